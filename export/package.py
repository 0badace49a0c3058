"""
Where an artifact is made: in a folder beside its target, which is renamed in when the artifact is
whole.

The folder is locked while it is used, so that the next export can tell what a killed one left
behind, and removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from atomic import replace_directory
from command import BadUsage, Unavailable
from service.artifact import MANIFEST, ArtifactError, read_manifest

FULL_BYTES = 1 << 20
"""A disk with less room than this is full: whatever failed, failed by that."""
LITTER = (".DS_Store", "lost+found")
"""What systems leave in folders; it goes with the artifact that it lies beside."""
OLD = "-old"
ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What ends a command without a word, so that nothing is tidied up."""


def place_of(target: Path) -> Path:
    """Where the artifact goes: the folder that `target` is or links to. BadUsage unless it is free,
    empty, or an artifact and nothing else.
    """
    place = target.resolve() if target.is_symlink() else target
    if os.path.ismount(place):
        raise BadUsage(
            f"{target} is a mount point, which cannot be replaced at once; export to a folder in"
            f" it, as {target / 'model'}."
        )
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return place
    try:
        known = {*read_manifest(place).files, MANIFEST}
    except ArtifactError:
        known = set()
    if not place.is_dir() or any(
        path.name not in known and path.name not in LITTER for path in place.iterdir()
    ):
        raise BadUsage(
            f"{target} exists and is not an artifact and nothing else; remove it or choose another"
            " place."
        )
    return place


@contextmanager
def workplace(place: Path) -> Iterator[Path]:
    """A folder to make an artifact in, beside its place; it is gone afterwards, whatever happens,
    unless it was renamed.

    Unavailable, with the disk's name, if what failed did so for want of room.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    folder: Path | None = None
    lock = -1
    try:
        with _signals_that_tidy_up():
            _remove_leftovers(place)
            folder, lock = _locked_folder(place)
            yield folder
    except Exception:
        free = shutil.disk_usage(place.parent).free
        if free < FULL_BYTES:
            raise Unavailable(
                f"The disk of {place.parent} is full: {free:,} bytes are free. Make room there, or"
                " export to another disk."
            ) from None
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked_folder(place: Path) -> tuple[Path, int]:
    """A new folder beside `place`, and the lock on it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        lock = -1
        try:
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino == folder.stat().st_ino:
                return folder, lock
        except (FileNotFoundError, BlockingIOError):
            pass  # Another export took it for a leftover in the moment before it was locked.
        if lock >= 0:
            os.close(lock)


def put_in_place(folder: Path, place: Path) -> None:
    """Renames the new artifact in; the old one goes only when the new one is there, and comes back
    if it cannot be.
    """
    if not place.exists():
        folder.chmod(0o755)
        folder.rename(place)
        return
    with _lock(place):
        replace_directory(folder, place, folder.with_name(f"{folder.name}{OLD}"))


def _remove_leftovers(place: Path) -> None:
    """Removes what exports to the same place left that were killed; what another one works in is
    locked.

    An old artifact that one was killed while replacing goes back to its place.
    """
    of_ours = re.compile(rf"\.{re.escape(place.name)}-[a-z0-9_]{{8}}({OLD})?")
    for left in sorted(path for path in place.parent.iterdir() if of_ours.fullmatch(path.name)):
        try:
            with _lock(left):
                if left.name.endswith(OLD) and not place.exists():
                    print(
                        f"puts {left} back to {place}: an export was killed while replacing it",
                        flush=True,
                    )
                    left.rename(place)
                else:
                    print(
                        f"removes {left}, which an export that was killed left behind", flush=True
                    )
                    shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue  # In use, or no folder.


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps a folder from whoever else asks for its lock; OSError if somebody has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _signals_that_tidy_up() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process as an exception does, by the code that a shell gives for
    them.
    """

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {}
    try:
        for number in ENDING:
            # nohup starts a process that ignores SIGHUP, so that it outlives its terminal.
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, end)
    except ValueError:
        pass  # Only the main thread may; another one is not the process's end.
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
