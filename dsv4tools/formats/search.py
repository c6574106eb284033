"""The searches for block scales that the K formats share, over lanes: each lane is a sub-block of its own.

The formulas are those of ggml-quants.c (make_qkx2_quants, make_qkx3_quants, make_qp_quants), operation by operation:
each is rounded to float32, each sum is taken from the first element to the last. Buffers hold element i of all lanes
at ``offset + i * WIDTH``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.compile import helper, routine
from dsv4tools.formats.lanes import (
    WIDTH,
    absolute,
    any_of,
    clipped,
    fill,
    load,
    negated,
    nint,
    smaller,
    store,
    to_float,
    where,
)

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Floats, Ints

F = np.float32


@helper
def _sum_levels(
    x: Floats, at: int, w: Floats, levels: Floats, n: int, lo: Lanes, inverse: Lanes, highest: int, everywhere: bool
) -> tuple[Lanes, Lanes, Lanes]:
    """Put ``l = clip(nint(inverse * (x - lo)))`` to `levels`; the sums of w l, w l^2 and w l x."""
    sl = fill(0.0)
    sl2 = fill(0.0)
    sxl = fill(0.0)
    for i in range(n):
        value = load(x, at + i * WIDTH)
        level = clipped(inverse * (value - lo), highest, everywhere)
        store(levels, i * WIDTH, level)
        wl = load(w, i * WIDTH) * level
        sl = sl + wl
        sl2 = sl2 + wl * level
        sxl = sxl + wl * value
    return sl, sl2, sxl


@helper
def _sum_errors(
    x: Floats, at: int, w: Floats, levels: Floats, n: int, scale: Lanes, lo: Lanes, squared: bool
) -> Lanes:
    """The sum of ``w e^2``, or else of ``w |e|``, with ``e = scale * l + lo - x``."""
    total = fill(0.0)
    for i in range(n):
        error = scale * load(levels, i * WIDTH) + lo - load(x, at + i * WIDTH)
        error = error * error if squared else absolute(error)
        total = total + load(w, i * WIDTH) * error
    return total


@routine
def search_scale_and_min(
    x: Floats, at: int, w: Floats, levels: Floats, n: int, highest: int,
    rmin: np.float32, rdelta: np.float32, n_steps: int, squared: bool,
) -> tuple[Lanes, Lanes, Lanes, Lanes]:  # fmt: skip
    """Fit ``x = scale * l + minimum`` with l in 0..highest and minimum <= 0, weighing errors (or squared) with `w`.

    Returns ``(scale, -minimum, inverse, low)``: the levels of the best fit are ``clip(nint(inverse * (x - low)))``.
    """
    lo = load(x, at)
    hi = lo
    weight = load(w, 0)
    sw = weight
    sx = weight * lo
    for i in range(1, n):
        value = load(x, at + i * WIDTH)
        weight = load(w, i * WIDTH)
        lo = where(value < lo, value, lo)
        hi = where(value > hi, value, hi)
        sw = sw + weight
        sx = sx + weight * value
    smallest = lo
    lo = where(lo > 0.0, 0.0, lo)
    flat = hi <= lo   # a flat lane gets an inverse of 0 and so level 0 everywhere, which no step improves
    inverse = where(flat, 0.0, highest / (hi - lo))
    scale = where(flat, 0.0, 1.0 / inverse)
    _sum_levels(x, at, w, levels, n, lo, inverse, highest, True)
    best = _sum_errors(x, at, w, levels, n, scale, lo, squared)
    kept_inverse = inverse
    kept_lo = lo
    for step in range(n_steps + 1):
        inverse = where(flat, 0.0, (rmin + rdelta * F(step) + F(highest)) / (hi - lo))
        # The product is monotonic in x: when both ends are in range, so is everything between.
        first = absolute(inverse * (smallest - lo))
        last = absolute(inverse * (hi - lo))
        if any_of(~((first < 4194303.0) & (last < 4194303.0))):
            sl, sl2, sxl = _sum_levels(x, at, w, levels, n, lo, inverse, highest, True)
        else:
            sl, sl2, sxl = _sum_levels(x, at, w, levels, n, lo, inverse, highest, False)
        det = sw * sl2 - sl * sl
        s = (sw * sxl - sx * sl) / det
        m = (sl2 * sx - sl * sxl) / det
        above = m > 0.0
        if any_of(above):
            s = where(above, sxl / sl2, s)
            m = where(above, 0.0, m)
        total = _sum_errors(x, at, w, levels, n, s, m, squared)
        better = (det > 0.0) & (total < best)
        best = where(better, total, best)
        scale = where(better, s, scale)
        kept_inverse = where(better, inverse, kept_inverse)
        kept_lo = where(better, lo, kept_lo)
        lo = where(better, m, lo)
    return scale, negated(lo), kept_inverse, kept_lo


@routine
def fit_positive(x: Floats, w: Floats, levels: Ints, n: int, highest: int) -> Lanes:
    """Fit ``x = scale * l`` with l in 0..highest, weighing squared errors with `w`; integers l go to `levels`.

    `x` and `w` hold one sub-block per element and one block per lane. C keeps a level in a byte, whatever came out.
    Returns the scale.
    """
    hi = fill(0.0)
    for i in range(n):
        value = load(x, i * WIDTH)
        hi = where(value > hi, value, hi)
    tiny = hi < 1e-15
    inverse = highest / hi
    scale = 1.0 / inverse
    best = fill(0.0)
    for i in range(n):
        value = load(x, i * WIDTH)
        error = value - scale * to_float(nint(inverse * value) & 255)
        best = best + load(w, i * WIDTH) * error * error
    for step in range(-4, 5):
        if step != 0:
            trial = (F(0.1) * F(step) + F(highest)) / hi
            scale = 1.0 / trial
            total = fill(0.0)
            for i in range(n):
                value = load(x, i * WIDTH)
                error = value - scale * to_float(smaller(nint(trial * value), highest))
                total = total + load(w, i * WIDTH) * error * error
            better = total < best
            best = where(better, total, best)
            inverse = where(better, trial, inverse)
    sumlx = fill(0.0)
    suml2 = fill(0.0)
    for i in range(n):
        value = load(x, i * WIDTH)
        weight = load(w, i * WIDTH)
        integer = smaller(nint(inverse * value), highest)
        level = to_float(integer)
        store(levels, i * WIDTH, where(tiny, 0, integer & 255))
        sumlx = sumlx + weight * value * level
        suml2 = suml2 + weight * level * level
    for _ in range(5):
        changed = tiny & ~tiny
        for i in range(n):
            value = load(x, i * WIDTH)
            weight = load(w, i * WIDTH)
            old = load(levels, i * WIDTH)
            level = to_float(old)
            slx = sumlx - weight * value * level
            sl2 = suml2 - weight * level * level
            new = smaller(nint(value * sl2 / slx), highest)
            accepted = (slx > 0.0) & (sl2 > 0.0) & (new != old) & ~tiny
            level = to_float(new)
            slx = slx + weight * value * level
            sl2 = sl2 + weight * level * level
            accepted = accepted & (slx * slx * suml2 > sumlx * sumlx * sl2)
            store(levels, i * WIDTH, where(accepted, new & 255, old))
            sumlx = where(accepted, slx, sumlx)
            suml2 = where(accepted, sl2, suml2)
            changed = changed | accepted
        if not any_of(changed):
            break
    return where(~tiny & (suml2 > 0.0), sumlx / suml2, 0.0)
