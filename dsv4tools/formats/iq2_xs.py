"""IQ2_XS and IQ2_S: 256 values to F16 d and, for each 16, two grid points of 8 values, their signs and a 4-bit scale.

The layouts are those of ggml-common.h (block_iq2_xs, block_iq2_s), the searches those of ggml-quants.c
(quantize_row_iq2_xs_impl, quantize_row_iq2_s_impl). IQ2_XS stores seven signs of eight, IQ2_S all of them.

One kernel serves both, for it takes long to compile: the size of a block says which format is meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import f16_to_float, load_u16, store_u16
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
    is_searched,
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
from dsv4tools.formats.tiles import DECODE, ENCODE

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.nearest import Lists, Room, Words
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Ints, Shape

VALUES = 256
BYTES_XS, BYTES_S = 74, 82
_SUB = 16                      # values of a sub-block; there are sixteen in a block
_EIGHT = 8 * WIDTH             # eight values of every lane
_STEP = _SUB * WIDTH           # a sub-block of every lane
_TILE = WIDTH * VALUES         # one block per lane
_WORDS = 20                    # words of a block after d, of IQ2_S; IQ2_XS has 18
F = np.float32


@helper
def _weigh(x: Floats, q: Floats, weighted: bool, at: int, sigma2: Lanes, w: Floats) -> None:
    """Weights of a sub-block's values; those without importance are IQ2_S's."""
    if weighted:
        weigh_by_importance(x, q, at, _SUB, sigma2, w)
    else:
        for i in range(_SUB):
            value = load(x, at + i * WIDTH)
            store(w, i * WIDTH, 0.25 * sigma2 + value * value)


@routine
def _fit_sub_block(
    x: Floats, at: int, w: Floats, is_s: bool, lists: Lists, room: Room, kept: Ints, signs: Ints
) -> tuple[Lanes, Lanes]:
    """Search the sub-block from `at` on; entries of its points go to `kept`, of its signs to `signs`.

    Returns its scale, 0 if there is nothing in it, and whether all went well: with weights beyond float32 ggml gives
    up.
    """
    sizes, roots, found = aligned(_STEP), aligned(_STEP), aligned(2 * WIDTH).view(np.int32)
    fine = take_roots(w, roots)
    nothing = bits_of(fill(0.0))
    for k in range(2):
        store(kept, k * WIDTH, nothing)
        store(signs, k * WIDTH, split_signs(x, at + k * _EIGHT, w, k * _EIGHT, not is_s, sizes))
    largest = largest_size(sizes)
    empty = largest < (F(1e-8) if is_s else F(1e-15))
    scale = largest / 5.0
    best = fill(0.0)
    for step in range(-9, 10):
        inverse = fill(F(5.0) + F(0.1) * F(step)) / largest
        for k in range(2):
            snap(sizes, roots, k * _EIGHT, inverse, 1.0 / inverse, lists, room, found, k * WIDTH)
        sumqx, sumq2 = sum_products(sizes, w, found)
        better = (sumq2 > 0.0) & (sumqx * sumqx > best * sumq2)
        scale = where(better, sumqx / sumq2, scale)
        best = where(better, scale * sumqx, best)
        keep(better, found, kept)
    again = is_searched(load(kept, 0)) | is_searched(load(kept, WIDTH))
    again = again & (scale > 0.0)
    for k in range(2):
        snap(sizes, roots, k * _EIGHT, 1.0 / scale, scale, lists, room, found, k * WIDTH)
        entry = load(kept, k * WIDTH)
        store(kept, k * WIDTH, where(again & is_searched(entry), load(found, k * WIDTH), entry))
    sumqx, sumq2 = sum_products(sizes, w, kept)
    scale = where(again & (sumq2 > 0.0), sumqx / sumq2, scale)
    for k in range(2):
        turned = where(scale < 0.0, load(signs, k * WIDTH) ^ 255, load(signs, k * WIDTH))
        store(signs, k * WIDTH, where(empty, 0, turned))
        store(kept, k * WIDTH, where(empty, 0, load(kept, k * WIDTH)))
    return where(empty, 0.0, absolute(scale)), empty | (fine & (absolute(scale) >= 0.0))


@helper
def _put(words: Ints, i: int, value: Lanes, shift: int) -> None:
    """Add bits to word `i`."""
    store(words, i * WIDTH, load(words, i * WIDTH) | value << shift)


@helper
def _pack(j: int, kept: Ints, signs: Ints, is_s: bool, words: Ints) -> None:
    """Points and signs of sub-block `j`.

    IQ2_XS has words of 16 bits, nine of a point's number and seven signs. IQ2_S has the low bytes of all numbers, then
    all signs, then two high bits for each number.
    """
    for k in range(2):
        number, eight = number_of(load(kept, k * WIDTH)), 2 * j + k
        if is_s:
            _put(words, eight // 4, number & 255, 8 * (eight % 4))
            _put(words, 8 + eight // 4, load(signs, k * WIDTH), 8 * (eight % 4))
            _put(words, 16 + eight // 16, number >> 8, 2 * (eight % 16))
        else:
            _put(words, j, number | (load(signs, k * WIDTH) & 127) << 9, 16 * k)


@helper
def _encode_lanes(
    x: Floats, q: Floats, weighted: bool, is_s: bool, lists: Lists, room: Room, blocks: Bytes
) -> bool:
    """Encode one block per lane to `WIDTH` blocks; whether every d is finite as F16."""
    n_bytes = BYTES_S if is_s else BYTES_XS
    w, scales = aligned(_STEP), aligned(16 * WIDTH)
    kept, signs = aligned(2 * WIDTH).view(np.int32), aligned(2 * WIDTH).view(np.int32)
    words = aligned(_WORDS * WIDTH).view(np.int32)
    words[:] = 0
    total = sum_of_squares(x)
    sigma2 = 2.0 * total / 256.0 if is_s else total / 256.0
    largest = fill(0.0)
    fine = sigma2 < np.inf
    for j in range(16):
        _weigh(x, q, weighted, j * _STEP, sigma2, w)
        scale, searched = _fit_sub_block(x, j * _STEP, w, is_s, lists, room, kept, signs)
        fine = fine & searched
        largest = where(largest > scale, largest, scale)
        store(scales, j * WIDTH, scale)
        _pack(j, kept, signs, is_s, words)
    d = largest / 31.0
    for j in range(16):
        level = clipped_integer((1.0 / d * load(scales, j * WIDTH) - 1.0) * 0.5, 15)
        _put(words, (18 if is_s else 16) + j // 8, level, 4 * (j % 8))
    zero = largest == 0.0
    if any_of(zero):
        for i in range(_WORDS):
            store(words, i * WIDTH, where(zero, 0, load(words, i * WIDTH)))
    half = where(fine, to_f16(d * F(0.9875)) if is_s else to_f16(d), 0x7E00)
    put_words(words, _WORDS if is_s else 18, blocks, 2, n_bytes)
    store(words, 0, half)
    for k in range(WIDTH):
        store_u16(blocks, n_bytes * k, words[k])
    return not any_of(is_infinite(half))


@kernel(f"{ENCODE[:-1]}, {LISTS})")
def _encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots,
    groups: Words, entries: Ints, places: Ints,
) -> None:  # fmt: skip
    n_values = shape[0] * shape[1]
    n_bytes = out.size // (n_values // VALUES)
    weighted, is_s = importance.size > 0, n_bytes == BYTES_S
    tile, x, q = aligned(_TILE), aligned(_TILE), aligned(_TILE)
    blocks = aligned(n_bytes * WIDTH // 4 + 4).view(np.uint8)
    lists, room = (groups, entries, places), make_room()
    for first in range(0, n_values, _TILE):
        n_blocks = fill_lanes(kind, shape, data, scales, importance, first, VALUES, tile, x, q, faults)
        finite = _encode_lanes(x, q, weighted, is_s, lists, room, blocks)
        write_blocks(blocks, n_bytes * n_blocks, out, n_bytes * (first // VALUES))
        if not finite:
            note_infinite(blocks, n_bytes, n_blocks, 0, 1, first, VALUES, faults)


def encode_xs(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to IQ2_XS, with an importance vector."""
    _encode(kind, shape, data, scales, importance, out, faults, *make_lists("IQ2_XS"))


def encode_s(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to IQ2_S, with an importance vector or without."""
    _encode(kind, shape, data, scales, importance, out, faults, *make_lists("IQ2_S"))


@kernel(f"{DECODE[:-1]}, uint8[:, ::1], uint8[::1])")
def _decode(data: Bytes, out: Floats, values: Bytes, even_signs: Bytes) -> None:
    n_blocks = out.size // VALUES
    n_bytes = data.size // n_blocks if n_blocks else 0
    is_s = n_bytes == BYTES_S
    for block in range(n_blocks):
        at = n_bytes * block
        d = f16_to_float(load_u16(data, at))
        for eight in range(32):
            scale = data[at + n_bytes - 8 + eight // 4] >> 4 * (eight // 2 % 2) & 15
            dd = F(F(d * F(F(0.5) + F(scale))) * F(0.25))
            if is_s:
                number = data[at + 2 + eight] | (data[at + 66 + eight // 4] >> 2 * (eight % 4) & 3) << 8
                signs = data[at + 34 + eight]
            else:
                both = load_u16(data, at + 2 + 2 * eight)
                number = both & 511
                signs = even_signs[both >> 9]
            for i in range(8):
                value = F(dd * F(values[number, i]))
                out[VALUES * block + 8 * eight + i] = -value if signs >> i & 1 else value


def decode_xs(data: Bytes, out: Floats) -> None:
    """IQ2_XS to float32: ``d (scale + 1/2) / 4`` times the values of the points."""
    _decode(data, out, find_grid("IQ2_XS").values, sign_bytes())


def decode_s(data: Bytes, out: Floats) -> None:
    """IQ2_S to float32: ``d (scale + 1/2) / 4`` times the values of the points."""
    _decode(data, out, find_grid("IQ2_S").values, sign_bytes())
