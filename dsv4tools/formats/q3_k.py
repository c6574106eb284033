"""Q3_K: 256 values to levels of three bits (the high one first), sixteen 6-bit scales, F16 d.

The layout is that of ggml-common.h (block_q3_K), the search that of ggml-quants.c (quantize_row_q3_K_ref and _impl).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import f16_to_float, load_u16
from dsv4tools.formats.blocks import (
    fill_lanes,
    is_infinite,
    note_infinite,
    pack_two_bits,
    put_words,
    sum_of_squares,
    weigh_by_importance,
    word_of,
    write_blocks,
)
from dsv4tools.formats.compile import helper, kernel
from dsv4tools.formats.lanes import (
    WIDTH,
    absolute,
    aligned,
    any_of,
    fill,
    from_f16,
    larger,
    load,
    nint,
    smaller,
    store,
    to_f16,
    to_float,
    where,
)
from dsv4tools.formats.signed import refine_scale, requantize_signed, search_scale
from dsv4tools.formats.tiles import DECODE, ENCODE

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Ints, Shape

VALUES = 256
BYTES = 110
_HIGH, _LOW, _SCALES, _D = 0, 32, 96, 108     # where each begins
_SUB = 16                      # values of a sub-block; there are sixteen in a block
_STEP = _SUB * WIDTH           # a sub-block of every lane
_PER_SUB = 16 * WIDTH          # one number per sub-block
_TILE = WIDTH * VALUES         # one block per lane
F = np.float32


@helper
def _fit_plain(x: Floats, stored: Ints, levels: Ints) -> Lanes:
    """Search all sub-blocks; scales as levels of the largest, plus 32, go to `stored`. Returns the F16 bits of d."""
    trial, scales = aligned(_STEP), aligned(_PER_SUB)
    largest = fill(0.0)
    for j in range(16):
        scale = refine_scale(x, j * _STEP, _SUB, 4, trial, levels)
        store(scales, j * WIDTH, scale)
        largest = where(absolute(scale) > absolute(largest), scale, largest)
    none = largest == 0.0
    inverse = -32.0 / largest
    for j in range(16):
        level = ((nint(inverse * load(scales, j * WIDTH)) & 255) ^ 128) - 128   # C keeps it in a byte
        store(stored, j * WIDTH, where(none, 0, smaller(larger(level, -32), 31) + 32))
    return where(none, 0, to_f16(1.0 / inverse))


@helper
def _fit_weighted(x: Floats, q: Floats, stored: Ints, levels: Ints) -> Lanes:
    """The same with importance: the scales are searched for their own scale as the values are."""
    w, wx, scales, weight = aligned(_STEP), aligned(_STEP), aligned(_PER_SUB), aligned(_PER_SUB)
    sigma2 = 2.0 * sum_of_squares(x) / 256.0
    for j in range(16):
        store(weight, j * WIDTH, weigh_by_importance(x, q, j * _STEP, _SUB, sigma2, w))
        store(scales, j * WIDTH, search_scale(x, j * _STEP, w, wx, _SUB, 4, False, levels))
    return to_f16(search_scale(scales, 0, weight, wx, 16, 32, True, stored))


@helper
def _pack(levels: Ints, j: int, words: Ints) -> None:
    """Sub-block `j`: two bits of bytes that four share, and bit ``j / 2`` of 16 bytes."""
    for i in range(4):
        word = word_of(levels, j * _STEP + 4 * i * WIDTH)
        pack_two_bits(word & 0x03030303, j, i, words, _LOW // 4)
        place = (_HIGH // 4 + 4 * (j % 2) + i) * WIDTH
        high = word >> 2 & 0x01010101
        store(words, place, high if j < 2 else load(words, place) | high << j // 2)


@helper
def _pack_scales(stored: Ints, words: Ints) -> None:
    """Three words: the low nibbles of sub-blocks 0..7 and, above them, 8..15; then the high bits, four to a byte."""
    a, b = word_of(stored, 0), word_of(stored, 4 * WIDTH)
    c, d = word_of(stored, 8 * WIDTH), word_of(stored, 12 * WIDTH)
    nibbles, pairs = 0x0F0F0F0F, 0x03030303
    to = _SCALES // 4 * WIDTH
    store(words, to, (a & nibbles) | (c & nibbles) << 4)
    store(words, to + WIDTH, (b & nibbles) | (d & nibbles) << 4)
    high = (a >> 4 & pairs) | (b >> 4 & pairs) << 2 | (c >> 4 & pairs) << 4 | (d >> 4 & pairs) << 6
    store(words, to + 2 * WIDTH, high)


@helper
def _encode_lanes(x: Floats, q: Floats, weighted: bool, blocks: Bytes) -> bool:
    """Encode one block per lane to `WIDTH` blocks; whether every d is finite as F16."""
    levels = aligned(_TILE).view(np.int32)
    stored = aligned(_PER_SUB).view(np.int32)
    words = aligned(28 * WIDTH).view(np.int32)
    d = _fit_weighted(x, q, stored, levels) if weighted else _fit_plain(x, stored, levels)
    for j in range(16):
        dd = from_f16(d) * to_float(load(stored, j * WIDTH) - 32)
        requantize_signed(x, j * _STEP, _SUB, 4, dd, levels)
        _pack(levels, j, words)
    _pack_scales(stored, words)
    store(words, _D // 4 * WIDTH, d)
    put_words(words, 28, blocks, 0, BYTES)
    return not any_of(is_infinite(d))


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to Q3_K, with an importance vector or without."""
    weighted = importance.size > 0
    tile, x, q = aligned(_TILE), aligned(_TILE), aligned(_TILE)
    blocks = aligned(BYTES * WIDTH // 4 + 4).view(np.uint8)
    for first in range(0, shape[0] * shape[1], _TILE):
        n_blocks = fill_lanes(kind, shape, data, scales, importance, first, VALUES, tile, x, q, faults)
        finite = _encode_lanes(x, q, weighted, blocks)
        write_blocks(blocks, BYTES * n_blocks, out, BYTES * (first // VALUES))
        if not finite:
            note_infinite(blocks, BYTES, n_blocks, _D, 1, first, VALUES, faults)


@kernel(DECODE)
def decode(data: Bytes, out: Floats) -> None:
    """Q3_K to float32: ``d (scale - 32) (l - 4)``."""
    for block in range(out.size // VALUES):
        at = BYTES * block
        d = f16_to_float(load_u16(data, at + _D))
        for j in range(16):
            scale = data[at + _SCALES + j % 8] >> 4 * (j // 8) & 15
            scale |= (data[at + _SCALES + 8 + j % 4] >> 2 * (j // 4) & 3) << 4
            dd = F(d * F(scale - 32))
            low = at + _LOW + 32 * (j // 8) + 16 * (j % 2)
            high = at + _HIGH + 16 * (j % 2)
            for i in range(_SUB):
                level = (data[low + i] >> 2 * (j % 8 // 2) & 3) | (data[high + i] >> j // 2 & 1) << 2
                out[VALUES * block + _SUB * j + i] = dd * F(level - 4)
