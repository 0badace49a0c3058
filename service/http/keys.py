"""
API keys from a file, one key per line.

The file is reloaded when it changes, so keys are rotated without a restart.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

from command import Unavailable
from service.host.files import Stamp, read_regular
from service.host.watching import watch

log = logging.getLogger(__name__)

# A million keys of 64 characters.
MAX_FILE_BYTES = 64 * 1024 * 1024
SECRET = os.urandom(32)
# A # inside a key is part of the key.
COMMENT = re.compile(rb"(^|\s)#.*")


class Keys:
    """The keys of a file, one per line.

    `#` begins a comment at the start of a line or behind white space. Raises Unavailable if the
    file cannot be read or holds no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._logged_reason = ""
        try:
            content, self._stamp = read_regular(path, MAX_FILE_BYTES)
            self._digests = digests_of(content)
        except OSError as error:
            raise Unavailable(f"The key file {path} cannot be read ({error.strerror}).") from None
        if not self._digests:
            raise Unavailable(f"The key file {path} holds no key; write one key per line.")

    def __len__(self) -> int:
        return len(self._digests)

    def admit(self, headers: Mapping[bytes, bytes]) -> bool:
        """Return whether a request has a known key.

        The header is `Authorization: Bearer KEY` or `X-API-Key: KEY`.
        """
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = headers.get(b"x-api-key", b"")
        # A look-up takes as long for a million keys as for one. Its time may depend on the key's
        # digest, but the digests need a secret of this process, so no caller can choose a digest.
        return digest(key.strip()) in self._digests

    def watch(self) -> None:
        """Check the file for changes once a second, in its own thread."""
        watch("keys", self.reload_if_changed)

    def reload_if_changed(self) -> None:
        """Read the file if it has changed.

        If it cannot be read or holds no key, the previous keys stay valid.
        """
        try:
            if Stamp.of(self._path.stat()) == self._stamp:
                self._logged_reason = ""
                return
            content, stamp = read_regular(self._path, MAX_FILE_BYTES)
            digests = digests_of(content)
        except OSError as error:
            self._log_unusable(error.strerror or str(error))
            return
        if not digests:
            self._log_unusable("it holds no key")
            return
        self._digests, self._stamp, self._logged_reason = digests, stamp, ""
        log.info("keys reloaded", extra={"file": str(self._path), "keys": len(digests)})

    def _log_unusable(self, reason: str) -> None:
        """Log an error, once for each reason: a file that stays wrong would fill the log."""
        if reason != self._logged_reason:
            log.error(
                "the key file cannot be used; the previous keys stay valid",
                extra={"file": str(self._path), "why": reason, "keys": len(self._digests)},
            )
        self._logged_reason = reason


def digest(key: bytes) -> bytes:
    """Return a key's digest under a secret of this process."""
    return hashlib.blake2b(key, key=SECRET, digest_size=32).digest()


def digests_of(content: bytes) -> frozenset[bytes]:
    """Return the digest of each key in a file.

    Raises OSError if the file is in UTF-16, as editors on Windows may save it.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise OSError(errno.EILSEQ, "it is in UTF-16; save it in UTF-8")
    # A byte order mark is not part of a key. In joined files it also begins later lines.
    lines = (line.removeprefix(codecs.BOM_UTF8) for line in content.splitlines())
    return frozenset(digest(key) for line in lines if (key := COMMENT.sub(b"", line).strip()))
