"""
Reads files that others write and replace: regular files only, and never more of one than a limit.

A FIFO, a device or a file that grows without end would otherwise be waited for, or read until
memory is used up.
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
    """A file is there and is not what is asked for: no regular file, too large, or changing."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file is replaced or written to. The change time cannot be set back as the
    modification time can.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )

    def same_content(self, other: Stamp) -> bool:
        """Whether a file was not written to, nor replaced: a change time cannot be set, so another
        file cannot have it.

        Devices and inodes are left out, as some network file systems number them anew while nothing
        changes.
        """
        return (self.size, self.modified_ns, self.changed_ns) == (
            other.size,
            other.modified_ns,
            other.changed_ns,
        )


@contextlib.contextmanager
def open_regular(path: Path, limit: int) -> Iterator[tuple[BinaryIO, Stamp]]:
    """Open a regular file of at most `limit` bytes, or a link to one; OSError says what else
    it is.
    """
    try:
        # Looked at before it is opened, as opening a device may do something, and after, as it may
        # have been replaced.
        _check_regular(path, os.stat(path))
        # Opening a FIFO waits for its other end, unless it is told not to.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a NUL, or characters that no file name can have here
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
        # Not to the end: what grows while it is read may have none.
        content = file.read(stamp.size + 1)
        if len(content) != stamp.size:
            raise UnsuitableFile(errno.EAGAIN, "it changed while it was read", str(path))
        return content, stamp


def hash_regular(path: Path, limit: int) -> tuple[str, Stamp]:
    """Return the SHA-256 of a regular file of at most `limit` bytes in hexadecimal, and its stamp;
    UnsuitableFile if it changes meanwhile.
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
