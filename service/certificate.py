"""
The certificate by which requests come over TLS: a renewed one is taken up without a restart, as whoever renews them expects.

Connections that are open keep the one they began with.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Sequence
from pathlib import Path

from command import Unavailable

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


class Certificate:
    """A certificate's chain and its key, files in PEM form. Unavailable if they cannot be used for TLS."""

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain = chain
        self._key = key
        try:
            self._stamp = self._stamped()
            self._try()
        except OSError as error:    # ssl.SSLError is one
            raise Unavailable(f"{chain} and {key} cannot be used for TLS ({error.strerror or error}).") from None

    async def keep(self, contexts: Sequence[ssl.SSLContext]) -> None:
        """Renews what the contexts show to new connections, whenever the files change; for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._look_again(contexts)

    def _look_again(self, contexts: Sequence[ssl.SSLContext]) -> None:
        try:
            stamp = self._stamped()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            # On a context of its own first: one of ours would be left with half of a pair that does not belong together.
            self._try()
            for context in contexts:
                context.load_cert_chain(self._chain, self._key)
            log.info("certificate read again", extra={"file": str(self._chain)})
        except OSError as error:
            # Half of a renewal, most likely; the other half changes a file again.
            log.warning("the new certificate cannot be used; the last one holds", extra={"file": str(self._chain), "why": error.strerror or str(error)})

    def _try(self) -> None:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._chain, self._key)

    def _stamped(self) -> list[tuple[int, int, int]]:
        told = [path.stat() for path in (self._chain, self._key)]
        return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in told]
