"""The directory that a download fills: one download at a time, what killed runs left, hashes, and the receipt."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4tools.checkpoint.card import RECEIPT
from dsv4tools.errors import ResourceError, UsageError
from dsv4tools.files import lock_file, pread_into
from dsv4tools.outfile import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dsv4tools.hub.snapshot import RemoteFile, Snapshot

_HUB_FOLDER = Path(".cache/huggingface/download")   # where huggingface_hub keeps what is not complete
_CHUNK_BYTES = 1 << 22


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold `directory` (made if missing) for one download; ResourceError if another one has it."""
    lock = directory / RECEIPT.with_name("lock")
    with explained(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        if not lock_file(fd):
            raise ResourceError(directory, "another download into it is running", hint="wait for it to end")
        yield
    finally:
        os.close(fd)


def remove_orphans(directory: Path) -> int:
    """Remove incomplete files that no process is writing; how many there were.

    huggingface_hub writes each file under a name of its own and never takes up one that a killed run left. While it
    writes it holds a lock in the same folder: a folder in which somebody holds one is left alone.
    """
    removed = 0
    folder = directory / _HUB_FOLDER
    for path in sorted(folder.rglob("*.incomplete")) if folder.is_dir() else ():
        if any(_is_held(lock) for lock in path.parent.glob("*.lock")):
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            removed += 1
    return removed


def _is_held(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not lock_file(fd)
    finally:
        os.close(fd)


def matches(path: Path, file: RemoteFile, progress: Callable[[int], None]) -> bool:
    """Whether the content of `path` has the hash that the Hub states (its size, where it states none)."""
    digest = hashlib.sha256()
    if file.sha256 is None:
        digest = hashlib.sha1(b"blob %d\0" % file.n_bytes, usedforsecurity=False)
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, file.n_bytes + 1)))
    position = 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            while position <= file.n_bytes and (n := pread_into(fd, buffer, position)):
                digest.update(buffer[:n])
                position += n
                progress(n)
        finally:
            os.close(fd)
    except OSError as e:
        raise ResourceError(path, f"cannot be read: {e.strerror}") from None
    expected = file.sha256 or file.git_sha1
    return position == file.n_bytes and expected in {None, digest.hexdigest()}


def check_replaceable(directory: Path, name: str) -> None:
    """UsageError if the file `name` is there and did not come from the Hub: it is somebody's own.

    huggingface_hub leaves notes about each file that it fetches: a lock before, and what came after.
    """
    path = directory / name
    notes = [directory / _HUB_FOLDER / f"{name}{suffix}" for suffix in (".metadata", ".lock")]
    if os.path.lexists(path) and not any(note.exists() for note in notes):
        raise UsageError(path, "is there already, differs from the file on the Hub and was not fetched from it",
                         hint="move it away, or choose another directory")


def write_receipt(directory: Path, snapshot: Snapshot, files: Iterable[RemoteFile]) -> None:
    """Note in `directory` where its files are from, and with which hashes they were found to agree."""
    path = directory / RECEIPT
    entries = {f.name: {"n_bytes": f.n_bytes, "sha256": f.sha256} if f.sha256 else
               {"n_bytes": f.n_bytes, "git_sha1": f.git_sha1} for f in files}
    receipt = {"repository": snapshot.repository, "revision": snapshot.revision, "files": entries}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")   # another process may be writing the same
    with explained(path):
        partial.write_text(json.dumps(receipt, indent=1) + "\n", "utf-8")
        partial.replace(path)
