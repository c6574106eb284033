"""Putting the files of a checkpoint into a new directory: linked, cloned, copied or written."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Literal

from dsv4tools.checkpoint.index import locate_shard
from dsv4tools.errors import InputError, ResourceError, UsageError, VerifyError
from dsv4tools.files import clone_file, preallocate, pwrite_all
from dsv4tools.gguf.regular import open_regular, read_into
from dsv4tools.outfile import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.checkpoint.shard import Shard

Link = Literal["auto", "hard", "copy"]
_CHUNK_BYTES = 1 << 23


def side_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """All files but the shards, by their path in the checkpoint; hidden directories (.git, .cache) stay behind.

    InputError for what is neither file nor directory, and for links that lead out of the checkpoint or to a directory.
    """
    found: dict[str, Path] = {}
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        directory = checkpoint.directory / prefix
        try:
            entries = sorted(os.scandir(directory), key=lambda e: e.name)
        except OSError as e:
            raise ResourceError(directory, f"cannot be listed: {e.strerror}") from None
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith("."):
                    waiting.append(name + "/")
            elif name not in checkpoint.shards:
                path = locate_shard(checkpoint.directory, name)
                if not path.is_file():
                    raise InputError(path, "is no regular file", hint="remove it, or put the file itself there")
                found[name] = path
    return found


def link_shard(shard: Shard, target: Path, link: Link) -> str:
    """Make `target` a second name or a clone of `shard`: ``linked`` or ``cloned``, ``copied`` if that is still to do.

    UsageError where ``hard`` is asked for and impossible; VerifyError if the shard has changed since it was opened.
    """
    if link != "copy":
        try:
            os.link(shard.path.resolve(), target)
        except OSError as e:
            if link == "hard":
                raise UsageError(shard.path, f"cannot be hard-linked to the output: {e.strerror}",
                                 hint="--link auto clones or copies where links cannot be") from None
        else:
            _check_same(shard, target.lstat())
            return "linked"
    cloned = _clone(shard.path, target)
    _check_same(shard, shard.path.stat())
    return "cloned" if cloned else "copied"


def _check_same(shard: Shard, now: os.stat_result) -> None:
    if (now.st_ino, now.st_size, now.st_mtime_ns) != (shard.inode, shard.n_file_bytes, shard.mtime_ns):
        raise VerifyError(shard.path, "source changed since it was opened", hint="start again with the new file")


def _clone(source: Path, target: Path) -> bool:
    """Whether `target` now shares the blocks of `source`; if not, there is no `target`."""
    source_fd, _ = open_regular(source)
    try:
        with new_file(target) as fd:
            cloned = clone_file(source_fd, fd)
    finally:
        os.close(source_fd)
    if not cloned:
        target.unlink()
    return cloned


def copy_shard(shard: Shard, target: Path, progress: Callable[[int], None]) -> None:
    """Copy all bytes of `shard`; errors of `Shard.read_into`."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with new_file(target, shard.n_file_bytes) as fd:
        for begin in range(0, shard.n_file_bytes, _CHUNK_BYTES):
            part = buffer[: min(_CHUNK_BYTES, shard.n_file_bytes - begin)]
            shard.read_into(begin, part)
            pwrite_all(fd, part, begin)
            progress(len(part))


def copy_file(source: Path, target: Path, progress: Callable[[int], None]) -> None:
    """Clone or copy the bytes and the permissions of `source`: never a link, so that editing one leaves the other."""
    source_fd, n_bytes = open_regular(source)
    try:
        with new_file(target) as fd:
            os.fchmod(fd, os.fstat(source_fd).st_mode & 0o777 | 0o600)
            if clone_file(source_fd, fd):
                progress(n_bytes)
                return
            buffer = memoryview(bytearray(_CHUNK_BYTES))
            for position in range(0, n_bytes, _CHUNK_BYTES):
                part = buffer[: min(_CHUNK_BYTES, n_bytes - position)]
                read_into(source_fd, part, position, source)
                pwrite_all(fd, part, position)
                progress(len(part))
    finally:
        os.close(source_fd)


def write_file(target: Path, raw: bytes, progress: Callable[[int], None]) -> None:
    """Write `raw` to the new file `target`."""
    with new_file(target, len(raw)) as fd:
        pwrite_all(fd, memoryview(raw), 0)
    progress(len(raw))


@contextlib.contextmanager
def new_file(path: Path, n_bytes: int = 0) -> Iterator[int]:
    """A descriptor of the new file `path`, its directory made, `n_bytes` reserved; synced and closed at the end.

    The name must be free: whatever lies there may be a link to a file of the source.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            preallocate(fd, n_bytes)
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
