"""Output files: what must not be written over, and files that carry their name only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from dsv4tools.errors import ResourceError, UsageError
from dsv4tools.files import free_bytes, lock_file, sync_directory
from dsv4tools.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from dsv4tools.checkpoint import Checkpoint

SPACE_MARGIN_BYTES = 1 << 20   # for the directory entry and the manifest
WORKING_SUFFIXES = (".partial", ".journal", ".lock")   # what stands beside an output on its way


def partial_path(path: Path) -> Path:
    """Where the file `path` is written until it is complete: beside it, so that a rename suffices."""
    return path.with_name(path.name + ".partial")


def check_output(checkpoint: Checkpoint, path: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, is an input, lies in the checkpoint's directory, or cannot be created.

    Raises
    ------
    UsageError
        `path` is a directory, exists without `overwrite`, or is (or would pass through) an input.
    ResourceError
        Its directory is missing or cannot be written to.
    """
    check_not_input(path, [shard.path for shard in checkpoint.shards.values()])
    with explained(path):
        source = checkpoint.directory.resolve()
        if path.resolve().is_relative_to(source):
            raise UsageError(path, f"lies in the source directory {source}",
                             hint="write elsewhere: inputs are never touched")
    check_place(path, overwrite=overwrite)


def check_not_input(path: Path, inputs: Iterable[Path]) -> None:
    """UsageError if `path` is a directory, or if writing it would touch one of `inputs`."""
    inputs = list(inputs)
    with explained(path):
        if path.is_dir():
            raise UsageError(path, "is a directory", hint="give the name of the output file")
        for candidate in (path, *(path.with_name(path.name + suffix) for suffix in WORKING_SUFFIXES)):
            if candidate.exists() and any(each.exists() and candidate.samefile(each) for each in inputs):
                raise UsageError(candidate, "is one of the inputs", hint="write elsewhere: inputs are never touched")


def check_place(path: Path, *, overwrite: bool) -> None:
    """UsageError if `path` exists without `overwrite`, or is no file; ResourceError if it cannot be created."""
    with explained(path):
        if path.exists() and not path.is_file():   # a rename would put a file in the place of /dev/null
            raise UsageError(path, "is no regular file", hint="give the name of a file")
        if path.exists() and not overwrite:
            raise UsageError(path, "exists", hint="--overwrite replaces it")
        if not path.parent.is_dir():
            raise ResourceError(path.parent, "is no directory", hint="create it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise ResourceError(path.parent, "cannot be written to")


def check_space(path: Path, n_bytes: int, partials: Sequence[Path] = ()) -> None:
    """ResourceError with the numbers if `n_bytes` more at `path` do not fit the disk.

    What an earlier run left in the partial files (`partial_path` without any) counts as free: it is used again.
    """
    with explained(path.parent):
        free = free_bytes(path.parent)
        for each in partials or [partial_path(path)]:
            with contextlib.suppress(FileNotFoundError):
                free += each.lstat().st_blocks * 512
    need = n_bytes + SPACE_MARGIN_BYTES
    if need > free:
        raise ResourceError(path.parent, f"{format_bytes(free)} free, the output needs {format_bytes(need)}",
                            hint="free some space or write elsewhere")


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[int]:
    """An empty file open for writing: when the block ends well it is synced and gets the name `path`, else removed.

    Two writers of one path exclude each other: the second gets a ResourceError and touches nothing.
    """
    partial = partial_path(path)
    fd = open_alone(partial)
    complete = False
    try:
        with explained(partial):
            os.ftruncate(fd, 0)   # what an earlier, killed run left
        yield fd
        with explained(path):
            os.fsync(fd)
            partial.replace(path)
            complete = True
            sync_directory(path.parent)
    finally:
        if not complete:
            with contextlib.suppress(OSError):
                partial.unlink()
        os.close(fd)


def open_alone(path: Path) -> int:
    """A descriptor of `path` (made if missing) that no other conversion holds; its content is untouched yet."""
    fd = open_own(path)
    try:
        _check_alone(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_own(path: Path) -> int:
    """A descriptor of `path` (made if missing) that is no link to a file of another name; its content is untouched."""
    with explained(path):
        # NOFOLLOW: through a link of that name some other file would be emptied. NONBLOCK: a pipe must not hang us.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    info = os.fstat(fd)
    what = "is no regular file" if not stat.S_ISREG(info.st_mode) else "has a second name as a hard link"
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
        os.close(fd)
        raise ResourceError(path, what, hint="remove it")
    return fd


def _check_alone(fd: int, path: Path) -> None:
    if not lock_file(fd):
        raise ResourceError(path, "is being written by another conversion")
    mine = os.fstat(fd)
    try:
        same = os.path.samestat(mine, path.lstat())
    except FileNotFoundError:
        same = False
    if not same:   # the other writer finished between our opening and our locking: `fd` is its complete file
        raise ResourceError(path, "was being written by another conversion until just now", hint="try again")


# What errno means where files are written, in words that help more than the system's.
WHY = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file system, or a limit of this process, allows no file of this size",
    errno.EROFS: "the file system is read-only",
    errno.ELOOP: "it is a symbolic link",
}


@contextlib.contextmanager
def explained(path: Path, *, hint: str = "") -> Iterator[None]:
    """Turn the operating system's errors into ours."""
    try:
        yield
    except OSError as e:
        what = WHY.get(e.errno or 0, e.strerror or str(e))
        raise ResourceError(path, f"cannot be written: {what}", hint=hint) from None
