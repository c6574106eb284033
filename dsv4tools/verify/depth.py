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
from dsv4tools.workers import run_in_order

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

    totals = {t.name: _Total(t) for t in tensors}
    pieces = (piece for t in tensors for piece in _pieces(t))
    with closing(run_in_order(pieces, make_worker, threads)) as results:
        for piece, found in results:
            totals[piece.tensor.name].add(piece, found)
            if progress is not None:
                progress(piece.n_blocks * piece.tensor.format.block_bytes)
    return [t.check() for t in totals.values()], [f for t in totals.values() for f in t.findings(file.data_offset)]


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
    if target.name == "F64":   # nothing of a model is, so it is looked at and not measured
        odd = np.flatnonzero(~np.isfinite(data.view("<f8")))
        if len(odd):
            found.bad = piece.first_block + int(odd[0]), _not_finite(data.view("<f8")[odd[0]])
            found.n_bad = len(odd)
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
            found.bad = found.bad or ((piece.first_block + first) * target.block_values + at, _not_finite(values[at]))
    found.values = meter.result()
    return found


def _not_finite(value: float | np.floating) -> str:
    return f"is {'NaN' if np.isnan(value) else 'infinite'}"


class _Total:
    """All pieces of one tensor, added in their order."""

    def __init__(self, tensor: TensorInfo) -> None:
        self._tensor = tensor
        self._found = _Found(ScaleCounts())
        self._largest = [0.0] * _n_matrices(tensor)
        self._decodable = tensor.format.name in DECODABLE

    def add(self, piece: _Piece, found: _Found) -> None:
        """Take a piece in."""
        self._found.scales.add(found.scales)
        self._found.values.add(found.values)
        self._found.exponents += found.exponents
        self._found.bad = self._found.bad or found.bad
        self._found.n_bad += found.n_bad
        self._largest[piece.matrix] = max(self._largest[piece.matrix], found.values.highest, -found.values.lowest)

    def check(self) -> DepthCheck:
        """What the tensor is like."""
        tensor, found = self._tensor, self._found
        exponents = tuple(found.exponents.tolist()) if self._decodable else ()
        return DepthCheck(tensor.name, tensor.format.name, tensor.n_bytes, found.scales,
                          found.values if self._decodable else None, exponents, self._zeros())

    def _zeros(self) -> tuple[int, ...]:
        if not self._decodable or not self._tensor.n_bytes or self._found.values.n_not_finite:
            return ()
        return tuple(i for i, most in enumerate(self._largest) if most == 0)

    def findings(self, data_offset: int) -> Iterator[Finding]:
        """What is wrong or odd; `data_offset` is where the data section begins, 0 if there is no one place."""
        tensor, found, target = self._tensor, self._found, self._tensor.format
        start = data_offset + tensor.offset
        if found.scales.faults:
            block, _ = found.scales.faults[0]
            at = start + block * target.block_bytes if data_offset else None
            yield Finding("error", "block-scale", tensor.name, _name_blocks(tensor, found.scales), at)
        if found.bad:
            index, what = found.bad
            also = f", and {found.n_bad - 1:,} more such values" if found.n_bad > 1 else ""
            at = start + index * target.block_bytes if data_offset else None
            yield Finding("error", "value", tensor.name, f"{_place(tensor, index)} {what}{also}", at)
        if target.name == "F16" and found.values.n_large:
            text = (f"{found.values.n_large:,} values have the magnitude {_LARGEST_F16}, the largest of F16: they may "
                    f"have been clipped")
            yield Finding("warning", "f16-range", tensor.name, text, None)
        zeros = self._zeros()
        if zeros and len(tensor.ne) > 1:
            experts = ", ".join(map(str, zeros[:8])) + (" ..." if len(zeros) > 8 else "")
            text = f"all values of expert {experts} are 0" if len(tensor.ne) > 2 else "all values are 0"
            yield Finding("warning", "zeros", tensor.name, text, None)


def _name_blocks(tensor: TensorInfo, scales: ScaleCounts) -> str:
    """The first block that is not finite with its place and why, and the numbers of the next."""
    (block, what), *others = scales.faults
    text = f"block {block:,} ({_place(tensor, block * tensor.format.block_values)}): {what}"
    n_more = scales.n_not_finite - 1
    if not n_more:
        return text
    named = ", ".join(f"{number:,}" for number, _ in others)
    return f"{text}; {n_more:,} more such blocks: {named}" + (" ..." if n_more > len(others) else "")


def _place(tensor: TensorInfo, index: int) -> str:
    """``expert 3 row 100 column 0`` of the value with this flat index."""
    row, column = divmod(index, tensor.ne[0])
    if len(tensor.ne) < 3:
        return f"row {row} column {column}"
    expert, row = divmod(row, tensor.ne[1])
    return f"expert {expert} row {row} column {column}"
