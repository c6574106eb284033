"""Eight sub-blocks of 32 values, each with a scale and a min of six bits: what Q4_K and Q5_K share.

The formulas are those of ggml-quants.c (quantize_row_q4_K_ref, quantize_row_q5_K_impl, get_scale_min_k4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.blocks import sum_of_squares, weigh_by_importance, weigh_by_size
from dsv4tools.formats.compile import helper, routine
from dsv4tools.formats.lanes import WIDTH, aligned, fill, load, nint, smaller, store, to_f16, where
from dsv4tools.formats.search import fit_positive, search_scale_and_min

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Bytes, Floats, Ints

SUB = 32                      # values of a sub-block
STEP = SUB * WIDTH            # a sub-block of every lane
PER_SUB = 8 * WIDTH           # one number per sub-block
F = np.float32


@helper
def fit_sub_blocks(
    x: Floats, q: Floats, weighted: bool, highest: int, rmin: np.float32, rdelta: np.float32, n_steps: int,
    inverse: Floats, offset: Floats, scales: Ints, mins: Ints, words: Ints,
) -> tuple[Lanes, Lanes]:  # fmt: skip
    """Search all sub-blocks, and put the first 16 bytes of the blocks to `words`.

    Without importance the search takes the steps that are given, with importance the same for all types. Sub-block j's
    scale and min as stored go to `scales` and `mins`; its levels in the search were
    ``clip(nint(inverse * (x - offset)))``. Returns d and dmin as F16 bits.
    """
    w, trial = aligned(STEP), aligned(STEP)
    scale, low, weight = aligned(PER_SUB), aligned(PER_SUB), aligned(PER_SUB)
    if weighted:
        rmin, rdelta, n_steps = F(-0.9), F(0.05), 36
    sigma2 = 2.0 * sum_of_squares(x) / 256.0 if weighted else fill(0.0)
    for j in range(8):
        if weighted:
            store(weight, j * WIDTH, weigh_by_importance(x, q, j * STEP, SUB, sigma2, w))
        else:
            weigh_by_size(x, j * STEP, SUB, w)
        s, m, kept_inverse, kept_low = search_scale_and_min(
            x, j * STEP, w, trial, SUB, highest, rmin, rdelta, n_steps, True
        )
        store(scale, j * WIDTH, s)
        store(low, j * WIDTH, m)
        store(inverse, j * WIDTH, kept_inverse)
        store(offset, j * WIDTH, kept_low)
    if weighted:
        d = to_f16(fit_positive(scale, weight, scales, 8, 63))
        dmin = to_f16(fit_positive(low, weight, mins, 8, 63))
        if highest == 31:   # C cuts what does not fit into six bits for Q5_K; for Q4_K it lets it spill
            for j in range(8):
                store(scales, j * WIDTH, smaller(load(scales, j * WIDTH), 63))
                store(mins, j * WIDTH, smaller(load(mins, j * WIDTH), 63))
    else:
        d = _levels(scale, scales)
        dmin = _levels(low, mins)
    _pack(d, dmin, scales, mins, words)
    return d, dmin

@routine
def _levels(x: Floats, levels: Ints) -> Lanes:
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
def _pack(d: Lanes, dmin: Lanes, scales: Ints, mins: Ints, words: Ints) -> None:
    """d, dmin, scales and mins as four words. Leaves in `scales` and `mins` what a decoder will read from them.

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


@helper
def read_scale_and_min(data: Bytes, at: int, j: int) -> tuple[int, int]:
    """Scale and min of sub-block `j` from the twelve bytes at `at`."""
    if j < 4:
        return data[at + j] & 63, data[at + 4 + j] & 63
    low = data[at + 4 + j]
    return (low & 15) | (data[at + j - 4] >> 6) << 4, (low >> 4) | (data[at + j] >> 6) << 4
