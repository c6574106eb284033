"""A conversion that fetches its shards while it runs: some ahead, in order, and removed once they are used up."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from dsv4tools.checkpoint.shard import read_shard
from dsv4tools.errors import ResourceError, UsageError, VerifyError
from dsv4tools.files import free_bytes
from dsv4tools.hub.download import DownloadPlan, FileFetch
from dsv4tools.hub.faults import Cancelled
from dsv4tools.hub.local import held, remove_orphans
from dsv4tools.hub.ranges import MAX_SKIPPED_BYTES
from dsv4tools.hub.remote import RemoteShard, RemoteSource
from dsv4tools.hub.schedule import Schedule, make_schedule
from dsv4tools.outfile import SPACE_MARGIN_BYTES
from dsv4tools.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.checkpoint.shard import Shard
    from dsv4tools.options import RunOptions
    from dsv4tools.plan import Plan, Unit

MAX_AHEAD = 1000
_MAX_FETCHERS = 4            # at a time; huggingface_hub uses several connections for one file where it can
_SECONDS_BETWEEN_LOOKS = 0.1  # at whether the work was stopped, while there is none
_SECONDS_TO_STOP = 2.0


@dataclass(frozen=True)
class StreamPlan:
    """What a streamed conversion will fetch, and the disk it takes besides its output.

    Attributes
    ----------
    directory:
        Where shards lie on their way: in our own cache, never a directory of the user's.
    n_shards, n_bytes:
        Of all shards that the conversion needs.
    n_present_bytes:
        Of those that are there already (by their size; hashes are looked at later).
    shards_ahead:
        How many are fetched beyond the one in hand.
    delete:
        Whether each is removed after its last use.
    peak_shards, peak_bytes:
        The most there is on disk at once.
    """

    directory: Path
    n_shards: int
    n_bytes: int
    n_present_bytes: int
    shards_ahead: int
    delete: bool
    peak_shards: int
    peak_bytes: int

    @property
    def n_more_bytes(self) -> int:
        """What will be on disk at most and is not there now."""
        return max(self.peak_bytes - self.n_present_bytes, 0)


def plan_stream(plan: Plan, run: RunOptions) -> StreamPlan | None:
    """How a conversion of `plan` from the beginning fetches its shards; None where they are files of the user's.

    UsageError if shards of a directory are to be deleted, or ``run.shards_ahead`` is out of range; ResourceError if
    shards are to be deleted and the server does not send parts of such files, which is how rows are looked at later.
    """
    source = _remote_source(plan.checkpoint.shards)
    _check_options(source, run)
    if source is None:
        return None
    needs = (matrix.shard_names for t in plan.tensors for matrix in t.tensor.sources)
    schedule = make_schedule(needs, _sizes(plan.checkpoint.shards), run.shards_ahead)
    if run.delete_shards and source.ranges.sends_whole_files and max(schedule.n_bytes, default=0) > MAX_SKIPPED_BYTES:
        raise ResourceError(source.reference, "the server sends whole files where parts are asked for: rows of a shard "
                            "that was deleted could not be compared at the end", hint="leave out --delete-shards")
    present = _present(source, schedule)
    total = sum(schedule.n_bytes)
    peak = schedule.peak(present) if run.delete_shards else (len(schedule.shards), total)
    return StreamPlan(source.directory, len(schedule.shards), total, sum(present.values()), run.shards_ahead,
                      run.delete_shards, *peak)


def _check_options(source: RemoteSource | None, run: RunOptions) -> None:
    if source is None and run.delete_shards:
        raise UsageError("--delete-shards", "is for hf://OWNER/NAME: files in a directory of yours are never removed",
                         hint="leave it out")
    if not 0 <= run.shards_ahead <= MAX_AHEAD:
        raise UsageError("--shards-ahead", f"is {run.shards_ahead}, expected 0 to {MAX_AHEAD}")


def _remote_source(shards: Mapping[str, Shard]) -> RemoteSource | None:
    return next((shard.source for shard in shards.values() if isinstance(shard, RemoteShard)), None)


def _sizes(shards: Mapping[str, Shard]) -> dict[str, int]:
    return {name: shard.n_file_bytes for name, shard in shards.items()}


def _present(source: RemoteSource, schedule: Schedule) -> dict[str, int]:
    """The shards of `schedule` that lie in the cache, and their sizes."""
    found = {}
    for name, n_bytes in zip(schedule.shards, schedule.n_bytes, strict=True):
        with contextlib.suppress(OSError):
            if (source.directory / name).stat().st_size == n_bytes:
                found[name] = n_bytes
    return found


class Feed:
    """Units in the order in which they are worked on. A context manager.

    Attributes
    ----------
    halt:
        To be set when nobody will take another unit: whoever waits for one stops waiting.
    """

    def __init__(self, units: Iterable[Unit]) -> None:
        self._units = units
        self.halt = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __iter__(self) -> Iterator[Unit]:
        """The units, each as soon as its source is at hand; ends early when the work was stopped."""
        return iter(self._units)

    def done(self, unit: Unit) -> None:
        """A unit was written and recorded."""


def feed_units(checkpoint: Checkpoint, units: Iterable[Unit], run: RunOptions, flush: Callable[[], None]) -> Feed:
    """`units` as they can be worked on: those of a directory as they are, those of the Hub by shards.

    `flush` makes what was recorded survive a kill; it is called before a shard is removed.
    """
    source = _remote_source(checkpoint.shards)
    return Feed(units) if source is None else _ShardFeed(source, checkpoint.shards, list(units), run, flush)


class _ShardFeed(Feed):
    """Units whose shards come from the Hub, in order of their shards; see `schedule`.

    A shard is used when its hash was found to be the Hub's, and its header to be the one that was planned with. With
    ``run.delete_shards`` it is removed when its last unit was recorded and that record is on disk, and only then the
    next one is fetched.
    """

    def __init__(
        self, source: RemoteSource, shards: Mapping[str, Shard], units: list[Unit], run: RunOptions,
        flush: Callable[[], None],
    ) -> None:
        self._schedule = make_schedule((u.matrix.shard_names for u in units), _sizes(shards), run.shards_ahead)
        super().__init__(sorted(units, key=self._step))
        self._source, self._shards, self._run, self._flush = source, shards, run, flush
        self._units_left = Counter(name for u in units for name in u.matrix.shard_names)
        self._step_left = Counter(map(self._step, units))
        self._step_in_hand, self._next = 0, 0      # both count shards of the schedule
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stack = ExitStack()
        self._stop = threading.Event()
        n_threads = max(1, min(run.shards_ahead, _MAX_FETCHERS))
        self._threads = [threading.Thread(target=self._fetch_all, name=f"shard-{i}", daemon=True)
                         for i in range(n_threads)]

    def _step(self, unit: Unit) -> int:
        return self._schedule.step(unit.matrix.shard_names)

    # ---------------------------------------------------------------------------------------------- begin and end

    def __enter__(self) -> Self:
        if not self._schedule.shards and not self._run.delete_shards:
            return self
        directory = self._source.directory
        self._stack.enter_context(held(directory))
        try:
            remove_orphans(directory)
            if self._run.delete_shards:
                for name in self._shards.keys() - set(self._schedule.shards):
                    self._remove(name)   # a run was killed between recording its last unit and removing it
            present = _present(self._source, self._schedule)
            self._check_room(present)
            files = tuple(self._source.snapshot.files[name] for name in self._schedule.shards)
            self._plan = DownloadPlan(self._source.snapshot, directory, files, frozenset(present), 0, own=True)
            self._advance()
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_SECONDS_TO_STOP)
        self._stack.close()

    def _check_room(self, present: Mapping[str, int]) -> None:
        directory, schedule = self._source.directory, self._schedule
        peak = schedule.peak(present)[1] if self._run.delete_shards else sum(schedule.n_bytes)
        need = max(peak - sum(present.values()), 0)
        free = free_bytes(directory)
        if need and need + SPACE_MARGIN_BYTES > free:
            less = "use --delete-shards, "
            if self._run.delete_shards:
                less = "use fewer --shards-ahead, " if self._run.shards_ahead else ""
            raise ResourceError(directory, f"{format_bytes(free)} free, the shards need {format_bytes(need)}",
                                hint=f"free some space, {less}or name another place by DSV4TOOLS_CACHE")

    # -------------------------------------------------------------------------------- the side that fetches shards

    def _fetch_all(self) -> None:
        try:
            while (i := self._take()) is not None:
                self._fetch(i)
        except Cancelled:
            pass
        except BaseException as e:  # noqa: BLE001  - raised where a unit waits for this shard
            with self._changed:
                self._error = self._error or e
                self._changed.notify_all()

    def _take(self) -> int | None:
        """The next shard to fetch, as soon as it may lie on disk; None when there is no more."""
        with self._changed:
            while not self._stop.is_set() and self._error is None and self._next < len(self._schedule.shards):
                if self._next <= self._step_in_hand + self._schedule.ahead:
                    self._next += 1
                    return self._next - 1
                self._changed.wait()
        return None

    def _fetch(self, i: int) -> None:
        name, directory = self._schedule.shards[i], self._source.directory
        file = self._source.snapshot.files[name]
        what = "checking" if name in self._plan.present else "fetching"
        self._run.tell(f"{what} {name}, {format_bytes(file.n_bytes)}, {i + 1} of {len(self._schedule.shards)}")
        FileFetch(self._plan, file, lambda _: None, self._stop).run()
        local, planned = read_shard(directory / name), self._shards[name]
        if local.header_sha256 != planned.header_sha256:
            raise VerifyError(directory / name, "has another header than the one that came first, which no hash covers",
                              hint="the way from the Hub damages files: run the same command again")
        with self._changed:
            self._source.local[name] = local
            self._changed.notify_all()

    # ----------------------------------------------------------------------------------------- the side that works

    def __iter__(self) -> Iterator[Unit]:
        for unit in self._units:
            if not self._wait(unit.matrix.shard_names):
                return
            yield unit

    def _wait(self, names: set[str]) -> bool:
        """Wait for shards; whether they are there. What stopped the fetching is raised."""
        with self._changed:
            while not names <= self._source.local.keys():
                if self.halt.is_set() or self._run.stop.is_set():
                    return False
                if self._error is not None:
                    raise self._error
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)
        return True

    def done(self, unit: Unit) -> None:
        names = unit.matrix.shard_names
        self._units_left.subtract(names)
        used_up = [name for name in names if not self._units_left[name]]
        if used_up and self._run.delete_shards:
            self._flush()
            for name in used_up:
                self._source.local.pop(name, None)
                self._remove(name)
        self._step_left[self._step(unit)] -= 1
        self._advance()

    def _advance(self) -> None:
        with self._changed:
            while self._step_in_hand < len(self._schedule.shards) and not self._step_left[self._step_in_hand]:
                self._step_in_hand += 1
            self._changed.notify_all()

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._source.directory / name).unlink()
