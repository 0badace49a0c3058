"""
What a request says beyond its body's JSON: the headers that steer it, its bytes, and that its
client has disconnected.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from starlette.types import Receive

from service.errors import BodyTooSlow, InvalidInput, Overloaded, TooLarge
from service.http.transport.exchange import Exchange

Result = TypeVar("Result")


class ClientDisconnected(Exception):
    """The client closed the connection before its request was answered."""


class ByteBudget:
    """A limit on the bytes that the bodies of all requests hold together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used = 0

    def acquire(self, size: int) -> None:
        """Take `size` bytes of the budget; raises Overloaded if they are not free."""
        if self._used + size > self._max_bytes:
            raise Overloaded(
                f"The bodies of all requests hold {self._used} bytes, the limit is"
                f" {self._max_bytes}; retry later.",
                retry_after_s=1,
            )
        self._used += size

    def release(self, size: int) -> None:
        """Return `size` bytes to the budget."""
        self._used -= size


def read_timeout(header: bytes | None, limit_s: float) -> float:
    """Return the seconds that a request may take, by its X-Request-Timeout-Ms.

    At most `limit_s`, which also holds without the header. Raises InvalidInput.
    """
    if header is None:
        return limit_s
    try:
        milliseconds = float(header)
    except ValueError:
        milliseconds = 0.0
    if not milliseconds > 0:
        raise InvalidInput(
            "X-Request-Timeout-Ms must be a number of milliseconds above 0.",
            param="X-Request-Timeout-Ms",
        )
    return min(limit_s, milliseconds / 1000)


def read_injected_delay(header: bytes | None, allowed: bool) -> float:
    """Return the share, 0 to 1, by which X-Busy-Wait makes a batch longer.

    It is for the positive control of a latency proof. Raises InvalidInput, also if it is not
    allowed.
    """
    if header is None:
        return 0.0
    if not allowed:
        raise InvalidInput(
            "X-Busy-Wait is for latency proofs and off here; DRBERT_BUSY_WAIT=loopback turns"
            " it on.",
            param="X-Busy-Wait",
        )
    try:
        share = float(header)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InvalidInput(
            "X-Busy-Wait must be a number from 0 to 1, the share by which its batch takes longer.",
            param="X-Busy-Wait",
        )
    return share


async def read_body(
    content_length: bytes, receive: Receive, limit: int, timeout_s: float, budget: ByteBudget
) -> bytes:
    """Return a request's body; its bytes are taken from `budget`, and the caller returns them.

    `content_length` is the header's value, or empty. Raises TooLarge as soon as the body is known
    to exceed `limit` bytes, BodyTooSlow if it is not complete in time, ClientDisconnected.
    """
    if content_length.isdigit() and len(content_length) < 20 and int(content_length) > limit:
        raise TooLarge(
            f"The body has {int(content_length)} bytes, the limit is {limit}.", param="body"
        )
    exchange = exchange_of(receive)
    body = None if exchange is None else exchange.whole_body()
    if body is not None:  # Nearly always: it arrived with its head.
        if len(body) > limit:
            raise TooLarge(f"The body has more than {limit} bytes, the limit.", param="body")
        budget.acquire(len(body))
        return body
    # Not joined at the end, which would take the memory of a large body twice.
    content = io.BytesIO()
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in body_chunks(receive):
                if size + len(chunk) > limit:
                    raise TooLarge(
                        f"The body has more than {limit} bytes, the limit.", param="body"
                    )
                budget.acquire(len(chunk))
                size += len(chunk)
                content.write(chunk)
    except BaseException as error:
        budget.release(size)
        if not isinstance(error, TimeoutError):
            raise
        raise BodyTooSlow(
            f"The body was not complete after {timeout_s:g} s; {size} bytes of it were read.",
            param="body",
        ) from None
    return content.getvalue()


async def body_chunks(receive: Receive) -> AsyncIterator[bytes]:
    """Yield a body as it arrives; raises ClientDisconnected."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def cancel_on_disconnect(receive: Receive, work: Awaitable[Result]) -> Result:
    """Return what `work` returns, or raise what it raises.

    If the client disconnects first, `work` is cancelled and ClientDisconnected is raised.
    """
    task = asyncio.current_task()
    assert task is not None, "a request is answered in a task"
    disconnected = False

    def on_disconnect(*_: object) -> None:
        nonlocal disconnected
        disconnected = True
        task.cancel()

    exchange, watcher = exchange_of(receive), None
    if exchange is not None:
        exchange.on_disconnect = on_disconnect
        if exchange.disconnected:
            on_disconnect()
    else:
        # Another server's. After the body, the only message is that the client has disconnected.
        watcher = asyncio.ensure_future(receive())
        watcher.add_done_callback(on_disconnect)
    try:
        value = await work
        if disconnected:
            # Work that never waits meets its cancellation here, and not in a later step.
            await asyncio.sleep(0)
        return value
    except asyncio.CancelledError:
        if not disconnected:
            raise
        task.uncancel()
        raise ClientDisconnected from None
    finally:
        if exchange is not None:
            exchange.on_disconnect = None
        if watcher is not None:
            watcher.remove_done_callback(on_disconnect)
            watcher.cancel()


def exchange_of(receive: Receive) -> Exchange | None:
    """Return the exchange to which `receive` belongs; None if the server is not ours."""
    owner = getattr(receive, "__self__", None)
    return owner if isinstance(owner, Exchange) else None
