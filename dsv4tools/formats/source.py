"""What an encoder reads: a run of rows as its bytes lie in the source, and what it found wrong with them.

Plain data, no numba: planners and tests build these without compiling anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dsv4tools.formats.table import Format


class SourceKind(IntEnum):
    """How the values of a source row are stored. The numbers are what the kernels switch on."""

    F32 = 0
    F16 = 1
    BF16 = 2
    FP8 = 3    # F8_E4M3 (e4m3fn), E8M0 scales over blocks of rows and columns
    FP4 = 4    # E2M1, two per byte, low nibble first, E8M0 scales over runs of columns


SOURCE_BITS = {SourceKind.F32: 32, SourceKind.F16: 16, SourceKind.BF16: 16, SourceKind.FP8: 8, SourceKind.FP4: 4}


@dataclass(frozen=True, slots=True)
class SourceRows:
    """A run of whole rows of one matrix, as stored.

    Attributes
    ----------
    kind:
        How `data` is to be read.
    data:
        uint8 [n_rows * n_cols * bits / 8], the rows one after the other.
    n_rows, n_cols:
        Their logical shape.
    scales:
        uint8 [scale rows, scale columns] of E8M0 bytes for FP8 and FP4, else None. Row r of the run and column c
        use ``scales[(first_row + r) // scale_rows, c // scale_cols]``.
    scale_rows, scale_cols:
        Size of the block that one scale byte covers: (128, 128) for FP8 as published, (1, 32) for FP4.
    first_row:
        Rows between the start of ``scales[0]``'s block and the run's first row.
    blocks:
        The ggml type whose blocks `data` holds, for rows of a GGUF that are not plain numbers; `kind` then says what
        they are decoded to: FP4 from MXFP4, which keeps its codes and scales, F32 from any other.
    """

    kind: SourceKind
    data: NDArray[np.uint8]
    n_rows: int
    n_cols: int
    scales: NDArray[np.uint8] | None = None
    scale_rows: int = 1
    scale_cols: int = 1
    first_row: int = 0
    blocks: Format | None = None

    def cut(self, first: int, n: int) -> SourceRows:
        """`n` rows of the run from its row `first` on; views of the same bytes."""
        row_bytes = self.data.size // self.n_rows
        return replace(self, data=self.data[first * row_bytes : (first + n) * row_bytes], n_rows=n,
                       first_row=self.first_row + first)


class FaultKind(IntEnum):
    """What can be wrong with a value. The first four are the source's, the last two come of the target type."""

    NAN_SCALE = 1          # E8M0 byte 255
    NAN_CODE = 2           # F8_E4M3 code 0x7F or 0xFF
    NOT_FINITE = 3         # NaN or infinity in an F32, F16 or BF16 source
    SCALED_OVERFLOW = 4    # code times scale is beyond float32
    TARGET_OVERFLOW = 5    # a finite value beyond the target's range (F16: above 65504)
    BLOCK_OVERFLOW = 6     # a block scale that is infinite or NaN as F16


@dataclass(frozen=True, slots=True)
class Faults:
    """Counts of faulty values in a run of rows, and where the first one (in row-major order) lies.

    `n_source` counts values of the first four kinds (these can be zeroed), `n_target` values or blocks of the last
    two (these cannot). `first` is None or ``(kind, row, column)`` with the row counted within the run; for
    BLOCK_OVERFLOW the column is that of the block's first value.
    """

    n_source: int = 0
    n_target: int = 0
    first: tuple[FaultKind, int, int] | None = None

    def then(self, other: Faults, first_row: int) -> Faults:
        """These and those of the rows that follow, from row `first_row` on."""
        first = self.first
        if first is None and other.first is not None:
            kind, row, column = other.first
            first = kind, row + first_row, column
        return Faults(self.n_source + other.n_source, self.n_target + other.n_target, first)
