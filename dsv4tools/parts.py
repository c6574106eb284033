"""A conversion by parts, for job arrays: each part writes its units to a file of its own, `assemble` joins them.

No machine writes into another's file, which network disks do not keep coherent. A part file is::

    magic, version, lengths | JSON: identity, part, parts, n_units | GGUF header | unit table | data, page aligned

with a table entry per unit: position in the output, bytes, checksum, values that were zeroed. The table is written
last, like any header here.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import re
import socket
import struct
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.convert import RunOptions, make_recheck, write_units
from dsv4tools.errors import Interrupted, UsageError, VerifyError
from dsv4tools.formats.codecs import prepare, self_test
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.gguf.regular import open_regular, read_bytes
from dsv4tools.identity import plan_identity, shard_states
from dsv4tools.journal import FinishedUnit, compare_identity
from dsv4tools.outfile import check_output, check_space
from dsv4tools.output import OutputFile, checksum
from dsv4tools.workers import choose_threads, run_units

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dsv4tools.plan import Plan, Unit

_MAGIC = b"DSV4PART"
_VERSION = 1
_LENGTHS = struct.Struct("<8sIIQQ")        # magic, version, JSON bytes, GGUF header bytes, units
_ENTRY = struct.Struct("<QQ16sQ")
_PAGE_BYTES = 4096
MAX_PARTS = 99_999
_PART_NAME = re.compile(r"\.part-(\d{5})-of-(\d{5})")


def part_path(out: Path, part: int, parts: int) -> Path:
    """Where part `part` (from 1) of `parts` of the output `out` is written."""
    return out.with_name(f"{out.name}.part-{part:05}-of-{parts:05}")


def parse_part(text: str) -> tuple[int, int]:
    """``"2/8"`` -> (2, 8); UsageError unless 1 <= 2 <= 8."""
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MAX_PARTS:
        raise UsageError("--part", f"is {text!r}, expected I/N with 1 <= I <= N <= {MAX_PARTS}")
    return int(match[1]), int(match[2])


def part_units(plan: Plan, part: int, parts: int) -> list[Unit]:
    """The units of a part: a run of consecutive ones, about 1/`parts` of the output's bytes."""
    units = list(plan.units())
    total = sum(u.n_bytes for u in units) or 1
    before = itertools.accumulate((u.n_bytes for u in units), initial=0)
    return [u for u, n in zip(units, before, strict=False) if n * parts // total == part - 1]


def convert_part(
    plan: Plan, out: Path, part: int, parts: int, *, overwrite: bool = False, run: RunOptions | None = None
) -> tuple[Path, bool]:
    """Write one part of the conversion of `plan` to `out`; its path, and whether it was there already.

    A part that exists and belongs to the same plan is left as it is, so a job may run twice. Errors as `convert`'s.
    """
    run = run or RunOptions()
    n_threads = choose_threads(run.threads)
    check_output(plan.checkpoint, out, overwrite=overwrite)
    path = part_path(out, part, parts)
    identity = plan_identity(plan) | {"part": f"{part}/{parts}"}
    if path.exists() and not overwrite:
        _check_same(path, identity, read_part(path).identity)
        return path, True
    units = part_units(plan, part, parts)
    about = {"identity": identity, "part": part, "parts": parts, "total_bytes": plan.total_bytes,
             "n_units": sum(1 for _ in plan.units())}
    description = json.dumps(about, sort_keys=True).encode()
    n_head = _LENGTHS.size + len(description) + len(plan.header) + len(units) * _ENTRY.size
    start = -(-n_head // _PAGE_BYTES) * _PAGE_BYTES
    positions = dict(zip(map(plan.position, units), itertools.accumulate((u.n_bytes for u in units), initial=start),
                         strict=False))
    n_bytes = start + sum(u.n_bytes for u in units)
    # Each host has files of its own on the way: a job that was moved never meets another host's lock.
    output = OutputFile(path, n_bytes, identity, shard_states(plan), recheck=_recheck_at(plan, positions),
                        restart=run.restart, steal_lock=run.steal_lock,
                        working_name=f"{path.name}.{socket.gethostname()}")
    check_space(path, n_bytes)
    prepare({t.format.name for t in plan.tensors} - {"I32"})
    self_test()
    with output:
        done = write_units(plan, output, units, lambda unit: positions[plan.position(unit)], n_threads, run)
        lengths = _LENGTHS.pack(_MAGIC, _VERSION, len(description), len(plan.header), len(units))
        head = [lengths, description, plan.header]
        head += [_ENTRY.pack(position, done[at].n_bytes, bytes.fromhex(done[at].output), done[at].n_zeroed)
                 for position, at in positions.items()]
        output.complete(b"".join(head), _check_readable)
    return path, False


def _recheck_at(plan: Plan, positions: dict[int, int]) -> Callable[[FinishedUnit, set[str]], bool]:
    recheck, back = make_recheck(plan), {at: position for position, at in positions.items()}

    def at_part(finished: FinishedUnit, changed: set[str]) -> bool:
        position = back.get(finished.position, -1)
        return recheck(FinishedUnit(position, finished.n_bytes, finished.output, finished.source), changed)

    return at_part


def _check_readable(path: Path) -> None:
    read_part(path)


def _check_same(path: Path, now: dict[str, Any], then: dict[str, Any]) -> None:
    differences = compare_identity(now, then)
    if differences:
        raise UsageError(path, f"is a part of another conversion: {'; '.join(differences)}",
                         hint="--overwrite replaces it")


@dataclass(frozen=True, slots=True)
class PartUnit:
    """A unit in a part file: where it lies there, where it belongs, its checksum, how many values were zeroed."""

    path: Path
    start: int
    position: int
    n_bytes: int
    checksum: str
    n_zeroed: int


@dataclass(frozen=True, slots=True)
class Part:
    """What a part file says."""

    path: Path
    identity: dict[str, Any]
    part: int
    parts: int
    n_units: int
    total_bytes: int
    header: bytes
    units: tuple[PartUnit, ...]


def read_part(path: Path) -> Part:
    """Read a part file's head; VerifyError if it is no part file, damaged or of another version."""
    fd, n_file_bytes = open_regular(path)
    try:
        magic, version, n_json, n_header, n_units = _LENGTHS.unpack(read_bytes(fd, 0, _LENGTHS.size, path))
        n_head = _LENGTHS.size + n_json + n_header + n_units * _ENTRY.size
        if magic != _MAGIC or version != _VERSION or n_head > n_file_bytes:
            raise VerifyError(path, "is no part file of this version", hint="run that part again")
        raw = read_bytes(fd, 0, n_head, path)
    finally:
        os.close(fd)
    at = _LENGTHS.size
    about, header = json.loads(raw[at: at + n_json]), bytes(raw[at + n_json: at + n_json + n_header])
    start, units = -(-n_head // _PAGE_BYTES) * _PAGE_BYTES, []
    for position, n_bytes, digest, n_zeroed in _ENTRY.iter_unpack(raw[at + n_json + n_header:]):
        units.append(PartUnit(path, start, position, n_bytes, digest.hex(), n_zeroed))
        start += n_bytes
    if start != n_file_bytes:
        raise VerifyError(path, f"has {n_file_bytes:,} bytes, its table describes {start:,}",
                          hint="run that part again")
    return Part(path, about["identity"], about["part"], about["parts"], about["n_units"], about["total_bytes"], header,
                tuple(units))


def find_parts(out: Path) -> list[Part]:
    """All parts of `out`, in order, complete and of one conversion.

    Raises
    ------
    UsageError
        There are none, some are missing (all are named), or they are not of one conversion.
    VerifyError
        One of them is damaged.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(out.parent.glob(glob_escape(out.name) + ".part-*")):
        match = _PART_NAME.fullmatch(path.name.removeprefix(out.name))
        if match:
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if not found:
        raise UsageError(out, "has no parts here", hint="write them with dsv4tools convert --part I/N")
    if len(found) > 1:
        raise UsageError(out, f"has parts of {' and of '.join(map(str, sorted(found)))}", hint="remove the wrong ones")
    parts, paths = found.popitem()
    missing = [part_path(out, i, parts).name for i in range(1, parts + 1) if i not in paths]
    if missing:
        raise UsageError(out, f"lacks {len(missing)} of {parts} parts: {', '.join(missing)}",
                         hint="run dsv4tools convert --part for these")
    read = [read_part(paths[i]) for i in range(1, parts + 1)]
    for part in read[1:]:
        _check_same(part.path, _common(part), _common(read[0]))
    if sum(len(p.units) for p in read) != read[0].n_units:
        raise VerifyError(out, f"parts hold {sum(len(p.units) for p in read)} units, expected {read[0].n_units}")
    return read


def _common(part: Part) -> dict[str, Any]:
    return {k: v for k, v in part.identity.items() if k != "part"}


def glob_escape(name: str) -> str:
    """`name` as a literal in a glob pattern."""
    return re.sub(r"([*?[])", r"[\1]", name)


def assemble(out: Path, *, overwrite: bool = False, run: RunOptions | None = None) -> tuple[list[Path], dict[str, int]]:
    """Join the parts of `out`, checking every unit; the same bytes as a conversion in one run.

    Returns the parts, and per tensor how many values were zeroed.

    Raises UsageError, VerifyError as `find_parts`; VerifyError for a unit that does not have its checksum;
    ResourceError and Interrupted as `convert`.
    """
    run = run or RunOptions()
    n_threads = choose_threads(run.threads)
    if out.exists() and not overwrite:
        raise UsageError(out, "exists", hint="--overwrite replaces it")
    parts = find_parts(out)
    total, header = parts[0].total_bytes, parts[0].header
    output = OutputFile(out, total, _common(parts[0]) | {"assembled from": len(parts)}, {},
                        recheck=lambda unit, changed: True, restart=run.restart, steal_lock=run.steal_lock)  # noqa: ARG005
    check_space(out, total)

    def make_worker(computing: threading.Semaphore) -> Callable[[PartUnit], FinishedUnit]:
        def work(unit: PartUnit) -> FinishedUnit:
            fd, _ = open_regular(unit.path)
            try:
                data = np.frombuffer(read_bytes(fd, unit.start, unit.n_bytes, unit.path), np.uint8)
            finally:
                os.close(fd)
            with computing:
                if checksum(data) != unit.checksum:
                    raise VerifyError(unit.path, f"is damaged at byte {unit.start:,}", hint="run that part again")
            return output.write(unit.position, data, unit.checksum)

        return work

    with output:
        todo = (u for part in parts for u in part.units if u.position not in output.finished)
        with closing(run_units(todo, make_worker, n_threads, run.stop)) as results:
            for _, finished in results:
                output.record(finished)
                if run.progress is not None:
                    run.progress(finished.n_bytes)
        output.flush()
        if run.stop.is_set():
            raise Interrupted(run.stop.signal_number, "stopped", hint=output.hint)
        output.complete(header, _check_gguf)
    return [part.path for part in parts], _zeroed_by_tensor(out, parts)


def _zeroed_by_tensor(out: Path, parts: Sequence[Part]) -> dict[str, int]:
    zeroed: dict[str, int] = {}
    faulty = [u for part in parts for u in part.units if u.n_zeroed]
    with open_gguf(out) as file:
        tensors = list(file.tensors.values())
        starts = [file.data_offset + t.offset for t in tensors]
        for unit in faulty:
            name = tensors[bisect.bisect_right(starts, unit.position) - 1].name
            zeroed[name] = zeroed.get(name, 0) + unit.n_zeroed
    return zeroed


def _check_gguf(path: Path) -> None:
    open_gguf(path).close()
