"""Q4_K: 256 values to F16 d and dmin, eight 6-bit scales and mins, 256 nibbles (ggml-common.h, block_q4_K)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import f16_to_float, load_u16
from dsv4tools.formats.compile import helper, kernel
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
from dsv4tools.formats.tiles import BLOCK_OVERFLOW, DECODE, ENCODE, N_TARGET, encode_tiles, note_fault

if TYPE_CHECKING:
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Shape

VALUES = 256
BYTES = 144
_SUB = 32                      # values of a sub-block; there are eight in a block
_TILE = WIDTH * VALUES         # one block per lane
_STEP = _SUB * WIDTH           # elements of a buffer from sub-block to sub-block
F = np.float32


@helper
def _to_lanes(tile: Floats, x: Floats) -> None:
    """Blocks side by side: value i of lane k goes from ``tile[256 k + i]`` to ``x[WIDTH i + k]``."""
    for i in range(0, VALUES, 8):
        for k in range(0, WIDTH, 8):
            transpose(8, tile, VALUES * k + i, VALUES, x, WIDTH * i + k, WIDTH)


@helper
def _weigh_by_size(x: Floats, at: int, w: Floats) -> None:
    total = fill(0.0)
    for i in range(_SUB):
        value = load(x, at + i * WIDTH)
        total = total + value * value
    mean = square_root(total / 32.0)
    for i in range(_SUB):
        store(w, i * WIDTH, mean + absolute(load(x, at + i * WIDTH)))


@helper
def _weigh_by_importance(x: Floats, q: Floats, at: int, sigma2, w: Floats):
    total = fill(0.0)
    for i in range(_SUB):
        value = load(x, at + i * WIDTH)
        weight = load(q, at + i * WIDTH) * square_root(sigma2 + value * value)
        total = total + weight
        store(w, i * WIDTH, weight)
    return total


@helper
def _six_bits(x, levels):
    """Scales (or mins) as levels of 0..63, and the F16 bits of what a level stands for: maximum / 63."""
    hi = fill(0.0)
    for j in range(8):
        value = load(x, j * WIDTH)
        hi = where(value > hi, value, hi)
    inverse = where(hi > 0.0, 63.0 / hi, 0.0)
    for j in range(8):
        store(levels, j * WIDTH, smaller(nint(inverse * load(x, j * WIDTH)) & 255, 63))
    return to_f16(hi / 63.0)


@helper
def _pack_head(d, dmin, scales, mins, words):
    """The first 16 bytes; returns nothing, but leaves in `scales` and `mins` what a decoder will read."""
    store(words, 0, d | dmin << 16)
    low = fill(0.0)
    word_s = nint(low)
    word_m = nint(low)
    word_h = nint(low)
    for j in range(4):
        s0 = load(scales, j * WIDTH)
        s1 = load(scales, (j + 4) * WIDTH)
        m0 = load(mins, j * WIDTH)
        m1 = load(mins, (j + 4) * WIDTH)
        s = (s0 | s1 >> 4 << 6) & 255
        m = (m0 | m1 >> 4 << 6) & 255
        h = ((s1 & 15) | m1 << 4) & 255
        word_s = word_s | s << (8 * j)
        word_m = word_m | m << (8 * j)
        word_h = word_h | h << (8 * j)
        store(scales, j * WIDTH, s & 63)
        store(mins, j * WIDTH, m & 63)
        store(scales, (j + 4) * WIDTH, (h & 15) | s >> 6 << 4)
        store(mins, (j + 4) * WIDTH, h >> 4 | m >> 6 << 4)
    store(words, WIDTH, word_s)
    store(words, 2 * WIDTH, word_m)
    store(words, 3 * WIDTH, word_h)


@helper
def _requantize(x, at, dd, dm, inverse, low, levels):
    """Levels of a sub-block for the scale and min that are stored; where the scale is 0 the search's stay."""
    for i in range(_SUB):
        store(levels, i * WIDTH, clipped_integer((load(x, at + i * WIDTH) + dm) / dd, 15))
    none = dd == 0.0
    if any_of(none):
        for i in range(_SUB):
            kept = clipped_integer(inverse * (load(x, at + i * WIDTH) - low), 15)
            store(levels, i * WIDTH, where(none, kept, load(levels, i * WIDTH)))


@helper
def _encode_lanes(x, q, weighted, blocks):
    """Encode one block per lane to `WIDTH` blocks; whether all d and dmin are finite as F16."""
    w = aligned(_STEP)
    trial = aligned(2 * _STEP)
    levels = trial.view(np.int32)
    fits = aligned(5 * 8 * WIDTH)
    scale, low, weight, inverse, offset = (
        fits[: 8 * WIDTH], fits[8 * WIDTH : 16 * WIDTH], fits[16 * WIDTH : 24 * WIDTH],
        fits[24 * WIDTH : 32 * WIDTH], fits[32 * WIDTH :],
    )
    scales = aligned(8 * WIDTH).view(np.int32)
    mins = aligned(8 * WIDTH).view(np.int32)
    words = aligned(36 * WIDTH).view(np.int32)
    sigma2 = fill(0.0)
    if weighted:
        for i in range(VALUES):
            value = load(x, i * WIDTH)
            sigma2 = sigma2 + value * value
        sigma2 = 2.0 * sigma2 / 256.0
    for j in range(8):
        at = j * _STEP
        if weighted:
            store(weight, j * WIDTH, _weigh_by_importance(x, q, at, sigma2, w))
            rmin, rdelta, n_steps = F(-0.9), F(0.05), 36
        else:
            _weigh_by_size(x, at, w)
            rmin, rdelta, n_steps = F(-1.0), F(0.1), 20
        s, m, kept_inverse, kept_low = search_scale_and_min(x, at, w, trial, _SUB, 15, rmin, rdelta, n_steps)
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
    unit = from_f16(d)
    unit_min = from_f16(dmin)
    for pair in range(4):
        for half in range(2):
            j = 2 * pair + half
            dd = unit * to_float(load(scales, j * WIDTH))
            dm = unit_min * to_float(load(mins, j * WIDTH))
            _requantize(
                x, j * _STEP, dd, dm, load(inverse, j * WIDTH), load(offset, j * WIDTH), levels[half * _STEP :]
            )
        for i in range(8):
            word = load(levels, 4 * i * WIDTH) | load(levels, 4 * i * WIDTH + _STEP) << 4
            for b in range(1, 4):
                code = load(levels, (4 * i + b) * WIDTH) | load(levels, (4 * i + b) * WIDTH + _STEP) << 4
                word = word | code << (8 * b)
            store(words, (4 + 8 * pair + i) * WIDTH, word)
    for i in range(0, 36, 4):
        for k in range(0, WIDTH, 4):
            transpose(4, words, WIDTH * i + k, WIDTH, blocks, BYTES * k + 4 * i, BYTES)
    return not any_of(((d & 0x7FFF) >= 0x7C00) | ((dmin & 0x7FFF) >= 0x7C00))


@helper
def _encode_tile(
    tile: Floats, count: int, first: int, n_cols: int, importance: Floats, out: Bytes, at: int, faults: FaultSlots
) -> None:
    x = aligned(_TILE)
    q = aligned(_TILE)
    blocks = aligned(BYTES * WIDTH // 4).view(np.uint8)
    _to_lanes(tile, x)
    weighted = importance.size > 0
    n_blocks = count // VALUES
    if weighted:
        for k in range(WIDTH):
            column = (first + VALUES * k) % n_cols
            tile[VALUES * k : VALUES * k + VALUES] = importance[column : column + VALUES]
        _to_lanes(tile, q)
    finite = _encode_lanes(x, q, weighted, blocks)
    out[at : at + BYTES * n_blocks] = blocks[: BYTES * n_blocks]
    if not finite:
        for k in range(n_blocks):
            d = load_u16(blocks, BYTES * k) & 0x7FFF
            dmin = load_u16(blocks, BYTES * k + 2) & 0x7FFF
            if max(d, dmin) >= 0x7C00:
                note_fault(faults, N_TARGET, BLOCK_OVERFLOW, first + VALUES * k, 1)


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    encode_tiles(_encode_tile, _TILE, VALUES, BYTES, kind, shape, data, scales, importance, out, faults)


@kernel(DECODE)
def decode(data: Bytes, out: Floats) -> None:
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
