"""Output directories that carry their name only when they are complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4tools.errors import ResourceError, UsageError
from dsv4tools.files import sync_directory
from dsv4tools.outfile import explained, open_alone, partial_path

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK_NAME = "dsv4tools.lock"
_CONTENT_NAME = "content"


def check_new_directory(path: Path) -> None:
    """Refuse an output directory that exists (an empty one will do) or cannot be created.

    Raises
    ------
    UsageError
        `path` exists, or what a killed run would have left beside it is somebody else's.
    ResourceError
        The directory above is missing or cannot be written to.
    """
    partial = partial_path(path)
    with explained(path):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UsageError(path, "exists and is no directory", hint="choose another name")
        if path.is_dir() and any(path.iterdir()):
            raise UsageError(path, "exists and is not empty", hint="remove it or choose another directory")
        if not path.parent.is_dir():
            raise ResourceError(path.parent, "is no directory", hint="create it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise ResourceError(path.parent, "cannot be written to")
        if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
            raise UsageError(partial, "is in the way: the output is prepared there", hint="remove it")
        if partial.is_dir() and not (partial / LOCK_NAME).is_file() and any(partial.iterdir()):
            raise UsageError(partial, "is in the way and was not left by an earlier run", hint="remove it")


@contextlib.contextmanager
def complete_directory(path: Path) -> Iterator[Path]:
    """A new empty directory to fill: when the block ends well it gets the name `path`, else it is removed.

    It lies in ``PATH.partial``; what a killed run left there is removed first. Files in it must have been synced by
    whoever wrote them; the directories are synced here. Two writers of one path exclude each other: the second gets a
    ResourceError and touches nothing.
    """
    check_new_directory(path)
    partial = partial_path(path)
    content = partial / _CONTENT_NAME
    with explained(partial):
        partial.mkdir(exist_ok=True)
    lock = open_alone(partial / LOCK_NAME)
    try:
        with explained(content):
            # Only names are removed here: a stale file may be a hard link to a shard of the source.
            if content.is_dir():
                shutil.rmtree(content)
            content.mkdir()
        yield content
        with explained(path):
            for directory, _, _ in os.walk(content, topdown=False):
                sync_directory(Path(directory))
            content.rename(path)
            sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(content, ignore_errors=True)
            (partial / LOCK_NAME).unlink()
            partial.rmdir()
        os.close(lock)
