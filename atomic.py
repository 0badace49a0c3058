"""
Writes files and folders so that a reader sees the old one or the new one, and never half of one.

A draft is written next to its target, on the same file system, and renamed over it. A process that
is killed leaves the target as it was.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a draft's path; it replaces `path` if the block ends well, and is removed if not."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file in UTF-8; a full disk leaves the file as it was."""
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def atomic_directory(directory: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yield an empty folder; it replaces `directory` if the block ends well, else it is removed.

    With `keep_existing`, a folder that another process wrote meanwhile stays and the draft is
    removed. Use it for content that is the same from every writer.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not keep_existing:
        recover_directory(directory)
    draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield draft
        if keep_existing:
            _rename_unless_exists(draft, directory)
        else:
            replace_directory(draft, directory, _set_aside(directory))
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _rename_unless_exists(draft: Path, directory: Path) -> None:
    draft.chmod(0o755)
    try:
        draft.rename(directory)
    except OSError:
        # A folder with content is in the way: another process wrote it meanwhile.
        if not directory.exists():
            raise


def replace_directory(draft: Path, directory: Path, set_aside: Path) -> None:
    """Rename `draft` to `directory`; a folder that is there is renamed to `set_aside` and removed.

    If `draft` cannot be renamed, the folder that was there comes back.
    """
    # mkdtemp makes a private folder; a result is as readable as any other file.
    draft.chmod(0o755)
    if not directory.exists():
        draft.rename(directory)
        return
    shutil.rmtree(set_aside, ignore_errors=True)
    directory.rename(set_aside)
    try:
        draft.rename(directory)
    except BaseException:
        if not directory.exists():
            set_aside.rename(directory)
        raise
    shutil.rmtree(set_aside, ignore_errors=True)


def recover_directory(directory: Path) -> None:
    """Undo a replacement during which the process was killed, if there was one."""
    if not directory.exists() and _set_aside(directory).exists():
        _set_aside(directory).rename(directory)


def _set_aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}-old")
