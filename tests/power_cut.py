"""What a power cut may leave: a record of all that is done to a directory, played back as far as a disk had to have it.

Data is on disk once its file was synced, a name once its directory was. What was not synced may be there in any part:
each sector of a write, and each change of a name in the order of the changes, is there or not.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4tools import files, journal, working

if TYPE_CHECKING:
    import random

SECTOR_BYTES = 64     # small ones tear more


@dataclass
class Recorder:
    """Everything that is done to the files of one directory, in order."""

    directory: Path
    events: list[tuple[Any, ...]] = field(default_factory=list)

    def start(self, monkeypatch) -> None:
        """Listen to the calls of the modules that write; they go through."""
        self._listen_to_data(monkeypatch)
        self._listen_to_names(monkeypatch)
        self._listen_to_the_journal(monkeypatch)

    def _listen_to_data(self, monkeypatch) -> None:
        real = {name: getattr(os, name) for name in ("pwrite", "ftruncate", "fsync", "fdatasync")}

        def pwrite(fd, data, position):
            n = real["pwrite"](fd, data, position)
            self.events.append(("write", os.fstat(fd).st_ino, position, bytes(data[:n])))
            return n

        def ftruncate(fd, n):
            real["ftruncate"](fd, n)
            self.events.append(("size", os.fstat(fd).st_ino, n))

        def preallocate(fd, n):
            reserved = files.preallocate(fd, n)
            self.events.append(("extend", os.fstat(fd).st_ino, n))
            return reserved

        def sync(name):
            def call(fd):
                real[name](fd)
                info = os.fstat(fd)
                is_directory = info.st_ino == self.directory.stat().st_ino
                self.events.append(("names",) if is_directory else ("sync", info.st_ino))

            return call

        monkeypatch.setattr(os, "pwrite", pwrite)
        monkeypatch.setattr(os, "ftruncate", ftruncate)
        monkeypatch.setattr(os, "fsync", sync("fsync"))
        monkeypatch.setattr(os, "fdatasync", sync("fdatasync"))
        monkeypatch.setattr(working, "preallocate", preallocate)

    def _listen_to_names(self, monkeypatch) -> None:
        real_open, real_replace, real_unlink = os.open, Path.replace, Path.unlink

        def open_(path, flags, *rest, **options):
            existed = os.path.lexists(path)
            fd = real_open(path, flags, *rest, **options)
            if not existed and Path(path).parent == self.directory:
                self.events.append(("create", Path(path).name, os.fstat(fd).st_ino))
            return fd

        def replace(path, target):
            self.events.append(("rename", path.name, target.name, path.stat().st_ino))
            return real_replace(path, target)

        def unlink(path, **options):
            if os.path.lexists(path):
                self.events.append(("unlink", path.name))
            real_unlink(path, **options)

        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(Path, "unlink", unlink)

    def _listen_to_the_journal(self, monkeypatch) -> None:
        """The journal is written through Python's files, whose position is theirs to know."""
        real_init, real_append = journal.JournalWriter.__init__, journal.JournalWriter._append
        recorder = self

        def init(writer, path, *arguments, **options):
            at = len(recorder.events)
            real_init(writer, path, *arguments, **options)
            # Its bytes were written before its sync, which is the first event of its inode.
            inode = path.stat().st_ino
            first = next(i for i in range(at, len(recorder.events)) if recorder.events[i] == ("sync", inode))
            recorder.events.insert(first, ("write", inode, 0, path.read_bytes()))

        def append(writer, data):
            position = os.fstat(writer._file.fileno()).st_size
            inode = os.fstat(writer._file.fileno()).st_ino
            at = len(recorder.events)
            real_append(writer, data)
            recorder.events.insert(at, ("write", inode, position, data))

        monkeypatch.setattr(journal.JournalWriter, "__init__", init)
        monkeypatch.setattr(journal.JournalWriter, "_append", append)


def state_after_cut(events: list[tuple[Any, ...]], rng: random.Random) -> dict[str, tuple[int, bytes]]:
    """Name -> inode, content of a directory whose power was cut after `events`; the rest is chance."""
    contents: dict[int, bytearray] = defaultdict(bytearray)
    pending: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    names: dict[str, int] = {}
    pending_names: list[tuple[Any, ...]] = []
    for event in events:
        kind = event[0]
        if kind in {"write", "size", "extend"}:
            pending[event[1]].append(event)
        elif kind == "sync":
            for change in pending.pop(event[1], []):
                _apply(contents[event[1]], change)
        elif kind == "names":
            for change in pending_names:
                _rename(names, change)
            pending_names = []
        else:
            pending_names.append(event)
    for change in pending_names[: rng.randint(0, len(pending_names))]:
        _rename(names, change)
    # Sizes and sectors reach the disk in no order; a journal that is appended to is torn.
    pieces = [(inode, piece) for inode, changes in pending.items() for change in changes for piece in _tear(change)]
    for inode, piece in pieces:
        if rng.random() < 0.5:
            _apply(contents[inode], piece)
    return {name: (inode, bytes(contents[inode])) for name, inode in names.items()}


def _tear(change: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    if change[0] != "write":
        return [change]
    _, inode, position, data = change
    return [("write", inode, position + i, data[i: i + SECTOR_BYTES]) for i in range(0, len(data), SECTOR_BYTES)]


def _apply(content: bytearray, change: tuple[Any, ...]) -> None:
    if change[0] == "write":
        _, _, position, data = change
        content.extend(bytes(max(0, position - len(content))))
        content[position: position + len(data)] = data
    elif change[0] == "size":
        del content[change[2]:]
        content.extend(bytes(change[2] - len(content)))
    else:
        content.extend(bytes(max(0, change[2] - len(content))))


def _rename(names: dict[str, int], change: tuple[Any, ...]) -> None:
    if change[0] == "create":
        names[change[1]] = change[2]
    else:
        names.pop(change[1], None)
        if change[0] == "rename":
            names[change[2]] = change[3]
