"""The operating system's file calls that this package relies on, each with its fallback.

Linux and macOS differ in preadv, posix_fallocate and O_CLOEXEC behaviour of old kernels; everything that must know
it is here, so that the rest of the package does not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_FICLONE = 0x40049409   # linux/fs.h: _IOW(0x94, 9, int)


def pread_into(fd: int, out: memoryview, position: int) -> int:
    """Read up to ``len(out)`` bytes at `position` into `out`; the number read, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], position)
    raw = os.pread(fd, len(out), position)
    out[: len(raw)] = raw
    return len(raw)


def pwrite_all(fd: int, data: memoryview, position: int) -> None:
    """Write all of `data` at `position`. A single write may be short without an error: loop until it is done."""
    done = 0
    while done < len(data):
        n = os.pwrite(fd, data[done:], position + done)
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
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, n_bytes)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        else:
            return True
    os.ftruncate(fd, n_bytes)
    return False


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


def lock_file(fd: int) -> bool:
    """Lock the open file `fd` until it is closed; False if another descriptor holds it.

    True also where system or file system has no locks: then nobody is kept out.
    """
    try:
        import fcntl  # noqa: PLC0415  - not on every platform
    except ImportError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


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
