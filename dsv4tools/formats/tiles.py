"""From source bytes to encoded blocks, one cache-resident tile at a time.

Rows are whole numbers of blocks, so a run of rows is one long sequence of values. A tile of it is decoded to float32,
looked over for faults, and handed to the encoder of the target format. Decoders and encoders meet here only: every
source works with every target, and neither knows the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import (
    bf16_to_float,
    bits_float,
    e2m1_to_float,
    e4m3_to_float,
    e8m0_to_float,
    f16_to_float,
    float_bits,
    is_finite,
    load_u16,
    load_u32,
)
from dsv4tools.formats.compile import helper
from dsv4tools.formats.source import FaultKind, SourceKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]
    FaultSlots = NDArray[np.int64]
    Shape = tuple[int, int, int, int, int]
    EncodeTile = Callable[[Floats, int, int, int, Floats, Bytes, int, FaultSlots], None]

F32, F16, BF16, FP8, FP4 = (int(kind) for kind in SourceKind)
NAN_SCALE, NAN_CODE, NOT_FINITE, SCALED_OVERFLOW, TARGET_OVERFLOW, BLOCK_OVERFLOW = (int(kind) for kind in FaultKind)

# The signature of every encoder: kind, (n_rows, n_cols, scale_rows, scale_cols, first_row), data, scales, importance
# (empty: none), out, faults.
_BYTES = "Array(uint8, 1, 'C', readonly=True)"
ENCODE = (
    f"void(int64, UniTuple(int64, 5), {_BYTES}, Array(uint8, 2, 'C', readonly=True), "
    "Array(float32, 1, 'C', readonly=True), uint8[::1], int64[::1])"
)
# The signature of every decoder: data, out.
DECODE = f"void({_BYTES}, float32[::1])"
# The signature of the decoder of source formats: kind and shape as above, data, scales, out, faults.
DECODE_SOURCE = f"void(int64, UniTuple(int64, 5), {_BYTES}, Array(uint8, 2, 'C', readonly=True), float32[::1], int64[::1])"
# Slots of the `faults` array that a kernel fills: counts, then kind and position (flat value index) of the first.
N_SOURCE, N_TARGET, FIRST_KIND, FIRST_POSITION, N_FAULT_SLOTS = range(5)


@helper
def note_fault(faults: FaultSlots, slot: int, kind: int, position: int, n: int) -> None:
    """Count `n` faulty values or blocks in `slot`; remember the first in row-major order."""
    faults[slot] += n
    if faults[FIRST_KIND] == 0 or position < faults[FIRST_POSITION]:
        faults[FIRST_KIND] = kind
        faults[FIRST_POSITION] = position


@helper
def _load_scaled(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, first: int, count: int, tile: Floats
) -> None:
    """Decode values `first` .. `first + count` of FP8 or FP4 rows: one stretch under one scale after the other."""
    _, n_cols, scale_rows, scale_cols, first_row = shape
    done = 0
    while done < count:
        row = (first + done) // n_cols
        column = first + done - row * n_cols
        n = min(count - done, n_cols - column, scale_cols - column % scale_cols)
        scale = e8m0_to_float(scales[(first_row + row) // scale_rows, column // scale_cols])
        if kind == FP8:
            for i in range(n):
                tile[done + i] = e4m3_to_float(data[first + done + i]) * scale
        else:
            packed = data[(first + done) // 2 : (first + done + n) // 2]
            for i in range(n // 2):
                tile[done + 2 * i] = e2m1_to_float(packed[i] & 15) * scale
                tile[done + 2 * i + 1] = e2m1_to_float(packed[i] >> 4) * scale
        done += n


@helper
def load_tile(kind: int, shape: Shape, data: Bytes, scales: Bytes, first: int, count: int, tile: Floats) -> bool:
    """Decode values `first` .. `first + count` of a run of rows to ``tile[:count]``; whether all of them are finite.

    What is not finite is a fault, whatever the kind: NaN codes and scales decode to NaN.
    """
    if kind == F32:
        for i in range(count):
            tile[i] = bits_float(load_u32(data, 4 * (first + i)))
    elif kind == F16:
        for i in range(count):
            tile[i] = f16_to_float(load_u16(data, 2 * (first + i)))
    elif kind == BF16:
        for i in range(count):
            tile[i] = bf16_to_float(load_u16(data, 2 * (first + i)))
    else:
        _load_scaled(kind, shape, data, scales, first, count, tile)
    largest = np.uint32(0)
    for i in range(count):
        largest = max(largest, np.uint32(float_bits(tile[i]) & np.uint32(0x7FFFFFFF)))
    return largest < np.uint32(0x7F800000)


@helper
def _fault_kind(kind: int, shape: Shape, data: Bytes, scales: Bytes, position: int) -> int:
    """Why the value at flat index `position` is not finite."""
    _, n_cols, scale_rows, scale_cols, first_row = shape
    if kind not in (FP8, FP4):
        return NOT_FINITE
    row = position // n_cols
    column = position - row * n_cols
    if scales[(first_row + row) // scale_rows, column // scale_cols] == 255:
        return NAN_SCALE
    if kind == FP8 and data[position] & 0x7F == 0x7F:
        return NAN_CODE
    return SCALED_OVERFLOW


@helper
def note_source_faults(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, first: int, count: int, tile: Floats, zero: bool,
    faults: FaultSlots,
) -> None:  # fmt: skip
    """Count the values of a tile that are not finite, and make them +0.0 if `zero`."""
    for i in range(count):
        if not is_finite(tile[i]):
            note_fault(faults, N_SOURCE, _fault_kind(kind, shape, data, scales, first + i), first + i, 1)
            if zero:
                tile[i] = np.float32(0.0)


@helper
def encode_tiles(
    encode: EncodeTile, tile_values: int, block_values: int, block_bytes: int,
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots,
) -> None:  # fmt: skip
    """Encode a run of rows, `tile_values` (a whole number of blocks) at a time.

    ``encode(tile, count, first, n_cols, importance, out, at, faults)`` turns ``tile[:count]``, the values from flat
    index `first` on, into blocks at byte `at` of `out`. The tile is `tile_values` long; beyond `count` it is zero.
    """
    n_values = shape[0] * shape[1]
    tile = np.empty(tile_values, np.float32)
    for first in range(0, n_values, tile_values):
        count = min(tile_values, n_values - first)
        if not load_tile(kind, shape, data, scales, first, count, tile):
            note_source_faults(kind, shape, data, scales, first, count, tile, True, faults)
        tile[count:] = np.float32(0.0)
        encode(tile, count, first, shape[1], importance, out, first // block_values * block_bytes, faults)
