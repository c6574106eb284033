"""IQ4_NL and IQ4_XS: levels are indexes of sixteen numbers that lie closer together near zero.

IQ4_NL has 32 values under an F16 scale. IQ4_XS has 256: F16 d, a 6-bit scale for each of eight sub-blocks of 32, and
levels. Layouts and numbers are those of ggml-common.h (block_iq4_nl, block_iq4_xs, kvalues_iq4nl), the search that of
ggml-quants.c (quantize_row_iq4_nl_impl).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import f16_to_float, load_u16, store_u16
from dsv4tools.formats.blocks import (
    fill_lanes,
    is_infinite,
    note_infinite,
    pack_nibbles,
    put_words,
    sum_of_squares,
    weigh_by_importance,
    write_blocks,
)
from dsv4tools.formats.compile import helper, kernel, routine
from dsv4tools.formats.lanes import (
    WIDTH,
    aligned,
    any_of,
    bits_of,
    fill,
    larger,
    load,
    negated,
    nint,
    smaller,
    store,
    to_f16,
    to_float,
    where,
)
from dsv4tools.formats.signed import largest_of_each
from dsv4tools.formats.tiles import DECODE, ENCODE

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Ints, Shape

F = np.float32
NUMBERS = (
    F(-127), F(-104), F(-83), F(-65), F(-49), F(-35), F(-22), F(-10),
    F(1), F(13), F(25), F(38), F(53), F(69), F(89), F(113),
)  # fmt: skip
# Halfway between neighbours; what lies there goes up. ggml compares the two distances, which are exact near them.
MIDDLES = tuple(F((a + b) / 2) for a, b in pairwise(NUMBERS))

_SUB = 32                      # values of a block of IQ4_NL, or of a sub-block of IQ4_XS, which has eight
_STEP = _SUB * WIDTH           # a sub-block of every lane
_NL_BYTES, _XS_BYTES = 18, 136
_HALF = 16                     # values 0..15 of 32 are in the low nibbles, 16..31 in the high ones


@helper
def _is_xs(n_values: int, n_bytes: int) -> bool:
    """Whether bytes of so many values are IQ4_XS: 17 for each 32 values, not 18."""
    return n_bytes < n_values // _SUB * _NL_BYTES


@helper
def _nearest_number(v: Lanes) -> Lanes:
    """The nearest of the sixteen numbers; the last for NaN."""
    number = fill(NUMBERS[15])
    for i in range(14, -1, -1):
        number = where(v < MIDDLES[i], NUMBERS[i], number)
    return number


@helper
def _nearest_level(v: Lanes) -> Lanes:
    """The index of `_nearest_number` as int32 lanes."""
    level = (bits_of(v) & 0) | 15
    for i in range(14, -1, -1):
        level = where(v < MIDDLES[i], i, level)
    return level


@helper
def _sum_numbers(x: Floats, at: int, w: Floats, inverse: Lanes) -> tuple[Lanes, Lanes]:
    """The sums of w q x and w q^2 with q the number nearest to ``inverse * x``."""
    sqx = fill(0.0)
    sq2 = fill(0.0)
    for i in range(_SUB):
        value = load(x, at + i * WIDTH)
        number = _nearest_number(inverse * value)
        wq = load(w, i * WIDTH) * number
        sqx = sqx + wq * value
        sq2 = sq2 + wq * number
    return sqx, sq2


@routine
def _search_scale(x: Floats, at: int, w: Floats) -> Lanes:
    """Fit ``x = scale * q`` with q of the sixteen numbers, weighing squared errors with `w`; returns the scale."""
    largest, size = largest_of_each(x, at, _SUB)
    inverse = 1.0 / (largest / 127.0)
    scale = fill(0.0)
    best = scale
    for step in range(-8, 8):
        if step > -8:
            inverse = fill(F(step - 127)) / largest
        sqx, sq2 = _sum_numbers(x, at, w, inverse)
        first = fill(F(step)) == -8.0
        better = (sq2 > 0.0) & (first | (sqx * sqx > best * sq2))
        scale = where(better, sqx / sq2, scale)
        best = where(better, scale * sqx, best)
    return where(size < 1e-15, 0.0, scale)


@helper
def _weigh(x: Floats, q: Floats, at: int, weighted: bool, sigma2: Lanes, w: Floats) -> None:
    if weighted:
        weigh_by_importance(x, q, at, _SUB, sigma2, w)
    else:
        for i in range(_SUB):
            value = load(x, at + i * WIDTH)
            store(w, i * WIDTH, value * value)


@helper
def _put_levels(x: Floats, at: int, scale: Lanes, levels: Ints) -> None:
    """Levels for a scale; all are that of zero where it is 0."""
    inverse = where(scale == 0.0, 0.0, 1.0 / scale)
    for i in range(_SUB):
        store(levels, i * WIDTH, _nearest_level(inverse * load(x, at + i * WIDTH)))


@helper
def _scale_scales(found: Floats, words: Ints) -> Lanes:
    """Scales of eight sub-blocks as levels of the largest, ``-32 .. 31``; fills the two words before the levels.

    The scales become what they are stored as. Returns the F16 bits of d.
    """
    largest, _ = largest_of_each(found, 0, 8)
    d = negated(largest) / 32.0
    inverse = where(d == 0.0, 0.0, 1.0 / d)
    low = bits_of(d) & 0
    high = low
    for j in range(8):
        level = smaller(larger(nint(inverse * load(found, j * WIDTH)), -32), 31)
        store(found, j * WIDTH, d * to_float(level))
        low = low | ((level + 32) & 15) << 4 * j
        high = high | (level + 32) >> 4 << 2 * j
    half = to_f16(d)
    store(words, 0, half | high << 16)
    store(words, WIDTH, low)
    return half


@helper
def _encode_lanes(
    x: Floats, q: Floats, weighted: bool, w: Floats, found: Floats, words: Ints, blocks: Bytes, n_bytes: int
) -> bool:
    """Encode one block per lane; whether every F16 scale is finite."""
    levels = w.view(np.int32)
    n_subs = x.size // _STEP
    sigma2 = sum_of_squares(x) * (2.0 / (_SUB * n_subs))
    for j in range(n_subs):
        _weigh(x, q, j * _STEP, weighted, sigma2, w)
        store(found, j * WIDTH, _search_scale(x, j * _STEP, w))
    half = to_f16(load(found, 0)) if n_subs == 1 else _scale_scales(found, words)
    head = 0 if n_subs == 1 else 2
    for j in range(n_subs):
        _put_levels(x, j * _STEP, load(found, j * WIDTH), levels)
        pack_nibbles(levels, words, head + 4 * j)
    put_words(words, head + 4 * n_subs, blocks, 0 if head else 2, n_bytes)
    if n_subs == 1:
        store(words, 0, half)
        for k in range(WIDTH):
            store_u16(blocks, n_bytes * k, words[k])
    return not any_of(is_infinite(half))


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to IQ4_NL or IQ4_XS, whichever `out` has room for, with an importance vector or without."""
    n_values = shape[0] * shape[1]
    xs = _is_xs(n_values, out.size)
    n_bytes, values = (_XS_BYTES, 8 * _SUB) if xs else (_NL_BYTES, _SUB)
    n_tile = WIDTH * values
    weighted = importance.size > 0
    tile, x, q, w, found = aligned(n_tile), aligned(n_tile), aligned(n_tile), aligned(_STEP), aligned(8 * WIDTH)
    words = aligned(36 * WIDTH).view(np.int32)
    blocks = aligned(n_bytes * WIDTH // 4 + 4).view(np.uint8)
    for first in range(0, n_values, n_tile):
        n_blocks = fill_lanes(kind, shape, data, scales, importance, first, values, tile, x, q, faults)
        finite = _encode_lanes(x, q, weighted, w, found, words, blocks, n_bytes)
        write_blocks(blocks, n_bytes * n_blocks, out, n_bytes * (first // values))
        if not finite:
            note_infinite(blocks, n_bytes, n_blocks, 0, 1, first, values, faults)


@helper
def _decode_numbers(data: Bytes, at: int, scale: np.float32, out: Floats, to: int) -> None:
    for i in range(_HALF):
        packed = data[at + i]
        out[to + i] = scale * NUMBERS[packed & 15]
        out[to + _HALF + i] = scale * NUMBERS[packed >> 4]


@kernel(DECODE)
def decode(data: Bytes, out: Floats) -> None:
    """IQ4_NL to float32, ``d q``, or IQ4_XS, ``d (scale - 32) q``."""
    xs = _is_xs(out.size, data.size)
    for sub in range(out.size // _SUB):
        block, j = sub // 8, sub % 8
        at = _XS_BYTES * block if xs else _NL_BYTES * sub
        levels = at + 2
        scale = f16_to_float(load_u16(data, at))
        if xs:
            levels = at + 8 + _HALF * j
            level = (data[at + 4 + j // 2] >> 4 * (j % 2) & 15) | (load_u16(data, at + 2) >> 2 * j & 3) << 4
            scale = F(scale * F(np.int32(level) - 32))
        _decode_numbers(data, levels, scale, out, _SUB * sub)
