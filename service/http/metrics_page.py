"""
The page at /metrics: written at most once a second, in a thread of its own, and sent to all who ask
meanwhile.

With 61 models it has 1.5 MB, and whoever reaches the port may ask for it.
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
from service.http.transport.pacing import Turns
from service.telemetry.metrics import Metrics

FRESH_S = 1.0
# zlib's number for gzip's header and trailer.
GZIP = 31


@dataclass(frozen=True)
class Page:
    """The page as it was written once, and the same compressed."""

    text: bytes
    compressed: bytes
    written: float = field(default_factory=time.monotonic)


class MetricsPage:
    def __init__(self, metrics: Metrics, executor: Executor) -> None:
        self._metrics = metrics
        self._executor = executor
        self._writing: asyncio.Task[Page] | None = None
        self._turns = Turns()

    async def respond(self, request: Request) -> Response:
        """Answer a scraper with a page that is at most FRESH_S old, compressed if it takes gzip."""
        await self._turns.wait()
        if self._writing is None or self._is_over(self._writing):
            self._writing = asyncio.create_task(self._executor.run(self._write))
        # Shielded: others wait for the same page when this caller leaves.
        page = await asyncio.shield(self._writing)
        headers = {"vary": "accept-encoding"}
        if not takes_gzip(request.headers.get("accept-encoding", "")):
            return Response(page.text, headers=headers, media_type=CONTENT_TYPE_LATEST)
        return Response(
            page.compressed,
            headers=headers | {"content-encoding": "gzip"},
            media_type=CONTENT_TYPE_LATEST,
        )

    @staticmethod
    def _is_over(writing: asyncio.Task[Page]) -> bool:
        if not writing.done():
            return False
        return (
            writing.cancelled()
            or writing.exception() is not None
            or time.monotonic() - writing.result().written > FRESH_S
        )

    def _write(self) -> Page:
        text = self._metrics.page()
        compressor = zlib.compressobj(1, wbits=GZIP)
        return Page(text, compressor.compress(text) + compressor.flush())


def takes_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding header names gzip, and not with the weight 0."""
    for coding in accepted.lower().split(","):
        name, _, parameters = coding.partition(";")
        if name.strip() == "gzip":
            return parameters.replace(" ", "").rstrip("0") not in ("q=", "q=0.")
    return False
