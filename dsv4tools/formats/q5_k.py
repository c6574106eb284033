"""Q5_K: 256 values to F16 d and dmin, eight 6-bit scales and mins, 32 bytes of high bits, 256 nibbles.

The layout is that of ggml-common.h (block_q5_K), the search that of ggml-quants.c (quantize_row_q5_K_ref and _impl).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import f16_to_float, load_u16
from dsv4tools.formats.blocks import (
    fill_lanes,
    is_infinite,
    note_infinite,
    put_words,
    requantize,
    word_of,
    write_blocks,
)
from dsv4tools.formats.compile import helper, kernel
from dsv4tools.formats.lanes import WIDTH, aligned, any_of, from_f16, load, store, to_float
from dsv4tools.formats.six_bits import PER_SUB, STEP, SUB, fit_sub_blocks, read_scale_and_min
from dsv4tools.formats.tiles import DECODE, ENCODE

if TYPE_CHECKING:
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Ints, Shape

VALUES = 256
BYTES = 176
_HIGH, _LOW = 16, 48           # where the high bits begin, and the nibbles
_TILE = WIDTH * VALUES         # one block per lane
F = np.float32


@helper
def _pack_pair(levels: Ints, pair: int, words: Ints) -> None:
    """Two sub-blocks: nibbles as in Q4_K, the fifth bits to bits ``2 pair`` and ``2 pair + 1`` of 32 bytes."""
    for i in range(8):
        low, high = word_of(levels, 4 * i * WIDTH), word_of(levels, 4 * i * WIDTH + STEP)
        store(words, (_LOW // 4 + 8 * pair + i) * WIDTH, (low & 0x0F0F0F0F) | (high & 0x0F0F0F0F) << 4)
        bits = (low >> 4 & 0x01010101) | (high >> 3 & 0x02020202)
        place = (_HIGH // 4 + i) * WIDTH
        store(words, place, bits if pair == 0 else load(words, place) | bits << 2 * pair)


@helper
def _encode_lanes(x: Floats, q: Floats, weighted: bool, blocks: Bytes) -> bool:
    """Encode one block per lane to `WIDTH` blocks; whether every d and dmin is finite as F16."""
    levels = aligned(2 * STEP).view(np.int32)
    inverse, offset = aligned(PER_SUB), aligned(PER_SUB)
    scales, mins = aligned(PER_SUB).view(np.int32), aligned(PER_SUB).view(np.int32)
    words = aligned(BYTES // 4 * WIDTH).view(np.int32)
    d, dmin = fit_sub_blocks(x, q, weighted, 31, F(-0.5), F(0.1), 15, inverse, offset, scales, mins, words)
    for j in range(8):
        dd = from_f16(d) * to_float(load(scales, j * WIDTH))
        dm = from_f16(dmin) * to_float(load(mins, j * WIDTH))
        half = levels[j % 2 * STEP :]
        requantize(x, j * STEP, SUB, 31, dd, dm, load(inverse, j * WIDTH), load(offset, j * WIDTH), half)
        if j % 2:
            _pack_pair(levels, j // 2, words)
    put_words(words, BYTES // 4, blocks, 0, BYTES)
    return not any_of(is_infinite(d) | is_infinite(dmin))


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to Q5_K, with an importance vector or without."""
    weighted = importance.size > 0
    tile, x, q = aligned(_TILE), aligned(_TILE), aligned(_TILE)
    blocks = aligned(BYTES // 4 * WIDTH).view(np.uint8)
    for first in range(0, shape[0] * shape[1], _TILE):
        n_blocks = fill_lanes(kind, shape, data, scales, importance, first, VALUES, tile, x, q, faults)
        finite = _encode_lanes(x, q, weighted, blocks)
        write_blocks(blocks, BYTES * n_blocks, out, BYTES * (first // VALUES))
        if not finite:
            note_infinite(blocks, BYTES, n_blocks, 0, 2, first, VALUES, faults)


@kernel(DECODE)
def decode(data: Bytes, out: Floats) -> None:
    """Q5_K to float32: ``d scale l - dmin min``."""
    for block in range(out.size // VALUES):
        at = BYTES * block
        d = f16_to_float(load_u16(data, at))
        dmin = f16_to_float(load_u16(data, at + 2))
        for j in range(8):
            scale, low = read_scale_and_min(data, at + 4, j)
            dd = F(d * F(scale))
            dm = F(dmin * F(low))
            shift = 4 * (j & 1)
            nibbles = at + _LOW + SUB * (j >> 1)
            for i in range(SUB):
                level = (data[nibbles + i] >> shift & 15) | (data[at + _HIGH + i] >> j & 1) << 4
                out[VALUES * block + SUB * j + i] = F(dd * F(level)) - dm
