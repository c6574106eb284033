"""One writer per output: a lock file that names its owner, and that explains itself when it is stale.

The file holds process id, host and start time. Where the file system has locks, the kernel's lock on it decides, so a
lock never outlives its process; where it has none (some network disks), the owner's process id does.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from dsv4tools.errors import ResourceError

if TYPE_CHECKING:
    from pathlib import Path

try:
    import fcntl
except ImportError:   # not on every platform: the owner's process id decides alone
    _flock = None
else:
    def _flock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


class OutputLock:
    """An exclusive lock beside an output. Use `acquire`, then `release`.

    Attributes
    ----------
    path:
        The lock file.
    inherited:
        Who left a stale lock that this one replaced, in words; empty where there was none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inherited = ""
        self._fd = -1

    def acquire(self, *, steal: bool = False) -> None:
        """Take the lock, over a dead owner's too; with `steal` whoever the owner is.

        Raises
        ------
        ResourceError
            Another conversion holds it; the message names it. Or the file cannot be made.
        """
        while self._fd < 0:
            fd = self._open()
            try:
                if self._take(fd, steal=steal):
                    self._fd = fd
            finally:
                if self._fd < 0:
                    os.close(fd)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as e:
            raise ResourceError(self.path, f"cannot be made: {e.strerror}") from None

    def _take(self, fd: int, *, steal: bool) -> bool:
        """Whether the lock is ours; False: the file was exchanged meanwhile, open it again."""
        kernel_says = _try_kernel_lock(fd)
        owner = _read_owner(fd)
        if kernel_says is False or (owner and kernel_says is None and not steal and not _is_dead(owner)):
            raise ResourceError(
                self.path, f"is held by {_describe(owner)}: another conversion writes this output",
                hint="wait for it; if you are sure that it is gone, --steal-lock",
            )
        if owner and not steal and owner.get("host") != socket.gethostname():
            # The kernel's locks of network disks may not reach other hosts: only its own host could tell that it died.
            raise ResourceError(
                self.path, f"was left by {_describe(owner)}, which cannot be asked from here",
                hint="if you are sure that it is gone, --steal-lock",
            )
        try:
            if os.fstat(fd).st_ino != os.stat(self.path).st_ino:  # noqa: PTH116  - beside fstat
                return False
        except FileNotFoundError:
            return False
        self.inherited = _describe(owner) if owner else ""
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": _process_start(os.getpid()),
                "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(mine).encode(), 0)
        return True

    def release(self) -> None:
        """Give the lock back; harmless if it is not held."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink()   # while it is held: nobody can have taken this file
            os.close(self._fd)
            self._fd = -1


def _try_kernel_lock(fd: int) -> bool | None:
    """True: locked; False: another process holds it; None: this file system has no locks."""
    if _flock is None:
        return None
    try:
        _flock(fd)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read_owner(fd: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(fd, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    # The number may have been given to another process since.
    return owner.get("started") is not None and _process_start(pid) != owner.get("started")


def _process_start(pid: int) -> str | None:
    """What tells two processes of the same number apart, where the system says it (Linux: ticks since boot)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:  # noqa: PTH123  - not a user's file
            return f.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "a process that did not leave its name"
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
