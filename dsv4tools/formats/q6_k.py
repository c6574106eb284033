"""Q6_K: 256 values to levels of six bits (the low four, then the high two), sixteen int8 scales, F16 d.

The layout is that of ggml-common.h (block_q6_K), the search that of ggml-quants.c (quantize_row_q6_K_ref and _impl).
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
    load,
    nint,
    smaller,
    store,
    to_f16,
    to_float,
    where,
)
from dsv4tools.formats.signed import requantize_signed, search_scale
from dsv4tools.formats.tiles import DECODE, ENCODE

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Ints, Shape

VALUES = 256
BYTES = 210
_LOW, _HIGH, _SCALES, _D = 0, 128, 192, 208   # where each begins
_SUB = 16                      # values of a sub-block; there are sixteen in a block
_STEP = _SUB * WIDTH           # a sub-block of every lane
_TILE = WIDTH * VALUES         # one block per lane
F = np.float32


@helper
def _fit_scales(x: Floats, q: Floats, weighted: bool, scales: Floats, levels: Ints) -> Lanes:
    """Search all sub-blocks, values weighing their squares or their importance; returns the largest scale by size."""
    w, wx = aligned(_STEP), aligned(_STEP)
    largest = fill(0.0)
    for j in range(16):
        for i in range(_SUB):
            place = j * _STEP + i * WIDTH
            store(w, i * WIDTH, load(q, place) if weighted else load(x, place) * load(x, place))
        scale = search_scale(x, j * _STEP, w, wx, _SUB, 32, False, levels)
        store(scales, j * WIDTH, scale)
        largest = where(absolute(scale) > absolute(largest), scale, largest)
    return largest


@helper
def _pack(levels: Ints, j: int, words: Ints) -> None:
    """Sub-block `j`: the low bits to a nibble, the high ones to two bits, of bytes that others share."""
    half, plane, side = j // 8, j % 8 // 2, j % 2
    for i in range(4):
        word = word_of(levels, j * _STEP + 4 * i * WIDTH)
        place = (_LOW // 4 + 16 * half + 8 * (plane % 2) + 4 * side + i) * WIDTH
        low = word & 0x0F0F0F0F
        store(words, place, low if plane < 2 else load(words, place) | low << 4)
        pack_two_bits(word >> 4 & 0x03030303, j, i, words, _HIGH // 4)


@helper
def _encode_lanes(x: Floats, q: Floats, weighted: bool, blocks: Bytes) -> bool:
    """Encode one block per lane to `WIDTH` blocks; whether every d is finite as F16."""
    levels = aligned(_TILE).view(np.int32)
    scales = aligned(16 * WIDTH)
    stored = aligned(16 * WIDTH).view(np.int32)
    words = aligned(56 * WIDTH).view(np.int32)
    largest = _fit_scales(x, q, weighted, scales, levels)
    empty = absolute(largest) < 1e-15
    inverse = -128.0 / largest
    d = where(empty, 0, to_f16(1.0 / inverse))
    for j in range(16):
        scale = smaller(nint(inverse * load(scales, j * WIDTH)), 127)
        store(stored, j * WIDTH, scale & 255)
        dd = from_f16(d) * to_float(((scale & 255) ^ 128) - 128)
        requantize_signed(x, j * _STEP, _SUB, 32, dd, levels)
        _pack(levels, j, words)
    for i in range(4):
        store(words, (_SCALES // 4 + i) * WIDTH, word_of(stored, 4 * i * WIDTH))
    store(words, _D // 4 * WIDTH, d)
    if any_of(empty):   # nothing but zero bytes
        for i in range(_D // 4):
            store(words, i * WIDTH, where(empty, 0, load(words, i * WIDTH)))
    put_words(words, 53, blocks, 0, BYTES)
    return not any_of(is_infinite(d))


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to Q6_K, with an importance vector or without."""
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
    """Q6_K to float32: ``d scale (l - 32)``."""
    for block in range(out.size // VALUES):
        at = BYTES * block
        d = f16_to_float(load_u16(data, at + _D))
        for j in range(16):
            half, plane, side = j // 8, j % 8 // 2, j % 2
            dd = F(d * F(np.int8(data[at + _SCALES + j])))
            low = at + _LOW + 64 * half + 32 * (plane % 2) + 16 * side
            high = at + _HIGH + 32 * half + 16 * side
            for i in range(_SUB):
                level = (data[low + i] >> 4 * (plane // 2) & 15) | (data[high + i] >> 2 * plane & 3) << 4
                out[VALUES * block + _SUB * j + i] = dd * F(level - 32)
