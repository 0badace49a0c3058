"""
Loads models beside the event loop: one at a time, each in a thread of its own and within a time, so
that one that hangs blocks no other.

A thread that waits for a file system that has gone cannot be ended. It is given up, and does
nothing more if it ever comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from service.errors import DeadlineExceeded, LoadInProgress, NotReady

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Each may hold a model's memory.
MOST_GIVEN_UP = 4


class Ticket:
    """Decides once what becomes of a load: its model answers, or its caller has given up on it.
    Never both.
    """

    def __init__(self) -> None:
        self._taken = threading.Lock()

    def take(self) -> bool:
        """Whether this is the first call, from whatever thread; who makes it decides."""
        return self._taken.acquire(blocking=False)


class Loads:
    """The loads of one process. All methods are called on the event loop."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._since: dict[str, float] = {}
        self._given_up = 0

    def check_free(self, name: str) -> None:
        """Raise LoadInProgress if a model of that name is being loaded."""
        if name in self._since:
            since_s = time.monotonic() - self._since[name]
            raise LoadInProgress(
                f"A model of that name has been loading for {since_s:.0f} s; wait for its answer.",
                param="model",
                retry_after_s=1,
            )

    async def run(self, name: str, work: Callable[[Ticket], Result]) -> Result:
        """Return what `work` returns in a thread of its own, when it is its turn.

        LoadInProgress if the same name is being loaded, or if others take all the time;
        DeadlineExceeded if `work` does.
        """
        self.check_free(name)
        if self._given_up >= MOST_GIVEN_UP:
            raise NotReady(
                f"{self._given_up} loads have not come back, each in a thread that cannot be ended;"
                " restart this replica to load models."
            )
        self._since[name] = began = time.monotonic()
        try:
            await self._wait_for_turn()
            try:
                return await self._work(name, work, began)
            finally:
                self._turn.release()
        finally:
            del self._since[name]

    async def _wait_for_turn(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._turn.acquire()
        except TimeoutError:
            raise LoadInProgress(
                f"Other models have been loading for {self._timeout_s:g} s; retry later.",
                retry_after_s=1,
            ) from None

    async def _work(self, name: str, work: Callable[[Ticket], Result], began: float) -> Result:
        ticket = Ticket()
        future = _in_thread(f"load {name}"[:40], lambda: work(ticket))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(future)
        except (TimeoutError, asyncio.CancelledError) as ended:
            if not ticket.take():
                return await future  # it was just in time
            self._give_up(name, future)
            if isinstance(ended, asyncio.CancelledError):
                raise
            log.error(
                "a load is given up",
                extra={
                    "model": name,
                    "seconds": round(time.monotonic() - began, 1),
                    "given_up": self._given_up,
                },
            )
            raise DeadlineExceeded(
                f"The model was not loaded within {self._timeout_s:g} s and is given up; all models"
                " are as they were. DRBERT_ADMIN_LOAD_TIMEOUT_S sets the limit."
            ) from None

    def _give_up(self, name: str, future: asyncio.Future[Any]) -> None:
        self._given_up += 1

        def came_back(done: asyncio.Future[Any]) -> None:
            self._given_up -= 1
            done.exception()  # looked at, so that nobody misses it
            log.info("a load that was given up came back", extra={"model": name})

        future.add_done_callback(came_back)


def _in_thread(thread_name: str, work: Callable[[], Result]) -> asyncio.Future[Result]:
    """What `work` returns or raises, in a thread that holds no process up."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=thread_name, daemon=True).start()
    return future
