"""Searches for scales of levels on both sides of zero, over lanes: what Q3_K, Q6_K, Q4_0 and Q5_0 have in common.

The formulas are those of ggml-quants.c (make_qx_quants, make_q3_quants), operation by operation; see `search` for how
buffers lie. A level l is one of ``-half .. half - 1`` and stored as ``l + half``. A sub-block with nothing above 1e-15
has the scale 0 and stores 0 everywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.compile import helper, routine
from dsv4tools.formats.lanes import (
    WIDTH,
    absolute,
    any_of,
    bits_of,
    fill,
    float_of,
    larger,
    load,
    smaller,
    store,
    where,
)

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Floats, Ints

F = np.float32
_MAGIC = 12582912.0      # 1.5 * 2^23, see `lanes.clipped_integer`
_BITS = 0x4B400000       # its bits


@helper
def _signed(v: Lanes, half: int, everywhere: bool) -> Lanes:
    """``clip(nint(v), -half, half - 1)`` as float32; unless `everywhere` only right for ``|v| < 2^22``."""
    bits = bits_of(v + _MAGIC)
    if everywhere:
        bits = bits & 0x7FFFFF | 0x4B000000
    return float_of(smaller(larger(bits, _BITS - half), _BITS + half - 1)) - _MAGIC


@helper
def _stored(v: Lanes, half: int) -> Lanes:
    """``clip(nint(v), -half, half - 1) + half`` as int32 lanes, for every v."""
    bits = bits_of(v + _MAGIC) & 0x7FFFFF | 0x4B000000
    return smaller(larger(bits, _BITS - half), _BITS + half - 1) - (_BITS - half)


@helper
def largest_of_each(x: Floats, at: int, n: int) -> tuple[Lanes, Lanes]:
    """Of each lane the first of the values that are largest in size, and its size."""
    size = fill(0.0)
    largest = size
    for i in range(n):
        value = load(x, at + i * WIDTH)
        above = absolute(value) > size
        size = where(above, absolute(value), size)
        largest = where(above, value, largest)
    return largest, size


@helper
def _sum_levels(
    x: Floats, at: int, w: Floats, wx: Floats, n: int, half: int, inverse: Lanes, everywhere: bool
) -> tuple[Lanes, Lanes]:
    """The sums of w x l and w l^2 with ``l = clip(nint(inverse * x))``."""
    slx = fill(0.0)
    sl2 = fill(0.0)
    for i in range(n):
        level = _signed(inverse * load(x, at + i * WIDTH), half, everywhere)
        slx = slx + load(wx, i * WIDTH) * level
        sl2 = sl2 + load(w, i * WIDTH) * level * level
    return slx, sl2


@routine
def search_scale(
    x: Floats, at: int, w: Floats, wx: Floats, n: int, half: int, everywhere: bool, levels: Ints
) -> Lanes:
    """Fit ``x = scale * l``, weighing squared errors with `w`; stored levels go to `levels` from `at` on.

    `wx` is room for as many values as `w` has. `everywhere` is for x that may be infinite or NaN. Returns the scale.
    """
    for i in range(n):
        store(wx, i * WIDTH, load(w, i * WIDTH) * load(x, at + i * WIDTH))
    largest, size = largest_of_each(x, at, n)
    kept = fill(-half) / largest
    slx, sl2 = _sum_levels(x, at, w, wx, n, half, kept, everywhere)
    scale = where(sl2 != 0.0, slx / sl2, 0.0)
    best = scale * slx
    for step in range(-9, 10):
        if step != 0:
            inverse = fill(-(F(half) + F(0.1) * F(step))) / largest
            slx, sl2 = _sum_levels(x, at, w, wx, n, half, inverse, everywhere)
            better = (sl2 > 0.0) & (slx * slx > best * sl2)
            kept = where(better, inverse, kept)
            scale = where(better, slx / sl2, scale)
            best = where(better, scale * slx, best)
    tiny = size < 1e-15
    for i in range(n):
        level = _stored(kept * load(x, at + i * WIDTH), half)
        store(levels, at + i * WIDTH, where(tiny, 0, level))
    return where(tiny, 0.0, scale)


@routine
def refine_scale(x: Floats, at: int, n: int, half: int, trial: Floats, levels: Ints) -> Lanes:
    """Fit ``x = scale * l``, weighing squared errors with x^2, by moving one level after the other.

    `trial` is room for n lanes. Stored levels go to `levels` from `at` on. Returns the scale.
    """
    largest, size = largest_of_each(x, at, n)
    tiny = size < 1e-15
    inverse = fill(-half) / largest
    sumlx = fill(0.0)
    suml2 = fill(0.0)
    for i in range(n):
        value = load(x, at + i * WIDTH)
        level = _signed(inverse * value, half, False)
        store(trial, i * WIDTH, level)
        w = value * value
        sumlx = sumlx + w * value * level
        suml2 = suml2 + w * level * level
    for _ in range(5):
        changed = tiny & ~tiny
        for i in range(n):
            value = load(x, at + i * WIDTH)
            old = load(trial, i * WIDTH)
            w = value * value
            wx = w * value
            slx = sumlx - wx * old
            sl2 = suml2 - w * old * old
            new = _signed(value * sl2 / slx, half, True)
            accepted = (slx > 0.0) & (new != old)
            slx = slx + wx * new
            sl2 = sl2 + w * new * new
            accepted = accepted & (sl2 > 0.0) & (slx * slx * suml2 > sumlx * sumlx * sl2)
            store(trial, i * WIDTH, where(accepted, new, old))
            sumlx = where(accepted, slx, sumlx)
            suml2 = where(accepted, sl2, suml2)
            changed = changed | accepted
        if not any_of(changed & ~tiny):
            break
    for i in range(n):
        level = bits_of(load(trial, i * WIDTH) + _MAGIC) - (_BITS - half)
        store(levels, at + i * WIDTH, where(tiny, 0, level))
    return where(~tiny & (suml2 > 0.0), sumlx / suml2, 0.0)


@routine
def requantize_signed(x: Floats, at: int, n: int, half: int, dd: Lanes, levels: Ints) -> None:
    """Stored levels for the scale that is stored; where that is 0 the search's stay."""
    none = dd == 0.0
    for i in range(n):
        level = _stored(load(x, at + i * WIDTH) / dd, half)
        store(levels, at + i * WIDTH, where(none, load(levels, at + i * WIDTH), level))
