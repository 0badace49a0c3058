"""
The pages for a browser: one to classify texts at /, and the API description at /docs.

All files are bundled; the pages load nothing from another host.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

PAGE = Path(__file__).parent / "page"
# API keys are typed on these pages, so they run no foreign script. Swagger UI uses data: URLs for
# its icons.
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; frame-ancestors 'none';"
        " base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Files(StaticFiles):
    """Static files with HEADERS, because a page can also be opened by its path under /page."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        """Return Starlette's response with HEADERS."""
        response = super().file_response(*arguments, **options)
        response.headers.update(HEADERS)
        return response


def swagger_files() -> Path:
    """Return the folder of Swagger UI's files.

    The package that contains them is not imported, so none of its code runs.
    """
    spec = find_spec("fastapi_swagger")
    if spec is None:
        raise ModuleNotFoundError("No module named 'fastapi_swagger'", name="fastapi_swagger")
    [folder] = spec.submodule_search_locations or []
    return Path(folder) / "resources"


def add_pages(app: FastAPI) -> None:
    """Add the pages and their files."""
    app.mount("/page", Files(directory=PAGE), name="page")
    app.mount("/docs/files", Files(directory=swagger_files()), name="docs")

    @app.get(
        "/",
        response_class=HTMLResponse,
        responses={
            200: {
                "content": {
                    "application/json": {
                        "schema": {"type": "object", "additionalProperties": {"type": "string"}}
                    }
                }
            }
        },
    )
    async def root(request: Request) -> Response:
        """Return a page to classify texts to a browser, and the main paths to other clients."""
        if "text/html" not in request.headers.get("accept", ""):
            prefix = request.scope["state"].get("prefix", "")
            return JSONResponse(
                {
                    "service": "drbert-serve",
                    "classify": f"POST {prefix}/classify",
                    "docs": f"{prefix}/docs",
                    "info": f"{prefix}/info",
                }
            )
        return FileResponse(PAGE / "index.html", headers=HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(PAGE / "docs.html", headers=HEADERS)
