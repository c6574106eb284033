"""From source bytes to encoded blocks, one cache-resident tile at a time.

Rows are whole numbers of blocks, so a run of rows is one long sequence of values. An encoder fills a tile with the
next of them, which decodes them to float32 and looks them over for faults, and encodes it. Sources and targets meet in
that tile only: every source works with every target, and neither knows the other.
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
from dsv4tools.formats.compile import helper, routine
from dsv4tools.formats.lanes import (
    bits_of,
    byte_to_float,
    byte_to_int,
    float_of,
    interleave,
    larger,
    load_lanes,
    store,
    to_float,
    where,
)
from dsv4tools.formats.source import FaultKind, SourceKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Floats = NDArray[np.float32]
    Ints = NDArray[np.int32]
    FaultSlots = NDArray[np.int64]
    Shape = tuple[int, int, int, int, int]

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
DECODE_SOURCE = (
    f"void(int64, UniTuple(int64, 5), {_BYTES}, Array(uint8, 2, 'C', readonly=True), float32[::1], int64[::1])"
)
_LANES, _PAIRS = 32, 16   # values that source decoders take at once, and bytes of two FP4 values
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
def _decode_fp8(data: Bytes, at: int, n: int, scale: np.float32, tile: Floats, to: int) -> None:
    """``tile[to : to + n]`` from `n` F8_E4M3 codes under one scale; see `bits.e4m3_to_float`."""
    whole = n - n % _LANES
    for i in range(0, whole, _LANES):
        code = byte_to_int(load_lanes(_LANES, data, at + i))
        magnitude = code & 0x7F
        small = bits_of(to_float(magnitude) * 2.0**-9)
        value = where(magnitude >= 8, (magnitude << 20) + 0x3C000000, small)
        value = where(magnitude == 0x7F, 0x7FC00000, value)
        store(tile, to + i, float_of(((code & 0x80) << 24) | value) * scale)
    for i in range(whole, n):
        tile[to + i] = e4m3_to_float(data[at + i]) * scale


@helper
def _decode_fp4(data: Bytes, at: int, n: int, scale: np.float32, tile: Floats, to: int) -> None:
    """``tile[to : to + n]`` from `n` FP4 codes under one scale, the first in the low nibble of byte `at`.

    Twice a value is an integer (0 1 2 3 4 6 8 12), and half a scale is exact.
    """
    whole = n - n % _LANES
    for i in range(0, whole, _LANES):
        packed = load_lanes(_PAIRS, data, at + i // 2)
        code = interleave(packed & 15, packed >> 4)
        magnitude = code & 7
        doubled = magnitude + larger(magnitude - 4, 0)
        doubled = where(magnitude == 7, 12, doubled)
        store(tile, to + i, byte_to_float(where(code >= 8, 0 - doubled, doubled)) * (np.float32(0.5) * scale))
    for i in range(whole, n, 2):
        packed = data[at + i // 2]
        tile[to + i] = e2m1_to_float(packed & 15) * scale
        tile[to + i + 1] = e2m1_to_float(packed >> 4) * scale


@helper
def _load_scaled(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, first: int, count: int, tile: Floats
) -> None:
    """Decode values `first` .. `first + count` of FP8 or FP4 rows: one stretch under one scale after the other."""
    _, n_cols, scale_rows, scale_cols, first_row = shape
    row = first // n_cols
    column = first - row * n_cols
    group = column // scale_cols
    done = 0
    while done < count:
        n = min(count - done, n_cols - column, (group + 1) * scale_cols - column)
        scale = e8m0_to_float(scales[(first_row + row) // scale_rows, group])
        if kind == FP8:
            _decode_fp8(data, first + done, n, scale, tile, done)
        else:
            _decode_fp4(data, (first + done) // 2, n, scale, tile, done)
        done += n
        column += n
        group += 1
        if column == n_cols:
            row += 1
            column = 0
            group = 0


@routine
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
    return bool(largest < np.uint32(0x7F800000))


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


@routine
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


@routine
def fill_tile(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, first: int, tile: Floats, faults: FaultSlots
) -> int:
    """Decode a run of rows from value `first` on, as far as it or `tile` reaches; how many values that were.

    Values that are faults of the source are counted and become +0.0, as does the rest of the tile.
    """
    count = min(tile.size, shape[0] * shape[1] - first)
    if not load_tile(kind, shape, data, scales, first, count, tile):
        note_source_faults(kind, shape, data, scales, first, count, tile, True, faults)
    for i in range(count, tile.size):
        tile[i] = np.float32(0.0)
    return count
