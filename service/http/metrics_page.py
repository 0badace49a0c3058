"""
The page at /metrics, written at most once a second in a thread of its own.

With 61 models it has 1.5 MB, and every client that reaches the port may request it.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from service.host.executors import Executor
from service.http.transport.pacing import Pacer
from service.telemetry.metrics import Metrics

MAX_AGE_S = 1.0
# zlib's window bits for a gzip header and trailer.
GZIP_WBITS = 31


@dataclass(frozen=True)
class Page:
    """The page as text in Prometheus' format, and compressed by gzip."""

    text: bytes
    compressed: bytes
    written: float = field(default_factory=time.monotonic)


class MetricsPage:
    """Writes the page when it is requested, and sends one page to all who wait for it."""

    def __init__(self, metrics: Metrics, executor: Executor) -> None:
        self._metrics = metrics
        self._executor = executor
        self._writing: asyncio.Task[Page] | None = None
        self._pacer = Pacer()

    async def respond(self, request: Request) -> Response:
        """Return a page that is at most MAX_AGE_S old, compressed if the client accepts gzip."""
        await self._pacer.wait()
        if self._writing is None or self._is_stale(self._writing):
            self._writing = asyncio.create_task(self._executor.run(self._write))
        # Shielded: others wait for the same page when this caller disconnects.
        page = await asyncio.shield(self._writing)
        headers = {"vary": "accept-encoding"}
        if not accepts_gzip(request.headers.get("accept-encoding", "")):
            return Response(page.text, headers=headers, media_type=CONTENT_TYPE_LATEST)
        return Response(
            page.compressed,
            headers=headers | {"content-encoding": "gzip"},
            media_type=CONTENT_TYPE_LATEST,
        )

    @staticmethod
    def _is_stale(writing: asyncio.Task[Page]) -> bool:
        if not writing.done():
            return False
        return (
            writing.cancelled()
            or writing.exception() is not None
            or time.monotonic() - writing.result().written > MAX_AGE_S
        )

    def _write(self) -> Page:
        text = self._metrics.page()
        compressor = zlib.compressobj(1, wbits=GZIP_WBITS)
        return Page(text, compressor.compress(text) + compressor.flush())


def accepts_gzip(accept_encoding: str) -> bool:
    """Return whether an Accept-Encoding header names gzip with a weight above 0."""
    for coding in accept_encoding.lower().split(","):
        name, _, parameters = coding.partition(";")
        if name.strip() == "gzip":
            return parameters.replace(" ", "").rstrip("0") not in ("q=", "q=0.")
    return False
