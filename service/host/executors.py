"""
Threads for the work that would hold up the event loop. Each kind of work has its own few threads
and its own bounded queue, so that work which is slow, or hangs, delays its own kind only.

asyncio's default executor has one unbounded queue for everything, and its threads must end before
the process can.
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
from service.host import cpus

Result = TypeVar("Result")
Steps = Generator[None, None, Result]
"""A job that may pause: each `yield` lets another job have the thread, and what it returns is the
job's result.
"""

# A thread without work ends after so long.
IDLE_S = 10.0
# Bodies that wait for the one thread that parses large ones, texts too long for the ordinary queue,
# and changes of models.
PARSE_JOBS = 128
LONG_JOBS = 64
LOAD_JOBS = 16


@dataclass(eq=False, slots=True)
class _Job(Generic[Result]):
    steps: Steps[Result]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Result] | None
    """None once it is settled: an error's traceback has this job, and the two would keep a body
    alive until garbage is collected.
    """
    abandoned: bool = False

    def step(self) -> bool:
        """Do the next step; False if there is none left, or if nobody waits for the result any
        more.
        """
        try:
            if self.abandoned:
                self.steps.close()
                return False
            next(self.steps)
        except StopIteration as end:
            self._settle(end.value, None)
            return False
        except BaseException as error:  # The thread outlives whatever a job does.
            self._settle(None, error)
            return False
        return True

    def _settle(self, value: Any, error: BaseException | None) -> None:
        future, self.future = self.future, None
        # A closed loop has nobody who waits.
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
    """At most `threads` daemon threads, and at most `max_jobs` jobs that run or wait; one more is
    Overloaded.

    A thread does one step of the oldest job, then puts the job behind the others: a short job
    passes a long one.
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
        """How many threads are within a step."""
        return self._running

    async def run(self, function: Callable[[], Result]) -> Result:
        """Return what `function` returns, from a thread."""
        return await self.run_steps(_one_step(function))

    async def run_steps(self, steps: Steps[Result]) -> Result:
        """Return what the generator returns; it is closed at its next `yield` if the caller is
        cancelled.
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
                self._forget(job)
            del future  # An error's traceback has this frame.

    def _forget(self, job: _Job[Any]) -> None:
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        job.steps.close()

    def _work(self) -> None:
        while (job := self._take()) is not None:
            unfinished = job.step()
            with self._changed:
                self._running -= 1
                if unfinished:
                    self._waiting.append(job)
            del job  # It holds texts.

    def _take(self) -> _Job[Any] | None:
        """The next job, which counts as running; None if there is none for so long that the thread
        ends.
        """
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
        # orjson holds the interpreter, so a second thread would only make both slower.
        self.parsing = Executor("parsing", 1, PARSE_JOBS)
        self.tokenizing = Executor("tokenizing", threads, max_queue_size)
        self.tokenizing_long = Executor("tokenizing long texts", max(1, threads - 1), LONG_JOBS)
        # An answer is computed by then, so it is never refused; the batcher's queue bounds how many
        # there are.
        self.writing = Executor("writing answers", 1, math.inf)
        self.metrics = Executor("metrics", 1, LOAD_JOBS)
        self.loading = Executor("loading models", 1, LOAD_JOBS)

    @property
    def running(self) -> list[str]:
        """What the threads are doing just now, by kind."""
        return [
            one.name for one in vars(self).values() if isinstance(one, Executor) and one.running
        ]
