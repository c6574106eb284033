"""Q8_0: 32 values to an F16 scale and 32 int8 (ggml-common.h, block_q8_0)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import bits_float, f16_to_float, float_bits, float_to_f16, load_u16, store_u16
from dsv4tools.formats.compile import helper, kernel
from dsv4tools.formats.tiles import BLOCK_OVERFLOW, DECODE, ENCODE, N_TARGET, encode_tiles, note_fault

if TYPE_CHECKING:
    from dsv4tools.formats.tiles import Bytes, Floats, FaultSlots, Shape

VALUES = 32
BYTES = 34
_TILE = 4096


@helper
def _encode_block(x: Floats, out: Bytes, at: int) -> bool:
    """One block; whether its scale is finite as F16.

    d = max|x| / 127, q = x/d rounded half away from zero with the float32 d. Where 1/d overflows every q is 0.
    """
    largest = np.uint32(0)
    for i in range(VALUES):
        largest = max(largest, np.uint32(float_bits(x[i]) & np.uint32(0x7FFFFFFF)))
    d = bits_float(largest) / np.float32(127.0)
    inverse = np.float32(1.0) / d
    if not (inverse < np.float32(np.inf)):   # d is 0 or too small
        inverse = np.float32(0.0)
    for i in range(VALUES):
        scaled = x[i] * inverse
        whole = np.float32(np.int32(scaled))                        # towards zero; |scaled| is 127 at most
        rest = scaled - whole                                       # exact
        up = np.int32(1) if rest >= np.float32(0.5) else np.int32(0)
        down = np.int32(1) if rest <= np.float32(-0.5) else np.int32(0)
        out[at + 2 + i] = np.uint8(np.int32(scaled) + up - down)
    half = float_to_f16(d)
    store_u16(out, at, half)
    return half < 0x7C00


@helper
def _encode_tile(
    tile: Floats, count: int, first: int, n_cols: int, importance: Floats, out: Bytes, at: int, faults: FaultSlots
) -> None:
    for block in range(count // VALUES):
        if not _encode_block(tile[VALUES * block :], out, at + BYTES * block):
            note_fault(faults, N_TARGET, BLOCK_OVERFLOW, first + VALUES * block, 1)


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    encode_tiles(_encode_tile, _TILE, VALUES, BYTES, kind, shape, data, scales, importance, out, faults)


@kernel(DECODE)
def decode(data: Bytes, out: Floats) -> None:
    for block in range(out.size // VALUES):
        d = f16_to_float(load_u16(data, BYTES * block))
        for i in range(VALUES):
            out[VALUES * block + i] = np.float32(np.int8(data[BYTES * block + 2 + i])) * d
