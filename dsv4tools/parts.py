"""A conversion by parts, for job arrays: each part writes its units to a file of its own, `assemble` joins them.

No machine writes into another's file, which network disks do not keep coherent. A part file is::

    magic, version, lengths, checksum | JSON: identity, part, parts, n_units | GGUF header | unit table | data

with a table entry per unit: position in the output, bytes, checksum, values that were zeroed. The data begins on a
page. The first checksum is that of all between itself and the data: damage anywhere in a part is noticed. What stands
before the data is written last, like any header here.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import re
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from dsv4tools.checksum import checksum
from dsv4tools.convert import make_recheck, record_all, write_units
from dsv4tools.errors import Interrupted, ResourceError, UsageError, VerifyError
from dsv4tools.files import insist, pread_all
from dsv4tools.formats.codecs import prepare, self_test
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.gguf.regular import open_regular, read_bytes
from dsv4tools.hub.stream import plan_stream
from dsv4tools.identity import plan_identity, shard_states
from dsv4tools.journal import BYTES_PER_UNIT, FinishedUnit, compare_identity
from dsv4tools.manifest import write_manifest
from dsv4tools.options import RunOptions
from dsv4tools.outfile import WORKING_SUFFIXES, check_not_input, check_output, check_place, check_space
from dsv4tools.output import OutputFile, discard_leftovers, was_completed
from dsv4tools.workers import choose_threads, run_units

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dsv4tools.plan import Plan, Unit

_MAGIC = b"DSV4PART"
_VERSION = 1
_LENGTHS = struct.Struct("<8sIIQQ16s")     # magic, version, JSON bytes, GGUF header bytes, units, checksum
_ENTRY = struct.Struct("<QQ16sQ")
_PAGE_BYTES = 4096
MAX_PARTS = 99_999
_PART_NAME = re.compile(r"\.part-([0-9]{5})-of-([0-9]{5})")


def part_path(out: Path, part: int, parts: int) -> Path:
    """Where part `part` (from 1) of `parts` of the output `out` is written."""
    return out.with_name(f"{out.name}.part-{part:05}-of-{parts:05}")


def parse_part(text: str) -> tuple[int, int]:
    """``"2/8"`` -> (2, 8); UsageError unless 1 <= 2 <= 8."""
    match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
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

    A part that is there is read through: if it is whole and belongs to the same plan it is left as it is, so a job may
    run twice; if it is damaged it is written again. Errors as `convert`'s.
    """
    run = run or RunOptions()
    n_threads = choose_threads(run.threads)
    if len(plan.files) > 1:
        raise UsageError("--part", "is for an output of one file", hint="assemble it, then split it: dsv4tools convert "
                         "OUT.gguf SET.gguf --policy keep --split-max-size SIZE")
    plan_stream(plan, run)   # for its refusals
    check_output(plan.checkpoint, out, overwrite=overwrite)
    path = part_path(out, part, parts)
    check_not_input(path, [shard.path for shard in plan.checkpoint.shards.values()])
    identity = plan_identity(plan) | {"part": f"{part}/{parts}"}
    # Each host has files of its own on the way: a job that was moved never meets another host's lock.
    working_name = f"{path.name}.{socket.gethostname()}"
    if path.exists() and not overwrite and _is_whole(path, identity, run):
        discard_leftovers(path, working_name)
        return path, True
    units = part_units(plan, part, parts)
    about = {"identity": identity, "part": part, "parts": parts, "total_bytes": plan.total_bytes,
             "n_units": plan.n_units}
    description = json.dumps(about, sort_keys=True).encode()
    n_head = _LENGTHS.size + len(description) + len(plan.header) + len(units) * _ENTRY.size
    start = -(-n_head // _PAGE_BYTES) * _PAGE_BYTES
    positions = dict(zip(map(plan.position, units), itertools.accumulate((u.n_bytes for u in units), initial=start),
                         strict=False))
    n_bytes = start + sum(u.n_bytes for u in units)
    output = OutputFile(path, n_bytes, identity, shard_states(plan), recheck=_recheck_at(plan, positions), run=run,
                        extents=lambda: ((positions[plan.position(u)], u.n_bytes) for u in units),
                        working_name=working_name)
    check_space(path, n_bytes + BYTES_PER_UNIT * len(units), output.partials)
    prepare(plan.kernels)
    self_test()
    with output:
        if not output.completed:
            write_units(plan, output, units, lambda unit: positions[plan.position(unit)], n_threads, run)
            table = b"".join(
                _ENTRY.pack(position, done.n_bytes, bytes.fromhex(done.output), done.n_zeroed)
                for position, done in ((p, output.finished[at]) for p, at in positions.items())
            )
            head = description + plan.header + table
            lengths = (_MAGIC, _VERSION, len(description), len(plan.header), len(units))
            output.complete(_LENGTHS.pack(*lengths, xxhash.xxh3_128_digest(head)) + head, _check_readable)
    return path, False


def _recheck_at(plan: Plan, positions: dict[int, int]) -> Callable[[FinishedUnit, set[str]], bool]:
    recheck, back = make_recheck(plan), {at: position for position, at in positions.items()}

    def at_part(finished: FinishedUnit, changed: set[str]) -> bool:
        position = back.get(finished.position, -1)
        return recheck(FinishedUnit(position, finished.n_bytes, finished.output, finished.source), changed)

    return at_part


def _check_readable(path: Path) -> None:
    read_part(path)


def _is_whole(path: Path, identity: dict[str, Any], run: RunOptions) -> bool:
    """Whether the part that is there is right in every byte; UsageError if it is of another conversion."""
    try:
        part = read_part(path)
        _check_same(path, identity, part.identity)
        for unit in part.units:
            if run.stop.is_set():
                raise Interrupted(run.stop.signal_number, "stopped", hint="run the same command again to continue")
            read_unit(unit)
            run.advance(unit.n_bytes)
    except VerifyError as e:
        run.tell(f"{path}: {e.what}: it is written again")
        return False
    return True


def _check_same(path: Path, now: dict[str, Any], then: dict[str, Any]) -> None:
    differences = compare_identity(now, then)
    if differences:
        raise UsageError(path, f"is a part of another conversion: {'; '.join(differences)}",
                         hint="convert --overwrite replaces it")


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
    hint = _run_again(path)
    try:
        if n_file_bytes < _LENGTHS.size:
            raise VerifyError(path, f"has {n_file_bytes} bytes, too few for a part", hint=hint)
        raw = read_bytes(fd, 0, _LENGTHS.size, path)
        magic, version, n_json, n_header, n_units, digest = _LENGTHS.unpack(raw)
        n_head = n_json + n_header + n_units * _ENTRY.size
        if magic != _MAGIC or version != _VERSION or _LENGTHS.size + n_head > n_file_bytes:
            raise VerifyError(path, "is no part file of this version", hint=hint)
        head = read_bytes(fd, _LENGTHS.size, n_head, path)
    finally:
        os.close(fd)
    if xxhash.xxh3_128_digest(head) != digest:
        raise VerifyError(path, "is damaged before its data", hint=hint)
    start, units = -(-(_LENGTHS.size + n_head) // _PAGE_BYTES) * _PAGE_BYTES, []
    for position, n_bytes, unit_digest, n_zeroed in _ENTRY.iter_unpack(memoryview(head)[n_json + n_header:]):
        units.append(PartUnit(path, start, position, n_bytes, unit_digest.hex(), n_zeroed))
        start += n_bytes
    if start != n_file_bytes:
        raise VerifyError(path, f"has {n_file_bytes:,} bytes, its table describes {start:,}", hint=hint)
    try:
        about = json.loads(head[:n_json])
        return Part(path, dict(about["identity"]), int(about["part"]), int(about["parts"]), int(about["n_units"]),
                    int(about["total_bytes"]), bytes(head[n_json: n_json + n_header]), tuple(units))
    except (ValueError, TypeError, KeyError):
        raise VerifyError(path, "does not describe itself as a part does", hint=hint) from None


def read_unit(unit: PartUnit) -> NDArray[np.uint8]:
    """A unit's bytes, uint8 [n_bytes]; VerifyError if they do not have their checksum, ResourceError on failure."""
    data = np.zeros(unit.n_bytes, np.uint8)

    def attempt() -> int:
        fd = os.open(unit.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return pread_all(fd, data.data, unit.start)
        finally:
            os.close(fd)

    try:
        n_read = insist(attempt)
    except OSError as e:
        raise ResourceError(unit.path, f"read failed at byte {unit.start:,}: {e.strerror}") from None
    if n_read != unit.n_bytes or checksum(data) != unit.checksum:
        raise VerifyError(unit.path, f"is damaged between bytes {unit.start:,} and {unit.start + unit.n_bytes:,}",
                          hint=_run_again(unit.path))
    return data


def _run_again(path: Path) -> str:
    match = _PART_NAME.search(path.name)
    return f"run dsv4tools convert --part {int(match[1])}/{int(match[2])} again" if match else "write it again"


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
    for i, part in enumerate(read, 1):
        if (part.part, part.parts) != (i, parts):
            raise VerifyError(part.path, f"is part {part.part} of {part.parts} by its content",
                              hint="give it back its name")
        _check_same(part.path, _common(part), _common(read[0]))
    _check_cover(out, read)
    return read


def _check_cover(out: Path, parts: Sequence[Part]) -> None:
    """VerifyError unless the units of all parts are as many as they must be, in order and without overlap."""
    units = [u for part in parts for u in part.units]
    if len(units) != parts[0].n_units:
        raise VerifyError(out, f"parts hold {len(units)} units, expected {parts[0].n_units}")
    end = len(parts[0].header)
    for unit in units:
        if unit.position < end:
            raise VerifyError(unit.path, f"has a unit at byte {unit.position:,} of the output, where another one lies")
        end = unit.position + unit.n_bytes
    if end > parts[0].total_bytes:
        raise VerifyError(out, f"parts reach to byte {end:,}, the output has {parts[0].total_bytes:,}")


def _common(part: Part) -> dict[str, Any]:
    return {k: v for k, v in part.identity.items() if k != "part"}


def glob_escape(name: str) -> str:
    """`name` as a literal in a glob pattern."""
    return re.sub(r"([*?[])", r"[\1]", name)


@dataclass(frozen=True, slots=True)
class Assembly:
    """What `assemble` did: the file, the parts it is from, and per tensor how many values were zeroed.

    `leftovers` are files of interrupted runs of `convert --part`; nothing needs them any more.
    """

    path: Path
    n_bytes: int
    parts: tuple[Path, ...]
    leftovers: tuple[Path, ...]
    zeroed: dict[str, int]


def assemble(
    out: Path, *, overwrite: bool = False, manifest: Path | None = None, run: RunOptions | None = None
) -> Assembly:
    """Join the parts of `out`, checking every unit; the same bytes as a conversion in one run.

    Raises
    ------
    UsageError
        `out` or `manifest` exists; errors of `find_parts`.
    VerifyError
        A unit does not have its checksum; errors of `find_parts`.
    ResourceError, Interrupted
        As `convert`.
    """
    run = run or RunOptions()
    n_threads = choose_threads(run.threads)
    parts = find_parts(out)
    total, header = parts[0].total_bytes, parts[0].header
    identity = _common(parts[0]) | {"assembled from": f"{len(parts)} parts"}
    check_not_input(out, [part.path for part in parts])
    done_before = was_completed(out, identity)
    check_place(out, overwrite=overwrite or done_before)
    if manifest is not None:
        check_not_input(manifest, [out, *(part.path for part in parts)])
        check_place(manifest, overwrite=overwrite)
    units = [u for part in parts for u in part.units]
    if not done_before:
        check_space(out, total + BYTES_PER_UNIT * len(units))
    output = OutputFile(out, total, identity, {}, extents=lambda: ((u.position, u.n_bytes) for u in units),
                        recheck=lambda unit, changed: True, run=run)  # noqa: ARG005  - a part has no sources

    def make_worker(computing: threading.Semaphore) -> Callable[[PartUnit], FinishedUnit]:  # noqa: ARG001  - for reading and writing only
        return lambda unit: output.write(unit.position, read_unit(unit), unit.checksum, unit.n_zeroed)

    with output:
        if not output.completed:
            todo = (u for u in units if u.position not in output.finished)
            record_all(run_units(todo, make_worker, n_threads, run.stop), output, run)
            output.complete(header, _check_gguf)
        zeroed = _zeroed_by_tensor(out, units)
        if manifest is not None:
            write_manifest([out], manifest, zeroed, stop=run.stop)
    paths = tuple(part.path for part in parts)
    return Assembly(out, total, paths, _find_leftovers(paths), zeroed)


def _find_leftovers(parts: Sequence[Path]) -> tuple[Path, ...]:
    """The working files of parts: every host has its own."""
    return tuple(p for part in parts for p in sorted(part.parent.glob(glob_escape(part.name) + ".*"))
                 if p.suffix in WORKING_SUFFIXES)


def _zeroed_by_tensor(out: Path, units: Sequence[PartUnit]) -> dict[str, int]:
    zeroed: dict[str, int] = {}
    faulty = [u for u in units if u.n_zeroed]
    with open_gguf(out) as file:
        tensors = list(file.tensors.values())
        starts = [file.data_offset + t.offset for t in tensors]
        for unit in faulty:
            name = tensors[bisect.bisect_right(starts, unit.position) - 1].name
            zeroed[name] = zeroed.get(name, 0) + unit.n_zeroed
    return zeroed


def _check_gguf(path: Path) -> None:
    open_gguf(path).close()
