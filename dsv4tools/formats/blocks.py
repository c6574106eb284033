"""Blocks side by side, `WIDTH` of them, one per lane: what formats share that are encoded so.

Value i of all lanes lies at ``i * WIDTH`` of a buffer, so that a sub-block is a run of it. Blocks are put together as
words of 32 bits in the same order, and turned into bytes at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import load_u16
from dsv4tools.formats.compile import helper, routine
from dsv4tools.formats.lanes import (
    WIDTH,
    absolute,
    any_of,
    clipped_integer,
    fill,
    load,
    square_root,
    store,
    transpose,
    where,
)
from dsv4tools.formats.tiles import BLOCK_OVERFLOW, N_TARGET, fill_tile, note_fault

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Ints, Shape

F = np.float32


# ---- In


@routine
def _to_lanes(tile: Floats, values: int, x: Floats) -> None:
    """Value i of lane k goes from ``tile[values * k + i]`` to ``x[WIDTH * i + k]``."""
    for i in range(0, values, 8):
        for k in range(0, WIDTH, 8):
            transpose(8, tile, values * k + i, values, x, WIDTH * i + k, WIDTH)


@helper
def _gather_importance(importance: Floats, first: int, n_cols: int, values: int, tile: Floats) -> None:
    """The weights of the columns of as many values as a tile has, the first of which is value `first`."""
    for k in range(WIDTH):
        column = (first + values * k) % n_cols
        for i in range(values):
            tile[values * k + i] = importance[column + i]


@helper
def fill_lanes(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, first: int, values: int,
    tile: Floats, x: Floats, q: Floats, faults: FaultSlots,
) -> int:  # fmt: skip
    """Blocks of `values` values, from value `first` on, to `x`, the importance of their columns to `q`.

    Returns how many blocks there are; lanes without a block hold zeros. `tile` is room to work in.
    """
    n_blocks = fill_tile(kind, shape, data, scales, first, tile, faults) // values
    _to_lanes(tile, values, x)
    if importance.size:
        _gather_importance(importance, first, shape[1], values, tile)
        _to_lanes(tile, values, q)
    return n_blocks


# ---- Weights of values in a search


@helper
def sum_of_squares(x: Floats) -> Lanes:
    """The sum of a block's squares."""
    total = fill(0.0)
    for i in range(x.size // WIDTH):
        value = load(x, i * WIDTH)
        total = total + value * value
    return total


@helper
def weigh_by_size(x: Floats, at: int, n: int, w: Floats) -> None:
    """Without importance a value weighs its size plus the sub-block's root mean square."""
    total = fill(0.0)
    for i in range(n):
        value = load(x, at + i * WIDTH)
        total = total + value * value
    mean = square_root(total / F(n))
    for i in range(n):
        store(w, i * WIDTH, mean + absolute(load(x, at + i * WIDTH)))


@helper
def weigh_by_importance(x: Floats, q: Floats, at: int, n: int, sigma2: Lanes, w: Floats) -> Lanes:
    """Weights from the columns' importance; returns their sum."""
    total = fill(0.0)
    for i in range(n):
        value = load(x, at + i * WIDTH)
        weight = load(q, at + i * WIDTH) * square_root(sigma2 + value * value)
        total = total + weight
        store(w, i * WIDTH, weight)
    return total


# ---- Levels for scales as stored, and bytes


@routine
def requantize(
    x: Floats, at: int, n: int, highest: int, dd: Lanes, dm: Lanes, inverse: Lanes, low: Lanes, levels: Ints
) -> None:
    """Levels of a sub-block for the scale and min that are stored; where that scale is 0 the search's stay."""
    for i in range(n):
        store(levels, i * WIDTH, clipped_integer((load(x, at + i * WIDTH) + dm) / dd, highest))
    none = dd == 0.0
    if any_of(none):
        for i in range(n):
            kept = clipped_integer(inverse * (load(x, at + i * WIDTH) - low), highest)
            store(levels, i * WIDTH, where(none, kept, load(levels, i * WIDTH)))


@helper
def word_of(levels: Ints, at: int) -> Lanes:
    """Four int32 lanes of 0..255 as one word, the first in the low byte."""
    word = load(levels, at) | load(levels, at + WIDTH) << 8
    return word | load(levels, at + 2 * WIDTH) << 16 | load(levels, at + 3 * WIDTH) << 24


@helper
def pack_two_bits(word: Lanes, j: int, i: int, words: Ints, to: int) -> None:
    """Word `i` of sub-block `j` of 16 (a level 0..3 in each byte) to the 16 words from `to` on.

    Sub-blocks 0, 2, 4, 6 share bytes, each with two bits of them, as do 1, 3, 5, 7, and so on from 8.
    """
    shift = 2 * (j % 8 // 2)
    place = (to + 8 * (j // 8) + 4 * (j % 2) + i) * WIDTH
    store(words, place, word if shift == 0 else load(words, place) | word << shift)


@helper
def pack_nibbles(levels: Ints, words: Ints, to: int) -> None:
    """The low four bits of 32 levels as four words: in bytes 0..15 levels 0..15 in the low nibbles, 16..31 above."""
    for i in range(4):
        low, high = word_of(levels, 4 * i * WIDTH), word_of(levels, 4 * (i + 4) * WIDTH)
        store(words, (to + i) * WIDTH, (low & 0x0F0F0F0F) | (high & 0x0F0F0F0F) << 4)


@helper
def put_words(words: Ints, n: int, blocks: Bytes, to: int, n_bytes: int) -> None:
    """The first `n` words to byte `to` of every lane's block of `n_bytes`.

    Words go in fours, from the last ones on: what lies beyond a block is overwritten by the next block's first ones.
    Hence `words` has room for a multiple of four, and `blocks` for 16 bytes more than its blocks.
    """
    for i in range((n - 1) // 4 * 4, -1, -4):
        for k in range(0, WIDTH, 4):
            transpose(4, words, WIDTH * i + k, WIDTH, blocks, n_bytes * k + to + 4 * i, n_bytes)


@helper
def is_infinite(half: Lanes) -> Lanes:
    """Whether F16 bits in int32 lanes are an infinity or NaN."""
    return (half & 0x7FFF) >= 0x7C00


@helper
def write_blocks(blocks: Bytes, n: int, out: Bytes, to: int) -> None:
    """The first `n` bytes of lanes' blocks to `out`."""
    for i in range(n):
        out[to + i] = blocks[i]


@routine
def note_infinite(
    blocks: Bytes, n_bytes: int, n_blocks: int, at: int, n_halves: int, first: int, values: int, faults: FaultSlots
) -> None:
    """Count the blocks with an F16 that is infinite or NaN among the `n_halves` at byte `at`.

    `first` is the position of the first block's first value.
    """
    for k in range(n_blocks):
        largest = 0
        for i in range(n_halves):
            largest = max(largest, load_u16(blocks, n_bytes * k + at + 2 * i) & 0x7FFF)
        if largest >= 0x7C00:
            note_fault(faults, N_TARGET, BLOCK_OVERFLOW, first + values * k, 1)
