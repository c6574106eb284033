"""The files that an output is written to until it is complete: one, or one for each part of a split set.

Positions count through all of them, one after the other: who writes units need not know of parts. The first file gets
its name last, so that no reader, who begins there, ever finds a part of a set.
"""

from __future__ import annotations

import bisect
import itertools
import os
from typing import TYPE_CHECKING, Literal

from dsv4tools.errors import ResourceError
from dsv4tools.files import insist, pread_all, preallocate, pwrite_all, sync_data, sync_directory
from dsv4tools.outfile import explained, open_own, partial_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MARK = bytes(8)   # over a header's first bytes: no reader takes the file for what it is not yet

Inodes = int | list[int]


class WorkingFiles:
    """`.partial` files, and the names that they will get.

    Parameters
    ----------
    files:
        Final name and size in bytes of each.
    partials:
        What they are called on the way.
    hint:
        What to tell the user when one cannot be written.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], partials: Sequence[Path], hint: str) -> None:
        self.finals, self.partials, self._hint = [path for path, _ in files], list(partials), hint
        self._sizes = [n for _, n in files]
        self._starts = list(itertools.accumulate(self._sizes[:-1], initial=0))
        self._fds: list[int] = []

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return sum(self._sizes)

    def open(self) -> None:
        """Open all, made where they are missing; content is untouched yet. Raises ResourceError."""
        for path in self.partials:
            self._fds.append(open_own(path))

    @property
    def inodes(self) -> Inodes:
        """Of the open files: a number, or a list of them for a set."""
        inodes = [os.fstat(fd).st_ino for fd in self._fds]
        return inodes[0] if len(inodes) == 1 else inodes

    @property
    def stored_sizes(self) -> list[int]:
        """Bytes in each open file."""
        return [os.fstat(fd).st_size for fd in self._fds]

    @property
    def have_their_sizes(self) -> bool:
        """Whether each open file is as large as it will be."""
        return self.stored_sizes == self._sizes

    def clear(self) -> None:
        """Drop what an earlier run left."""
        for fd, path in zip(self._fds, self.partials, strict=True):
            with explained(path, hint=self._hint):
                os.ftruncate(fd, 0)

    def reserve(self) -> None:
        """Take the space on disk, as far as the file system can."""
        for fd, path, n_bytes in zip(self._fds, self.partials, self._sizes, strict=True):
            with explained(path, hint=self._hint):
                preallocate(fd, n_bytes)

    def mark_unfinished(self) -> None:
        """Make sure that no reader takes a file for what it is not yet."""
        for fd, path in zip(self._fds, self.partials, strict=True):
            with explained(path, hint=self._hint):
                pwrite_all(fd, memoryview(_MARK), 0)

    def write(self, position: int, data: memoryview) -> None:
        """Write bytes that lie in one file; safe to call from many threads."""
        i = bisect.bisect_right(self._starts, position) - 1
        with explained(self.partials[i], hint=self._hint):
            pwrite_all(self._fds[i], data, position - self._starts[i])

    def read(self, position: int, out: memoryview) -> int:
        """Fill `out` from bytes that lie in one file; how many there were."""
        i = bisect.bisect_right(self._starts, position) - 1
        with explained(self.partials[i], hint=self._hint):
            return insist(lambda: pread_all(self._fds[i], out, position - self._starts[i]))

    def sync(self) -> None:
        """Wait until the data is on disk."""
        for fd, path in zip(self._fds, self.partials, strict=True):
            with explained(path, hint=self._hint):
                sync_data(fd)

    def sync_all(self) -> None:
        """Wait until data and sizes are on disk."""
        for fd, path in zip(self._fds, self.partials, strict=True):
            with explained(path, hint=self._hint):
                os.fsync(fd)

    def check_ours(self) -> None:
        """ResourceError if somebody took a file away."""
        for fd, path in zip(self._fds, self.partials, strict=True):
            try:
                same = os.path.samestat(os.fstat(fd), path.lstat())
            except FileNotFoundError:
                same = False
            if not same:
                raise ResourceError(path, "was replaced or removed while it was being written",
                                    hint="leave it alone until the work is done")

    def remove(self) -> None:
        """Take the files away."""
        for path in self.partials:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give all handles back."""
        while self._fds:
            os.close(self._fds.pop())

    def publication(self, inodes: Inodes | None) -> Literal["none", "begun", "all"]:
        """Whether the files with these inodes have got their names: none, some (only of a set) or all."""
        expected = inodes if isinstance(inodes, list) else [inodes]
        if len(expected) != len(self.finals):
            return "none"
        named = [_inode(path) == inode for path, inode in zip(self.finals, expected, strict=True)]
        waiting = [_inode(path) == inode for path, inode in zip(self.partials, expected, strict=True)]
        gone = [not path.exists() for path in self.partials]
        if all(named) and all(gone):
            return "all"
        each = zip(named, gone, waiting, strict=True)
        return "begun" if any(named) and all((n and g) or w for n, g, w in each) and len(named) > 1 else "none"

    def publish(self) -> None:
        """Give every file its name, the first one last; what had the first name before goes first of all."""
        directory = self.finals[0].parent
        if len(self.finals) > 1 and self.partials[0].exists():
            with explained(self.finals[0], hint=self._hint):
                self.finals[0].unlink(missing_ok=True)
                sync_directory(directory)
        for i in [*range(1, len(self.finals)), 0]:
            if i == 0 and len(self.finals) > 1:
                sync_directory(directory)
            with explained(self.finals[i], hint=self._hint):
                if i == 0 or self.partials[i].exists():   # a run before this one may have come so far
                    self.partials[i].replace(self.finals[i])
        with explained(self.finals[0], hint=self._hint):
            sync_directory(directory)


def make_working_files(
    files: Sequence[tuple[Path, int]], working_name: str | None = None, hint: str = ""
) -> WorkingFiles:
    """The working files of an output; `working_name` is what a single one is called on the way instead of its own."""
    partials = [partial_path(path) for path, _ in files]
    if working_name is not None:
        partials = [partial_path(files[0][0].with_name(working_name))]
    return WorkingFiles(files, partials, hint)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
