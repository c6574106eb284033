"""Q4_0, Q4_1, Q5_0, Q5_1: 32 values to levels of four or five bits and an F16 scale, in the _1 an F16 min.

The layouts are those of ggml-common.h (block_q4_0 and so on), the formulas those of ggml-quants.c
(quantize_row_q4_0_ref and so on; with importance quantize_row_q4_0_impl and so on, which search for the scale).

One kernel serves all four, for it takes long to compile: the size of a block says which format is meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import f16_to_float, load_u16, load_u32, store_u16
from dsv4tools.formats.blocks import (
    fill_lanes,
    is_infinite,
    note_infinite,
    pack_nibbles,
    put_words,
    weigh_by_importance,
    write_blocks,
)
from dsv4tools.formats.compile import helper, kernel, routine
from dsv4tools.formats.lanes import (
    WIDTH,
    absolute,
    aligned,
    any_of,
    bits_of,
    clipped_integer,
    load,
    negated,
    smaller,
    store,
    to_f16,
    truncated,
    where,
)
from dsv4tools.formats.search import search_scale_and_min
from dsv4tools.formats.signed import largest_of_each, search_scale
from dsv4tools.formats.tiles import DECODE, ENCODE, N_FAULT_SLOTS, fill_tile

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Ints, Shape

VALUES = 32
_HALF = 16                     # values 0..15 of a block are in the low nibbles, 16..31 in the high ones
_TILE = WIDTH * VALUES         # one block per lane
F = np.float32


@helper
def _read_block_size(n_bytes: int) -> tuple[int, bool]:
    """Bits of a level, and whether there is a min: a block has 18, 20, 22 or 24 bytes."""
    return 5 if n_bytes >= 22 else 4, n_bytes in (20, 24)


@routine
def _mean_squares(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, tile: Floats, means: Floats
) -> None:
    """The mean square of every row: with importance, weights depend on it."""
    n_rows, n_cols, _, _, _ = shape
    ignored = np.zeros(N_FAULT_SLOTS, np.int64)   # what there is to count is counted when the values are encoded
    for row in range(n_rows):
        total = F(0.0)
        for column in range(0, n_cols, tile.size):
            part = tile[: min(tile.size, n_cols - column)]
            fill_tile(kind, shape, data, scales, row * n_cols + column, part, ignored)
            for i in range(part.size):
                total = F(total + F(part[i] * part[i]))
        means[row] = F(total / F(n_cols))


@helper
def _rows_of_lanes(means: Floats, first: int, n_cols: int, of_lanes: Floats) -> None:
    """For every lane the number of its row, where the first lane's block starts at value `first`."""
    for k in range(WIDTH):
        of_lanes[k] = means[min((first + VALUES * k) // n_cols, means.size - 1)]


@helper
def _put_levels(v: Lanes, zero: Lanes, highest: int, levels: Ints, i: int) -> None:
    """``min(highest, int(v))``; 0 where `zero`: there v is infinite or NaN, which x86 converts to a byte of 0."""
    level = bits_of(truncated(v) + 12582912.0) - 0x4B400000
    store(levels, i * WIDTH, where(zero, 0, smaller(level, highest)))


@helper
def _fit_signed(x: Floats, q: Floats, mean: Lanes, weighted: bool, half: int, levels: Ints) -> Lanes:
    """Levels ``l + half`` of ``x = d l``, and d."""
    if weighted:
        w, wx = aligned(_TILE), aligned(_TILE)
        weigh_by_importance(x, q, 0, VALUES, mean, w)
        return search_scale(x, 0, w, wx, VALUES, half, False, levels)
    largest, _ = largest_of_each(x, 0, VALUES)
    d = largest / -half
    inverse = where(d == 0.0, 0.0, 1.0 / d)
    beyond = absolute(inverse) == F(np.inf)
    for i in range(VALUES):
        _put_levels(load(x, i * WIDTH) * inverse + (F(half) + F(0.5)), beyond, 2 * half - 1, levels, i)
    return d


@helper
def _fit_with_min(x: Floats, q: Floats, mean: Lanes, weighted: bool, highest: int, levels: Ints) -> tuple[Lanes, Lanes]:
    """Levels of ``x = d l + m``, d and m."""
    if weighted:
        w, trial = aligned(_TILE), aligned(_TILE)
        weigh_by_importance(x, q, 0, VALUES, mean, w)
        d, low, inverse, offset = search_scale_and_min(
            x, 0, w, trial, VALUES, highest, F(-0.9), F(0.05), 36, True
        )
        for i in range(VALUES):
            store(levels, i * WIDTH, clipped_integer(inverse * (load(x, i * WIDTH) - offset), highest))
        return d, negated(low)
    lo = load(x, 0)
    hi = lo
    for i in range(1, VALUES):
        value = load(x, i * WIDTH)
        lo = where(value < lo, value, lo)
        hi = where(value > hi, value, hi)
    d = (hi - lo) / highest
    inverse = where(d == 0.0, 0.0, 1.0 / d)
    beyond = inverse == F(np.inf)
    for i in range(VALUES):
        _put_levels((load(x, i * WIDTH) - lo) * inverse + 0.5, beyond, highest, levels, i)
    return d, lo


@helper
def _fifth_bits(levels: Ints) -> Lanes:
    """Bit i is the fifth bit of level i."""
    word = load(levels, 0) >> 4
    for i in range(1, VALUES):
        word = word | load(levels, i * WIDTH) >> 4 << i
    return word


@helper
def _encode_lanes(
    x: Floats, q: Floats, mean: Lanes, weighted: bool, bits: int, has_min: bool, levels: Ints, words: Ints,
    blocks: Bytes, n_bytes: int,
) -> bool:  # fmt: skip
    """Encode one block per lane to `WIDTH` blocks; whether every scale and min is finite as F16."""
    head = 1 if has_min else 0   # words before the levels
    if has_min:
        scale, low = _fit_with_min(x, q, mean, weighted, (1 << bits) - 1, levels)
        d, m = to_f16(scale), to_f16(low)
        store(words, 0, d | m << 16)
        faulty = any_of(is_infinite(d) | is_infinite(m))
    else:
        d = to_f16(_fit_signed(x, q, mean, weighted, 1 << (bits - 1), levels))
        faulty = any_of(is_infinite(d))
    if bits == 5:
        store(words, head * WIDTH, _fifth_bits(levels))
        head += 1
    pack_nibbles(levels, words, head)
    put_words(words, head + 4, blocks, 0 if has_min else 2, n_bytes)
    if not has_min:
        store(words, 0, d)
        for k in range(WIDTH):
            store_u16(blocks, n_bytes * k, words[k])
    return not faulty


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to the format that has blocks of as many bytes as `out` has room for."""
    n_values = shape[0] * shape[1]
    if n_values == 0:
        return
    n_bytes = out.size // (n_values // VALUES)
    bits, has_min = _read_block_size(n_bytes)
    weighted = importance.size > 0
    tile, x, q, of_lanes = aligned(_TILE), aligned(_TILE), aligned(_TILE), aligned(WIDTH)
    levels, words = aligned(_TILE).view(np.int32), aligned(8 * WIDTH).view(np.int32)
    blocks = aligned(n_bytes * WIDTH // 4 + 4).view(np.uint8)
    means = np.zeros(shape[0] if weighted else 1, np.float32)
    if weighted:
        _mean_squares(kind, shape, data, scales, tile, means)
    for first in range(0, n_values, _TILE):
        n_blocks = fill_lanes(kind, shape, data, scales, importance, first, VALUES, tile, x, q, faults)
        _rows_of_lanes(means, first, shape[1], of_lanes)
        finite = _encode_lanes(x, q, load(of_lanes, 0), weighted, bits, has_min, levels, words, blocks, n_bytes)
        write_blocks(blocks, n_bytes * n_blocks, out, n_bytes * (first // VALUES))
        if not finite:
            note_infinite(blocks, n_bytes, n_blocks, 0, 2 if has_min else 1, first, VALUES, faults)


@kernel(DECODE)
def decode(data: Bytes, out: Floats) -> None:
    """Blocks of the format with as many bytes to float32: ``d (l - half)``, or ``d l + m``."""
    n_blocks = out.size // VALUES
    n_bytes = data.size // n_blocks if n_blocks else 0
    bits, has_min = _read_block_size(n_bytes)
    for block in range(n_blocks):
        at = n_bytes * block
        d = f16_to_float(load_u16(data, at))
        m = f16_to_float(load_u16(data, at + 2)) if has_min else F(0.0)
        nibbles = at + n_bytes - _HALF
        fifths = load_u32(data, nibbles - 4) if bits == 5 else np.uint32(0)
        for i in range(VALUES):
            level = np.int32(data[nibbles + i % _HALF] >> 4 * (i // _HALF) & 15)
            level |= np.int32((fifths >> np.uint32(i)) & np.uint32(1)) << 4
            if has_min:
                out[VALUES * block + i] = F(F(level) * d) + m
            else:
                out[VALUES * block + i] = F(level - (1 << (bits - 1))) * d
