"""The search of IQ2_XXS, IQ2_XS and IQ2_S for grid points: eight values at a time, one eight per lane.

The formulas are those of ggml-quants.c (quantize_row_iq2_xxs_impl, iq2_find_best_neighbour and so on), operation by
operation; see `search` for how buffers lie. Levels are 0..2 and stand for 1, 3 and 5.

Most eights fall into a cell that is no point of the grid, and then 10 (IQ2_S) to 70 (IQ2_XS) points have to be tried.
Here lanes turn around: the errors that an eight's values have at each level are computed with an eight per lane, then
eight after eight tries `GROUP` points at once, one per lane, adding errors up in ggml's order. Which level a point has
is held as bits of masks, so that a sum costs two selections and an addition per value. Eights are sorted by the length
of their lists, so that the processor can foresee where loops end.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.compile import helper, routine
from dsv4tools.formats.grids import find_cells, find_grid
from dsv4tools.formats.lanes import (
    WIDTH,
    absolute,
    aligned,
    bits_of,
    clipped,
    fill,
    first_of,
    float_of,
    lane_numbers,
    load,
    load_mask,
    negated,
    smallest_of,
    spread,
    square_root,
    store,
    to_float,
    where,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Floats, Ints

    Words = NDArray[np.uint16]
    Lists = tuple[Words, Ints, Ints]
    Room = tuple[Floats, Ints, Ints, Ints]

GROUP = 16       # points that are tried at once, as many as a mask has bits
_LINE = 32       # numbers in a group of a list
_LENGTHS = 32    # lists have fewer groups than this
_SEARCHED = 1 << 30
LISTS = "uint16[::1], int32[::1], int32[::1]"   # the signature of what `make_lists` returns


@cache
def make_lists(name: str) -> Lists:
    """The points to try for each cell of a format's grid, as kernels read them.

    Returns
    -------
    groups:
        uint16 [n * 32], each `GROUP` points of a list: first masks, bit k of mask 2 i + level - 1 saying that value i
        of point k has this level (1 or 2), then the numbers of the points. What a list does not fill repeats points.
    entries:
        int32 [n_points]: two bits per level, the first value's lowest, and the point's number above these 16.
    places:
        int32 [n_cells]: which group the list of a cell begins with, times 32, plus how many groups it has. Of a cell
        that is a point, the point's entry times 32.
    """
    grid, cells = find_grid(name), find_cells(name)
    entries = (grid.levels.astype(np.int32) << 2 * np.arange(8)).sum(1, dtype=np.int32)
    entries |= np.arange(len(entries), dtype=np.int32) << 16
    lengths = np.where(cells.point >= 0, 0, np.diff(cells.start))
    n_groups = -(-lengths // GROUP)
    first = np.cumsum(n_groups) - n_groups
    places = np.where(cells.point >= 0, entries[cells.point], first) * _LENGTHS + n_groups
    of_list = np.repeat(np.arange(len(lengths)), GROUP * n_groups)   # for each point of all groups its cell
    slots = np.arange(len(of_list)) - GROUP * first[of_list]
    # A repeated point must not win in another lane: it stands in its own, one group earlier, if there is one.
    beyond = slots >= lengths[of_list]
    slots[beyond] = np.where(n_groups[of_list] > 1, slots - GROUP, lengths[of_list] - 1)[beyond]
    numbers = cells.near[cells.start[of_list] + slots].reshape(-1, GROUP)
    levels = np.arange(1, 3)[:, None] == grid.levels[numbers].transpose(0, 2, 1)[:, :, None, :]   # [group, 8, 2, GROUP]
    masks = np.packbits(levels, axis=3, bitorder="little").view("<u2").reshape(-1, GROUP)
    return np.hstack([masks, numbers]).reshape(-1).astype(np.uint16), entries, places.astype(np.int32)


@helper
def make_room() -> Room:
    """What `snap` works in: errors of each value at each level, cells, eights queued by the lengths of their lists."""
    return (
        aligned(24 * WIDTH), aligned(WIDTH).view(np.int32), np.empty(_LENGTHS * WIDTH, np.int32),
        np.empty(_LENGTHS, np.int32),
    )  # fmt: skip


@helper
def _error_of(table: Floats, k: int, i: int, groups: Words, at: int) -> Lanes:
    """The errors that value i of eight k would have with the levels of a group of points."""
    error = where(
        load_mask(groups, at + 2 * i),
        spread(GROUP, table, (3 * i + 1) * WIDTH + k),
        spread(GROUP, table, 3 * i * WIDTH + k),
    )
    return where(load_mask(groups, at + 2 * i + 1), spread(GROUP, table, (3 * i + 2) * WIDTH + k), error)


@routine
def _nearest_of(table: Floats, k: int, groups: Words, first: int, n_groups: int, room: Ints) -> int:
    """The number of the first point with the smallest error for eight k, in `n_groups` groups from `first` on."""
    best = float_of(lane_numbers(GROUP) & 0 | 0x7F7FFFFF)   # the largest float32
    which = lane_numbers(GROUP) + _LINE * first
    for g in range(first, first + n_groups):
        at = _LINE * g
        error = _error_of(table, k, 0, groups, at)
        for i in range(1, 8):
            error = error + _error_of(table, k, i, groups, at)
        better = error < best
        best = where(better, error, best)
        which = where(better, lane_numbers(GROUP) + at, which)
    bits = bits_of(best)   # in the order of the numbers, as none is negative
    is_best = bits == smallest_of(bits)
    lane = first_of(is_best)
    if lane < 0:
        return groups[GROUP + smallest_of(where(is_best, which, _LINE * (first + n_groups)))]
    store(room, 0, which)
    return groups[GROUP + room[lane]]


@routine
def snap(
    x: Floats, w: Floats, at: int, inverse: Lanes, scale: Lanes, lists: Lists, room: Room, found: Ints, to: int
) -> None:
    """Entries of the points for eights ``x = scale * (2 level + 1)``, from `at` on, to `found`.

    ``inverse * x`` decides on the cell; among the points near to it errors weigh the root of `w`, which holds these
    roots.
    """
    table, cells, queue, counts = room
    groups, entries, places = lists
    number = fill(0.0)
    for i in range(7, -1, -1):
        number = number * 3.0 + clipped((inverse * load(x, at + i * WIDTH) - 1.0) * 0.5, 2, True)
    store(cells, 0, bits_of(number + 12582912.0) - 0x4B400000)
    for i in range(8):
        value, weight = load(x, at + i * WIDTH), load(w, at + i * WIDTH)
        for level in range(3):
            difference = scale * fill(2 * level + 1) - value
            error = weight * difference * difference
            store(table, (3 * i + level) * WIDTH, error + 0.0 if i == 0 else error)   # sums begin with +0.0
    chosen = np.empty(GROUP, np.int32)
    counts[:] = 0
    for k in range(WIDTH):
        place = places[cells[k]]
        length = place & (_LENGTHS - 1)
        found[to + k] = place >> 5
        queue[length * WIDTH + counts[length]] = k
        counts[length] += 1
    for length in range(1, _LENGTHS):
        for j in range(counts[length]):
            k = queue[length * WIDTH + j]
            first = places[cells[k]] >> 5
            found[to + k] = entries[_nearest_of(table, k, groups, first, length, chosen)] | _SEARCHED


@helper
def take_roots(w: Floats, roots: Floats) -> Lanes:
    """The roots of weights; returns whether all weights are finite: without that ggml's search gives up."""
    largest = fill(0.0)
    for i in range(w.size // WIDTH):
        weight = load(w, i * WIDTH)
        store(roots, i * WIDTH, square_root(weight))
        largest = where(largest < weight, weight, largest)
    return largest < np.inf


@helper
def largest_size(sizes: Floats) -> Lanes:
    """The largest of all sizes."""
    largest = load(sizes, 0)
    for i in range(1, sizes.size // WIDTH):
        size = load(sizes, i * WIDTH)
        largest = where(largest > size, largest, size)
    return largest


@routine
def split_signs(x: Floats, at: int, w: Floats, to: int, even: bool, sizes: Floats) -> Lanes:
    """Sizes of an eight to `sizes`, from `to` on, where `w` begins too; returns its signs, bit i for value i.

    Where their number has to be even and is not, the value with the least ``w x^2`` gets the wrong one and a size below
    zero, the first if there are several.
    """
    least, which = fill(0.0), bits_of(fill(0.0))
    signs = which
    for i in range(8):
        value = load(x, at + i * WIDTH)
        size = absolute(value)
        store(sizes, to + i * WIDTH, size)
        signs = where(value < 0.0, signs | 1 << i, signs)
        loss = load(w, to + i * WIDTH) * size * size
        if i == 0:
            least, which = loss, which | 1
        else:
            smaller = loss < least
            least, which = where(smaller, loss, least), where(smaller, 1 << i, which)
    if even:
        half = signs ^ signs >> 4
        half = half ^ half >> 2
        which = where(((half ^ half >> 1) & 1) == 1, which, 0)
        for i in range(8):
            size = load(sizes, to + i * WIDTH)
            store(sizes, to + i * WIDTH, where(which == 1 << i, negated(size), size))
    return signs ^ which if even else signs


@routine
def sum_products(x: Floats, w: Floats, found: Ints) -> tuple[Lanes, Lanes]:
    """The sums of w x q and w q^2, q being what the levels of entries stand for."""
    sumqx, sumq2 = fill(0.0), fill(0.0)
    for k in range(found.size // WIDTH):
        entry = load(found, k * WIDTH)
        for i in range(8):
            weight = load(w, (8 * k + i) * WIDTH)
            q = to_float(((entry << 1) >> (2 * i)) & 6 | 1)
            sumqx = sumqx + weight * load(x, (8 * k + i) * WIDTH) * q
            sumq2 = sumq2 + weight * q * q
    return sumqx, sumq2


@helper
def keep(mask: Lanes, found: Ints, kept: Ints) -> None:
    """Entries of `found` to `kept` where `mask` is true."""
    for k in range(kept.size // WIDTH):
        store(kept, k * WIDTH, where(mask, load(found, k * WIDTH), load(kept, k * WIDTH)))


@helper
def number_of(entry: Lanes) -> Lanes:
    """The numbers of the points in entries."""
    return (entry >> 16) & 1023


@helper
def is_searched(entry: Lanes) -> Lanes:
    """Whether entries are of lists: their cell was no point."""
    return entry >= _SEARCHED
