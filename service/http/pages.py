"""
What is looked at in a browser: the page to type texts into, and the API to try. All of it comes
along; no other host is asked.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

PAGE = Path(__file__).parent / "page"
# Keys are typed on this origin. Swagger UI draws its icons from data: URLs.
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
    """Static files with HEADERS: a page is also reached by its own path under /page."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(HEADERS)
        return response


def swagger_files() -> Path:
    """The folder of Swagger UI's files. The package that brings them is found and not imported:
    none of its code runs.
    """
    spec = find_spec("fastapi_swagger")
    assert spec is not None, "pyproject.toml requires it"
    [folder] = spec.submodule_search_locations or []
    return Path(folder) / "resources"


def add_pages(app: FastAPI) -> None:
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
        """A page to type texts into, for a browser; where to go on, for everybody else."""
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse(
                {
                    "service": "drbert-serve",
                    "classify": "POST /classify",
                    "docs": "/docs",
                    "info": "/info",
                }
            )
        return FileResponse(PAGE / "index.html", headers=HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(PAGE / "docs.html", headers=HEADERS)
