"""One writer per output: a lock file that names its owner, and that explains itself when it is stale.

Where the file system has locks, the kernel's lock on the file decides, so a lock never outlives its process. Where it
has none (some network disks), or where its locks may not reach other machines, the owner's name in the file decides: a
process of this system can be looked up, one of another system cannot, and then only the user knows whether it is gone.

A writer asks again (`check`) whenever it is about to make something final. A lock that was taken all the same, because
somebody said so or because of a race on a disk without locks, stops it before two of them spoil one file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from dsv4tools.errors import ResourceError
from dsv4tools.files import pwrite_all, try_lock
from dsv4tools.outfile import explained, open_own

_MAX_BYTES = 4096
SETTLE_SECONDS = 0.2   # without kernel locks: how long a rival that saw the same stale lock may need to write its name


class OutputLock:
    """An exclusive lock beside an output. Use `acquire`, `check` now and then, and `release`.

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
        self._mine = b""

    def acquire(self, *, steal: bool = False) -> None:
        """Take the lock, from a dead owner too; with `steal` also from one that cannot be asked.

        Raises
        ------
        ResourceError
            Another process holds it; the message names it. Or the file cannot be made, or is no lock.
        """
        while self._fd < 0:
            fd = open_own(self.path)
            try:
                if self._take(fd, steal=steal):
                    self._fd = fd
            finally:
                if self._fd < 0:
                    os.close(fd)

    def _take(self, fd: int, *, steal: bool) -> bool:
        """Whether the lock is ours; False: the file was exchanged meanwhile, open it again."""
        has_kernel_lock = try_lock(fd)
        owner = self._read_owner(fd)
        if has_kernel_lock is False:
            raise ResourceError(self.path, f"is held by {_describe(owner)}: another run writes this output",
                                hint="wait for it, or end it")
        if owner and not steal:
            self._refuse_living(owner, has_kernel_lock=bool(has_kernel_lock))
        if not self._is_at_path(fd):
            return False
        self.inherited = _describe(owner) if owner else ""
        self._mine = json.dumps(_introduce_myself()).encode()
        with explained(self.path):
            try:
                os.ftruncate(fd, 0)
                pwrite_all(fd, memoryview(self._mine), 0)
            except OSError:
                with contextlib.suppress(OSError):
                    self.path.unlink()
                raise
        if not has_kernel_lock:
            time.sleep(SETTLE_SECONDS)
            self._check(fd)
        return True

    def _refuse_living(self, owner: dict[str, Any], *, has_kernel_lock: bool) -> None:
        """ResourceError unless `owner` is known to be gone."""
        if has_kernel_lock:
            # The kernel would have kept us out had it lived on this system, whatever the name of its container.
            # After a restart of the machine only its name is the same.
            gone = _is_here(owner) or owner.get("host") == socket.gethostname()
        else:
            gone = _is_dead(owner)
            if _is_here(owner, same_processes=True) and not gone:
                raise ResourceError(self.path, f"is held by {_describe(owner)}: another run writes this output",
                                    hint="wait for it, or end it")
        if not gone:
            raise ResourceError(self.path, f"was left by {_describe(owner)}, which cannot be asked from here",
                                hint="if you are sure that it is gone, --steal-lock")

    def check(self) -> None:
        """ResourceError if the lock that was acquired is not ours any more."""
        self._check(self._fd)

    def _check(self, fd: int) -> None:
        with explained(self.path):
            ours = self._is_ours(fd)
        if not ours:
            raise ResourceError(self.path, "was taken or removed by another run, this one stops",
                                hint="let only one run write an output")

    def _is_ours(self, fd: int) -> bool:
        return self._is_at_path(fd) and os.pread(fd, _MAX_BYTES, 0) == self._mine

    def _is_at_path(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self.path.lstat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock back; harmless if it is not held."""
        if self._fd < 0:
            return
        try:
            if self._is_ours(self._fd):
                self.path.unlink()   # while it is held: nobody can have taken this file
        except OSError:
            pass   # the next run finds that its owner is dead
        finally:
            os.close(self._fd)
            self._fd = -1

    def _read_owner(self, fd: int) -> dict[str, Any]:
        """Who wrote the lock; empty where nobody did, or a power cut took the name."""
        with explained(self.path):
            raw = os.pread(fd, _MAX_BYTES, 0)
        if not raw.strip(b"\0"):
            return {}
        try:
            owner = json.loads(raw)
        except (ValueError, RecursionError):
            owner = {} if raw.startswith((b'{"', b"\0")) else None   # torn, or somebody else's file
        if not isinstance(owner, dict):
            raise ResourceError(self.path, "is no lock of dsv4tools", hint="rename it")
        return owner


def _introduce_myself() -> dict[str, Any]:
    me = os.getpid()
    return {"pid": me, "host": socket.gethostname(), "boot": _boot(), "processes": _process_space(),
            "started": _process_start(me), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": secrets.token_hex(8)}


def _is_here(owner: dict[str, Any], *, same_processes: bool = False) -> bool:
    """Whether `owner` ran under this kernel, since its start; `same_processes`: and in this space of process ids."""
    boot = _boot()
    here = owner.get("boot") == boot if boot else owner.get("host") == socket.gethostname()
    return here and (not same_processes or owner.get("processes") == _process_space())


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether it is certain that the process `owner` does not exist any more."""
    pid = owner.get("pid")
    if not _is_here(owner, same_processes=True) or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    # The number may have been given to another process since.
    return owner.get("started") is not None and _process_start(pid) != owner.get("started")


def _boot() -> str | None:
    """What tells one run of one kernel from any other, whatever its containers are called (Linux)."""
    return _read_text("/proc/sys/kernel/random/boot_id")


def _process_space() -> str | None:
    """The space in which process ids count: a container has its own (Linux)."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115  - the target is no path
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """What tells two processes of the same number apart, where the system says it (Linux: ticks since boot)."""
    fields = (_read_text(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else None


def _read_text(path: str) -> str | None:
    try:
        return Path(path).read_text("utf-8", "replace").strip()
    except OSError:
        return None


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "a process that did not leave its name"
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
