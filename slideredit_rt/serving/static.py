"""Static content of a server: the web page, its sample image, and the API reference (Swagger UI)."""

from __future__ import annotations

import io
import mimetypes
from collections.abc import Callable
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path

from fastapi import FastAPI, Response

from slideredit_rt.samples import Sample

_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    # With no-referrer, browsers also withhold Origin, which identifies the page's own requests.
    "Referrer-Policy": "same-origin",
}
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")


def serve_page(app: FastAPI, sample: Sample) -> None:
    """Add `GET /`, `/docs` with Swagger UI, and their files.

    Args:
        app: Application.
        sample: Image that the page edits first.
    """

    @cache
    def sample_image() -> bytes:
        file = io.BytesIO()
        sample.open().save(file, "PNG")
        return file.getvalue()

    def serve(path: str, content: bytes | Callable[[], bytes], media_type: str) -> None:
        async def get() -> Response:
            return Response(content if isinstance(content, bytes) else content(), media_type=media_type, headers=_PAGE_HEADERS)

        app.add_api_route(path, get, include_in_schema=False)

    swagger = package_files("fastapi_swagger.resources")
    files = [*package_files("slideredit_rt.serving").joinpath("page").iterdir(), *(swagger.joinpath(n) for n in _SWAGGER_UI)]
    for file in files:
        name, suffix = file.name, Path(file.name).suffix
        media_type = _MEDIA_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        path = name.removesuffix("index.html").removesuffix(".html")
        serve(f"/{path}", file.read_bytes(), media_type)
    serve("/sample.png", sample_image, "image/png")
