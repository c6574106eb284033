"""An output file under construction: `.partial`, its journal and its lock; finished units survive what happens."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xxhash

from dsv4tools.files import pread_into, preallocate, pwrite_all, sync_data, sync_directory
from dsv4tools.journal import FinishedUnit, JournalState, JournalWriter, check_same_plan, read_journal
from dsv4tools.lock import OutputLock
from dsv4tools.outfile import explained, open_own

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

BATCH_SECONDS = 2.0
BATCH_BYTES = 256 << 20
RECHECKED_BYTES = 512 << 20   # of the units finished last: a power cut may have damaged them all the same


def checksum(data: NDArray[np.uint8]) -> str:
    """xxh3 of 128 bits, hex: against accidents, at memory speed."""
    return xxhash.xxh3_128_hexdigest(data.data)


def working_paths(path: Path, working_name: str | None = None) -> tuple[Path, Path, Path, Path]:
    """The output, and what stands beside it on the way: partial file, journal and lock."""
    name = working_name or path.name
    return path, path.with_name(f"{name}.partial"), path.with_name(f"{name}.journal"), path.with_name(f"{name}.lock")


class OutputFile:
    """`path` while it is being written. A context manager; leaving it keeps finished units for the next run.

    Parameters
    ----------
    path:
        The final name. ``path.partial``, ``.journal`` and ``.lock`` stand beside it on the way.
    n_bytes:
        Size of the finished file.
    identity:
        What the bytes depend on, field by field; an existing partial file must agree.
    shards:
        Shard name -> [mtime_ns, inode] now; a shard in which these changed is to be asked again by `recheck`.
    recheck:
        ``recheck(unit, changed shards) -> bool``: whether a finished unit's source still has the checksum that it was
        made with. Called only for units of the changed shards' tensors, as the caller knows them.
    restart:
        Throw an existing partial file away.
    working_name:
        What the files on the way are called, if not by `path`'s own name.
    steal_lock:
        Take the lock whoever holds it.
    """

    def __init__(
        self, path: Path, n_bytes: int, identity: Mapping[str, Any], shards: Mapping[str, Any], *,
        recheck: Callable[[FinishedUnit, set[str]], bool], restart: bool = False, steal_lock: bool = False,
        working_name: str | None = None,
    ) -> None:
        self.path, self.n_bytes, self.identity, self.shards = path, n_bytes, identity, shards
        _, self.partial, self.journal, lock = working_paths(path, working_name)
        self.notes: list[str] = []
        self.finished: dict[int, FinishedUnit] = {}
        self._recheck, self._restart, self._steal_lock = recheck, restart, steal_lock
        self._lock = OutputLock(lock)
        self._fd = -1
        self._writer: JournalWriter | None = None
        self._batch: list[FinishedUnit] = []
        self._batch_bytes, self._batch_start = 0, time.monotonic()

    def __enter__(self) -> Self:
        self._lock.acquire(steal=self._steal_lock)
        try:
            if self._lock.inherited:
                self.notes.append(f"the last run ({self._lock.inherited}) ended without cleaning up")
            state = JournalState() if self._restart else read_journal(self.journal)
            if state.identity is not None and self.partial.exists():
                check_same_plan(self.partial, self.identity, state.identity)
            with explained(self.partial, hint=self.hint):
                self._fd = open_own(self.partial)
                self.finished = self._adopt(state)
                if not self.finished:
                    os.ftruncate(self._fd, 0)
                preallocate(self._fd, self.n_bytes)
            self._writer = JournalWriter(self.journal, self.identity, self.shards, self.finished.values())
        except BaseException:
            if self._fd >= 0:   # else the refusal came first, and what is there belongs to another plan
                self._discard_if_empty()
            self._close()
            raise
        return self

    def _adopt(self, state: JournalState) -> dict[int, FinishedUnit]:
        """The finished units of an earlier run that can be trusted."""
        if state.identity is None or not state.units:
            return {}
        if os.fstat(self._fd).st_size != self.n_bytes:
            self.notes.append(f"{self.partial.name} does not have its size: beginning anew")
            return {}
        units = dict(state.units)
        if state.n_damaged:
            self.notes.append(f"{state.n_damaged} damaged journal lines: their units are done again")
        changed = {name for name, seen in self.shards.items() if state.shards.get(name) != seen}
        if changed:
            self.notes.append(f"modification time or inode changed: {', '.join(sorted(changed))}; checking their units")
            units = {p: u for p, u in units.items() if self._recheck(u, changed)}
        n_bytes = itertools.accumulate((u.n_bytes for u in reversed(units.values())), initial=0)
        recent = [u for u, before in zip(reversed(units.values()), n_bytes, strict=False) if before < RECHECKED_BYTES]
        if not all(map(self._is_intact, recent)):
            self.notes.append("the last finished units are damaged: checking all")
            units = {p: u for p, u in units.items() if self._is_intact(u)}
        return units

    def _is_intact(self, unit: FinishedUnit) -> bool:
        data = np.zeros(unit.n_bytes, np.uint8)
        done = 0
        while done < unit.n_bytes:
            n = pread_into(self._fd, data[done:].data, unit.position + done)
            if n == 0:
                return False
            done += n
        return checksum(data) == unit.output

    @property
    def hint(self) -> str:
        """What to tell the user when the work stops."""
        return "run the same command again to continue"

    def write(self, position: int, data: NDArray[np.uint8], source: str, n_zeroed: int = 0) -> FinishedUnit:
        """Write a unit; safe to call from many threads. It counts as finished once it was given to `record`."""
        with explained(self.partial, hint=self.hint):
            pwrite_all(self._fd, data.data, position)
        return FinishedUnit(position, data.nbytes, checksum(data), source, n_zeroed)

    def record(self, unit: FinishedUnit) -> None:
        """Note a written unit; about every 2 s or 256 MB the data is synced and the journal follows."""
        self._batch.append(unit)
        self._batch_bytes += unit.n_bytes
        if self._batch_bytes >= BATCH_BYTES or time.monotonic() - self._batch_start >= BATCH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sync what was recorded, then write its journal lines: data always before its line."""
        if self._batch and self._writer is not None:
            with explained(self.partial, hint=self.hint):
                sync_data(self._fd)
            self._writer.append(self._batch)
            self.finished.update((u.position, u) for u in self._batch)
        self._batch, self._batch_bytes, self._batch_start = [], 0, time.monotonic()

    def complete(self, header: bytes, check: Callable[[Path], None]) -> None:
        """Write the header last, sync, let `check` look at the file, give it its name, remove the journal."""
        self.flush()
        with explained(self.partial, hint=self.hint):
            pwrite_all(self._fd, memoryview(header), 0)
            os.fsync(self._fd)
        try:
            check(self.partial)
        except BaseException:
            self.finished.clear()   # what was written wrongly must not be continued
            raise
        with explained(self.path, hint=self.hint):
            self.partial.replace(self.path)
            sync_directory(self.path.parent)
            self.journal.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                # The first error is the one to tell; what cannot be flushed now is done again by the next run.
                with contextlib.suppress(Exception):
                    self.flush()
                self._discard_if_empty()
        finally:
            self._close()

    def _discard_if_empty(self) -> None:
        """Leave nothing behind where nothing was finished."""
        if not self.finished:
            for path in (self.partial, self.journal):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._lock.release()
