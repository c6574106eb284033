"""The journal of a conversion: which units of the `.partial` file are finished, so that a stopped run can go on.

One JSON object per line, each with a checksum of its own: first the plan, then the state of sources and partial file,
then, batch by batch, the finished units with position, size and checksums of output and source. A unit's line is
written after its data was synced to disk. A line that is torn or damaged costs its unit, never wrong bytes: the unit
is done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4tools.errors import ResourceError, UsageError
from dsv4tools.files import sync_directory
from dsv4tools.outfile import explained, open_own

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

VERSION = 1
BYTES_PER_UNIT = 256   # of disk space: a line has about 110, and there are two journals while one is replaced
_MAX_LINE_BYTES = 10_000_000


@dataclass(frozen=True, slots=True)
class FinishedUnit:
    """A unit whose bytes are on disk.

    `output` and `source` are checksums (xxh3, 128 bits, hex) of what was written and of what it was made from;
    `n_zeroed` counts the values that were not finite and became 0.
    """

    position: int
    n_bytes: int
    output: str
    source: str
    n_zeroed: int = 0


@dataclass
class JournalState:
    """What an existing journal says.

    Attributes
    ----------
    version, identity:
        Of the journal itself; field -> value of the plan that it belongs to. None where the first line is missing or
        damaged.
    shards:
        Shard name -> [mtime_ns, inode] as the last run saw them.
    inode:
        Of the partial file; of those of a split set a list.
    units:
        By position, in the order in which they were finished.
    complete:
        Whether the partial file was complete and checked, and about to get its name.
    n_damaged:
        Lines that could not be used.
    """

    version: int | None = None
    identity: dict[str, Any] | None = None
    shards: dict[str, Any] = field(default_factory=dict)
    inode: int | list[int] | None = None
    units: dict[int, FinishedUnit] = field(default_factory=dict)
    complete: bool = False
    n_damaged: int = 0


def read_journal(path: Path) -> JournalState:
    """Read whatever of a journal is whole; a missing file is an empty journal.

    ResourceError if it cannot be read, or is no regular file.
    """
    state = JournalState()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as f:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ResourceError(path, "is no regular file", hint="remove it")
            while line := f.readline(_MAX_LINE_BYTES):
                _add_line(state, line)
    except FileNotFoundError:
        return state
    except OSError as e:
        raise ResourceError(path, f"cannot be read: {e.strerror}") from None
    return state


def _add_line(state: JournalState, line: bytes) -> None:
    body, _, checksum = line.rpartition(b" ")
    if checksum != _checksum(body) + b"\n":
        state.n_damaged += 1
        return
    try:
        _add_entry(state, json.loads(body))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):   # not written by us, whatever it is
        state.n_damaged += 1


def _add_entry(state: JournalState, entry: dict[str, Any]) -> None:
    if "unit" in entry:
        unit = FinishedUnit(*entry["unit"])
        numbers = (unit.position, unit.n_bytes, unit.n_zeroed)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("numbers")
        if len(bytes.fromhex(unit.output)) != 16 or len(bytes.fromhex(unit.source)) != 16:
            raise ValueError("checksums")
        state.units.pop(unit.position, None)   # the last word counts, and stands last
        state.units[unit.position] = unit
    elif "identity" in entry:
        state.version, state.identity = int(entry["version"]), dict(entry["identity"])
    elif "shards" in entry:
        shards, inode = entry["shards"], entry["inode"]
        if not isinstance(shards, dict):
            raise ValueError("shards")
        inode = [int(each) for each in inode] if isinstance(inode, list) else int(inode)
        state.shards, state.inode = shards, inode
    else:
        state.complete = entry["complete"] is True


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)


def _encode(entry: Mapping[str, Any]) -> bytes:
    return _close_line(json.dumps(entry, separators=(",", ":"), sort_keys=True).encode())


def _encode_unit(u: FinishedUnit) -> bytes:
    # By hand, four times as fast as json: a large model has 400,000 of them.
    return _close_line(f'{{"unit":[{u.position},{u.n_bytes},"{u.output}","{u.source}",{u.n_zeroed}]}}'.encode())


def _close_line(body: bytes) -> bytes:
    return body + b" " + _checksum(body) + b"\n"


class JournalWriter:
    """Appends to a journal. A new one replaces whatever was there in one step.

    Parameters
    ----------
    path:
        Of the journal.
    identity, shards, inode, units:
        As in `JournalState`.
    hint:
        What the user can do when the journal cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], shards: Mapping[str, Any], inode: int | list[int], *,
                 units: Iterable[FinishedUnit] = (), hint: str = "") -> None:
        self._path, self._hint = path, hint
        fresh = path.with_name(path.name + ".new")
        fd = open_own(fresh)
        try:
            with explained(path, hint=hint):
                with os.fdopen(fd, "wb") as f:
                    f.truncate(0)
                    f.write(_encode({"version": VERSION, "identity": identity}))
                    f.write(_encode({"shards": shards, "inode": inode}))
                    f.writelines(map(_encode_unit, units))
                    f.flush()
                    os.fsync(f.fileno())   # a journal lost in a power cut would cost all work done
                fresh.replace(path)
                sync_directory(path.parent)
                self._file = path.open("ab", buffering=0)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise

    def append(self, units: Iterable[FinishedUnit]) -> None:
        """Record units whose data has been synced."""
        self._append(b"".join(map(_encode_unit, units)))

    def mark_complete(self) -> None:
        """Record that the file is complete and checked, before it gets its name."""
        self._append(_encode({"complete": True}))

    def _append(self, data: bytes) -> None:
        with explained(self._path, hint=self._hint):
            while data:
                data = data[self._file.write(data):]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it stays for the next run."""
        self._file.close()


def compare_identity(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """What differs between two plans, field by field, in words."""
    return [f"{key} is {_shown(now.get(key))}, was {_shown(then.get(key))}"
            for key in sorted({*now, *then}) if now.get(key) != then.get(key)]


def _shown(value: object) -> str:
    return "absent" if value is None else str(value)


def check_same_plan(path: Path, now: Mapping[str, Any], state: JournalState) -> None:
    """UsageError that shows both values of every field in which the interrupted conversion was another.

    A journal without its first line says nothing and is not refused: nothing in it will be used.
    """
    if state.identity is None:
        return
    differences = compare_identity(now, state.identity)
    if state.version != VERSION:
        differences.insert(0, f"journal version is {VERSION}, was {state.version}")
    if differences:
        raise UsageError(path, f"belongs to another conversion: {'; '.join(differences)}",
                         hint="give the options of that one to continue it, or --restart to begin anew")
