"""Q2_K: 256 values to sixteen 4-bit scales and mins, 256 levels of two bits, F16 d and dmin.

The layout is that of ggml-common.h (block_q2_K), the search that of ggml-quants.c (quantize_row_q2_K_ref and _impl).
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
    requantize,
    sum_of_squares,
    weigh_by_importance,
    word_of,
    write_blocks,
)
from dsv4tools.formats.compile import helper, kernel, routine
from dsv4tools.formats.lanes import (
    WIDTH,
    absolute,
    aligned,
    any_of,
    fill,
    from_f16,
    load,
    nint,
    store,
    to_f16,
    to_float,
    where,
)
from dsv4tools.formats.search import fit_positive, search_scale_and_min
from dsv4tools.formats.tiles import DECODE, ENCODE

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Ints, Shape

VALUES = 256
BYTES = 84
_LEVELS, _D = 16, 80           # where the levels begin, and d
_SUB = 16                      # values of a sub-block; there are sixteen in a block
_STEP = _SUB * WIDTH           # a sub-block of every lane
_PER_SUB = 16 * WIDTH          # one number per sub-block
_TILE = WIDTH * VALUES         # one block per lane
F = np.float32


@routine
def _four_bits(x: Floats, levels: Ints) -> Lanes:
    """Scales (or mins) as levels 0..15 of their maximum, and the F16 bits of what one level is."""
    hi = fill(0.0)
    for j in range(16):
        value = load(x, j * WIDTH)
        hi = where(value > hi, value, hi)
    inverse = where(hi > 0.0, 15.0 / hi, 0.0)
    for j in range(16):
        store(levels, j * WIDTH, nint(inverse * load(x, j * WIDTH)) & 255)
    return to_f16(hi / 15.0)


@helper
def _encode_lanes(x: Floats, q: Floats, weighted: bool, blocks: Bytes) -> bool:
    """Encode one block per lane to `WIDTH` blocks; whether every d and dmin is finite as F16."""
    w, trial = aligned(_STEP), aligned(_STEP)
    levels = trial.view(np.int32)
    scale, low, weight = aligned(_PER_SUB), aligned(_PER_SUB), aligned(_PER_SUB)
    inverse, offset = aligned(_PER_SUB), aligned(_PER_SUB)
    scales, mins = aligned(_PER_SUB).view(np.int32), aligned(_PER_SUB).view(np.int32)
    words = aligned(24 * WIDTH).view(np.int32)
    rmin, rdelta, n_steps = (F(-0.9), F(0.05), 36) if weighted else (F(-0.5), F(0.1), 15)
    sigma2 = sum_of_squares(x) / 256.0 if weighted else fill(0.0)
    for j in range(16):
        at = j * _STEP
        if weighted:
            store(weight, j * WIDTH, weigh_by_importance(x, q, at, _SUB, sigma2, w))
        else:
            for i in range(_SUB):
                store(w, i * WIDTH, absolute(load(x, at + i * WIDTH)))
        s, m, kept_inverse, kept_low = search_scale_and_min(x, at, w, trial, _SUB, 3, rmin, rdelta, n_steps, weighted)
        store(scale, j * WIDTH, s)
        store(low, j * WIDTH, m)
        store(inverse, j * WIDTH, kept_inverse)
        store(offset, j * WIDTH, kept_low)
    if weighted:
        d = to_f16(fit_positive(scale, weight, scales, 16, 15))
        dmin = to_f16(fit_positive(low, weight, mins, 16, 15))
    else:
        d = _four_bits(scale, scales)
        dmin = _four_bits(low, mins)
    for j in range(16):
        both = (load(scales, j * WIDTH) | load(mins, j * WIDTH) << 4) & 255
        store(scales, j * WIDTH, both)
        dd = from_f16(d) * to_float(both & 15)
        dm = from_f16(dmin) * to_float(both >> 4)
        requantize(x, j * _STEP, _SUB, 3, dd, dm, load(inverse, j * WIDTH), load(offset, j * WIDTH), levels)
        for i in range(4):
            pack_two_bits(word_of(levels, 4 * i * WIDTH), j, i, words, _LEVELS // 4)
    for i in range(4):
        store(words, i * WIDTH, word_of(scales, 4 * i * WIDTH))
    store(words, _D // 4 * WIDTH, d | dmin << 16)
    put_words(words, 21, blocks, 0, BYTES)
    return not any_of(is_infinite(d) | is_infinite(dmin))


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to Q2_K, with an importance vector or without."""
    weighted = importance.size > 0
    tile, x, q = aligned(_TILE), aligned(_TILE), aligned(_TILE)
    blocks = aligned((BYTES + 16) // 4 * WIDTH).view(np.uint8)
    for first in range(0, shape[0] * shape[1], _TILE):
        n_blocks = fill_lanes(kind, shape, data, scales, importance, first, VALUES, tile, x, q, faults)
        finite = _encode_lanes(x, q, weighted, blocks)
        write_blocks(blocks, BYTES * n_blocks, out, BYTES * (first // VALUES))
        if not finite:
            note_infinite(blocks, BYTES, n_blocks, _D, 2, first, VALUES, faults)


@kernel(DECODE)
def decode(data: Bytes, out: Floats) -> None:
    """Q2_K to float32: ``d scale l - dmin min``."""
    for block in range(out.size // VALUES):
        at = BYTES * block
        d = f16_to_float(load_u16(data, at + _D))
        dmin = f16_to_float(load_u16(data, at + _D + 2))
        for j in range(16):
            dd = F(d * F(data[at + j] & 15))
            dm = F(dmin * F(data[at + j] >> 4))
            levels = at + _LEVELS + 32 * (j // 8) + 16 * (j % 2)
            shift = 2 * (j % 8 // 2)
            for i in range(_SUB):
                out[VALUES * block + _SUB * j + i] = F(dd * F((data[levels + i] >> shift) & 3)) - dm
