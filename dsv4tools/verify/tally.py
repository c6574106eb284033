"""Comparing a file with its source, unit by unit: bytes, errors, and where they are. Nothing is judged here."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.derive import UnitDeriver
from dsv4tools.formats import measure
from dsv4tools.formats.codecs import DECODABLE, ENCODABLE, decode_rows, decode_source, prepare, self_test
from dsv4tools.formats.measure import ErrorSums, measure_cells, measure_errors
from dsv4tools.plan import NAN_KEY, PlannedTensor
from dsv4tools.workers import run_in_order

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.formats.source import SourceRows
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.plan import Unit

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]

CHUNK_VALUES = 1 << 16      # decoded at a time: 256 kB for each side, which a core's cache holds
MEASURED_OF = 8             # where bytes are identical, every eighth chunk is measured: it cannot hide anything
CELL_VALUES = 256           # errors are looked at in runs of so many values
# A cell is wrong where its RMSE is over four times that of our own encoding of it, and over 1 % of its values' own.
CELL_RATIO, CELL_FLOOR = 4.0, 0.01
N_SEGMENTS = 16             # of a tensor, by which is told whether differences are everywhere or in one place
N_KEPT = 64                 # places that are kept for naming; the rest is counted


@dataclass(slots=True)
class MatrixTally:
    """What was found in one source matrix of a tensor: an expert, or all of it.

    Attributes
    ----------
    n_bytes, n_different:
        Compared, and those of them that differ from our encoding.
    n_blocks, n_blocks_different, blocks:
        Likewise in blocks; and the numbers of the first that differ, counted from the tensor's first.
    segments:
        In which sixteenths of the tensor blocks differ.
    first:
        The tensor's byte that differs first, and a description of it; -1 and nothing where none does.
    found, own:
        Errors of the file and of our encoding.
    n_measured:
        Values that they were measured on.
    n_wrong_cells, n_cells, cells:
        Cells whose errors are beyond bounds, of as many as were looked at, and where the first of them begin (flat
        index in the tensor): one in each run of rows that share scales in the source.
    squared_in_cells:
        The part of the squared error that lies in wrong cells.
    """

    n_bytes: int = 0
    n_different: int = 0
    n_blocks: int = 0
    n_blocks_different: int = 0
    blocks: list[int] = field(default_factory=list)
    segments: frozenset[int] = frozenset()
    first: tuple[int, str] = (-1, "")
    found: ErrorSums = field(default_factory=ErrorSums)
    own: ErrorSums = field(default_factory=ErrorSums)
    n_measured: int = 0
    n_wrong_cells: int = 0
    n_cells: int = 0
    cells: list[int] = field(default_factory=list)
    squared_in_cells: float = 0.0

    def add(self, other: MatrixTally) -> None:
        """Take another unit of the same matrix in."""
        self.n_bytes += other.n_bytes
        self.n_different += other.n_different
        self.n_blocks += other.n_blocks
        self.n_blocks_different += other.n_blocks_different
        self.blocks = sorted([*self.blocks, *other.blocks])[:N_KEPT]
        self.segments |= other.segments
        if self.first[0] < 0 or 0 <= other.first[0] < self.first[0]:
            self.first = other.first
        self.found.add(other.found)
        self.own.add(other.own)
        self.n_measured += other.n_measured
        self.n_wrong_cells += other.n_wrong_cells
        self.n_cells += other.n_cells
        self.cells = sorted([*self.cells, *other.cells])[:N_KEPT]
        self.squared_in_cells += other.squared_in_cells


@dataclass
class TensorTally:
    """What was found in one tensor: its matrices in order, those without a compared unit left at zero."""

    planned: PlannedTensor
    matrices: list[MatrixTally]

    @cached_property
    def whole(self) -> MatrixTally:
        """All matrices together."""
        total = MatrixTally()
        for matrix in self.matrices:
            total.add(matrix)
        return total


def prepare_kernels(planned: Iterable[PlannedTensor]) -> None:
    """Compile or load what comparing needs, and test it; Dsv4Error names a kernel that computes wrongly."""
    prepare(name for t in planned for name in t.kernels)
    measure.prepare()
    self_test()


def matrix_of(unit: Unit) -> int:
    """Which of its tensor's matrices a unit belongs to."""
    return unit.start * len(unit.planned.tensor.sources) // max(1, unit.planned.n_bytes)


class UnitComparer:
    """Reads one unit after the other from file and source, and compares: one per worker, with buffers of its own."""

    def __init__(self, file: GgufFile, checkpoint: Checkpoint) -> None:
        self._file = file
        self._deriver = UnitDeriver(checkpoint.config.n_routed_experts, zero_nan=file.value(NAN_KEY) == "zero")
        self._held = np.zeros(0, np.uint8)
        self._rooms: dict[str, Floats] = {}

    def read(self, unit: Unit) -> tuple[SourceRows | NDArray[np.int32], Bytes]:
        """Its source rows, and its bytes in the file; valid until the next call."""
        rows = self._deriver.read(unit)
        if len(self._held) < unit.n_bytes:
            self._held = np.zeros(unit.n_bytes, np.uint8)
        found = self._held[: unit.n_bytes]
        self._file.read_tensor_into(unit.planned.name, found, unit.start)
        return rows, found

    def compare(self, unit: Unit, rows: SourceRows | NDArray[np.int32], found: Bytes) -> MatrixTally:
        """Encode the unit and compare; errors of `UnitDeriver.encode`."""
        target = unit.planned.format
        tally = MatrixTally(n_bytes=unit.n_bytes)
        own: Bytes | None = None
        if target.name in ENCODABLE | {"I32"} or target == unit.matrix.blocks:
            own, _ = self._deriver.encode(unit, rows)
            _compare_bytes(unit, found, own, tally)
        if not isinstance(rows, np.ndarray) and target.name in DECODABLE:
            self._measure(unit, rows, found, own, tally)
        return tally

    def _measure(self, unit: Unit, rows: SourceRows, found: Bytes, own: Bytes | None, tally: MatrixTally) -> None:
        """Errors of `found`, and of `own` if it is not the same; of a part of the rows where it is the same."""
        n_cols, target = unit.matrix.n_cols, unit.planned.format
        row_bytes = unit.n_bytes // unit.n_rows if unit.n_rows else 0
        step = max(1, CHUNK_VALUES // max(1, n_cols))
        starts = range(0, unit.n_rows, step)
        identical = own is not None and not tally.n_different
        if identical and len(starts) >= MEASURED_OF:
            starts = starts[::MEASURED_OF]
        for first in starts:
            n = min(step, unit.n_rows - first)
            at = (unit.start // row_bytes + first) * n_cols   # flat index in the tensor
            source = self._room("source", n, n_cols)
            decode_source(rows.cut(first, n), source)
            decoded = self._room("found", n, n_cols)
            decode_rows(found[first * row_bytes : (first + n) * row_bytes], target, n, n_cols, decoded)
            tally.n_measured += source.size
            tally.found.add(_shifted(measure_errors(decoded, source), at))
            if identical:
                continue
            if own is None:
                _count_cells(unit, decoded, source, None, at, tally=tally)
                continue
            ours = self._room("own", n, n_cols)
            decode_rows(own[first * row_bytes : (first + n) * row_bytes], target, n, n_cols, ours)
            tally.own.add(_shifted(measure_errors(ours, source), at))
            _count_cells(unit, decoded, source, ours, at, tally=tally)
        if identical:
            tally.found = tally.found.times(unit.n_rows * n_cols / max(1, tally.n_measured))
            tally.own = replace(tally.found)

    def _room(self, name: str, n_rows: int, n_cols: int) -> Floats:
        room = self._rooms.get(name)
        if room is None or room.size < n_rows * n_cols:
            room = self._rooms[name] = np.empty(n_rows * n_cols, np.float32)
        return room[: n_rows * n_cols].reshape(n_rows, n_cols)


def compare_units(
    file: GgufFile, checkpoint: Checkpoint, planned: Sequence[PlannedTensor], units: Iterable[Unit], *, threads: int,
    progress: Callable[[int], None] | None = None,
) -> list[TensorTally]:
    """Compare `units`, which are of the tensors `planned`; tallies in the order of `planned`.

    The result does not depend on the number of threads. Raises InputError, ResourceError and VerifyError as reading
    and encoding the source do, and Dsv4Error where a kernel fails its self-test.
    """
    prepare_kernels(planned)

    def make_worker(computing: threading.Semaphore) -> Callable[[Unit], MatrixTally]:
        comparer = UnitComparer(file, checkpoint)

        def work(unit: Unit) -> MatrixTally:
            rows, found = comparer.read(unit)
            with computing:
                return comparer.compare(unit, rows, found)

        return work

    tallies = {t.name: TensorTally(t, [MatrixTally() for _ in t.tensor.sources]) for t in planned}
    with closing(run_in_order(units, make_worker, threads)) as results:
        for unit, tally in results:
            tallies[unit.planned.name].matrices[matrix_of(unit)].add(tally)
            if progress is not None:
                progress(unit.n_bytes)
    return list(tallies.values())


def _compare_bytes(unit: Unit, found: Bytes, own: Bytes, tally: MatrixTally) -> None:
    size = unit.planned.format.block_bytes
    tally.n_blocks = unit.n_bytes // size
    if np.array_equal(found, own):
        return
    different = found != own
    blocks = np.flatnonzero(different.reshape(-1, size).any(axis=1))
    first = int(np.argmax(different))
    tally.n_different = int(np.count_nonzero(different))
    tally.n_blocks_different = len(blocks)
    numbers = unit.start // size + blocks
    tally.blocks = numbers[:N_KEPT].tolist()
    tally.segments = frozenset((numbers * N_SEGMENTS // (unit.planned.n_bytes // size)).tolist())
    tally.first = (unit.start + first, describe_byte(unit, first, int(found[first]), int(own[first])))


def describe_byte(unit: Unit, at: int, found: int, own: int) -> str:
    """What is to be said of byte `at` of a unit that differs."""
    block, byte = divmod(at, unit.planned.format.block_bytes)
    row, column = divmod(block * unit.planned.format.block_values, unit.matrix.n_cols)
    return (f"byte {unit.start + at:,} is 0x{found:02x}, the source gives 0x{own:02x} "
            f"(byte {byte} of the block at row {unit.first_row + row} column {column} of {unit.matrix.weight.name})")


def _count_cells(
    unit: Unit, found: Floats, source: Floats, own: Floats | None, first: int, *, tally: MatrixTally
) -> None:
    of_found = measure_cells(found, source, CELL_VALUES)
    of_own = measure_cells(own, source, CELL_VALUES)[:, 0] if own is not None else np.zeros(len(of_found))
    allowed = CELL_RATIO**2 * of_own + CELL_FLOOR**2 * of_found[:, 1]
    # Without an encoding of ours to compare with, an error as large as the values themselves is wrong.
    allowed = allowed if own is not None else of_found[:, 1]
    wrong = np.flatnonzero((of_found[:, 0] > allowed) | (of_found[:, 2] > 0))
    tally.n_cells += len(of_found)
    tally.n_wrong_cells += len(wrong)
    tally.squared_in_cells += float(of_found[wrong, 0].sum())
    at = first + wrong * CELL_VALUES
    height = unit.matrix.block[0] if unit.matrix.scale is not None else 1
    rows = at // unit.matrix.n_cols % unit.matrix.n_rows
    _, firsts = np.unique(rows // height, return_index=True)
    tally.cells = sorted([*tally.cells, *at[firsts[:N_KEPT]].tolist()])[:N_KEPT]


def _shifted(errors: ErrorSums, by: int) -> ErrorSums:
    if errors.largest_at >= 0:
        errors.largest_at += by
    return errors
