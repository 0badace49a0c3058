"""
Reads of files that others write and replace: regular files only, up to a limit of bytes.

Otherwise a FIFO or a device could block the reader, and a file that grows without end could fill
the memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 256 * 1024


class UnsuitableFile(OSError):
    """Raised for a path that is no regular file, too large, or changing while it is read."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """The part of a file's status that changes when the file is replaced or written to.

    The change time cannot be set back; the modification time can.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Return the stamp in a file's status."""
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )

    def same_content(self, other: Stamp) -> bool:
        """Return whether a file was neither written to nor replaced.

        Another file cannot have the same change time, because it cannot be set. Device and inode
        are not compared: some network file systems renumber unchanged files.
        """
        return (self.size, self.modified_ns, self.changed_ns) == (
            other.size,
            other.modified_ns,
            other.changed_ns,
        )


@contextlib.contextmanager
def open_regular(path: Path, limit: int) -> Iterator[tuple[BinaryIO, Stamp]]:
    """Open a regular file of at most `limit` bytes, or a link to one.

    Yields the open file and its stamp. Raises UnsuitableFile for anything else, and OSError where
    the system refuses.
    """
    try:
        # Checked before it is opened, because opening a device may have effects, and again after,
        # because the file may have been replaced in between.
        _check_regular(path, os.stat(path))
        # Without O_NONBLOCK, opening a FIFO waits for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # The path has a NUL, or characters that no file name can have here.
        raise UnsuitableFile(errno.EINVAL, "no file can have that name", "the path") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check_regular(path, status)
        if status.st_size > limit:
            raise UnsuitableFile(
                errno.EFBIG, f"it has {status.st_size} bytes, the limit is {limit}", str(path)
            )
        yield file, Stamp.of(status)


def read_regular(path: Path, limit: int) -> tuple[bytes, Stamp]:
    """Return the bytes of a regular file of at most `limit` bytes, and its stamp."""
    with open_regular(path, limit) as (file, stamp):
        # Not up to the end of the file: one that grows while it is read may have none.
        content = file.read(stamp.size + 1)
        if len(content) != stamp.size:
            raise UnsuitableFile(errno.EAGAIN, "it changed while it was read", str(path))
        return content, stamp


def hash_regular(path: Path, limit: int) -> tuple[str, Stamp]:
    """Return the SHA-256 of a regular file of at most `limit` bytes in hexadecimal, and its stamp.

    Raises UnsuitableFile if the file changes while it is read.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with open_regular(path, limit) as (file, stamp):
        remaining = stamp.size
        while remaining and (size := file.readinto(buffer[:remaining])):  # type: ignore[attr-defined]
            digest.update(buffer[:size])
            remaining -= size
        if Stamp.of(os.fstat(file.fileno())) != stamp:
            raise UnsuitableFile(errno.EAGAIN, "it changed while it was read", str(path))
        return digest.hexdigest(), stamp


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise UnsuitableFile(errno.EINVAL, f"it is {kind}", str(path))
