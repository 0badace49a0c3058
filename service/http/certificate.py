"""
The TLS certificate: a renewed one is loaded without a restart.

Open connections keep the certificate that they began with.
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

MAX_FILE_BYTES = 1024 * 1024
EXPIRES_SOON = timedelta(days=14)
WARN_EVERY_S = 86_400.0
PEM = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END")
# DER tags of the fields of a certificate up to its validity (RFC 5280, 4.1).
SEQUENCE, VERSION, UTC_TIME, GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


@dataclass(frozen=True)
class _Pair:
    """The content of a certificate chain's file and of its key's file."""

    chain: bytes
    key: bytes
    validity: tuple[datetime, datetime] | None
    """Time in which all certificates of the chain are valid; None if it cannot be read."""

    def load_into(self, context: ssl.SSLContext) -> None:
        """Use this pair for the context's new connections; raises OSError if it cannot be used."""
        # From memory: the content that was checked is loaded, and the event loop waits for no disk.
        # The password is empty, because OpenSSL would ask the terminal for one.
        with _in_memory(self.chain) as chain, _in_memory(self.key) as key:
            context.load_cert_chain(chain, key, password="")


class Certificate:
    """A certificate chain and its key, both in PEM files.

    Raises Unavailable if they cannot be used for TLS.
    """

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain = chain
        self._key = key
        self._logged_reason = ""
        self._last_warning = ("", 0.0)
        try:
            self._stamps, self._pair = self._read()
        except OSError as error:  # The base class of ssl.SSLError.
            raise Unavailable(
                f"{chain} and {key} cannot be used for TLS ({error.strerror or error})."
            ) from None
        self.warn(datetime.now(UTC))

    def watch(self, contexts: Sequence[ssl.SSLContext], loop: asyncio.AbstractEventLoop) -> None:
        """Renew the contexts' certificate whenever the files change, until the process ends.

        A thread reads the files. The contexts change on the event loop, which makes connections
        from them.
        """

        def check() -> None:
            pair = self.reload_if_changed()
            if pair is not None:
                with contextlib.suppress(RuntimeError):  # The loop was closed meanwhile.
                    loop.call_soon_threadsafe(self._load_into, pair, contexts)

        watch("certificate", check)

    def reload_if_changed(self) -> _Pair | None:
        """Return the new pair if the files have changed and can be used, else None.

        Also warns of a certificate that expires.
        """
        renewed = None
        try:
            if [Stamp.of(path.stat()) for path in (self._chain, self._key)] != self._stamps:
                self._stamps, self._pair = self._read()
                renewed = self._pair
            self._logged_reason = ""
        except OSError as error:
            # Most likely one of the two files is replaced, and the other one will be soon.
            reason = error.strerror or str(error)
            if reason != self._logged_reason:
                log.warning(
                    "the new certificate cannot be used; the previous one stays in use",
                    extra={"file": str(self._chain), "why": reason},
                )
            self._logged_reason = reason
        self.warn(datetime.now(UTC))
        return renewed

    def warn(self, now: datetime) -> None:
        """Warn of a certificate that has expired, is not valid yet or will expire soon.

        The warning is logged at once and once a day.
        """
        begins, ends = self._pair.validity or (None, None)
        warning = _expiry_warning(self._pair.validity, now)
        key, time_s = f"{warning} {ends}", time.monotonic()
        last_key, last_s = self._last_warning
        if warning and (key != last_key or time_s - last_s >= WARN_EVERY_S):
            log.warning(
                warning,
                extra={
                    "file": str(self._chain),
                    "valid_from": begins and begins.isoformat(),
                    "valid_until": ends and ends.isoformat(),
                },
            )
            self._last_warning = key, time_s

    def _load_into(self, pair: _Pair, contexts: Sequence[ssl.SSLContext]) -> None:
        for context in contexts:
            pair.load_into(context)
        log.info("certificate reloaded", extra={"file": str(self._chain)})

    def _read(self) -> tuple[list[Stamp], _Pair]:
        """Return both files' stamps and content; raises OSError if they cannot be used for TLS."""
        chain, chain_stamp = read_regular(self._chain, MAX_FILE_BYTES)
        key, key_stamp = read_regular(self._key, MAX_FILE_BYTES)
        pair = _Pair(chain, key, validity_of(chain))
        # Tried on another context first: a chain and a key that do not belong together would leave
        # half of them in a context that is in use.
        pair.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        return [chain_stamp, key_stamp], pair


def _expiry_warning(validity: tuple[datetime, datetime] | None, now: datetime) -> str:
    """Return the warning for a certificate, or an empty string if it needs none."""
    if validity is None:
        return "the certificate's dates cannot be read"
    begins, ends = validity
    if now > ends:
        return "the certificate has expired"
    if now < begins:
        return "the certificate is not valid yet"
    if ends - now < EXPIRES_SOON:
        return "the certificate expires soon"
    return ""


def validity_of(chain: bytes) -> tuple[datetime, datetime] | None:
    """Return the first and the last time at which every certificate of a PEM file is valid.

    Return None if they cannot be read. The ssl module shows the dates only of certificates that it
    has verified, and it does not verify a server's own.
    """
    try:
        periods = [
            _validity(ssl.PEM_cert_to_DER_cert(_pem(match[1]))) for match in PEM.finditer(chain)
        ]
    except (ValueError, IndexError):
        return None
    if not periods:
        return None
    return max(begins for begins, _ in periods), min(ends for _, ends in periods)


def _pem(base64: bytes) -> str:
    return f"{ssl.PEM_HEADER}\n{base64.decode('ascii').strip()}\n{ssl.PEM_FOOTER}"


def _validity(der: bytes) -> tuple[datetime, datetime]:
    """Return the validity of a certificate in DER.

    It is in Certificate → tbsCertificate, behind the optional version, serialNumber, signature and
    issuer.
    """
    _, offset, _ = _element(der, 0)
    _, offset, _ = _element(der, offset)
    tag, _, _ = _element(der, offset)
    for _ in range(4 if tag == VERSION else 3):
        _, _, offset = _element(der, offset)
    tag, not_before, _ = _element(der, offset)
    if tag != SEQUENCE:
        raise ValueError("no validity")
    _, _, not_after = _element(der, not_before)
    return _time(der, not_before), _time(der, not_after)


def _element(der: bytes, offset: int) -> tuple[int, int, int]:
    """Return the tag of the element at an offset, and where its content begins and ends."""
    tag, length, begin = der[offset], der[offset + 1], offset + 2
    if length >= 0x80:
        begin += length - 0x80
        length = int.from_bytes(der[offset + 2 : begin])
    return tag, begin, begin + length


def _time(der: bytes, offset: int) -> datetime:
    tag, begin, end = _element(der, offset)
    text = der[begin:end].decode("ascii")
    if tag == UTC_TIME:  # Its year has two digits and is between 1950 and 2049.
        text = ("20" if int(text[:2]) < 50 else "19") + text
    elif tag != GENERALIZED_TIME:
        raise ValueError("no time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[Path]:
    """Yield the path of a file in memory, for a function that only accepts paths."""
    descriptor = os.memfd_create("drbert")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
