"""Fetching a repository into a directory: planned first, resumed by file, every file compared with the Hub's hash."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Self

from dsv4tools import __version__
from dsv4tools.errors import ResourceError, UsageError, VerifyError
from dsv4tools.files import free_bytes
from dsv4tools.hub.faults import Cancelled, persist
from dsv4tools.hub.local import check_replaceable, held, matches, remove_orphans, write_receipt
from dsv4tools.hub.snapshot import LIBRARY_NAME, RemoteFile, Snapshot, list_snapshot, select_files
from dsv4tools.outfile import explained
from dsv4tools.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WORKERS = 8
_ATTEMPTS = 4              # for each file; huggingface_hub makes some of its own within each
_SECONDS_TO_STOP = 2.0     # how long a cancelled download may go on: a worker stops at its next chunk
_SPACE_MARGIN_BYTES = 1 << 24


@dataclass(frozen=True)
class DownloadPlan:
    """What to fetch, what is there already (by its size; the hashes are looked at later), and the room there is.

    `own`: whether the directory is in our cache, so that whatever lies there may be replaced.
    """

    snapshot: Snapshot
    directory: Path
    files: tuple[RemoteFile, ...]
    present: frozenset[str]
    free_bytes: int
    own: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of all files chosen."""
        return sum(f.n_bytes for f in self.files)

    @property
    def n_bytes_to_fetch(self) -> int:
        """Bytes of the files that are missing."""
        return sum(f.n_bytes for f in self.files if f.name not in self.present)

    @property
    def fits(self) -> bool:
        """Whether the missing files fit the disk."""
        return self.n_bytes_needed <= self.free_bytes

    @property
    def n_bytes_needed(self) -> int:
        """Free bytes that it takes to fetch what is missing, with some room for directories and notes."""
        return self.n_bytes_to_fetch and self.n_bytes_to_fetch + _SPACE_MARGIN_BYTES


@dataclass(frozen=True)
class Download:
    """What a download did: names of the files fetched, of those fetched again because their hash was wrong."""

    directory: Path
    snapshot: Snapshot
    fetched: tuple[str, ...]
    replaced: tuple[str, ...]
    n_verified: int
    n_orphans: int


def plan_download(
    repository: str, directory: str | Path | None = None, *, revision: str | None = None,
    include: Sequence[str] = (), exclude: Sequence[str] = (),
) -> DownloadPlan:
    """What `download` would do; changes nothing on disk. One request.

    Parameters
    ----------
    repository:
        ``owner/name``.
    directory:
        Where the files go; a directory of the repository's name in the current one by default.
    revision:
        Branch, tag or commit; the main branch by default. Everything is fetched at the commit that it now stands for.
    include, exclude:
        Globs of the files to fetch; errors of `select_files`.

    Raises
    ------
    UsageError
        `repository` is no name, `directory` is no directory or holds a file of somebody's own under the name of one
        to fetch, or the globs leave nothing.
    ResourceError
        As `list_snapshot`, or `directory` cannot be made.
    """
    snapshot = list_snapshot(repository, revision)
    directory = Path(directory if directory is not None else repository.partition("/")[2])
    if directory.exists() and not directory.is_dir():
        raise UsageError(directory, "is no directory", hint="give the directory to fill")
    files = select_files(snapshot, include, exclude)
    with explained(directory):
        present = frozenset(f.name for f in files if _has_size(directory / f.name, f.n_bytes))
        for f in files:
            if f.name not in present:
                check_replaceable(directory, f.name)
        existing = directory.absolute()
        while not existing.exists():
            existing = existing.parent
        return DownloadPlan(snapshot, directory, tuple(files), present, free_bytes(existing))


def _has_size(path: Path, n_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == n_bytes


def download(
    plan: DownloadPlan, *, workers: int = WORKERS, progress: Callable[[int], None] | None = None
) -> Download:
    """Fetch what is missing and compare every file with the Hub's hash; files that differ are fetched once more.

    Interrupted or failed, it keeps complete files; the next call goes on with the others. Notes the origin in the
    directory, so that a conversion can name it.

    Parameters
    ----------
    workers:
        Files at a time.
    progress:
        Called with the number of bytes done since the last call: fetched, or hashed where the file was there. They sum
        up to ``plan.n_bytes``; negative where something is done again.

    Raises
    ------
    ResourceError
        No space, no permission, no connection, no access, or another download into the directory is running.
    UsageError
        A file differs from the Hub's and did not come from there.
    VerifyError
        A file has the wrong hash even when fetched again; it was removed.
    """
    if workers < 1:
        raise UsageError("workers", f"is {workers}, expected at least 1")
    if not plan.fits:
        raise ResourceError(plan.directory, f"{format_bytes(plan.free_bytes)} free, the files to fetch need "
                            f"{format_bytes(plan.n_bytes_needed)}", hint="free some space, or choose another place")
    with held(plan.directory):
        n_orphans = remove_orphans(plan.directory)
        fetched, replaced = [], []
        for fetch in _Crew(plan, min(workers, len(plan.files)), progress or (lambda _: None)).run():
            if fetch.n_fetches:
                fetched.append(fetch.file.name)
            if fetch.replaced:
                replaced.append(fetch.file.name)
        write_receipt(plan.directory, plan.snapshot, plan.files)
    return Download(plan.directory, plan.snapshot, tuple(sorted(fetched)), tuple(sorted(replaced)), len(plan.files),
                    n_orphans)


class FileFetch:
    """One file on its way: present or fetched, then hashed. Reports each byte of it once."""

    def __init__(
        self, plan: DownloadPlan, file: RemoteFile, report: Callable[[int], None], stop: threading.Event
    ) -> None:
        self.plan, self.file, self.stop = plan, file, stop
        self.path = plan.directory / file.name
        self.n_fetches, self.replaced = 0, False
        self._report, self._n_reported = report, 0

    def advance(self, n: int) -> None:
        """`n` more bytes are done; Cancelled when the download was stopped."""
        if self.stop.is_set():
            raise Cancelled
        self._n_reported += n
        self._report(n)

    def reset(self, n: int = 0) -> None:
        """`n` bytes of the file are done, whatever was said before."""
        self._report(n - self._n_reported)
        self._n_reported = n

    def run(self) -> Self:
        """Leave the file in its directory with the Hub's hash; errors of `download`, or Cancelled."""
        if self.file.name in self.plan.present:
            if matches(self.path, self.file, self.advance):
                return self
            if not self.plan.own:
                check_replaceable(self.plan.directory, self.file.name)
            self.replaced = True
        else:
            self._fetch(force=False)
            if matches(self.path, self.file, self._watch):
                return self
            self.replaced = True
        self._fetch(force=True)
        if not matches(self.path, self.file, self._watch):
            self.path.unlink(missing_ok=True)
            kind = "sha256" if self.file.sha256 else "git hash"
            raise VerifyError(self.path, f"came twice with another {kind} than the Hub states, "
                              f"{self.file.sha256 or self.file.git_sha1}; it was removed",
                              hint="the way from the Hub damages files: try another network or later")
        return self

    def _watch(self, n: int) -> None:
        """Hashing what was fetched is not reported, but can be stopped."""
        del n
        if self.stop.is_set():
            raise Cancelled

    def _fetch(self, *, force: bool) -> None:
        from huggingface_hub import hf_hub_download  # noqa: PLC0415  - takes a quarter of a second

        snapshot, bar = self.plan.snapshot, type("Bar", (_Bar,), {"fetch": self})
        self.n_fetches += 1

        def once() -> None:
            self.reset()
            # The library takes a file that is there for the right one, whatever its size.
            self.path.unlink(missing_ok=True)
            hf_hub_download(snapshot.repository, self.file.name, revision=snapshot.revision,
                            local_dir=self.plan.directory, force_download=force, tqdm_class=bar,
                            library_name=LIBRARY_NAME, library_version=__version__)

        persist(once, snapshot.repository, snapshot.revision, attempts=_ATTEMPTS, stop=self.stop)
        self.reset(self.file.n_bytes)


class _Bar:
    """What huggingface_hub takes for a progress bar: bytes go to `fetch`, nothing is shown. A subclass sets `fetch`."""

    fetch: FileFetch

    def __init__(self, *_: object, **__: object) -> None:
        self._worker = threading.current_thread()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, n: float | None = 1) -> None:
        # Other threads than the worker's are those of hf_xet, which would not pass the exception on.
        if threading.current_thread() is self._worker or not self.fetch.stop.is_set():
            self.fetch.advance(int(n or 0))

    def update_transfer(self, n: float | None = 1) -> None: ...   # its presence says: one bar is enough

    def refresh(self) -> None: ...

    def close(self) -> None: ...

    def set_postfix_str(self, *_: object, **__: object) -> None: ...

    def set_transfer_postfix_str(self, *_: object, **__: object) -> None: ...


class _Crew:
    """Daemon threads that fetch files: one that hangs in a connection does not keep the process from ending."""

    def __init__(self, plan: DownloadPlan, workers: int, progress: Callable[[int], None]) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self.stop = threading.Event()
        # Small files first: a repository that gives no access says so before gigabytes have come.
        files = sorted(plan.files, key=lambda f: f.n_bytes)
        self._waiting = iter([FileFetch(plan, file, self._report, self.stop) for file in files])
        self._results: SimpleQueue[FileFetch | BaseException | None] = SimpleQueue()   # None: one worker has ended
        self._threads = [threading.Thread(target=self._work, name=f"download-{i}", daemon=True) for i in range(workers)]

    def _report(self, n: int) -> None:
        with self._lock:
            self._progress(n)

    def _work(self) -> None:
        try:
            while not self.stop.is_set():
                with self._lock:
                    fetch = next(self._waiting, None)
                if fetch is None:
                    break
                self._results.put(fetch.run())
        except Cancelled:
            pass
        except BaseException as e:  # noqa: BLE001  - raised in the caller's thread
            self._results.put(e)
        finally:
            self._results.put(None)

    def run(self) -> Iterator[FileFetch]:
        """Yield files as they are done; the first failure is raised when the others have stopped, or soon after."""
        try:
            for thread in self._threads:
                thread.start()
            running = len(self._threads)
            while running:
                result = self._results.get()
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    running -= 1
                else:
                    yield result
        finally:
            self.stop.set()
            deadline = time.monotonic() + _SECONDS_TO_STOP
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join(max(deadline - time.monotonic(), 0))
