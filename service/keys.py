"""
API keys: who may ask. A file holds them, one a line; it is read again when it changes, so keys are rotated without a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path

from command import Unavailable

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
# A # within a key is part of it.
COMMENT = re.compile(rb"(^|\s)#.*")


class Keys:
    """The keys in a file: one a line; `#` at its beginning or behind white space begins a comment. Unavailable if it cannot be read or holds none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked = time.monotonic()
        try:
            self._stamp = self._stamped()
            self._digests = self._read()
        except OSError as error:
            raise Unavailable(f"The file of keys {path} cannot be read ({error.strerror}).") from None
        if not self._digests:
            raise Unavailable(f"The file of keys {path} holds none; write one a line.")

    def admit(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request brings a known key, as `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
        self._look_again()
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        digest = hashlib.sha256(given.strip()).digest()
        # Every key is compared, each in constant time: how long it takes says nothing about how near a guess was.
        return sum([hmac.compare_digest(digest, own) for own in self._digests]) > 0

    def _look_again(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        try:
            stamp = self._stamped()
            if stamp != self._stamp:
                self._digests, self._stamp = self._read(), stamp
                log.info("keys read again", extra={"file": str(self._path), "keys": len(self._digests)})
        except OSError as error:
            # Half of a rotation, most likely. Whoever was let in stays let in.
            log.warning("the file of keys cannot be read; the last ones hold", extra={"file": str(self._path), "why": error.strerror})

    def _stamped(self) -> tuple[int, int, int]:
        told = self._path.stat()
        return told.st_ino, told.st_size, told.st_mtime_ns

    def _read(self) -> tuple[bytes, ...]:
        keys = (COMMENT.sub(b"", line).strip() for line in self._path.read_bytes().splitlines())
        return tuple(hashlib.sha256(key).digest() for key in keys if key)
