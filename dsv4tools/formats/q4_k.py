"""Q4_K: 256 values to F16 d and dmin, eight 6-bit scales and mins, 256 nibbles (ggml-common.h, block_q4_K)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import f16_to_float, load_u16
from dsv4tools.formats.compile import helper, kernel, routine
from dsv4tools.formats.lanes import (
    WIDTH,
    absolute,
    aligned,
    any_of,
    clipped_integer,
    fill,
    from_f16,
    load,
    nint,
    smaller,
    square_root,
    store,
    to_f16,
    to_float,
    transpose,
    where,
)
from dsv4tools.formats.search import fit_positive, search_scale_and_min
from dsv4tools.formats.tiles import BLOCK_OVERFLOW, DECODE, ENCODE, N_TARGET, fill_tile, note_fault

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Ints, Shape

VALUES = 256
BYTES = 144
_SUB = 32                      # values of a sub-block; there are eight in a block
_TILE = WIDTH * VALUES         # one block per lane
_STEP = _SUB * WIDTH           # a sub-block of every lane
_FIT = 8 * WIDTH               # one number per sub-block
F = np.float32


@routine
def _to_lanes(tile: Floats, x: Floats) -> None:
    """Blocks side by side: value i of lane k goes from ``tile[256 k + i]`` to ``x[WIDTH i + k]``."""
    for i in range(0, VALUES, 8):
        for k in range(0, WIDTH, 8):
            transpose(8, tile, VALUES * k + i, VALUES, x, WIDTH * i + k, WIDTH)


@helper
def _weigh_by_size(x: Floats, at: int, w: Floats) -> None:
    """Without importance a value weighs its size plus the sub-block's root mean square."""
    total = fill(0.0)
    for i in range(_SUB):
        value = load(x, at + i * WIDTH)
        total = total + value * value
    mean = square_root(total / 32.0)
    for i in range(_SUB):
        store(w, i * WIDTH, mean + absolute(load(x, at + i * WIDTH)))


@helper
def _weigh_by_importance(x: Floats, q: Floats, at: int, sigma2: Lanes, w: Floats) -> Lanes:
    """Weights from the columns' importance; returns their sum."""
    total = fill(0.0)
    for i in range(_SUB):
        value = load(x, at + i * WIDTH)
        weight = load(q, at + i * WIDTH) * square_root(sigma2 + value * value)
        total = total + weight
        store(w, i * WIDTH, weight)
    return total


@routine
def _six_bits(x: Floats, levels: Ints) -> Lanes:
    """Scales (or mins) as levels 0..63 of their maximum, and the F16 bits of what one level is."""
    hi = fill(0.0)
    for j in range(8):
        value = load(x, j * WIDTH)
        hi = where(value > hi, value, hi)
    inverse = where(hi > 0.0, 63.0 / hi, 0.0)
    for j in range(8):
        store(levels, j * WIDTH, smaller(nint(inverse * load(x, j * WIDTH)) & 255, 63))
    return to_f16(hi / 63.0)


@routine
def _pack_head(d: Lanes, dmin: Lanes, scales: Ints, mins: Ints, words: Ints) -> None:
    """The first 16 bytes as four words. Leaves in `scales` and `mins` what a decoder will read from them.

    Sub-block j < 4: byte j is s[j] with the two high bits of s[j + 4] above, byte j + 4 the same of m, byte j + 8
    the low halves of s[j + 4] and m[j + 4].
    """
    store(words, 0, d | dmin << 16)
    for word in range(1, 4):
        store(words, word * WIDTH, d ^ d)
    for j in range(4):
        s, m = load(scales, j * WIDTH), load(mins, j * WIDTH)
        s4, m4 = load(scales, (j + 4) * WIDTH), load(mins, (j + 4) * WIDTH)
        s = (s | s4 >> 4 << 6) & 255
        m = (m | m4 >> 4 << 6) & 255
        both = (s4 & 15 | m4 << 4) & 255
        store(words, WIDTH, load(words, WIDTH) | s << 8 * j)
        store(words, 2 * WIDTH, load(words, 2 * WIDTH) | m << 8 * j)
        store(words, 3 * WIDTH, load(words, 3 * WIDTH) | both << 8 * j)
        store(scales, j * WIDTH, s & 63)
        store(mins, j * WIDTH, m & 63)
        store(scales, (j + 4) * WIDTH, both & 15 | s >> 6 << 4)
        store(mins, (j + 4) * WIDTH, both >> 4 | m >> 6 << 4)


@routine
def _requantize(x: Floats, at: int, dd: Lanes, dm: Lanes, inverse: Lanes, low: Lanes, levels: Ints) -> None:
    """Levels of a sub-block for the scale and min that are stored; where that scale is 0 the search's stay."""
    for i in range(_SUB):
        store(levels, i * WIDTH, clipped_integer((load(x, at + i * WIDTH) + dm) / dd, 15))
    none = dd == 0.0
    if any_of(none):
        for i in range(_SUB):
            kept = clipped_integer(inverse * (load(x, at + i * WIDTH) - low), 15)
            store(levels, i * WIDTH, where(none, kept, load(levels, i * WIDTH)))


@helper
def _pack_pair(levels: Ints, words: Ints, to: int) -> None:
    """Two sub-blocks of levels as eight words: the first in the low nibbles, the second in the high ones."""
    for i in range(8):
        word = load(levels, 4 * i * WIDTH) | load(levels, 4 * i * WIDTH + _STEP) << 4
        for b in range(1, 4):
            byte = load(levels, (4 * i + b) * WIDTH) | load(levels, (4 * i + b) * WIDTH + _STEP) << 4
            word = word | byte << 8 * b
        store(words, to + i * WIDTH, word)


@helper
def _encode_lanes(x: Floats, q: Floats, weighted: bool, blocks: Bytes) -> bool:
    """Encode one block per lane to `WIDTH` blocks; whether every d and dmin is finite as F16."""
    w = aligned(_STEP)
    trial = aligned(2 * _STEP)
    levels = trial.view(np.int32)
    scale, low, weight = aligned(_FIT), aligned(_FIT), aligned(_FIT)   # of each sub-block
    inverse, offset = aligned(_FIT), aligned(_FIT)
    scales, mins = aligned(_FIT).view(np.int32), aligned(_FIT).view(np.int32)
    words = aligned(BYTES // 4 * WIDTH).view(np.int32)
    rmin, rdelta, n_steps = (F(-0.9), F(0.05), 36) if weighted else (F(-1.0), F(0.1), 20)
    sigma2 = fill(0.0)
    if weighted:
        for i in range(VALUES):
            value = load(x, i * WIDTH)
            sigma2 = sigma2 + value * value
        sigma2 = 2.0 * sigma2 / 256.0
    for j in range(8):
        if weighted:
            store(weight, j * WIDTH, _weigh_by_importance(x, q, j * _STEP, sigma2, w))
        else:
            _weigh_by_size(x, j * _STEP, w)
        s, m, kept_inverse, kept_low = search_scale_and_min(x, j * _STEP, w, trial, _SUB, 15, rmin, rdelta, n_steps)
        store(scale, j * WIDTH, s)
        store(low, j * WIDTH, m)
        store(inverse, j * WIDTH, kept_inverse)
        store(offset, j * WIDTH, kept_low)
    if weighted:
        d = to_f16(fit_positive(scale, weight, scales, 8, 63))
        dmin = to_f16(fit_positive(low, weight, mins, 8, 63))
    else:
        d = _six_bits(scale, scales)
        dmin = _six_bits(low, mins)
    _pack_head(d, dmin, scales, mins, words)
    for j in range(8):
        dd = from_f16(d) * to_float(load(scales, j * WIDTH))
        dm = from_f16(dmin) * to_float(load(mins, j * WIDTH))
        half = levels[j % 2 * _STEP :]
        _requantize(x, j * _STEP, dd, dm, load(inverse, j * WIDTH), load(offset, j * WIDTH), half)
        if j % 2:
            _pack_pair(levels, words, (4 * j) * WIDTH)
    for i in range(0, BYTES // 4, 4):
        for k in range(0, WIDTH, 4):
            transpose(4, words, WIDTH * i + k, WIDTH, blocks, BYTES * k + 4 * i, BYTES)
    return not any_of(((d & 0x7FFF) >= 0x7C00) | ((dmin & 0x7FFF) >= 0x7C00))


@helper
def _gather_importance(importance: Floats, first: int, n_cols: int, tile: Floats) -> None:
    """The weights of the columns of as many values as a tile has, the first of which is value `first`."""
    for k in range(WIDTH):
        column = (first + VALUES * k) % n_cols
        for i in range(VALUES):
            tile[VALUES * k + i] = importance[column + i]


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to Q4_K, with an importance vector or without. Lanes without a block hold zeros."""
    weighted = importance.size > 0
    tile, x, q = aligned(_TILE), aligned(_TILE), aligned(_TILE)
    blocks = aligned(BYTES // 4 * WIDTH).view(np.uint8)
    for first in range(0, shape[0] * shape[1], _TILE):
        n_blocks = fill_tile(kind, shape, data, scales, first, tile, faults) // VALUES
        _to_lanes(tile, x)
        if weighted:
            _gather_importance(importance, first, shape[1], tile)
            _to_lanes(tile, q)
        finite = _encode_lanes(x, q, weighted, blocks)
        start = first // VALUES * BYTES
        for i in range(n_blocks * BYTES):
            out[start + i] = blocks[i]
        if not finite:
            for k in range(n_blocks):
                d, dmin = load_u16(blocks, BYTES * k) & 0x7FFF, load_u16(blocks, BYTES * k + 2) & 0x7FFF
                if max(d, dmin) >= 0x7C00:
                    note_fault(faults, N_TARGET, BLOCK_OVERFLOW, first + VALUES * k, 1)


@kernel(DECODE)
def decode(data: Bytes, out: Floats) -> None:
    """Q4_K to float32: ``d scale l - dmin min``."""
    for block in range(out.size // VALUES):
        at = BYTES * block
        d = f16_to_float(load_u16(data, at))
        dmin = f16_to_float(load_u16(data, at + 2))
        for j in range(8):
            if j < 4:
                scale = data[at + 4 + j] & 63
                low = data[at + 8 + j] & 63
            else:
                scale = (data[at + 8 + j] & 15) | (data[at + j] >> 6) << 4
                low = (data[at + 8 + j] >> 4) | (data[at + 4 + j] >> 6) << 4
            dd = F(d * F(scale))
            dm = F(dmin * F(low))
            shift = 4 * (j & 1)
            nibbles = at + 16 + 32 * (j >> 1)
            for i in range(32):
                out[VALUES * block + 32 * j + i] = F(dd * F((data[nibbles + i] >> shift) & 15)) - dm
