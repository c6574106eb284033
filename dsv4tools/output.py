"""An output file under construction: `.partial`, its journal and its lock; finished units survive what happens."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import time
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dsv4tools.checksum import checksum
from dsv4tools.errors import Dsv4Error, Interrupted, ResourceError
from dsv4tools.journal import FinishedUnit, JournalState, JournalWriter, check_same_plan, read_journal
from dsv4tools.lock import OutputLock
from dsv4tools.outfile import WORKING_SUFFIXES, explained
from dsv4tools.working import WorkingFiles, make_working_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

    from dsv4tools.options import RunOptions
    from dsv4tools.working import Inodes

BATCH_SECONDS = 2.0
BATCH_BYTES = 256 << 20
RECHECKED_BYTES = 512 << 20   # of the units finished last: a power cut may have damaged them all the same


def working_paths(path: Path, working_name: str | None = None) -> tuple[Path, Path, Path, Path]:
    """The output, and what stands beside it on the way: partial file, journal and lock."""
    partial, journal, lock = (path.with_name((working_name or path.name) + suffix) for suffix in WORKING_SUFFIXES)
    return path, partial, journal, lock


def was_completed(path: Path, identity: Mapping[str, Any], files: Sequence[Path] = ()) -> bool:
    """Whether `path` is whole and of this very conversion, which was stopped before it had put everything away.

    `files` are all files of a split set, of which `path` is the first; some of them may still wait for their names.
    """
    _, _, journal, _ = working_paths(path)
    try:
        state = read_journal(journal) if journal.exists() else JournalState()
        working = make_working_files([(each, 0) for each in files or [path]])
        return _is_complete(state, identity) and working.publication(state.inode) != "none"
    except ResourceError:
        return False   # whatever it is, it will be told by whoever needs it


def _is_complete(state: JournalState, identity: Mapping[str, Any]) -> bool:
    return state.complete and state.identity == identity


def discard_leftovers(path: Path, working_name: str | None = None) -> None:
    """Remove what an earlier run left of `path`, unless another one is working on it."""
    _, partial, journal, lock_path = working_paths(path, working_name)
    if not any(p.exists() for p in (partial, journal, lock_path)):
        return
    lock = OutputLock(lock_path)
    with contextlib.suppress(ResourceError, OSError):
        lock.acquire()
        try:
            partial.unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
        finally:
            lock.release()


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
        Shard name -> [mtime_ns, inode] now, or whatever else says cheaply that a shard is the one it was; where this
        changed, `recheck` is asked.
    extents:
        ``extents()`` gives position and size of every unit, in order; what lies between them is padding.
    recheck:
        ``recheck(unit, changed shards) -> bool``: whether a finished unit's source still has the checksum that it was
        made with.
    run:
        Of it `restart`, `steal_lock`, `notify` and `stop` are used here.
    files:
        Names and sizes of the files of a split set, of which `path` is the first; positions and `n_bytes` then count
        through all of them.
    working_name:
        What the files on the way are called, if not by `path`'s own name.

    Attributes
    ----------
    finished:
        By position, the units that are on disk.
    completed:
        Whether the file has its name.
    """

    def __init__(
        self, path: Path, n_bytes: int, identity: Mapping[str, Any], shards: Mapping[str, Any], *,
        extents: Callable[[], Iterable[tuple[int, int]]], recheck: Callable[[FinishedUnit, set[str]], bool],
        run: RunOptions, files: Sequence[tuple[Path, int]] = (), working_name: str | None = None,
    ) -> None:
        self.path, self.n_bytes, self.identity, self.shards = path, n_bytes, identity, shards
        _, self.partial, self.journal, lock = working_paths(path, working_name)
        self._files: WorkingFiles = make_working_files(files or [(path, n_bytes)], working_name, self.hint)
        self.finished: dict[int, FinishedUnit] = {}
        self.completed = False
        self._extents, self._recheck, self._run = extents, recheck, run
        self._lock = OutputLock(lock)
        self._writer: JournalWriter | None = None
        self._has_begun = False   # until then everything there is of an earlier run
        self._batch: list[FinishedUnit] = []
        self._batch_bytes, self._batch_start = 0, time.monotonic()

    @property
    def partials(self) -> list[Path]:
        """What its files are called until they are complete."""
        return self._files.partials

    @property
    def hint(self) -> str:
        """What to tell the user when the work stops."""
        return "run the same command again to continue"

    # ------------------------------------------------------------------------------------- what an earlier run left

    def __enter__(self) -> Self:
        self._lock.acquire(steal=self._run.steal_lock)
        try:
            if self._lock.inherited:
                self._run.tell(f"the last run ({self._lock.inherited}) ended without cleaning up")
            self._open()
        except BaseException:
            self._leave()
            raise
        return self

    def _open(self) -> None:
        state = JournalState() if self._run.restart else read_journal(self.journal)
        if not self._run.restart and _is_complete(state, self.identity):
            published = self._files.publication(state.inode)
            if published == "begun":
                self._files.publish()
            if published != "none":
                self._run.tell(f"{self.path} was complete already")
                self.finished, self.completed = state.units, True
                return
        if any(path.exists() for path in self.partials):
            check_same_plan(self.partial, self.identity, state)
        self._files.open()
        inodes = self._files.inodes
        with explained(self.partial, hint=self.hint):
            self.finished = self._adopt(state, inodes)
        self._has_begun = True
        self._tell_what_is_continued()
        # First the journal, then the data: between the two there are no lines of units that are gone.
        self._writer = JournalWriter(self.journal, self.identity, self.shards, inodes, units=self.finished.values(),
                                     hint=self.hint)
        if self.finished:
            self._files.mark_unfinished()
        else:
            self._files.clear()
        self._files.reserve()

    def _tell_what_is_continued(self) -> None:
        if self.finished:
            n_bytes = sum(u.n_bytes for u in self.finished.values())
            self._run.tell(f"continuing {self.partial}: {len(self.finished)} units done, {n_bytes / self.n_bytes:.0%}")
            self._run.advance(n_bytes)

    def _adopt(self, state: JournalState, inodes: Inodes) -> dict[int, FinishedUnit]:
        """The finished units of an earlier run that can be trusted."""
        if not state.units:
            if any(self._files.stored_sizes) and state.identity is None and not self._run.restart:
                self._run.tell(f"{self.journal.name} is missing or damaged: beginning anew")
            return {}
        if not self._files.have_their_sizes:
            self._run.tell(f"{self.partial.name} does not have its size: beginning anew")
            return {}
        planned = {p for p, n in self._extents() if p in state.units and state.units[p].n_bytes == n}
        units = {p: u for p, u in state.units.items() if p in planned}
        if state.n_damaged:
            self._run.tell(f"{state.n_damaged} damaged journal lines: their units are done again")
        if n_others := len(state.units) - len(units):
            self._run.tell(f"{n_others} finished units are none of this version's: done again")
        changed = {name for name, seen in self.shards.items() if state.shards.get(name) != seen}
        if changed:
            self._run.tell(f"modification time or inode changed: {', '.join(sorted(changed))}; checking their units")
            units = {p: u for p, u in units.items() if self._heed_stop() and self._recheck(u, changed)}
        if inodes != state.inode:
            self._run.tell(f"{self.partial.name} was replaced: checking all finished units")
        elif all(map(self._is_intact, self._doubtful(units))):
            return units
        else:
            self._run.tell("the last finished units are damaged: checking all")
        return {p: u for p, u in units.items() if self._is_intact(u)}

    def _doubtful(self, units: Mapping[int, FinishedUnit]) -> list[FinishedUnit]:
        """What is looked at again in any case: the units finished last, and the one that lies last."""
        latest = list(units.values())[::-1]
        before = itertools.accumulate((u.n_bytes for u in latest), initial=0)
        recent = [u for u, n_bytes in zip(latest, before, strict=False) if n_bytes < RECHECKED_BYTES]
        return [*recent, units[max(units)]] if units else []

    def _is_intact(self, unit: FinishedUnit) -> bool:
        self._heed_stop()
        data = np.zeros(unit.n_bytes, np.uint8)
        return self._files.read(unit.position, data.data) == unit.n_bytes and checksum(data) == unit.output

    def _heed_stop(self) -> bool:
        if self._run.stop.is_set():
            raise Interrupted(self._run.stop.signal_number, "stopped", hint=self.hint)
        return True

    # --------------------------------------------------------------------------------------------------- this run

    def write(self, position: int, data: NDArray[np.uint8], source: str, n_zeroed: int = 0) -> FinishedUnit:
        """Write a unit; safe to call from many threads. It counts as finished once it was given to `record`."""
        digest = checksum(data)   # first: it leaves the bytes where a write finds them soonest
        self._files.write(position, data.data)
        return FinishedUnit(position, data.nbytes, digest, source, n_zeroed)

    def record(self, unit: FinishedUnit) -> None:
        """Note a written unit; about every 2 s or 256 MB the data is synced and the journal follows."""
        self._batch.append(unit)
        self._batch_bytes += unit.n_bytes
        if self._batch_bytes >= BATCH_BYTES or time.monotonic() - self._batch_start >= BATCH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Sync what was recorded, then write its journal lines: data always before its line."""
        # Taken out first: what could not be synced must not be tried again. The system has dropped it and says so
        # once only, so a second sync would succeed, and its lines would stand for bytes that are nowhere.
        batch, self._batch = self._batch, []
        self._batch_bytes, self._batch_start = 0, time.monotonic()
        if batch and self._writer is not None:
            self._check_alone()
            self._files.sync()
            self._writer.append(batch)
            self.finished.update((u.position, u) for u in batch)

    def _check_alone(self) -> None:
        """ResourceError if another run has taken over, or somebody took a file away."""
        self._lock.check()
        self._files.check_ours()

    def complete(
        self, header: bytes, check: Callable[[Path], None], *, later: Sequence[tuple[int, bytes]] = ()
    ) -> None:
        """Write the header last, sync, let `check` look at the file, and give it its name.

        `later` are position and header of the further files of a set; `check` gets the path of the first.
        """
        self.flush()
        self._check_alone()
        headers = [(0, header), *later]
        self._clear_padding(headers)
        for position, each in headers:
            self._files.write(position, memoryview(each))
        self._files.sync_all()
        try:
            check(self.partial)
        except Dsv4Error as e:
            if not isinstance(e, ResourceError | Interrupted):
                self.finished.clear()   # what was written wrongly must not be continued
            raise
        if self._writer is not None:
            self._writer.mark_complete()
        self._files.publish()
        self.completed = True

    def _clear_padding(self, headers: Sequence[tuple[int, bytes]]) -> None:
        """Write zeros wherever nothing lies: no checksum covers that, an earlier run may have left anything there."""
        end = 0
        begins = {position for position, _ in headers}
        extents = heapq.merge(self._extents(), ((position, len(header)) for position, header in headers),
                              [(self.n_bytes, 0)])
        for position, n_bytes in extents:
            if position < end or (n_bytes and position not in self.finished and position not in begins):
                raise Dsv4Error(self.partial, f"unit at byte {position:,} is missing or overlaps the one before it",
                                hint="please report this")
            if position > end:
                self._files.write(end, memoryview(bytes(position - end)))
            end = position + n_bytes

    # ----------------------------------------------------------------------------------------------------- the end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.completed:
            with contextlib.suppress(OSError):   # a journal left behind says that there is nothing more to do
                self.journal.unlink()
        elif error is not None:
            # The first error is the one to tell; what cannot be flushed now is done again by the next run.
            with contextlib.suppress(Exception):
                self.flush()
        self._leave()

    def _leave(self) -> None:
        """Close everything; leave nothing behind where this run has begun anew and finished nothing."""
        try:
            if self._has_begun and not self.finished and not self.completed:
                with contextlib.suppress(OSError, ResourceError):
                    self._check_alone()
                    self._files.remove()
                    self.journal.unlink(missing_ok=True)
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            self._files.close()
            self._lock.release()
