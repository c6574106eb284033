"""Sums over decoded values: errors against a source, and what a tensor's values are like.

Sums are float64 in sixteen lanes that are added at the end, in the same order on every processor. Nothing that is
written depends on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.formats.bits import bits_float, float_bits, is_finite
from dsv4tools.formats.compile import helper, kernel
from dsv4tools.formats.lanes import absolute, bits_of, larger, largest_of, load_lanes, store, where, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Floats, Ints

    Doubles = NDArray[np.float64]

_LANES = 16
_VALUES = "Array(float32, 1, 'C', readonly=True)"
_MAGNITUDE, _INFINITY, _SIGN = 0x7FFFFFFF, 0x7F800000, -0x80000000
# Slots of `sum_errors`, and of `sum_values`.
N, SQUARED_ERROR, PRODUCT, SQUARED_FOUND, SQUARED_SOURCE, LARGEST_ERROR, LARGEST_AT, N_NOT_FINITE = range(8)
N_FINITE, SUM, SQUARED, HIGHEST, LOWEST, N_ZERO, N_BAD, N_SMALL, N_LARGE = range(9)


@helper
def _total(lanes: Lanes) -> float:
    room = np.empty(_LANES, np.float64)
    store(room, 0, lanes)
    total = 0.0
    for k in range(_LANES):
        total += room[k]
    return total


@helper
def _count(lanes: Lanes) -> int:
    room = np.empty(_LANES, np.int32)
    store(room, 0, lanes)
    total = 0
    for k in range(_LANES):
        total += room[k]
    return total


@helper
def _load_rest(values: Floats, i: int) -> Lanes:
    """The lanes from `i` to the end, fewer than there are; NaN behind."""
    rest = np.full(_LANES, np.float32(np.nan))
    for k in range(i, values.size):
        rest[k - i] = values[k]
    return load_lanes(_LANES, rest, 0)


@helper
def _or_zero(value: np.float32) -> np.float32:
    return value if is_finite(value) else np.float32(0.0)


@helper
def _add_errors(x: Lanes, y: Lanes, so_far: Any) -> Any:
    squared, product, of_found, of_source, largest, n_finite = so_far
    finite = (bits_of(x) & _INFINITY) != _INFINITY
    y = where(finite & ((bits_of(y) & _INFINITY) != _INFINITY), y, 0.0)
    x = where(finite, x, 0.0)
    a, b = widened(x), widened(y)
    difference = a - b
    return (
        squared + difference * difference, product + a * b, of_found + a * a, of_source + b * b,
        larger(largest, bits_of(absolute(x - y))), n_finite + where(finite, (bits_of(x) ^ bits_of(x)) + 1, 0),
    )  # fmt: skip


@kernel(f"void({_VALUES}, {_VALUES}, float64[::1])")
def sum_errors(found: Floats, source: Floats, sums: Doubles) -> None:
    """Add the sums over two runs of values to `sums`.

    A value of `found` that is not finite is counted, and takes part in nothing else; one of `source` counts as 0, as
    where values were zeroed. LARGEST_AT is counted from the start of this run; negative if it was not in this run.
    """
    none = load_lanes(_LANES, np.zeros(_LANES, np.int32), 0)
    zero = load_lanes(_LANES, np.zeros(_LANES, np.float64), 0)
    so_far = (zero, zero, zero, zero, none, none)
    whole = found.size - found.size % _LANES
    for i in range(0, whole, _LANES):
        so_far = _add_errors(load_lanes(_LANES, found, i), load_lanes(_LANES, source, i), so_far)
    if whole < found.size:
        so_far = _add_errors(_load_rest(found, whole), _load_rest(source, whole), so_far)
    squared, product, of_found, of_source, largest, n_finite = so_far
    n_bad = found.size - _count(n_finite)
    sums[N] += found.size - n_bad
    sums[SQUARED_ERROR] += _total(squared)
    sums[PRODUCT] += _total(product)
    sums[SQUARED_FOUND] += _total(of_found)
    sums[SQUARED_SOURCE] += _total(of_source)
    sums[N_NOT_FINITE] += n_bad
    most = bits_float(np.uint32(largest_of(largest)))
    sums[LARGEST_AT] = -1
    if float(most) > sums[LARGEST_ERROR]:
        sums[LARGEST_ERROR] = most
        for i in range(found.size):
            if is_finite(found[i]) and abs(found[i] - _or_zero(source[i])) == most:
                sums[LARGEST_AT] = i
                break


@kernel(f"void({_VALUES}, {_VALUES}, int64, float64[:, ::1])")
def sum_cells(found: Floats, source: Floats, n_cell: int, sums: Doubles) -> None:
    """For each run of `n_cell` values (the last may be shorter): squared error, squared source, values not finite."""
    for cell in range(len(sums)):
        squared_error = squared = 0.0
        n_bad = 0
        for i in range(cell * n_cell, min((cell + 1) * n_cell, found.size)):
            y = float(_or_zero(source[i]))
            if is_finite(found[i]):
                squared_error += (float(found[i]) - y) * (float(found[i]) - y)
            else:
                n_bad += 1
            squared += y * y
        sums[cell, 0], sums[cell, 1], sums[cell, 2] = squared_error, squared, n_bad


@helper
def _ordered(bits: Lanes) -> Lanes:
    """Integers in the order of the floats with these bits; the other way round by the same formula."""
    return where(bits < 0, bits ^ _MAGNITUDE, bits)


@helper
def _largest_float(ordered: Lanes) -> np.float32:
    top = largest_of(ordered)
    return bits_float(np.uint32(top ^ _MAGNITUDE if top < 0 else top))


@helper
def _add_values(x: Lanes, so_far: Any) -> Any:
    total, squared, highest, lowest, n_finite, n_zero, n_small, n_large = so_far
    bits = bits_of(x)
    magnitude = bits & _MAGNITUDE
    one = (bits ^ bits) + 1
    finite = magnitude < _INFINITY
    a = widened(where(finite, x, 0.0))
    return (
        total + a, squared + a * a,
        larger(highest, where(finite, _ordered(bits), -_INFINITY)),
        larger(lowest, where(finite, _ordered(bits ^ _SIGN), -_INFINITY)),
        n_finite + where(finite, one, 0), n_zero + where(magnitude == 0, one, 0),
        n_small + where(magnitude < 0x38800000, one, 0), n_large + where(finite & (magnitude >= 0x477FE000), one, 0),
    )  # fmt: skip


@kernel(f"void({_VALUES}, float64[::1])")
def sum_values(values: Floats, sums: Doubles) -> None:
    """Add what a run of values is like to `sums`; HIGHEST and LOWEST must begin as -inf and +inf.

    Values that are not finite are counted (N_BAD) and take part in nothing else. N_SMALL counts magnitudes below the
    normal numbers of F16, zero included; N_LARGE those of its largest number or above, if they are finite.
    """
    none = load_lanes(_LANES, np.zeros(_LANES, np.int32), 0)
    zero = load_lanes(_LANES, np.zeros(_LANES, np.float64), 0)
    so_far = (zero, zero, none - _INFINITY, none - _INFINITY, none, none, none, none)
    whole = values.size - values.size % _LANES
    for i in range(0, whole, _LANES):
        so_far = _add_values(load_lanes(_LANES, values, i), so_far)
    if whole < values.size:
        so_far = _add_values(_load_rest(values, whole), so_far)
    total, squared, highest, lowest, finite, n_zero, n_small, n_large = so_far
    n_finite = _count(finite)
    sums[N_FINITE] += n_finite
    sums[SUM] += _total(total)
    sums[SQUARED] += _total(squared)
    sums[N_ZERO] += _count(n_zero)
    sums[N_BAD] += values.size - n_finite
    sums[N_SMALL] += _count(n_small)
    sums[N_LARGE] += _count(n_large)
    if n_finite:
        sums[HIGHEST] = max(sums[HIGHEST], float(_largest_float(highest)))
        sums[LOWEST] = min(sums[LOWEST], -float(_largest_float(lowest)))


@kernel(f"void({_VALUES}, int64[::1])")
def count_exponents(values: Floats, counts: Ints) -> None:
    """Add to `counts` [256] how many values have each exponent of float32, as stored (127 is 1 up to 2)."""
    for i in range(values.size):
        counts[float_bits(values[i]) >> np.uint32(23) & np.uint32(255)] += 1
