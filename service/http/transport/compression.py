"""
Bodies that come compressed (RFC 9110, 8.4): gzip and deflate, within the same limit as others.
"""

from __future__ import annotations

import zlib

from service.errors import InvalidRequest, TooLarge, UnsupportedEncoding

# zlib's word for which container to expect: 32 is gzip's or zlib's, whichever the data begins with.
EITHER = 32 + zlib.MAX_WBITS
RAW = -zlib.MAX_WBITS
CODINGS = ("gzip", "x-gzip", "deflate")


def is_compressed(encoding: bytes) -> bool:
    """Whether a body of that Content-Encoding has to be decompressed; UnsupportedEncoding where
    nobody here can.
    """
    if not encoding:  # As nearly always, and this is asked for every request.
        return False
    coding = encoding.decode("latin-1").strip().lower()
    if coding not in ("", "identity", *CODINGS):
        raise UnsupportedEncoding(
            f"Content-Encoding {coding[:64]} is not read here; send the body as it is, or by gzip"
            " or deflate.",
            param="Content-Encoding",
        )
    return coding in CODINGS


def decompressed(body: bytes, encoding: bytes, limit: int) -> bytes:
    """The content of a body, of one member or several.

    UnsupportedEncoding for another coding or several of them, TooLarge as soon as the content
    passes `limit` bytes, InvalidRequest if it is none of that coding. What is called deflate is
    zlib's format, and by many senders its data alone: both are read.
    """
    if not is_compressed(encoding):
        return body
    coding = encoding.decode("latin-1").strip().lower()
    for container in (EITHER, RAW) if coding == "deflate" else (EITHER,):
        content = _read(body, container, limit)
        if content is not None:
            return content
    raise InvalidRequest(
        f"The body is not whole, or not compressed as Content-Encoding says ({coding})."
    )


def _read(body: bytes, container: int, limit: int) -> bytes | None:
    """What all members of a body hold (RFC 1952, 2.2); None if one is broken or not whole. TooLarge
    as `decompressed` says.
    """
    parts: list[bytes] = []
    size, rest = 0, body
    while rest or not parts:
        reader = zlib.decompressobj(container)
        try:
            parts.append(reader.decompress(rest, limit - size + 1))
        except zlib.error:
            return None
        size += len(parts[-1])
        if size > limit:
            raise TooLarge(
                f"The body has more than {limit} bytes once it is decompressed, the limit.",
                param="body",
            )
        if not reader.eof:
            return None
        rest = reader.unused_data
    return b"".join(parts)
