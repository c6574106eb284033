"""MXFP4: 32 FP4 codes under one E8M0 byte, 17 bytes (ggml-common.h, block_mxfp4).

The codes and the scale are those of FP4 rows, so such rows are repacked and keep every value. Other sources are rounded
to the scale that ggml chooses (ggml-quants.c, quantize_row_mxfp4_ref).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import bits_float, e2m1_to_float, e8m0_to_float, float_bits, is_finite
from dsv4tools.formats.compile import helper, kernel, routine
from dsv4tools.formats.lanes import (
    absolute,
    aligned,
    bits_of,
    interleave,
    largest_of,
    load_lanes,
    store,
    to_byte,
    where,
)
from dsv4tools.formats.tiles import DECODE, ENCODE, FP4, N_SOURCE, NAN_SCALE, SCALED_OVERFLOW, fill_tile, note_fault

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Shape

VALUES = 32
BYTES = 17
_HALF = 16           # values 0..15 of a block are in the low nibbles, 16..31 in the high ones
_TILE = 4096
_FIRST_TO_CHECK = 253    # from this scale byte on a code can be beyond float32
_MIDDLES = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)   # between the codes' values, in halves of the scale
F = np.float32


# ---- From FP4 rows: neighbours share a byte there, values 16 apart do here.


@helper
def _repack_block(data: Bytes, at: int, scale: np.uint8, out: Bytes, to: int) -> None:
    low, high = load_lanes(8, data, at), load_lanes(8, data, at + 8)
    out[to] = scale
    store(out, to + 1, interleave((low & 15) | (high << 4), (low >> 4) | (high & 0xF0)))


@routine
def _check_block(out: Bytes, to: int, position: int, faults: FaultSlots) -> None:
    """Count the values of a repacked block that are not finite, and make them zeros."""
    scale = out[to]
    for i in range(VALUES):
        place, shift = to + 1 + i % _HALF, 4 * (i // _HALF)
        code = np.uint8((out[place] >> shift) & 15)
        if scale == 255:
            note_fault(faults, N_SOURCE, NAN_SCALE, position + i, 1)
        elif not is_finite(F(e2m1_to_float(code) * e8m0_to_float(scale))):
            note_fault(faults, N_SOURCE, SCALED_OVERFLOW, position + i, 1)
        else:
            continue
        out[place] &= np.uint8(0xF0 >> shift)
    if scale == 255:
        out[to] = 0


@helper
def _repack(shape: Shape, data: Bytes, scales: Bytes, out: Bytes, faults: FaultSlots) -> None:
    n_rows, n_cols, scale_rows, scale_cols, first_row = shape
    for row in range(n_rows):
        line = (first_row + row) // scale_rows
        start = row * n_cols
        for group in range(scales.shape[1]):
            scale = scales[line, group]
            for column in range(group * scale_cols, min((group + 1) * scale_cols, n_cols), VALUES):
                to = (start + column) // VALUES * BYTES
                _repack_block(data, (start + column) // 2, scale, out, to)
                if scale >= _FIRST_TO_CHECK:
                    _check_block(out, to, start + column, faults)


# ---- From anything else.


@helper
def _floor_log2(bits: np.uint32) -> np.int64:
    """``floorf(log2f(x))`` of the positive float32 with these bits, where log2f is correctly rounded.

    Just below a power of two the logarithm can round up to its exponent k. With x = 2^k (1 - j / 2^24) it lies
    1.4427 j / 2^24 below k, and rounds up when that is less than half of the spacing of float32 there.
    """
    shift = np.int64(0)
    if bits < np.uint32(0x00800000):   # subnormal, exact as a product
        bits = float_bits(F(bits_float(bits) * F(2.0**64)))
        shift = np.int64(64)
    above = np.int64(bits >> np.uint32(23)) - 126 - shift                          # k
    missing = np.int64(0x800000) - np.int64(bits & np.uint32(0x7FFFFF))            # j
    size = above if above > 0 else -above
    half_spacing = 1.0   # times 2^-24
    while half_spacing * 2.0 <= size:
        half_spacing *= 2.0
    if above > 0 and half_spacing == size:
        half_spacing *= 0.5   # below a power of two the spacing is half of that above
    return above if above != 0 and 1.4426950408889634 * missing < half_spacing else above - 1


@helper
def _codes(x: Lanes, unit: np.float32, n_middles: int) -> Lanes:
    """The nearest code of each value, at middles the smaller one; `unit` is half the scale."""
    size = absolute(x)
    code = bits_of(size) & 0
    for i in range(n_middles):
        code = where(size > F(F(_MIDDLES[i]) * unit), i + 1, code)
    return where((x < 0.0) & (code > 0), code | 8, code)


@helper
def _encode_block(tile: Floats, start: int, out: Bytes, at: int) -> None:
    """One block: the largest value decides the scale.

    C turns a number below 0 to a byte there, which keeps its low bits; all codes are 0 under such a scale.
    """
    a, b = load_lanes(_HALF, tile, start), load_lanes(_HALF, tile, start + _HALF)
    largest = np.uint32(max(largest_of(bits_of(absolute(a))), largest_of(bits_of(absolute(b)))))
    scale = np.uint8((_floor_log2(largest) + 125) & 255) if largest else np.uint8(0)
    unit = F(e8m0_to_float(scale) * F(0.5))
    # Only the very largest float32 come to this scale, and the two largest codes are infinite under it.
    n_middles = 5 if scale == _FIRST_TO_CHECK else 7
    out[at] = scale
    store(out, at + 1, to_byte(_codes(a, unit, n_middles) | _codes(b, unit, n_middles) << 4))


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to MXFP4."""
    if kind == FP4 and shape[3] % VALUES == 0:
        _repack(shape, data, scales, out, faults)
        return
    tile = aligned(_TILE)
    for first in range(0, shape[0] * shape[1], _TILE):
        for start in range(0, fill_tile(kind, shape, data, scales, first, tile, faults), VALUES):
            _encode_block(tile, start, out, (first + start) // VALUES * BYTES)


@kernel(DECODE)
def decode(data: Bytes, out: Floats) -> None:
    """MXFP4 to float32. Scale byte 255 is 2^128 to ggml, not NaN."""
    for block in range(out.size // VALUES):
        at = BYTES * block
        half = bits_float(np.uint32(254 << 23)) if data[at] == 255 else F(e8m0_to_float(data[at]) * F(0.5))
        for i in range(_HALF):
            packed = data[at + 1 + i]
            out[VALUES * block + i] = F(e2m1_to_float(packed & 15) * F(2.0)) * half
            out[VALUES * block + _HALF + i] = F(e2m1_to_float(packed >> 4) * F(2.0)) * half
