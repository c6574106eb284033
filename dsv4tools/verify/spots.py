"""Small places in a tensor: the source's blocks that are wrong, and the bytes that differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.measure import measure_errors
from dsv4tools.formats.scales import find_field
from dsv4tools.verify.report import Fault
from dsv4tools.verify.tally import CELL_FLOOR, CELL_RATIO, CELL_VALUES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dsv4tools.checkpoint.matrix import Matrix
    from dsv4tools.plan import PlannedTensor
    from dsv4tools.verify.bench import Bench
    from dsv4tools.verify.tally import MatrixTally

    Floats = NDArray[np.float32]

MAX_NAMED = 8   # blocks whose bytes are spelled out


@dataclass(frozen=True, slots=True)
class Tile:
    """One block of the source, the values under one scale, that is wrong in the file.

    `row` and `column` count blocks of the source; `block` is the row and the block of the file's type that the tile
    begins in; `rows` and `columns` are its values' in the matrix.
    """

    row: int
    column: int
    block: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]
    found: Floats
    source: Floats
    allowed: float   # squared error

    @property
    def place(self) -> str:
        """``rows 0-127 columns 128-255``."""
        return _place(self.rows, self.columns)

    def is_like(self, values: Floats) -> bool:
        """Whether the file holds `values` here, as closely as could be asked for."""
        difference = self.found.astype(np.float64) - values
        return bool((difference**2).sum() <= max(self.allowed, CELL_RATIO**2 * CELL_FLOOR**2 * (values**2).sum()))


def join_places(tiles: Sequence[Tile]) -> str:
    """Tiles beside each other, as one place."""
    return _place(tiles[0].rows, (tiles[0].columns[0], tiles[-1].columns[1]))


def describe_errors(tiles: Sequence[Tile]) -> str:
    """Their errors, where nothing better can be said."""
    found, source = (np.concatenate([x.reshape(-1) for x in each])
                     for each in ([t.found for t in tiles], [t.source for t in tiles]))
    if not np.isfinite(found).all():
        return "holds values that are NaN or infinite"
    errors = measure_errors(found, source)
    return f"is off by up to {errors.largest_error:.3g} (relative RMSE {errors.relative_rmse:.3g})"


def find_wrong_tiles(
    planned: PlannedTensor, tally: MatrixTally, number: int, bench: Bench, most: int
) -> tuple[list[Tile], int]:
    """The first `most` wrong blocks of the source where a matrix has wrong cells, and how many more were seen."""
    matrix = planned.tensor.sources[number]
    height, width = matrix.block if matrix.scale is not None else (1, min(CELL_VALUES, matrix.n_cols))
    bands = {row // height for cell in tally.cells for row in _rows_of(cell, number, matrix)}
    tiles: list[Tile] = []
    n_more = 0
    for band in sorted(bands):
        first = band * height
        n = min(height, matrix.n_rows - first)
        found, own = bench.found(planned, number, first, n), bench.own(planned, number, first, n)
        source = bench.source(matrix, first, n)
        starts = np.arange(0, matrix.n_cols, width)
        squared = (np.add.reduceat((x.astype(np.float64) ** 2).sum(axis=0), starts)
                   for x in (found - source, own - source, source))
        of_found, of_own, of_source = squared
        allowed = CELL_RATIO**2 * of_own + CELL_FLOOR**2 * of_source
        for column in np.flatnonzero(~(of_found <= allowed)).tolist():   # NaN is beyond any bound
            if len(tiles) == most:
                n_more += 1
                continue
            left, right = column * width, min((column + 1) * width, matrix.n_cols)
            tiles.append(Tile(band, column, (first, left // planned.format.block_values), (first, first + n - 1),
                              (left, right - 1), found[:, left:right], source[:, left:right], float(allowed[column])))
    return tiles, n_more


def _rows_of(cell: int, number: int, matrix: Matrix) -> range:
    """The rows of matrix `number` that a cell lies in."""
    first = cell - number * matrix.n_rows * matrix.n_cols
    last = min(first + CELL_VALUES, matrix.n_rows * matrix.n_cols) - 1
    return range(first // matrix.n_cols, last // matrix.n_cols + 1)


def _place(rows: tuple[int, int], columns: tuple[int, int]) -> str:
    row = f"row {rows[0]}" if rows[0] == rows[1] else f"rows {rows[0]}-{rows[1]}"
    return f"{row} columns {columns[0]}-{columns[1]}"


def describe_blocks(planned: PlannedTensor, tally: MatrixTally, number: int, bench: Bench) -> list[Fault]:
    """The first blocks that differ from our encoding, byte by byte."""
    matrix, target = planned.tensor.sources[number], planned.format
    per_row = matrix.n_cols // target.block_values
    faults = []
    for block in tally.blocks[:MAX_NAMED]:
        row, column = divmod(block, per_row)
        row -= number * matrix.n_rows
        at = slice(column * target.block_bytes, (column + 1) * target.block_bytes)
        found = bench.found_bytes(planned, number, row, 1)[at]
        own = bench.own_bytes(planned, number, row, 1)[at]
        expert = f" (expert {number} row {row} column {column * target.block_values})" \
            if len(planned.tensor.sources) > 1 else f" (row {row} column {column * target.block_values})"
        faults.append(Fault(f"block {block:,}{expert}", _describe_bytes(planned, found, own)))
    if tally.n_blocks_different > MAX_NAMED:
        faults.append(Fault("", f"{tally.n_blocks_different - MAX_NAMED:,} more blocks differ"))
    return faults


def _describe_bytes(planned: PlannedTensor, found: NDArray[np.uint8], own: NDArray[np.uint8]) -> str:
    changed = np.flatnonzero(found != own).tolist()
    bits = [(byte, bit) for byte in changed for bit in range(8) if (found[byte] ^ own[byte]) >> bit & 1]
    fields = {f.name for byte in changed if (f := find_field(planned.format, byte)) is not None}
    inside = f", in its scale {' and '.join(sorted(fields))}" if fields else ""
    if len(bits) == 1:
        byte, bit = bits[0]
        return f"one bit is flipped: bit {bit} of byte {byte}{inside}"
    return f"{len(changed)} of {len(found)} bytes differ, the first is byte {changed[0]}{inside}"
