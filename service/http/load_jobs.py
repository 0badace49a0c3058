"""
Loads models outside the event loop: one at a time, each in its own thread and with a timeout.

A thread that waits for a lost file system cannot be ended. It is abandoned, so that it blocks no
other load, and it has no effect if it ever returns.
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
MAX_ABANDONED = 4


class LoadTicket:
    """Decides once whether a load takes effect or has been abandoned, and never both."""

    def __init__(self) -> None:
        self._claimed = threading.Lock()

    def claim(self) -> bool:
        """Return whether this is the first call, from any thread; the first caller decides."""
        return self._claimed.acquire(blocking=False)


class LoadJobs:
    """The loads of one process. All methods are called on the event loop."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._started: dict[str, float] = {}
        self._abandoned = 0

    def check_free(self, name: str) -> None:
        """Raise LoadInProgress if a model of that name is being loaded."""
        if name in self._started:
            elapsed_s = time.monotonic() - self._started[name]
            raise LoadInProgress(
                f"A model of that name has been loading for {elapsed_s:.0f} s; wait for its"
                " answer.",
                param="model",
                retry_after_s=1,
            )

    async def run(self, name: str, work: Callable[[LoadTicket], Result]) -> Result:
        """Run `work` in its own thread when it is its turn, and return its value.

        Raises LoadInProgress if the same name is being loaded or others take the whole timeout,
        DeadlineExceeded if `work` exceeds the timeout, NotReady if too many loads were abandoned.
        """
        self.check_free(name)
        if self._abandoned >= MAX_ABANDONED:
            raise NotReady(
                f"{self._abandoned} loads have not returned, each in a thread that cannot be ended;"
                " restart this replica to load models."
            )
        self._started[name] = started = time.monotonic()
        try:
            await self._wait_for_turn()
            try:
                return await self._work(name, work, started)
            finally:
                self._turn.release()
        finally:
            del self._started[name]

    async def _wait_for_turn(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._turn.acquire()
        except TimeoutError:
            raise LoadInProgress(
                f"Other models have been loading for {self._timeout_s:g} s; retry later.",
                retry_after_s=1,
            ) from None

    async def _work(
        self, name: str, work: Callable[[LoadTicket], Result], started: float
    ) -> Result:
        ticket = LoadTicket()
        future = _in_thread(f"load {name}"[:40], lambda: work(ticket))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(future)
        except (TimeoutError, asyncio.CancelledError) as reason:
            if not ticket.claim():
                return await future  # it was just in time
            self._abandon(name, future)
            if isinstance(reason, asyncio.CancelledError):
                raise
            log.error(
                "a load is abandoned",
                extra={
                    "model": name,
                    "seconds": round(time.monotonic() - started, 1),
                    "abandoned": self._abandoned,
                },
            )
            raise DeadlineExceeded(
                f"The model was not loaded within {self._timeout_s:g} s; the load is abandoned, and"
                " all models are as they were. DRBERT_ADMIN_LOAD_TIMEOUT_S sets the limit."
            ) from None

    def _abandon(self, name: str, future: asyncio.Future[Any]) -> None:
        self._abandoned += 1

        def on_return(done: asyncio.Future[Any]) -> None:
            self._abandoned -= 1
            done.exception()  # retrieved, or asyncio logs that it never was
            log.info("an abandoned load returned", extra={"model": name})

        future.add_done_callback(on_return)


def _in_thread(thread_name: str, work: Callable[[], Result]) -> asyncio.Future[Result]:
    """Run `work` in a daemon thread, which does not delay the end of the process."""
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
