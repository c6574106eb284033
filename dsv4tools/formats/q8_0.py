"""Q8_0: 32 values to an F16 scale and 32 int8 (ggml-common.h, block_q8_0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import bits_float, f16_to_float, float_to_f16, load_u16, store_u16
from dsv4tools.formats.compile import helper, kernel
from dsv4tools.formats.lanes import absolute, aligned, bits_of, largest_of, load_lanes, store, to_byte, truncated, where
from dsv4tools.formats.tiles import BLOCK_OVERFLOW, DECODE, ENCODE, N_TARGET, fill_tile, note_fault

if TYPE_CHECKING:
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Shape

VALUES = 32
BYTES = 34
_TILE = 4096


@helper
def _encode_block(tile: Floats, start: int, out: Bytes, at: int) -> bool:
    """One block, a value per lane; whether its scale is finite as F16.

    d = max|x| / 127, q = x/d rounded half away from zero with the float32 d. Where 1/d overflows every q is 0.
    """
    x = load_lanes(VALUES, tile, start)
    d = bits_float(largest_of(bits_of(absolute(x)))) / np.float32(127.0)
    inverse = np.float32(1.0) / d
    if not (inverse < np.float32(np.inf)):   # d is 0 or too small
        inverse = np.float32(0.0)
    scaled = x * inverse
    whole = truncated(scaled)
    rest = scaled - whole                    # exact
    away = where(rest >= 0.5, 1.0, rest - rest)
    away = where(rest <= -0.5, -1.0, away)
    # 1.5 * 2^23 more, and the integer is in the low bits.
    store(out, at + 2, to_byte(bits_of(whole + away + 12582912.0)))
    half = float_to_f16(d)
    store_u16(out, at, half)
    return bool(half < 0x7C00)


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to Q8_0."""
    tile = aligned(_TILE)
    for first in range(0, shape[0] * shape[1], _TILE):
        count = fill_tile(kind, shape, data, scales, first, tile, faults)
        for start in range(0, count, VALUES):
            if not _encode_block(tile, start, out, (first + start) // VALUES * BYTES):
                note_fault(faults, N_TARGET, BLOCK_OVERFLOW, first + start, 1)


@kernel(DECODE)
def decode(data: Bytes, out: Floats) -> None:
    """Q8_0 to float32: ``d q``."""
    for block in range(out.size // VALUES):
        d = f16_to_float(load_u16(data, BYTES * block))
        for i in range(VALUES):
            out[VALUES * block + i] = np.float32(np.int8(data[BYTES * block + 2 + i])) * d
