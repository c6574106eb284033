"""The bytes of one unit, derived from its source: what a conversion writes and a verification compares with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.checkpoint.matrix import RowReader
from dsv4tools.checksum import checksum
from dsv4tools.errors import InputError
from dsv4tools.formats.codecs import NEEDS_IMPORTANCE, add_column_energy, decode_source, encode_rows
from dsv4tools.formats.scales import check_scales, not_finite
from dsv4tools.formats.source import FaultKind, Faults, SourceKind, SourceRows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dsv4tools.checkpoint.matrix import Matrix
    from dsv4tools.plan import PlannedTensor, Unit

ENERGY_VALUES = 1 << 20   # read at a time
MAX_VECTORS = 64   # kept by a deriver: more than a unit needs in any model that there is
_SOURCE_HINT = "begin anew with --nan zero --restart to convert such values to 0"
_FAULTS = {
    FaultKind.NAN_SCALE: ("is under a NaN scale byte (255)", _SOURCE_HINT),
    FaultKind.NAN_CODE: ("is a NaN FP8 code", _SOURCE_HINT),
    FaultKind.NOT_FINITE: ("is NaN or infinite", _SOURCE_HINT),
    FaultKind.SCALED_OVERFLOW: ("is infinite once scaled", _SOURCE_HINT),
    FaultKind.TARGET_OVERFLOW: ("is beyond the range of {format}", "give the tensor a type with a larger range"),
    FaultKind.BLOCK_OVERFLOW: ("is in a block whose scale is beyond the range of F16",
                               "give the tensor a type with a larger range"),
}


def source_checksum(rows: SourceRows | NDArray[np.int32]) -> str:
    """`checksum` of a unit's source bytes, scales included: whether it was made from what is there now."""
    if isinstance(rows, np.ndarray):
        return checksum(rows.reshape(-1).view(np.uint8))
    return checksum(rows.data, *(() if rows.scales is None else (rows.scales.reshape(-1),)))


def as_numbers(rows: SourceRows) -> SourceRows:
    """Rows in blocks of a ggml type as float32 rows; others as they are."""
    if rows.blocks is None:
        return rows
    values = np.empty((rows.n_rows, rows.n_cols), np.float32)
    decode_source(rows, values)
    return SourceRows(SourceKind.F32, values.view(np.uint8).reshape(-1), rows.n_rows, rows.n_cols)


class UnitDeriver:
    """Reads and encodes units, with buffers that it uses again: one per worker.

    Parameters
    ----------
    n_experts:
        Ids in routing tables must be below it.
    zero_nan:
        Convert values that are not finite to 0 instead of refusing them.
    """

    def __init__(self, n_experts: int, *, zero_nan: bool = False) -> None:
        self._reader, self._other_reader = RowReader(), RowReader()
        self._out = np.zeros(0, np.uint8)
        self._n_experts, self._zero_nan = n_experts, zero_nan
        self._vectors: dict[int, NDArray[np.float32] | None] = {}
        self._vectors_of: PlannedTensor | None = None

    def read(self, unit: Unit) -> SourceRows | NDArray[np.int32]:
        """The unit's source rows as stored; valid until the next read. Waits for the disk, not for the processor."""
        if unit.matrix.kind is None:
            return self._reader.read_ids(unit.matrix, unit.first_row, unit.n_rows, self._n_experts)
        for _ in self._runs(unit):   # the weights of its columns too
            pass
        return self._reader.read_rows(unit.matrix, unit.first_row, unit.n_rows)

    def encode(self, unit: Unit, rows: SourceRows | NDArray[np.int32]) -> tuple[NDArray[np.uint8], int]:
        """The unit's bytes, uint8 [unit.n_bytes], valid until the next call; and how many values were zeroed.

        Raises
        ------
        InputError
            A value is not finite (unless they are zeroed) or does not fit the target type: names tensor, row, column.
        """
        if isinstance(rows, np.ndarray):
            return rows.reshape(-1).view(np.uint8), 0
        if rows.blocks is not None and rows.blocks == unit.planned.format:
            return self._copy(unit, rows)
        if len(self._out) < unit.n_bytes:
            self._out = np.zeros(unit.n_bytes, np.uint8)
        out = self._out[: unit.n_bytes]
        faults, row_bytes = Faults(), unit.n_bytes // unit.n_rows
        for first, n, weights in self._runs(unit):
            found = encode_rows(rows if n == unit.n_rows else rows.cut(first, n), unit.planned.format,
                                out[first * row_bytes : (first + n) * row_bytes], importance=weights,
                                zero_nan=self._zero_nan)
            faults = faults.then(found, first)
        if faults.n_target or (faults.n_source and not self._zero_nan):
            raise _explain(unit, faults)
        return out, faults.n_source

    def _copy(self, unit: Unit, rows: SourceRows) -> tuple[NDArray[np.uint8], int]:
        """Blocks that have their type already, as they are; those with a scale that is not finite are faults."""
        target, data = unit.planned.format, rows.data
        bad = not_finite(data, target)
        if not bad.any():
            return data, 0
        if not self._zero_nan:
            _, what = check_scales(data, target).faults[0]
            row, column = divmod(int(np.argmax(bad)) * target.block_values, unit.matrix.n_cols)
            n = int(np.count_nonzero(bad))
            more = f" (and {n - 1} more blocks in the same {unit.n_rows} rows)" if n > 1 else ""
            raise InputError(unit.matrix.weight.where, f"the {target.name} block at row {unit.first_row + row} column "
                             f"{column} is not finite: {what}{more}", hint=_SOURCE_HINT)
        data.reshape(-1, target.block_bytes)[bad] = 0   # scales and all: every value of such a block is 0
        return data, int(np.count_nonzero(bad)) * target.block_values

    def _runs(self, unit: Unit) -> Iterator[tuple[int, int, NDArray[np.float32] | None]]:
        """The unit's rows by the vector that weighs their columns: first row, how many, and the vector."""
        importance, needed = unit.planned.importance, unit.planned.format.name in NEEDS_IMPORTANCE
        if importance is None and not needed:
            yield 0, unit.n_rows, None
            return
        rows_each = importance.rows_each if importance is not None else unit.planned.rows_each
        start, done = unit.first_tensor_row, 0
        while done < unit.n_rows:
            number, before = divmod(start + done, rows_each)
            n = min(unit.n_rows - done, rows_each - before)
            yield done, n, self._vector(unit, number, unit.first_row + done - before, rows_each)
            done += n

    def _vector(self, unit: Unit, number: int, first: int, n: int) -> NDArray[np.float32] | None:
        """Vector `number`, which weighs rows `first` .. of the unit's matrix; those of the last unit are kept."""
        if self._vectors_of is not unit.planned or len(self._vectors) > MAX_VECTORS:
            self._vectors_of, self._vectors = unit.planned, {}
        if number not in self._vectors:
            importance = unit.planned.importance
            vector = importance.read(number) if importance is not None else None
            if vector is None and unit.planned.format.name in NEEDS_IMPORTANCE:
                vector = self._column_energy(unit.matrix, first, n)
            self._vectors[number] = vector
        return self._vectors[number]

    def _column_energy(self, matrix: Matrix, first: int, n: int) -> NDArray[np.float32]:
        """What ds4's quantizer takes where it must have importance and there is none: the squares of `n` rows, summed.

        Float32 [n_cols]. Faults among these rows are left to whoever encodes them.
        """
        energy = np.zeros(matrix.n_cols, np.float32)
        step = max(1, ENERGY_VALUES // max(1, matrix.n_cols))
        for row in range(first, first + n, step):
            add_column_energy(as_numbers(self._other_reader.read_rows(matrix, row, min(step, first + n - row))), energy)
        return np.minimum(energy, np.finfo(np.float32).max)   # values whose squares overflow do not fit the type either


def _explain(unit: Unit, faults: Faults) -> InputError:
    where = unit.matrix.weight.where
    if faults.first is None:
        return InputError(where, f"{faults.n_source + faults.n_target} faulty values")
    kind, row, column = faults.first
    text, hint = _FAULTS[kind]
    row += unit.first_row
    n = faults.n_source + faults.n_target
    if kind is FaultKind.NAN_SCALE and unit.matrix.scale is not None:
        where = unit.matrix.scale.where
    more = f" (and {n - 1} more in the same {unit.n_rows} rows)" if n > 1 else ""
    what = text.format(format=unit.planned.format.name)
    return InputError(where, f"the value at row {row} column {column} {what}{more}", hint=hint)
