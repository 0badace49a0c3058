"""
Text and numbers as a report shows them.
"""

from __future__ import annotations

from markupsafe import Markup, escape


def escape_text(value: object) -> Markup:
    """Return markup as it is and anything else escaped for HTML.

    Two slashes in a row become character references: a report holds no address that a scan of
    the file could mistake for a request.
    """
    if isinstance(value, Markup):
        return value
    return Markup(str(escape(value)).replace("//", "&#47;&#47;"))


def with_minus_sign(number: str) -> str:
    """Replace the hyphen of a formatted number with a minus sign."""
    return number.replace("-", "\N{MINUS SIGN}")


def format_difference(ratio: float, digits: int = 2) -> str:
    """Format a ratio as its difference from 1: 1.02 is "+2.00%".

    A difference that rounds to zero has no sign.
    """
    signed = f"{ratio - 1:+.{digits}%}"
    rounds_to_zero = not any(digit in signed for digit in "123456789")
    return signed[1:] if rounds_to_zero else with_minus_sign(signed)


def format_range(low: float, high: float, digits: int = 2) -> str:
    """Format two ratios as the range of their differences from 1."""
    return f"{format_difference(low, digits)} to {format_difference(high, digits)}"
