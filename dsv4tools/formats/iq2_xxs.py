"""IQ2_XXS: 256 values to F16 d and, for each 32, four grid points of 8 bits, four times seven signs and a 4-bit scale.

The layout is that of ggml-common.h (block_iq2_xxs), the search that of ggml-quants.c (quantize_row_iq2_xxs_impl).
"""

from __future__ import annotations

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
from dsv4tools.formats.grids import find_grid, sign_bytes
from dsv4tools.formats.lanes import (
    WIDTH,
    absolute,
    aligned,
    any_of,
    bits_of,
    clipped_integer,
    fill,
    load,
    store,
    to_f16,
    where,
)
from dsv4tools.formats.nearest import (
    LISTS,
    keep,
    largest_size,
    make_lists,
    make_room,
    number_of,
    snap,
    split_signs,
    sum_products,
    take_roots,
)
from dsv4tools.formats.search import fit_positive
from dsv4tools.formats.tiles import DECODE, ENCODE

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.nearest import Lists, Room, Words
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Ints, Shape

VALUES = 256
BYTES = 66
_SUB = 32                      # values of a sub-block; there are eight in a block
_EIGHT = 8 * WIDTH             # eight values of every lane
_STEP = _SUB * WIDTH           # a sub-block of every lane
_TILE = WIDTH * VALUES         # one block per lane
F = np.float32


@routine
def _fit_sub_block(
    x: Floats, q: Floats, at: int, sigma2: Lanes, lists: Lists, room: Room, w: Floats, kept: Ints
) -> tuple[Lanes, Lanes, Lanes]:
    """Search the sub-block from `at` on; entries of its points go to `kept`. `w` is room for its weights.

    Returns its scale, 0 if there is nothing in it or nothing has weight, its signs, and whether all went well: with
    weights beyond float32 ggml gives up.
    """
    sizes, roots = aligned(_STEP), aligned(_STEP)
    levels, found = aligned(_STEP).view(np.int32), aligned(4 * WIDTH).view(np.int32)
    weigh_by_importance(x, q, at, _SUB, sigma2, w)
    fine = take_roots(w, roots)
    nothing = bits_of(fill(0.0))
    signs = nothing
    for k in range(4):
        signs = signs | (split_signs(x, at + k * _EIGHT, w, k * _EIGHT, True, sizes) & 127) << 7 * k
        store(kept, k * WIDTH, nothing)
    scale = fit_positive(sizes, w, levels, _SUB, 4)
    reach = scale * 3.0
    empty = (largest_size(sizes) < 1e-15) | (reach <= 0.0)
    best = fill(0.0)
    for step in range(-6, 7):
        inverse = fill(F(5.0) + F(0.1) * F(step)) / reach
        for k in range(4):
            snap(sizes, roots, k * _EIGHT, inverse, 1.0 / inverse, lists, room, found, k * WIDTH)
        sumqx, sumq2 = sum_products(sizes, w, found)
        better = (sumq2 > 0.0) & (sumqx * sumqx > best * sumq2)
        scale = where(better, sumqx / sumq2, scale)
        best = where(better, scale * sumqx, best)
        keep(better, found, kept)
    positive = scale > 0.0
    for k in range(4):
        snap(sizes, roots, k * _EIGHT, 1.0 / scale, scale, lists, room, found, k * WIDTH)
    sumqx, sumq2 = sum_products(sizes, w, found)
    keep(positive, found, kept)
    scale = where(positive & (sumq2 > 0.0), sumqx / sumq2, scale)
    signs = where(scale < 0.0, signs ^ 0x0FFFFFFF, signs)
    for k in range(4):
        store(kept, k * WIDTH, where(empty, 0, load(kept, k * WIDTH)))
    return where(empty, 0.0, absolute(scale)), where(empty, 0, signs), empty | (fine & (absolute(scale) >= 0.0))


@helper
def _encode_lanes(x: Floats, q: Floats, lists: Lists, room: Room, blocks: Bytes) -> bool:
    """Encode one block per lane to `WIDTH` blocks; whether every d is finite as F16."""
    w, scales = aligned(_STEP), aligned(8 * WIDTH)
    kept, words = aligned(4 * WIDTH).view(np.int32), aligned(16 * WIDTH).view(np.int32)
    sigma2 = sum_of_squares(x) / 256.0
    largest = fill(0.0)
    fine = sigma2 < np.inf
    for j in range(8):
        scale, signs, searched = _fit_sub_block(x, q, j * _STEP, sigma2, lists, room, w, kept)
        fine = fine & searched
        largest = where(largest > scale, largest, scale)
        store(scales, j * WIDTH, scale)
        word = number_of(load(kept, 0))
        for k in range(1, 4):
            word = word | number_of(load(kept, k * WIDTH)) << 8 * k
        store(words, 2 * j * WIDTH, word)
        store(words, (2 * j + 1) * WIDTH, signs)
    d = largest / 31.0
    for j in range(8):
        place = (2 * j + 1) * WIDTH
        level = clipped_integer((1.0 / d * load(scales, j * WIDTH) - 1.0) * 0.5, 15)
        store(words, place, load(words, place) | level << 28)
    zero = largest == 0.0
    if any_of(zero):
        for i in range(16):
            store(words, i * WIDTH, where(zero, 0, load(words, i * WIDTH)))
    half = where(fine, to_f16(d), 0x7E00)
    put_words(words, 16, blocks, 2, BYTES)
    store(words, 0, half)
    for k in range(WIDTH):
        store_u16(blocks, BYTES * k, words[k])
    return not any_of(is_infinite(half))


@kernel(f"{ENCODE[:-1]}, {LISTS})")
def _encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots,
    groups: Words, entries: Ints, places: Ints,
) -> None:  # fmt: skip
    tile, x, q = aligned(_TILE), aligned(_TILE), aligned(_TILE)
    blocks = aligned(BYTES * WIDTH // 4 + 4).view(np.uint8)
    lists, room = (groups, entries, places), make_room()
    for first in range(0, shape[0] * shape[1], _TILE):
        n_blocks = fill_lanes(kind, shape, data, scales, importance, first, VALUES, tile, x, q, faults)
        finite = _encode_lanes(x, q, lists, room, blocks)
        write_blocks(blocks, BYTES * n_blocks, out, BYTES * (first // VALUES))
        if not finite:
            note_infinite(blocks, BYTES, n_blocks, 0, 1, first, VALUES, faults)


def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to IQ2_XXS, with an importance vector."""
    _encode(kind, shape, data, scales, importance, out, faults, *make_lists("IQ2_XXS"))


@kernel(f"{DECODE[:-1]}, uint8[:, ::1], uint8[::1])")
def _decode(data: Bytes, out: Floats, values: Bytes, even_signs: Bytes) -> None:
    for block in range(out.size // VALUES):
        at = BYTES * block
        d = f16_to_float(load_u16(data, at))
        for j in range(8):
            numbers = at + 2 + 8 * j
            word = load_u32(data, numbers + 4)
            dd = F(F(d * F(F(0.5) + F(word >> np.uint32(28)))) * F(0.25))
            for k in range(4):
                signs = even_signs[word >> np.uint32(7 * k) & np.uint32(127)]
                for i in range(8):
                    value = F(dd * F(values[data[numbers + k], i]))
                    out[VALUES * block + _SUB * j + 8 * k + i] = -value if signs >> i & 1 else value


def decode(data: Bytes, out: Floats) -> None:
    """IQ2_XXS to float32: ``d (scale + 1/2) / 4`` times the values of the points."""
    _decode(data, out, find_grid("IQ2_XXS").values, sign_bytes())
