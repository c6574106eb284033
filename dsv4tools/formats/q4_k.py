"""Q4_K: 256 values to F16 d and dmin, eight 6-bit scales and mins, 256 nibbles (ggml-common.h, block_q4_K)."""

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
BYTES = 144
_TILE = WIDTH * VALUES         # one block per lane
F = np.float32


@helper
def _pack_pair(levels: Ints, words: Ints, to: int) -> None:
    """Two sub-blocks of levels as eight words: the first in the low nibbles, the second in the high ones."""
    for i in range(8):
        low, high = word_of(levels, 4 * i * WIDTH), word_of(levels, 4 * i * WIDTH + STEP)
        store(words, to + i * WIDTH, low | high << 4)


@helper
def _encode_lanes(x: Floats, q: Floats, weighted: bool, blocks: Bytes) -> bool:
    """Encode one block per lane to `WIDTH` blocks; whether every d and dmin is finite as F16."""
    levels = aligned(2 * STEP).view(np.int32)
    inverse, offset = aligned(PER_SUB), aligned(PER_SUB)
    scales, mins = aligned(PER_SUB).view(np.int32), aligned(PER_SUB).view(np.int32)
    words = aligned(BYTES // 4 * WIDTH).view(np.int32)
    d, dmin = fit_sub_blocks(x, q, weighted, 15, F(-1.0), F(0.1), 20, inverse, offset, scales, mins, words)
    for j in range(8):
        dd = from_f16(d) * to_float(load(scales, j * WIDTH))
        dm = from_f16(dmin) * to_float(load(mins, j * WIDTH))
        half = levels[j % 2 * STEP :]
        requantize(x, j * STEP, SUB, 15, dd, dm, load(inverse, j * WIDTH), load(offset, j * WIDTH), half)
        if j % 2:
            _pack_pair(levels, words, (4 * j) * WIDTH)
    put_words(words, BYTES // 4, blocks, 0, BYTES)
    return not any_of(is_infinite(d) | is_infinite(dmin))


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to Q4_K, with an importance vector or without. Lanes without a block hold zeros."""
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
    """Q4_K to float32: ``d scale l - dmin min``."""
    for block in range(out.size // VALUES):
        at = BYTES * block
        d = f16_to_float(load_u16(data, at))
        dmin = f16_to_float(load_u16(data, at + 2))
        for pair in range(4):
            scale, low = read_scale_and_min(data, at + 4, 2 * pair)
            d_low, m_low = F(d * F(scale)), F(dmin * F(low))
            scale, low = read_scale_and_min(data, at + 4, 2 * pair + 1)
            d_high, m_high = F(d * F(scale)), F(dmin * F(low))
            nibbles = at + 16 + SUB * pair
            to = VALUES * block + 2 * SUB * pair
            for i in range(SUB):   # both halves at once: fixed shifts make vector code
                byte = np.int32(data[nibbles + i])
                out[to + i] = F(d_low * F(byte & np.int32(15))) - m_low
                out[to + SUB + i] = F(d_high * F(byte >> np.int32(4))) - m_high
