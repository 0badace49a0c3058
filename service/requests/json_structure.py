"""
Checks that a JSON body can be parsed at little cost.

orjson holds the interpreter while it parses: 4 MiB of texts take 4 ms, 4 MiB of `[],[],…` 0.6 s.
"""

from __future__ import annotations

from service.errors import TooLarge

# The characters that separate values. A text needs at most five of them, as a pair does. The spare
# ones are for the rest of a request, and for a request with too many texts, which is refused by the
# number of its texts. To parse them takes 2 ms at most.
MARKS = b"[{,:"
MARKS_PER_TEXT = 8
SPARE_MARKS = 16_384
_OTHERS = bytes(set(range(256)) - set(MARKS))
# Smaller bodies cannot hold enough values to matter.
MIN_CHECKED_BYTES = 2_048
_SLICE_BYTES = 32_768


def check_structure(body: bytes, texts: int) -> None:
    """Raise TooLarge if a JSON document holds more values than a request of `texts` texts can have.

    The document is not parsed, and the contents of strings do not count. The check ends as soon as
    there are too many values.
    """
    # A document that begins with anything else is no object, and its parsing ends at once.
    if len(body) < MIN_CHECKED_BYTES or body[:64].lstrip()[:1] not in (b"{", b"[", b""):
        return
    max_marks = MARKS_PER_TEXT * texts + SPARE_MARKS
    marks = quotes = 0
    is_inside, half = False, b""
    for start in range(0, len(body), _SLICE_BYTES):
        data = half + body[start : start + _SLICE_BYTES]
        half = b""
        if b"\\" in data:
            # A pair of backslashes is one character of a string, and hides no quote.
            data = data.replace(b"\\\\", b"")
            if data.endswith(b"\\"):
                data, half = data[:-1], b"\\"
            data = data.replace(b'\\"', b"")
        pieces = data.split(b'"', 2 * max_marks + 4)
        quotes += len(pieces) - 1
        marks += len(b"".join(pieces[is_inside::2]).translate(None, _OTHERS))
        is_inside ^= len(pieces) % 2 == 0
        # Every string has a mark before it or after it.
        if max(marks, quotes // 2 - 1) > max_marks:
            raise TooLarge(
                f"The body holds more than {max_marks} values and fields; a request of {texts}"
                " texts, the limit, has fewer. Send several requests.",
                param="body",
            )
