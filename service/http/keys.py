"""
API keys: who may ask. A file holds them, one a line; it is read again when it changes, so keys are
rotated without a restart.
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
FILE_BYTES = 64 * 1024 * 1024
SECRET = os.urandom(32)
# A # within a key is part of it.
COMMENT = re.compile(rb"(^|\s)#.*")


class Keys:
    """The keys in a file: one a line; `#` at its beginning or behind white space begins a comment.
    Unavailable if it cannot be read or holds none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._complaint = ""
        try:
            content, self._stamp = read_regular(path, FILE_BYTES)
            self._digests = digests_of(content)
        except OSError as error:
            raise Unavailable(
                f"The file of keys {path} cannot be read ({error.strerror})."
            ) from None
        if not self._digests:
            raise Unavailable(f"The file of keys {path} holds none; write one a line.")

    def __len__(self) -> int:
        return len(self._digests)

    def admit(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request brings a known key, as `Authorization: Bearer KEY` or
        `X-API-Key: KEY`.
        """
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        # A look-up takes as long for a million keys as for one. Its time may depend on the guess's
        # digest, but nobody outside knows the secret of the digests, so nobody can choose guesses
        # by it.
        return digest(given.strip()) in self._digests

    def watch(self) -> None:
        """Look again at the file once a second, in a thread of its own."""
        watch("keys", self.look_again)

    def look_again(self) -> None:
        """Read the file if it has changed. What cannot be read or holds no key changes nothing: who
        was let in stays let in.
        """
        try:
            if Stamp.of(self._path.stat()) == self._stamp:
                self._complaint = ""
                return
            content, stamp = read_regular(self._path, FILE_BYTES)
            digests = digests_of(content)
        except OSError as error:
            self._complain(error.strerror or str(error))
            return
        if not digests:
            self._complain("it holds no key")
            return
        self._digests, self._stamp, self._complaint = digests, stamp, ""
        log.info("keys read again", extra={"file": str(self._path), "keys": len(digests)})

    def _complain(self, why: str) -> None:
        """Log at error, once for each reason: half of a rotation passes, and a file that stays
        wrong would fill the log.
        """
        if why != self._complaint:
            log.error(
                "the file of keys cannot be used; the last keys hold",
                extra={"file": str(self._path), "why": why, "keys": len(self._digests)},
            )
        self._complaint = why


def digest(key: bytes) -> bytes:
    """A key's digest under a secret of this process."""
    return hashlib.blake2b(key, key=SECRET, digest_size=32).digest()


def digests_of(content: bytes) -> frozenset[bytes]:
    """The digest of each key in a file; OSError if it is not in UTF-8, as editors on Windows may
    write it.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise OSError(errno.EILSEQ, "it is in UTF-16; save it in UTF-8")
    # A byte order mark is no part of a key. Where files were joined it begins other lines than the
    # first.
    lines = (line.removeprefix(codecs.BOM_UTF8) for line in content.splitlines())
    return frozenset(digest(key) for line in lines if (key := COMMENT.sub(b"", line).strip()))
