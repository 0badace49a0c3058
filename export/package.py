"""
Puts an artifact in its target folder atomically: a draft next to the target, renamed when complete.

The draft is locked while it is in use. The next export to the same target therefore recognises the
draft of an export that was killed, and removes it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atomic import replace_directory
from command import BadUsage, Unavailable, exit_on_termination_signals
from service.artifact import MANIFEST, ArtifactError, read_manifest

DISK_FULL_BYTES = 1 << 20
"""Free bytes below which a disk counts as full, so that any failure is reported as a full disk."""
SYSTEM_FILES = (".DS_Store", "lost+found")
"""Files that systems leave in folders; they are removed together with the artifact they lie in."""
OLD = "-old"
"""Suffix of the folder that the previous artifact has while it is replaced."""


def resolve_target(target: Path) -> Path:
    """Return the folder that the artifact replaces: `target`, or the folder it links to.

    Raises BadUsage unless that folder is missing, empty, or holds an artifact and nothing else.
    """
    folder = target.resolve() if target.is_symlink() else target
    if os.path.ismount(folder):
        raise BadUsage(
            f"{target} is a mount point, which cannot be replaced atomically; export to a folder"
            f" inside it, such as {target / 'model'}."
        )
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise BadUsage(f"{target} exists and is not a folder; remove it or choose another target.")
    files = {path.name for path in folder.iterdir()}
    if not files:
        return folder
    try:
        artifact_files = {*read_manifest(folder).files, MANIFEST}
    except ArtifactError:
        artifact_files = set()
    foreign = sorted(files - artifact_files - set(SYSTEM_FILES))
    if foreign:
        raise BadUsage(
            f"{target} holds {foreign[0]}, which belongs to no artifact and would be deleted;"
            " remove it or choose another target."
        )
    return folder


@contextmanager
def draft_artifact(target: Path) -> Iterator[Path]:
    """Yield an empty, locked folder next to `target`; it is removed at the end unless it was moved.

    Raises Unavailable with the disk's path if the block failed while that disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft: Path | None = None
    lock = -1
    try:
        with exit_on_termination_signals():
            _remove_abandoned_drafts(target)
            draft, lock = _create_locked_draft(target)
            yield draft
    except Exception:
        free = shutil.disk_usage(target.parent).free
        if free < DISK_FULL_BYTES:
            raise Unavailable(
                f"The disk of {target.parent} is full: {free:,} bytes are free. Make room there, or"
                " export to another disk."
            ) from None
        raise
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
            os.close(lock)


def _create_locked_draft(target: Path) -> tuple[Path, int]:
    """Create a folder next to `target`; return it with the descriptor that holds its lock."""
    while True:
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        lock = -1
        try:
            lock = os.open(draft, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino == draft.stat().st_ino:
                return draft, lock
        except (FileNotFoundError, BlockingIOError):
            pass  # Another export removed it as abandoned, in the moment before it was locked.
        if lock >= 0:
            os.close(lock)


def replace_artifact(draft: Path, target: Path) -> None:
    """Rename `draft` to `target`; the old artifact is removed last, and restored on failure."""
    if not target.exists():
        draft.chmod(0o755)
        draft.rename(target)
        return
    with _lock(target):
        replace_directory(draft, target, draft.with_name(f"{draft.name}{OLD}"))


def _remove_abandoned_drafts(target: Path) -> None:
    """Remove the drafts of killed exports to the same target; drafts that are in use are locked.

    If an export was killed while it replaced the target, the old artifact is restored.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}-[a-z0-9_]{{8}}({OLD})?")
    drafts = sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))
    for draft in drafts:
        try:
            with _lock(draft):
                if draft.name.endswith(OLD) and not target.exists():
                    print(
                        f"restoring {target} from {draft}: an export was killed while replacing it",
                        flush=True,
                    )
                    draft.rename(target)
                else:
                    print(f"removing {draft}, left behind by an export that was killed", flush=True)
                    shutil.rmtree(draft, ignore_errors=True)
        except OSError:
            continue  # It is in use, or not a folder.


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the exclusive lock of a folder; raises OSError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
