"""Locks, so that several processes can share the units of an experiment."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def lock_unit(out: Path, name: str) -> Iterator[bool]:
    """Lock a unit, and yield whether this process has the lock; it is released with the process."""
    path = out / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def wait_for_lock(out: Path, name: str) -> Iterator[None]:
    """Hold a lock, after waiting until no other process holds it."""
    path = out / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
