"""Looking at every block of a file without its source: scales and values that cannot be right, and statistics."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats import measure
from dsv4tools.formats.codecs import DECODABLE, decode_rows, prepare, self_test
from dsv4tools.formats.measure import N_EXPONENTS, ValueMeter, ValueSums, count_exponents
from dsv4tools.formats.scales import SCALE_FIELDS, ScaleCounts, check_scales
from dsv4tools.gguf.reader import Finding
from dsv4tools.template.tables import load_tables
from dsv4tools.verify.report import DepthCheck
from dsv4tools.workers import run_units

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from dsv4tools.gguf.header import TensorInfo
    from dsv4tools.gguf.reader import GgufFile

MAX_PIECE_VALUES = 1 << 22   # read at a time
CHUNK_VALUES = 1 << 17       # decoded at a time: 512 kB, which a core's cache holds
SAMPLED_VALUES = 1 << 13     # of each chunk, whose exponents are counted
_LARGEST_F16 = 65504


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of blocks inside one matrix of a tensor."""

    tensor: TensorInfo
    matrix: int
    first_block: int
    n_blocks: int


@dataclass(slots=True)
class _Found:
    """What a piece holds. `bad` is the first value that is wrong by itself: its flat index in the tensor, and why."""

    scales: ScaleCounts
    values: ValueSums = field(default_factory=ValueSums)
    exponents: NDArray[np.int64] = field(default_factory=lambda: np.zeros(N_EXPONENTS, np.int64))
    bad: tuple[int, str] | None = None
    n_bad: int = 0


def look_deep(
    file: GgufFile, names: Sequence[str], *, threads: int, progress: Callable[[int], None] | None = None
) -> tuple[list[DepthCheck], list[Finding]]:
    """Scan all blocks of the tensors `names`.

    Errors: scales and values that are NaN or infinite, and expert ids beyond the experts that there are. Warnings:
    experts or matrices of zeros only, and values at the end of F16's range. Raises ResourceError where reading fails.
    """
    tensors = [file.tensors[name] for name in names]
    decoded = {t.format.name for t in tensors} & DECODABLE
    prepare(decoded)
    measure.prepare()
    self_test()
    limits = _id_limits(file)

    def make_worker(computing: threading.Semaphore) -> Callable[[_Piece], _Found]:
        room, values = np.zeros(0, np.uint8), np.zeros(CHUNK_VALUES, np.float32)

        def work(piece: _Piece) -> _Found:
            nonlocal room
            n_bytes = piece.n_blocks * piece.tensor.format.block_bytes
            if len(room) < n_bytes:
                room = np.zeros(n_bytes, np.uint8)
            data = room[:n_bytes]
            file.read_tensor_into(piece.tensor.name, data, piece.first_block * piece.tensor.format.block_bytes)
            with computing:
                return _look(piece, data, values, limits.get(piece.tensor.name))

        return work

    found: dict[str, dict[tuple[int, int], _Found]] = {t.name: {} for t in tensors}
    pieces = (piece for t in tensors for piece in _pieces(t))
    with closing(run_units(pieces, make_worker, threads)) as results:
        for piece, outcome in results:
            found[piece.tensor.name][piece.matrix, piece.first_block] = outcome
            if progress is not None:
                progress(piece.n_blocks * piece.tensor.format.block_bytes)
    checks, findings = [], []
    for tensor in tensors:
        check, of_tensor = _conclude(tensor, found.pop(tensor.name), file)
        checks.append(check)
        findings += of_tensor
    return checks, findings


def _id_limits(file: GgufFile) -> dict[str, int]:
    """How many experts there are, for every routing table."""
    tables = load_tables()
    n_experts = file.value(f"{tables.architecture}.expert_count")
    if type(n_experts) is not int:
        return {}
    suffixes = tuple(row.name.rpartition("}")[2] for row in tables.tensors if row.integers)
    return {name: n_experts for name, t in file.tensors.items() if t.format.name == "I32" and name.endswith(suffixes)}


def _n_matrices(tensor: TensorInfo) -> int:
    return prod(tensor.ne[2:])


def _pieces(tensor: TensorInfo) -> Iterator[_Piece]:
    n_matrices = _n_matrices(tensor)
    n_blocks = tensor.n_bytes // tensor.format.block_bytes
    each = n_blocks // max(1, n_matrices)
    step = max(1, MAX_PIECE_VALUES // tensor.format.block_values)
    for matrix in range(n_matrices if n_blocks else 0):
        for first in range(0, each, step):
            yield _Piece(tensor, matrix, matrix * each + first, min(step, each - first))


def _look(piece: _Piece, data: NDArray[np.uint8], room: NDArray[np.float32], limit: int | None) -> _Found:
    target = piece.tensor.format
    found = _Found(check_scales(data, target, piece.first_block) if target.name in SCALE_FIELDS else ScaleCounts())
    if limit is not None:
        ids = data.view("<i4")
        bad = np.flatnonzero((ids < 0) | (ids >= limit))
        if len(bad):
            text = f"routes to expert {ids[bad[0]]}, expected 0 to {limit - 1}"
            found.bad, found.n_bad = (piece.first_block + int(bad[0]), text), len(bad)
    if target.name not in DECODABLE:
        return found
    step = max(1, CHUNK_VALUES // target.block_values)
    meter = ValueMeter()
    for first in range(0, piece.n_blocks, step):
        n = min(step, piece.n_blocks - first)
        values = room[: n * target.block_values]
        decode_rows(data[first * target.block_bytes : (first + n) * target.block_bytes], target, 1, len(values),
                    values[None])
        fine = meter.take(values)
        count_exponents(values[:SAMPLED_VALUES], found.exponents)
        if not fine and target.name not in SCALE_FIELDS:   # else the scales have said it
            bad = np.flatnonzero(~np.isfinite(values))
            at = int(bad[0])
            found.n_bad += len(bad)
            text = f"is {'NaN' if np.isnan(values[at]) else 'infinite'}"
            found.bad = found.bad or ((piece.first_block + first) * target.block_values + at, text)
    found.values = meter.result()
    return found


def _conclude(
    tensor: TensorInfo, pieces: dict[tuple[int, int], _Found], file: GgufFile
) -> tuple[DepthCheck, list[Finding]]:
    total = _Found(ScaleCounts())
    largest = [0.0] * _n_matrices(tensor)
    for matrix, first in sorted(pieces):
        piece = pieces[matrix, first]
        total.scales.add(piece.scales)
        total.values.add(piece.values)
        total.exponents += piece.exponents
        total.bad = total.bad or piece.bad
        total.n_bad += piece.n_bad
        largest[matrix] = max(largest[matrix], piece.values.highest, -piece.values.lowest)
    decodable = tensor.format.name in DECODABLE
    zeros = tuple(i for i, most in enumerate(largest) if most == 0) if decodable and tensor.n_bytes else ()
    check = DepthCheck(
        tensor.name, tensor.format.name, tensor.n_bytes, total.scales, total.values if decodable else None,
        tuple(total.exponents.tolist()) if decodable else (), zeros,
    )
    return check, list(_findings(tensor, total, zeros, file))


def _findings(tensor: TensorInfo, total: _Found, zeros: Sequence[int], file: GgufFile) -> Iterator[Finding]:
    target = tensor.format
    if total.scales.faults:
        block, what = total.scales.faults[0]
        more = total.scales.n_not_finite - 1
        named = ", ".join(f"{b:,}" for b, _ in total.scales.faults[1:])
        text = f"block {block:,} ({_place(tensor, block * target.block_values)}): {what}"
        if more:
            text += f"; {more:,} more such blocks: {named}" + (" ..." if more > len(total.scales.faults) - 1 else "")
        at = file.data_offset + tensor.offset + block * target.block_bytes if file.data_offset else None
        yield Finding("error", "block-scale", tensor.name, text, at)
    if total.bad:
        index, what = total.bad
        also = f", and {total.n_bad - 1:,} more such values" if total.n_bad > 1 else ""
        at = file.data_offset + tensor.offset + index * target.block_bytes if file.data_offset else None
        yield Finding("error", "value", tensor.name, f"{_place(tensor, index)} {what}{also}", at)
    n_large = total.values.n_large if target.name == "F16" else 0
    if n_large:
        text = f"{n_large:,} values have the magnitude {_LARGEST_F16}, the largest of F16: they may have been clipped"
        yield Finding("warning", "f16-range", tensor.name, text, None)
    if zeros and len(tensor.ne) > 1:
        experts = ", ".join(map(str, zeros[:8])) + (" ..." if len(zeros) > 8 else "")
        text = f"all values of expert {experts} are 0" if len(tensor.ne) > 2 else "all values are 0"
        yield Finding("warning", "zeros", tensor.name, text, None)


def _place(tensor: TensorInfo, index: int) -> str:
    """``expert 3 row 100 column 0`` of the value with this flat index."""
    row, column = divmod(index, tensor.ne[0])
    if len(tensor.ne) < 3:
        return f"row {row} column {column}"
    expert, row = divmod(row, tensor.ne[1])
    return f"expert {expert} row {row} column {column}"
