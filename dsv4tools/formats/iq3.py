"""IQ3_XXS and IQ3_S: 256 values as 64 points of a grid of four dimensions, signs, eight 4-bit scales and an F16 d.

IQ3_XXS has 256 points and stores seven signs of eight, whose number is even; IQ3_S has 512 points, and all signs.
The layouts are those of ggml-common.h (block_iq3_xxs, block_iq3_s), the searches those of ggml-quants.c
(quantize_row_iq3_xxs_impl, quantize_row_iq3_s_impl, iq3_find_best_neighbour), operation by operation.

A cell is the number of four levels 0..7, three bits each. Most fours of values fall into a cell that is no point, and
then the points near to it are tried, 5 to 9 on average and up to 38. There lanes turn around: fours of `WIDTH` blocks
find their cells side by side, then one four after the other tries `GROUP` points at once.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import f16_to_float, load_u16, load_u32, store_u16
from dsv4tools.formats.blocks import (
    fill_lanes,
    is_infinite,
    note_infinite,
    put_words,
    sum_of_squares,
    weigh_by_importance,
    write_blocks,
)
from dsv4tools.formats.compile import helper, kernel, routine
from dsv4tools.formats.grids import find_cells, find_grid, sign_bytes
from dsv4tools.formats.lanes import (
    WIDTH,
    absolute,
    aligned,
    any_of,
    bits_of,
    byte_to_float,
    clipped_integer,
    fill,
    first_of,
    float_of,
    lane_numbers,
    load,
    load_lanes,
    smallest_of,
    spread,
    store,
    to_f16,
    to_float,
    where,
)
from dsv4tools.formats.nearest import keep, largest_size, split_signs, take_roots
from dsv4tools.formats.tiles import DECODE, ENCODE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Ints, Shape

    Tables = tuple[NDArray[np.uint8], NDArray[np.uint16], Ints, Ints]

VALUES = 256
_XXS_BYTES, _S_BYTES = 98, 110
_SUB = 32                      # values of a sub-block; there are eight in a block
_FOUR = 4 * WIDTH              # four values of every lane
_STEP = _SUB * WIDTH           # a sub-block of every lane
_TILE = WIDTH * VALUES         # one block per lane
GROUP = 16                     # points that are tried at once
_LENGTHS = 64                  # lists are shorter than this
_SEARCHED = 1 << 12            # what is found beside a cell: that its four had to be searched for
_CELL = _SEARCHED - 1
_MOST = 0x7F7FFFFF             # the bits of the largest float32; errors beyond it do not count
_TABLES = "uint8[::1], uint16[::1], int32[::1], int32[::1]"
F = np.float32


def _name(n_values: int, n_bytes: int) -> str:
    """The format of bytes for so many values."""
    return "IQ3_XXS" if n_bytes <= n_values // VALUES * _XXS_BYTES else "IQ3_S"


@cache
def make_tables(name: str) -> Tables:
    """The points to try for each cell of a format's grid, as the kernel reads them.

    Returns
    -------
    groups:
        uint8 [n * 4 * GROUP], each `GROUP` points of a list: what their first levels stand for (1, 3 .. 15), their
        second ones and so on; zeros where a list ends.
    cells:
        uint16 [n * GROUP], the cells of these points.
    places:
        int32 [4096]: which group the list of a cell begins with, times 64, plus how long it is; 0 for points.
    numbers:
        int32 [4096]: the number of the point that the cell is, -1 where it is none.
    """
    grid, near = find_grid(name), find_cells(name)
    of_points = (grid.levels.astype(np.uint16) << 3 * np.arange(4)).sum(1, dtype=np.uint16)
    lengths = np.where(near.point >= 0, 0, np.diff(near.start))
    n_groups = -(-lengths // GROUP)
    first = np.cumsum(n_groups) - n_groups
    n_slots = GROUP * int(n_groups.sum())
    starts = np.where(near.point >= 0, 0, near.start[:-1])
    taken = np.repeat(GROUP * first - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())   # slots
    points = near.near[np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())]
    groups = np.zeros((n_slots, 4), np.uint8)
    groups[taken] = 2 * grid.levels[points] + 1
    cells = np.zeros(n_slots, np.uint16)
    cells[taken] = of_points[points]
    places = _LENGTHS * first + lengths
    turned = groups.reshape(-1, GROUP, 4).transpose(0, 2, 1).copy()
    return turned.reshape(-1), cells, np.where(lengths > 0, places, 0).astype(np.int32), near.point


# ---- The search for points


@helper
def _error_of(
    x: Floats, roots: Floats, at: int, scale: Lanes, groups: Bytes, group: int
) -> Lanes:
    """The errors of the points of a group for the four values from `at` on."""
    difference = scale * byte_to_float(load_lanes(GROUP, groups, 4 * GROUP * group)) - spread(GROUP, x, at)
    error = spread(GROUP, roots, at) * difference * difference
    for i in range(1, 4):
        q = byte_to_float(load_lanes(GROUP, groups, 4 * GROUP * group + GROUP * i))
        difference = scale * q - spread(GROUP, x, at + i * WIDTH)
        error = error + spread(GROUP, roots, at + i * WIDTH) * difference * difference
    return error


@helper
def _nearest_of(
    x: Floats, roots: Floats, at: int, scale: Lanes, groups: Bytes, first: int, length: int
) -> int:
    """Which point of a list of one group is the first with the smallest error."""
    error = _error_of(x, roots, at, scale, groups, first)
    most = float_of(lane_numbers(GROUP) & 0 | _MOST)
    error = where((error < most) & (lane_numbers(GROUP) < length), error, most)
    bits = bits_of(error)   # in the order of the numbers, as none is negative
    is_best = bits == smallest_of(bits)
    lane = first_of(is_best)
    return lane if lane >= 0 else smallest_of(where(is_best, lane_numbers(GROUP), GROUP))


@routine
def _nearest_of_many(
    x: Floats, roots: Floats, at: int, scale: Lanes, groups: Bytes, first: int, length: int
) -> int:
    """The same for a list of several groups."""
    best = float_of(lane_numbers(GROUP) & 0 | _MOST)
    which = lane_numbers(GROUP)
    for start in range(0, length, GROUP):
        error = _error_of(x, roots, at, scale, groups, first + start // GROUP)
        slot = lane_numbers(GROUP) + start
        better = (error < best) & (slot < length)
        best = where(better, error, best)
        which = where(better, slot, which)
    bits = bits_of(best)
    return smallest_of(where(bits == smallest_of(bits), which, length))


@routine
def _snap(
    x: Floats, roots: Floats, inverse: Lanes, scale: Lanes, tables: Tables, cells: Ints, queue: Ints, scales: Floats,
    found: Ints,
) -> None:  # fmt: skip
    """The cells of points for all fours ``x = scale * (2 level + 1)`` of a sub-block, to `found`.

    ``inverse * x`` decides on the cell; among the points near to it errors weigh `roots`.
    """
    groups, of_points, places, _ = tables
    store(scales, 0, scale)
    for four in range(8):
        at, to = four * _FOUR, four * WIDTH
        cell = clipped_integer((inverse * load(x, at) - 1.0) * 0.5, 7)
        for i in range(1, 4):
            cell = cell | clipped_integer((inverse * load(x, at + i * WIDTH) - 1.0) * 0.5, 7) << 3 * i
        store(found, to, cell)
        n_short, n_long = 0, WIDTH
        for k in range(WIDTH):
            place = places[found[to + k]]
            length = place & (_LENGTHS - 1)
            cells[k] = place
            queue[n_short] = k
            n_short += 0 < length <= GROUP
            queue[n_long] = k
            n_long += length > GROUP
        for j in range(n_short):
            k = queue[j]
            first, length = cells[k] >> 6, cells[k] & (_LENGTHS - 1)
            slot = _nearest_of(x, roots, at + k, spread(GROUP, scales, k), groups, first, length)
            found[to + k] = of_points[GROUP * first + slot] | _SEARCHED
        for j in range(WIDTH, n_long):
            k = queue[j]
            first, length = cells[k] >> 6, cells[k] & (_LENGTHS - 1)
            slot = _nearest_of_many(x, roots, at + k, spread(GROUP, scales, k), groups, first, length)
            found[to + k] = of_points[GROUP * first + slot] | _SEARCHED


@routine
def _sum_products(wx: Floats, w: Floats, found: Ints) -> tuple[Lanes, Lanes]:
    """The sums of w x q and w q^2, q being what the levels of cells stand for."""
    sumqx, sumq2 = fill(0.0), fill(0.0)
    for four in range(8):
        cell = load(found, four * WIDTH) << 1
        for i in range(4):
            at = four * _FOUR + i * WIDTH
            q = to_float(cell >> (3 * i) & 14 | 1)
            sumqx = sumqx + load(wx, at) * q
            sumq2 = sumq2 + load(w, at) * q * q
    return sumqx, sumq2


@helper
def _count_searched(kept: Ints) -> Lanes:
    """A number above 0 where a four had to be searched for."""
    searched = load(kept, 0) & _SEARCHED
    for four in range(1, 8):
        searched = searched | load(kept, four * WIDTH) & _SEARCHED
    return searched


@routine
def _fit_sub_block(
    x: Floats, q: Floats, at: int, sigma2: Lanes, weighted: bool, xxs: bool, tables: Tables, kept: Ints, signs: Ints
) -> tuple[Lanes, Lanes, Lanes]:
    """Search the sub-block from `at` on: cells of points go to `kept`, signs to `signs`, bit i of four for values i.

    Returns its scale, whether there is nothing in it, and whether ggml could have searched it.
    """
    w, wx, sizes, roots = aligned(_STEP), aligned(_STEP), aligned(_STEP), aligned(_STEP)
    found, scales = aligned(8 * WIDTH).view(np.int32), aligned(WIDTH)
    cells, queue = np.empty(WIDTH, np.int32), np.empty(2 * WIDTH + 1, np.int32)
    if weighted:
        weigh_by_importance(x, q, at, _SUB, sigma2, w)
    else:
        for i in range(_SUB):
            value = load(x, at + i * WIDTH)
            store(w, i * WIDTH, value * value)
    fine = take_roots(w, roots)
    for k in range(4):
        store(signs, k * WIDTH, split_signs(x, at + 2 * k * _FOUR, w, 2 * k * _FOUR, xxs, sizes))
    for i in range(_SUB):
        store(wx, i * WIDTH, load(w, i * WIDTH) * load(sizes, i * WIDTH))
    size = largest_size(sizes)
    empty = size < 1e-8 if xxs else size == 0.0
    unsearched = bits_of(fill(0.0)) if xxs else bits_of(fill(0.0)) | _SEARCHED
    for four in range(8):
        store(kept, four * WIDTH, unsearched)
    scale = size / 15.0
    best = fill(0.0)
    n_steps = 15 if xxs else 9
    for step in range(-n_steps, n_steps + 1):
        inverse = fill(F(15.0) + F(step) * F(0.2)) / size
        _snap(sizes, roots, inverse, 1.0 / inverse, tables, cells, queue, scales, found)
        sumqx, sumq2 = _sum_products(wx, w, found)
        better = (sumq2 > 0.0) & (sumqx * sumqx > best * sumq2)
        scale = where(better, sumqx / sumq2, scale)
        best = where(better, scale * sumqx, best)
        keep(better, found, kept)
    again = (_count_searched(kept) > 0) & (scale > 0.0)
    _snap(sizes, roots, 1.0 / scale, scale, tables, cells, queue, scales, found)
    for four in range(8):
        old = load(kept, four * WIDTH)
        mine = again & ((old & _SEARCHED) > 0) if xxs else again
        new = where(mine, load(found, four * WIDTH), old) & _CELL
        store(kept, four * WIDTH, where(empty, 0, new))
    sumqx, sumq2 = _sum_products(wx, w, kept)
    scale = where(again & (sumq2 > 0.0), sumqx / sumq2, scale)
    flip = where(scale < 0.0, bits_of(fill(0.0)) | 255, 0)
    for k in range(4):
        store(signs, k * WIDTH, where(empty, 0, load(signs, k * WIDTH) ^ flip))
    return where(empty, 0.0, absolute(scale)), empty, empty | (fine & (absolute(scale) <= np.inf))


# ---- Blocks


@helper
def _number_fours(kept: Ints, numbers: Ints) -> None:
    """Cells to the numbers of their points."""
    for i in range(8 * WIDTH):
        kept[i] = numbers[kept[i]]


@helper
def _pack_points(kept: Ints, j: int, words: Ints) -> None:
    """The low bytes of the points of sub-block `j` as two words."""
    for half in range(2):
        word = load(kept, 4 * half * WIDTH) & 255
        for k in range(1, 4):
            word = word | (load(kept, (4 * half + k) * WIDTH) & 255) << 8 * k
        store(words, (2 * j + half) * WIDTH, word)


@helper
def _pack_high(kept: Ints, j: int, words: Ints) -> None:
    """The ninth bits of the points of sub-block `j` as byte `j` of two words."""
    byte = load(kept, 0) >> 8
    for k in range(1, 8):
        byte = byte | load(kept, k * WIDTH) >> 8 << k
    place = (16 + j // 4) * WIDTH
    store(words, place, byte if j % 4 == 0 else load(words, place) | byte << 8 * (j % 4))


@helper
def _close_ranks(words: Ints, at: int, n: int, k: int, empty: Ints) -> None:
    """Move what full sub-blocks of lane `k` have from word `at` on, `n` words each, over what empty ones have."""
    to = 0
    for j in range(8):
        for i in range(n):
            word = words[(at + n * j + i) * WIDTH + k]
            words[(at + n * j + i) * WIDTH + k] = 0
            words[(at + n * to + i) * WIDTH + k] = word
        to += 1 - empty[j * WIDTH + k]


@helper
def _pack_signs(signs: Ints, xxs: bool) -> Lanes:
    """The signs of a sub-block in one word: four times seven, or eight, of them."""
    word = load(signs, 0) & 127 if xxs else load(signs, 0)
    for k in range(1, 4):
        byte = load(signs, k * WIDTH)
        word = word | (byte & 127) << 7 * k if xxs else word | byte << 8 * k
    return word


@helper
def _pack_scales(scales: Floats, largest: Lanes, xxs: bool, words: Ints) -> None:
    """Scales as levels 0..15 of the largest: above the signs of IQ3_XXS, in the last word of IQ3_S."""
    for j in range(8):
        level = clipped_integer((1.0 / (largest / 31.0) * load(scales, j * WIDTH) - 1.0) * 0.5, 15)
        level = where(largest == 0.0, 0, level)
        if xxs:
            place = (16 + j) * WIDTH
            store(words, place, load(words, place) | level << 28)
        else:
            store(words, 26 * WIDTH, level if j == 0 else load(words, 26 * WIDTH) | level << 4 * j)


@helper
def _encode_lanes(
    x: Floats, q: Floats, weighted: bool, xxs: bool, tables: Tables, words: Ints, blocks: Bytes, n_bytes: int
) -> bool:
    """Encode one block per lane to `WIDTH` blocks; whether every d is finite as F16."""
    scales, signs, kept = aligned(8 * WIDTH), aligned(4 * WIDTH).view(np.int32), aligned(8 * WIDTH).view(np.int32)
    empty = aligned(8 * WIDTH).view(np.int32)
    sigma2 = 2.0 * sum_of_squares(x) / 256.0
    largest = fill(0.0)
    fine = sigma2 < np.inf
    some_empty = largest < 0.0
    for j in range(8):
        scale, nothing, searched = _fit_sub_block(x, q, j * _STEP, sigma2, weighted, xxs, tables, kept, signs)
        fine, some_empty = fine & searched, some_empty | nothing
        largest = where(largest > scale, largest, scale)
        store(scales, j * WIDTH, scale)
        store(empty, j * WIDTH, where(nothing, bits_of(fill(0.0)) | 1, 0))
        _number_fours(kept, tables[3])
        _pack_points(kept, j, words)
        store(words, ((16 if xxs else 18) + j) * WIDTH, _pack_signs(signs, xxs))
        if not xxs:
            _pack_high(kept, j, words)
    _pack_scales(scales, largest, xxs, words)
    if xxs:
        for i in range(24):
            store(words, i * WIDTH, where(largest == 0.0, 0, load(words, i * WIDTH)))
    elif any_of(some_empty):
        for k in range(WIDTH):
            _close_ranks(words, 0, 2, k, empty)
            _close_ranks(words, 18, 1, k, empty)
    half = where(fine, to_f16(largest / 31.0 * (F(1.0125) if xxs else F(1.033))), 0x7E00)
    put_words(words, 24 if xxs else 27, blocks, 2, n_bytes)
    store(words, 0, half)
    for k in range(WIDTH):
        store_u16(blocks, n_bytes * k, words[k])
    return not any_of(is_infinite(half))


@kernel(f"{ENCODE[:-1]}, {_TABLES})")
def _encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots,
    groups: Bytes, of_points: NDArray[np.uint16], places: Ints, numbers: Ints,
) -> None:  # fmt: skip
    n_values = shape[0] * shape[1]
    xxs = out.size <= n_values // VALUES * _XXS_BYTES
    n_bytes = _XXS_BYTES if xxs else _S_BYTES
    weighted = importance.size > 0
    tile, x, q = aligned(_TILE), aligned(_TILE), aligned(_TILE)
    words = aligned(28 * WIDTH).view(np.int32)
    blocks = aligned(n_bytes * WIDTH // 4 + 4).view(np.uint8)
    tables = (groups, of_points, places, numbers)
    for first in range(0, n_values, _TILE):
        n_blocks = fill_lanes(kind, shape, data, scales, importance, first, VALUES, tile, x, q, faults)
        finite = _encode_lanes(x, q, weighted, xxs, tables, words, blocks, n_bytes)
        write_blocks(blocks, n_bytes * n_blocks, out, n_bytes * (first // VALUES))
        if not finite:
            note_infinite(blocks, n_bytes, n_blocks, 0, 1, first, VALUES, faults)


def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to IQ3_XXS or IQ3_S, whichever `out` has room for, with an importance vector or without."""
    tables = make_tables(_name(shape[0] * shape[1], out.size))
    _encode(kind, shape, data, scales, importance, out, faults, *tables)


@kernel(f"{DECODE[:-1]}, uint8[:, ::1], uint8[::1])")
def _decode(data: Bytes, out: Floats, values: Bytes, even_signs: Bytes) -> None:
    n_blocks = out.size // VALUES
    xxs = data.size <= n_blocks * _XXS_BYTES
    for sub in range(8 * n_blocks):
        j = sub % 8
        at = sub // 8 * (_XXS_BYTES if xxs else _S_BYTES)
        points = at + 2 + 8 * j
        d = f16_to_float(load_u16(data, at))
        if xxs:
            word = load_u32(data, at + 66 + 4 * j)
            dd = F(F(d * F(F(0.5) + F(word >> np.uint32(28)))) * F(0.5))
        else:
            dd = F(d * F(1 + 2 * (data[at + 106 + j // 2] >> 4 * (j % 2) & 15)))
        for k in range(4):
            signs = even_signs[word >> np.uint32(7 * k) & np.uint32(127)] if xxs else data[at + 74 + 4 * j + k]
            for i in range(8):
                point = np.int32(data[points + 2 * k + i // 4])
                if not xxs:
                    point |= (data[at + 66 + j] >> 2 * k + i // 4 & 1) << 8
                value = F(dd * F(values[point, i % 4]))
                out[_SUB * sub + 8 * k + i] = -value if signs >> i & 1 else value


def decode(data: Bytes, out: Floats) -> None:
    """IQ3_XXS to float32, ``d (scale + 1/2) / 2`` times the values of points, or IQ3_S, ``d (2 scale + 1)`` times."""
    _decode(data, out, find_grid(_name(out.size, data.size)).values, sign_bytes())


