"""The journal of a conversion: which units of the `.partial` file are finished, so that a stopped run can go on.

One JSON object per line, each with a checksum of its own. The first describes the plan; then, batch by batch, the
finished units with position, size and checksums of output and source. A unit's line is written after its data was
synced to disk. A line that is torn or damaged costs its unit, never wrong bytes: the unit is done again.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4tools.errors import ResourceError, UsageError
from dsv4tools.files import sync_directory
from dsv4tools.outfile import explained

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

VERSION = 1
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
    identity:
        Field -> value of the plan that it belongs to; None where the first line is missing or damaged.
    shards:
        Shard name -> [mtime_ns, inode] as the last run saw them.
    units:
        By position, in the order in which they were finished.
    n_damaged:
        Lines that could not be used.
    """

    identity: dict[str, Any] | None = None
    shards: dict[str, Any] = field(default_factory=dict)
    units: dict[int, FinishedUnit] = field(default_factory=dict)
    n_damaged: int = 0


def read_journal(path: Path) -> JournalState:
    """Read whatever of a journal is whole; a missing file is an empty journal."""
    state = JournalState()
    try:
        with path.open("rb") as f:
            while line := f.readline(_MAX_LINE_BYTES):
                _add_line(state, line)
    except FileNotFoundError:
        return state
    except OSError as e:
        raise ResourceError(path, f"cannot be read: {e.strerror}") from None
    return state


def _add_line(state: JournalState, line: bytes) -> None:
    body, _, checksum = line.rpartition(b" ")
    if not line.endswith(b"\n") or checksum.strip() != _checksum(body):
        state.n_damaged += 1
        return
    entry = json.loads(body)   # cannot fail: the checksum says that we wrote it
    if "identity" in entry:
        if entry["version"] == VERSION:
            state.identity = entry["identity"]
    elif "shards" in entry:
        state.shards = entry["shards"]
    else:
        unit = FinishedUnit(*entry["unit"])
        state.units.pop(unit.position, None)   # the last word counts, and stands last
        state.units[unit.position] = unit


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)


def _encode(entry: Mapping[str, Any]) -> bytes:
    body = json.dumps(entry, separators=(",", ":"), sort_keys=True).encode()
    return body + b" " + _checksum(body) + b"\n"


def compare_identity(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """What differs between two plans, field by field, in words."""
    return [f"{key} is {_shown(now.get(key))}, was {_shown(then.get(key))}"
            for key in sorted({*now, *then}) if now.get(key) != then.get(key)]


def _shown(value: object) -> str:
    return "absent" if value is None else str(value)


class JournalWriter:
    """Appends to a journal. A new one replaces whatever was there in one step."""

    def __init__(self, path: Path, identity: Mapping[str, Any], shards: Mapping[str, Any],
                 units: Iterable[FinishedUnit] = ()) -> None:
        self._path = path
        fresh = path.with_name(path.name + ".new")
        lines = [_encode({"version": VERSION, "identity": identity}), _encode({"shards": shards})]
        lines += [_encode_unit(u) for u in units]
        with explained(path):
            with fresh.open("wb") as f:
                f.write(b"".join(lines))
                f.flush()
                os.fsync(f.fileno())   # a journal lost in a power cut would cost all work done
            fresh.replace(path)
            sync_directory(path.parent)
            self._file = path.open("ab", buffering=0)

    def append(self, units: Iterable[FinishedUnit]) -> None:
        """Record units whose data has been synced."""
        with explained(self._path):
            data = b"".join(_encode_unit(u) for u in units)
            while data:
                data = data[self._file.write(data):]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it stays for the next run."""
        self._file.close()


def _encode_unit(unit: FinishedUnit) -> bytes:
    return _encode({"unit": [unit.position, unit.n_bytes, unit.output, unit.source, unit.n_zeroed]})


def check_same_plan(path: Path, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """UsageError that shows both values of every field in which the interrupted conversion was another."""
    differences = compare_identity(now, then)
    if differences:
        raise UsageError(path, f"belongs to another conversion: {'; '.join(differences)}",
                         hint="give the options of that one to continue it, or --restart to begin anew")
