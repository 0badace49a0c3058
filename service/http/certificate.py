"""
The certificate by which requests come over TLS: a renewed one is taken up without a restart, as
whoever renews them expects.

Connections that are open keep the one they began with.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from command import Unavailable
from service.host.files import Stamp, read_regular
from service.host.watching import watch

log = logging.getLogger(__name__)

FILE_BYTES = 1024 * 1024
EXPIRES_SOON = timedelta(days=14)
WARN_EVERY_S = 86_400.0
PEM = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END")
# DER's tags of what stands in a certificate before and in its validity (RFC 5280, 4.1).
SEQUENCE, VERSION, UTC_TIME, GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


@dataclass(frozen=True)
class _Pair:
    """A chain and its key as they were read, and the time in which all certificates of the chain
    are valid, if it is known.
    """

    chain: bytes
    key: bytes
    valid: tuple[datetime, datetime] | None

    def load_into(self, context: ssl.SSLContext) -> None:
        """Show this pair to the context's new connections; OSError if it cannot be used."""
        # From memory: what was checked is what is loaded, and the event loop waits for no disk. An
        # empty password, as OpenSSL asks the terminal for one otherwise.
        with _in_memory(self.chain) as chain, _in_memory(self.key) as key:
            context.load_cert_chain(chain, key, password="")


class Certificate:
    """A certificate's chain and its key, files in PEM form. Unavailable if they cannot be used for
    TLS.
    """

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain = chain
        self._key = key
        self._complaint = ""
        self._warned = ("", 0.0)
        try:
            self._stamps, self._pair = self._read()
        except OSError as error:  # ssl.SSLError is one
            raise Unavailable(
                f"{chain} and {key} cannot be used for TLS ({error.strerror or error})."
            ) from None
        self.warn(datetime.now(UTC))

    def watch(self, contexts: Sequence[ssl.SSLContext], loop: asyncio.AbstractEventLoop) -> None:
        """Renew what the contexts show to new connections, whenever the files change, until the
        process ends.

        The files are read in a thread of its own. The contexts change on the event loop, which
        makes connections from them.
        """

        def look() -> None:
            pair = self.look_again()
            if pair is not None:
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                    loop.call_soon_threadsafe(self._show, pair, contexts)

        watch("certificate", look)

    def look_again(self) -> _Pair | None:
        """Return the renewed pair if the files have changed and it can be used, and warn of one
        that expires.
        """
        renewed = None
        try:
            if [Stamp.of(path.stat()) for path in (self._chain, self._key)] != self._stamps:
                self._stamps, self._pair = self._read()
                renewed = self._pair
            self._complaint = ""
        except OSError as error:
            # Half of a renewal, most likely; the other half changes a file again.
            why = error.strerror or str(error)
            if why != self._complaint:
                log.warning(
                    "the new certificate cannot be used; the last one holds",
                    extra={"file": str(self._chain), "why": why},
                )
            self._complaint = why
        self.warn(datetime.now(UTC))
        return renewed

    def warn(self, now: datetime) -> None:
        """Warn of a certificate that has expired, is not valid yet or will expire soon: at once,
        and again each day.
        """
        if self._pair.valid is None:
            state, begins, ends = "the certificate's dates cannot be read", None, None
        else:
            begins, ends = self._pair.valid
            state = (
                "the certificate has expired"
                if now > ends
                else (
                    "the certificate is not valid yet"
                    if now < begins
                    else "the certificate expires soon"
                    if ends - now < EXPIRES_SOON
                    else ""
                )
            )
        key, at = f"{state} {ends}", time.monotonic()
        if state and (key != self._warned[0] or at - self._warned[1] >= WARN_EVERY_S):
            log.warning(
                state,
                extra={
                    "file": str(self._chain),
                    "valid_from": begins and begins.isoformat(),
                    "valid_until": ends and ends.isoformat(),
                },
            )
            self._warned = key, at

    def _show(self, pair: _Pair, contexts: Sequence[ssl.SSLContext]) -> None:
        for context in contexts:
            pair.load_into(context)
        log.info("certificate read again", extra={"file": str(self._chain)})

    def _read(self) -> tuple[list[Stamp], _Pair]:
        (chain, chain_stamp), (key, key_stamp) = (
            read_regular(self._chain, FILE_BYTES),
            read_regular(self._key, FILE_BYTES),
        )
        pair = _Pair(chain, key, validity_of(chain))
        # On a context of its own first: one of ours would be left with half of a pair that does not
        # belong together.
        pair.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        return [chain_stamp, key_stamp], pair


def validity_of(chain: bytes) -> tuple[datetime, datetime] | None:
    """Return from when to when every certificate of a PEM file is valid; None if that cannot be
    read.

    ssl tells the dates of certificates only where it has verified them, which it does not do with a
    server's own.
    """
    try:
        times = [
            _validity(ssl.PEM_cert_to_DER_cert(_pem(found[1]))) for found in PEM.finditer(chain)
        ]
    except (ValueError, IndexError):
        return None
    return (max(begins for begins, _ in times), min(ends for _, ends in times)) if times else None


def _pem(base64: bytes) -> str:
    return f"{ssl.PEM_HEADER}\n{base64.decode('ascii').strip()}\n{ssl.PEM_FOOTER}"


def _validity(der: bytes) -> tuple[datetime, datetime]:
    """Certificate → tbsCertificate → [version], serialNumber, signature, issuer, validity."""
    _, place, _ = _element(der, 0)
    _, place, _ = _element(der, place)
    tag, _, _ = _element(der, place)
    for _ in range(4 if tag == VERSION else 3):
        _, _, place = _element(der, place)
    tag, inner, _ = _element(der, place)
    if tag != SEQUENCE:
        raise ValueError("no validity")
    _, _, between = _element(der, inner)
    return _time(der, inner), _time(der, between)


def _element(der: bytes, place: int) -> tuple[int, int, int]:
    """The tag of the element there, where its content begins, and where it ends."""
    tag, length, begin = der[place], der[place + 1], place + 2
    if length >= 0x80:
        begin += length - 0x80
        length = int.from_bytes(der[place + 2 : begin])
    return tag, begin, begin + length


def _time(der: bytes, place: int) -> datetime:
    tag, begin, end = _element(der, place)
    text = der[begin:end].decode("ascii")
    if tag == UTC_TIME:  # two digits of the year, from 1950 to 2049
        text = ("20" if int(text[:2]) < 50 else "19") + text
    elif tag != GENERALIZED_TIME:
        raise ValueError("no time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[Path]:
    """A file that holds `content` and lies on no disk, for a function that only takes a path."""
    descriptor = os.memfd_create("drbert")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
