"""
A server that is compared: its address and its format, and one request to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiohttp

from client.compare.formats import UNREADABLE, Answer, Format, printable

LONGEST_S = 60.0
"""Longest wait for an answer."""
SHOWN_CHARS = 160
"""Characters of a body that a message shows."""


@dataclass(frozen=True)
class Target:
    """One of the two servers."""

    role: str
    """`old` or `new`."""
    url: str
    """Scheme, host and port, without a slash at the end."""
    format: Format
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """The URL that requests are sent to."""
        return self.url + self.format.path

    def encode(self, text: str) -> bytes:
        """Return the request's body for a text."""
        return json.dumps(self.format.body(text)).encode()


class RequestFailed(Exception):
    """A request that was not answered with a classification; the message says why."""


def read_answer(target: Target, content: bytes) -> Answer:
    """Return the answer in a body; raises RequestFailed if it is no classification."""
    try:
        return target.format.read(json.loads(content))
    except (*UNREADABLE, RecursionError):
        raise RequestFailed(f"no classification: {shown(content)}") from None


async def post(
    session: aiohttp.ClientSession, address: str, body: bytes, headers: Mapping[str, str]
) -> bytes:
    """Send a request and return the answer's body; raises RequestFailed unless it is 200."""
    try:
        async with session.post(
            address,
            data=body,
            headers={"content-type": "application/json", **headers},
            # A redirected POST becomes a GET, and headers may hold a key.
            allow_redirects=False,
        ) as response:
            content = await response.read()
            if response.status != 200:
                raise RequestFailed(f"status {response.status}: {shown(content)}")
            return content
    except TimeoutError:
        raise RequestFailed("no answer in time") from None
    except aiohttp.ClientError as error:
        raise RequestFailed(f"{type(error).__name__}: {error}") from None


def shown(content: bytes) -> str:
    """Return the begin of a body, in one line that a terminal can show."""
    text = printable(" ".join(content.decode("utf-8", "replace").split()))
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
