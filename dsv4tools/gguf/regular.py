"""Opening and reading a regular file by position: no mmap (a truncated file would kill the process), no hang."""

from __future__ import annotations

import os
import stat
from functools import partial
from pathlib import Path

from dsv4tools.errors import InputError, ResourceError
from dsv4tools.files import insist, pread_into

_MAX_READ = 1 << 30  # Linux moves at most 2 GiB - 4 KiB per call, macOS 2 GiB - 1


def open_regular(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Open a regular file, or a link to one, for reading: its descriptor and its size in bytes.

    Raises
    ------
    InputError
        There is no such file, or it is a directory, pipe, socket or device (which is not opened).
    ResourceError
        The system refuses.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe put there after the look must not block the open
    try:
        _refuse_irregular(path, Path(path).stat())
        fd = os.open(path, flags)
        try:
            status = os.fstat(fd)
            _refuse_irregular(path, status)
        except BaseException:
            os.close(fd)
            raise
    except FileNotFoundError:
        raise InputError(path, "no such file") from None
    except ValueError as error:  # a zero byte in the path
        raise InputError(repr(path), str(error)) from None
    except OSError as error:
        raise ResourceError(path, f"cannot be opened: {error.strerror or error}") from None
    return fd, status.st_size


def _refuse_irregular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    mode = status.st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "no regular file"
        raise InputError(path, f"is {kind}, expected a file")


def read_into(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` (bytes) from `offset` of the file, with `insist`.

    ResourceError if the system fails or the file ends before.
    """
    done = 0
    while done < len(view):
        part = view[done : done + _MAX_READ]
        try:
            n = insist(partial(pread_into, fd, part, offset + done))
        except OSError as error:
            raise ResourceError(path, f"reading at byte {offset + done} failed: {error.strerror or error}") from None
        if n == 0:
            raise ResourceError(
                path, f"ends at byte {offset + done}, expected {offset + len(view)}; it shrank while it was read"
            )
        done += n


def read_bytes(fd: int, offset: int, n_bytes: int, path: Path) -> bytearray:
    """`n_bytes` from `offset` of the file; ResourceError as `read_into`."""
    out = bytearray(n_bytes)
    read_into(fd, memoryview(out), offset, path)
    return out
