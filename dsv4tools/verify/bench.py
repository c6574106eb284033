"""Rows of a tensor as the file, the source and our own encoding have them: what a diagnosis looks at."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.checkpoint.matrix import RowReader
from dsv4tools.derive import UnitDeriver
from dsv4tools.formats.codecs import decode_rows, decode_source
from dsv4tools.plan import NAN_KEY, Unit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.checkpoint.matrix import Matrix
    from dsv4tools.formats.source import SourceRows
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.plan import PlannedTensor

    Floats = NDArray[np.float32]

BAND_VALUES = 1 << 20


class Bench:
    """Reads single runs of rows. Every array it returns is its caller's own; source values not finite are 0."""

    def __init__(self, file: GgufFile, checkpoint: Checkpoint) -> None:
        self.file = file
        self._reader = RowReader()
        self._deriver = UnitDeriver(checkpoint.config.n_routed_experts, zero_nan=file.value(NAN_KEY) == "zero")

    def found_bytes(self, planned: PlannedTensor, number: int, first: int, n: int) -> NDArray[np.uint8]:
        """The stored bytes of rows `first` .. of matrix `number`."""
        unit = _unit(planned, number, first, n)
        return self.file.read_tensor_bytes(planned.name, unit.start, unit.n_bytes)

    def own_bytes(self, planned: PlannedTensor, number: int, first: int, n: int) -> NDArray[np.uint8]:
        """The same rows as we encode them."""
        unit = _unit(planned, number, first, n)
        encoded, _ = self._deriver.encode(unit, self._deriver.read(unit))
        return encoded.copy()

    def found(self, planned: PlannedTensor, number: int, first: int, n: int) -> Floats:
        """Rows of matrix `number` as the file has them, float32 [n, n_cols]."""
        return _decode(self.found_bytes(planned, number, first, n), planned, n)

    def own(self, planned: PlannedTensor, number: int, first: int, n: int) -> Floats:
        """The same rows as our encoding has them."""
        return _decode(self.own_bytes(planned, number, first, n), planned, n)

    def stored(self, matrix: Matrix, first: int, n: int) -> SourceRows:
        """Rows as the source stores them, valid until the next call."""
        return self._reader.read_rows(matrix, first, n)

    def scales(self, matrix: Matrix) -> NDArray[np.uint8]:
        """All scale bytes of a matrix; uint8 [0, 0] where it has none."""
        if matrix.scale is None:
            return np.zeros((0, 0), np.uint8)
        scales = np.zeros(matrix.scale.shape, np.uint8)
        matrix.scale.shard.read_into(matrix.scale.begin, scales.reshape(-1).data)
        return scales

    def source(self, matrix: Matrix, first: int, n: int, scales: NDArray[np.uint8] | None = None) -> Floats:
        """The same rows as the source has them; with other `scales` (of all rows) where they are given."""
        rows = self.stored(matrix, first, n)
        if scales is not None:
            rows = replace(rows, scales=scales, first_row=first)
        return decode(rows)

    def ids(self, matrix: Matrix) -> NDArray[np.int32]:
        """A whole routing table."""
        return self._reader.read_ids(matrix, 0, matrix.n_rows, 1 << 31).copy()

    def bands(self, matrix: Matrix) -> Iterator[tuple[int, Floats]]:
        """The whole source matrix, a band of rows at a time, with the number of its first row."""
        step = max(1, BAND_VALUES // max(1, matrix.n_cols))
        for first in range(0, matrix.n_rows, step):
            yield first, self.source(matrix, first, min(step, matrix.n_rows - first))


def decode(rows: SourceRows) -> Floats:
    """Source rows as float32 [n_rows, n_cols]."""
    out = np.zeros((rows.n_rows, rows.n_cols), np.float32)
    decode_source(rows, out)
    out[~np.isfinite(out)] = 0
    return out


def _unit(planned: PlannedTensor, number: int, first: int, n: int) -> Unit:
    matrix = planned.tensor.sources[number]
    row_bytes = planned.format.row_bytes(matrix.n_cols, planned.name)
    return Unit(planned, matrix, first, n, (number * matrix.n_rows + first) * row_bytes, n * row_bytes)


def _decode(data: NDArray[np.uint8], planned: PlannedTensor, n: int) -> Floats:
    out = np.zeros((n, planned.tensor.ne[0]), np.float32)
    decode_rows(data, planned.format, n, planned.tensor.ne[0], out)
    return out
