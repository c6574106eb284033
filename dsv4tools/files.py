"""The operating system's file calls that this package relies on, each with its fallback.

Linux and macOS differ in preadv, posix_fallocate and O_CLOEXEC behaviour of old kernels; everything that must know
it is here, so that the rest of the package does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_FICLONE = 0x40049409   # linux/fs.h: _IOW(0x94, 9, int)
_PASSING = (errno.EIO, errno.ESTALE)   # what network disks say when a server was away for a moment
_PAUSES = (0.1, 0.5)                   # seconds before each further attempt

Result = TypeVar("Result")


def insist(attempt: Callable[[], Result]) -> Result:
    """`attempt()`, made again after a moment where it fails with EIO or ESTALE; the last failure is raised.

    For what may be repeated: a positional read or write. Not for a sync: the system forgets what it could not write,
    so the second one would succeed without the data.
    """
    for seconds in _PAUSES:
        try:
            return attempt()
        except OSError as e:
            if e.errno not in _PASSING:
                raise
        time.sleep(seconds)
    return attempt()


def pread_into(fd: int, out: memoryview, position: int) -> int:
    """Read up to ``len(out)`` bytes at `position` into `out`; the number read, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], position)
    raw = os.pread(fd, len(out), position)
    out[: len(raw)] = raw
    return len(raw)


def pread_all(fd: int, out: memoryview, position: int) -> int:
    """Fill `out` from `position`; the number of bytes read, fewer than asked for only at the end of the file."""
    done = 0
    while done < len(out) and (n := pread_into(fd, out[done:], position + done)):
        done += n
    return done


def pwrite_all(fd: int, data: memoryview, position: int) -> None:
    """Write all of `data` at `position`, with `insist`.

    A single write may be short without an error: loop until it is done.
    """
    done = 0
    while done < len(data):
        n = insist(functools.partial(os.pwrite, fd, data[done:], position + done))
        if n == 0:
            raise OSError(errno.EIO, "write returned 0 bytes")
        done += n


def preallocate(fd: int, n_bytes: int) -> bool:
    """Reserve `n_bytes` on disk for `fd`, so that a full disk shows now and not after hours.

    Returns False where the file system cannot reserve (the file then only has its size set). OSError when the space
    is not there.
    """
    if n_bytes == 0:
        return True
    try:
        _reserve(fd, n_bytes)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    else:
        return True
    os.ftruncate(fd, n_bytes)
    return False


def _reserve(fd: int, n_bytes: int) -> None:
    if sys.platform != "linux":
        if not hasattr(os, "posix_fallocate"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        os.posix_fallocate(fd, 0, n_bytes)
        return
    # Not os.posix_fallocate: where a file system cannot reserve (NFS 3, FAT), glibc writes a byte into every block.
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(fd, 0, 0, n_bytes):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def clone_file(source: int, target: int) -> bool:
    """Let the empty file `target` share the blocks of `source` until one of them is changed, where that can be.

    Returns False, with `target` still empty, where system or file system cannot: copy then. Only Linux's way is known
    here (btrfs, xfs and some others have it).
    """
    if sys.platform != "linux":
        return False
    import fcntl  # noqa: PLC0415  - not on every platform

    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def try_lock(fd: int) -> bool | None:
    """Lock the open file `fd` until it is closed: True, or False if another descriptor holds it.

    None where system or file system has no locks: then nobody is kept out.
    """
    try:
        import fcntl  # noqa: PLC0415  - not on every platform
    except ImportError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def lock_file(fd: int) -> bool:
    """`try_lock`, but True also where there are no locks."""
    return try_lock(fd) is not False


def sync_data(fd: int) -> None:
    """Wait until the data of `fd` is on disk (its times need not be)."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write on the file system of `directory`."""
    return shutil.disk_usage(directory).free


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power loss, where the system can open directories."""
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def usable_cpus() -> int:
    """Cores that this process may use; a container or a job scheduler often allows fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)
