"""The engine's CPU time leaves out the threads that do other work."""

from __future__ import annotations

import threading
import time

from service.host import cpu_time

BURNT_NS = 20_000_000


def burn(excluded: bool) -> None:
    """Use the CPU for BURNT_NS in a thread."""

    def work() -> None:
        end = time.thread_time_ns() + BURNT_NS
        while time.thread_time_ns() < end:
            pass

    def work_excluded() -> None:
        with cpu_time.excluded_thread():
            work()

    thread = threading.Thread(target=work_excluded if excluded else work)
    thread.start()
    thread.join()


def measured(excluded: bool) -> tuple[int, int]:
    """Return the CPU time of a burn in the whole process, and as the engine's.

    The process is read first before the burn and last after it, so that what the reads themselves
    take never makes the difference smaller.
    """
    process, engine = time.process_time_ns(), cpu_time.engine_ns()
    burn(excluded)
    engine_used = cpu_time.engine_ns() - engine
    return time.process_time_ns() - process, engine_used


def test_a_thread_of_the_engine_counts() -> None:
    process, engine = measured(excluded=False)
    assert process >= BURNT_NS
    assert engine >= BURNT_NS


def test_an_excluded_thread_does_not_count_also_after_its_end() -> None:
    process, engine = measured(excluded=True)
    assert process - engine >= BURNT_NS


def test_what_a_thread_computed_before_its_block_counts_as_the_engines() -> None:
    counted = cpu_time.engine_ns()
    burn(excluded=False)
    with cpu_time.excluded_thread():
        assert cpu_time.engine_ns() - counted >= BURNT_NS
