"""
Threads for work that would block the event loop. Each kind of work has a few threads and a bounded
queue of its own, so work that is slow or hangs delays only its own kind.

asyncio's default executor has one unbounded queue for everything, and the process cannot end before
its threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from service.errors import Overloaded
from service.host import cpu_time, cpus

Result = TypeVar("Result")
Steps = Generator[None, None, Result]
"""A job that may pause. Each `yield` lets another job have the thread; the generator returns the
job's result.
"""

IDLE_S = 10.0
"""Seconds without work after which a thread ends."""
PARSE_JOBS = 128
"""Large bodies that run or wait in the thread that parses them."""
LONG_JOBS = 64
"""Texts above the ordinary length that run or wait in the threads that tokenize them."""
LOAD_JOBS = 16
"""Changes of models, and scrapes of metrics, that run or wait in their threads."""


@dataclass(eq=False, slots=True)
class _Job(Generic[Result]):
    steps: Steps[Result]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Result] | None
    """The caller's future; None once it is settled. An error's traceback refers to this job, and
    the cycle would keep a body alive until garbage is collected.
    """
    abandoned: bool = False
    """Whether the caller no longer waits for the result."""

    def step(self) -> bool:
        """Run the next step; return False if it was the last, or if the job is abandoned."""
        try:
            if self.abandoned:
                self.steps.close()
                return False
            next(self.steps)
        except StopIteration as end:
            self._settle(end.value, None)
            return False
        except BaseException as error:  # The thread must outlive every failure of a job.
            self._settle(None, error)
            return False
        return True

    def _settle(self, value: Any, error: BaseException | None) -> None:
        future, self.future = self.future, None
        # Nobody waits on a closed loop.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(_answer, future, value, error)


def _answer(future: asyncio.Future[Any] | None, value: Any, error: BaseException | None) -> None:
    if future is None or future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


class Executor:
    """Up to `threads` daemon threads for up to `max_jobs` jobs that run or wait.

    One job more is refused as Overloaded. A thread runs one step of the oldest job and then puts
    the job behind the others, so short jobs overtake long ones.
    """

    def __init__(self, name: str, threads: int, max_jobs: float) -> None:
        self.name = name
        self._max_threads = threads
        self._max_jobs = max_jobs
        self._changed = threading.Condition()
        self._waiting: deque[_Job[Any]] = deque()
        self._threads = 0
        self._running = 0

    @property
    def running(self) -> int:
        """Return the number of threads that run a step at this moment."""
        return self._running

    async def run(self, function: Callable[[], Result]) -> Result:
        """Run `function` in a thread and return its result."""
        return await self.run_steps(_one_step(function))

    async def run_steps(self, steps: Steps[Result]) -> Result:
        """Run a generator in a thread and return its result.

        It is closed at its next `yield` if the caller is cancelled.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        job = _Job(steps, loop, future)
        with self._changed:
            if self._running + len(self._waiting) >= self._max_jobs:
                raise Overloaded(
                    f"{self._max_jobs} requests are in the queue for {self.name}, the limit; retry"
                    " later.",
                    retry_after_s=1,
                )
            self._waiting.append(job)
            if self._running + len(self._waiting) > self._threads < self._max_threads:
                self._threads += 1
                threading.Thread(target=self._work, name=self.name, daemon=True).start()
            self._changed.notify()
        try:
            return await future
        finally:
            job.abandoned = True
            if future.cancelled():
                self._discard(job)
            del future  # An error's traceback refers to this frame.

    def _discard(self, job: _Job[Any]) -> None:
        """Remove a job that still waits and close it."""
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        job.steps.close()

    def _work(self) -> None:
        with cpu_time.excluded_thread():
            while (job := self._take()) is not None:
                unfinished = job.step()
                with self._changed:
                    self._running -= 1
                    if unfinished:
                        self._waiting.append(job)
                del job  # It holds texts, which should not live while this thread waits.

    def _take(self) -> _Job[Any] | None:
        """Return the next job, which then counts as running; None after IDLE_S without one."""
        with self._changed:
            if not self._waiting and not self._changed.wait_for(lambda: self._waiting, IDLE_S):
                self._threads -= 1
                return None
            self._running += 1
            return self._waiting.popleft()


def _one_step(function: Callable[[], Result]) -> Steps[Result]:
    return function()
    yield


class Executors:
    """The executors of one server, by kind of work."""

    def __init__(self, max_queue_size: int) -> None:
        threads = cpus.usable()
        # orjson holds the GIL, so a second thread would only slow both down.
        self.parsing = Executor("parsing", 1, PARSE_JOBS)
        self.tokenizing = Executor("tokenizing", threads, max_queue_size)
        self.tokenizing_long = Executor("tokenizing long texts", max(1, threads - 1), LONG_JOBS)
        # Never refused, because the answer is computed already. The batcher's queue limits their
        # number.
        self.writing = Executor("writing answers", 1, math.inf)
        self.metrics = Executor("metrics", 1, LOAD_JOBS)
        self.loading = Executor("loading models", 1, LOAD_JOBS)

    @property
    def running(self) -> list[str]:
        """Return the kinds of work that run at this moment."""
        executors = [value for value in vars(self).values() if isinstance(value, Executor)]
        return [executor.name for executor in executors if executor.running]
