"""
Compressed request bodies (RFC 9110, 8.4): gzip and deflate, within the limit of other bodies.
"""

from __future__ import annotations

import zlib

from service.errors import InvalidRequest, TooLarge, UnsupportedEncoding

# zlib's codes for the container to expect. 32 detects gzip or zlib by the first bytes.
DETECT_CONTAINER = 32 + zlib.MAX_WBITS
NO_CONTAINER = -zlib.MAX_WBITS
CODINGS = ("gzip", "x-gzip", "deflate")


def is_compressed(encoding: bytes) -> bool:
    """Return whether a body of this Content-Encoding has to be decompressed.

    Raises UnsupportedEncoding for another coding than gzip and deflate.
    """
    if not encoding:  # Nearly always, and every request is checked.
        return False
    coding = encoding.decode("latin-1").strip().lower()
    if coding not in ("", "identity", *CODINGS):
        raise UnsupportedEncoding(
            f"Content-Encoding {coding[:64]} is not supported; send the body uncompressed, or"
            " compressed with gzip or deflate.",
            param="Content-Encoding",
        )
    return coding in CODINGS


def decompressed(body: bytes, encoding: bytes, limit: int) -> bytes:
    """Return a body's content; a body of several gzip members is decompressed whole.

    Raises UnsupportedEncoding for another coding or several of them, TooLarge as soon as the
    content exceeds `limit` bytes, and InvalidRequest if the body is not of that coding.

    By the standard, deflate means zlib's format. Many senders omit zlib's frame, so both are
    accepted.
    """
    if not is_compressed(encoding):
        return body
    coding = encoding.decode("latin-1").strip().lower()
    content = _decompress(body, DETECT_CONTAINER, limit)
    if content is None and coding == "deflate":
        content = _decompress(body, NO_CONTAINER, limit)
    if content is None:
        raise InvalidRequest(
            f"The body is incomplete, or not compressed with {coding}, its Content-Encoding."
        )
    return content


def _decompress(body: bytes, container: int, limit: int) -> bytes | None:
    """Return the content of all members (RFC 1952, 2.2); None if one is broken or incomplete.

    Raises TooLarge as soon as the content exceeds `limit` bytes.
    """
    parts: list[bytes] = []
    size, remaining = 0, body
    while remaining or not parts:
        reader = zlib.decompressobj(container)
        try:
            parts.append(reader.decompress(remaining, limit - size + 1))
        except zlib.error:
            return None
        size += len(parts[-1])
        if size > limit:
            raise TooLarge(
                f"The decompressed body has more than {limit} bytes, the limit.",
                param="body",
            )
        if not reader.eof:
            return None
        remaining = reader.unused_data
    return b"".join(parts)
