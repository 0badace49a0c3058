"""
What is looked at in a browser: the page to type texts into, and the API to try. All of it comes along; no other host is asked.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

PAGE = Path(__file__).parent / "page"
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "cache-control": "no-cache",
}


def add_pages(app: FastAPI) -> None:
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.mount("/docs/files", StaticFiles(directory=str(resources.files("fastapi_swagger") / "resources")), name="docs")

    @app.get("/", response_class=HTMLResponse, responses={200: {"content": {"application/json": {}}}})
    async def root(request: Request) -> Response:
        """A page to type texts into, for a browser; where to go on, for everybody else."""
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse({"service": "drbert-serve", "classify": "POST /classify", "docs": "/docs", "info": "/info"})
        return FileResponse(PAGE / "index.html", headers=HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json", title="DrBERT Serve", swagger_js_url="/docs/files/swagger-ui-bundle.js",
            swagger_css_url="/docs/files/swagger-ui.css", swagger_favicon_url="/docs/files/favicon-32x32.png",
        )
