"""Kernels that multiply rows of weights with vectors.

The rows are encoded (a block is decoded in registers and never stored), or float32 for everything else. Sums run side
by side in lanes, one for each place in a run of values, and are added in a fixed order at the end of the row: the
result does not depend on the processor or on the number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import f16_to_float, load_u16
from dsv4tools.formats.compile import helper, kernel
from dsv4tools.formats.lanes import aligned, byte_to_float, byte_to_int, load_lanes, store, to_float

if TYPE_CHECKING:
    from dsv4tools.formats.lanes import Lanes
    from dsv4tools.formats.tiles import Bytes, Floats

N = 32        # lanes for encoded rows: a block of Q8_0, a sub-block of Q4_K
TILE_N = 16   # lanes for float32 rows: eight sums of 16 fill the registers of AVX-512
_DOT = "void(Array(uint8, 1, 'C', readonly=True), Array(float32, 1, 'C', readonly=True), float32[::1])"
_DOT_TILE = (
    "void(Array(float32, 2, 'C', readonly=True), Array(float32, 2, 'C', readonly=True), Array(float32, 2, 'A'))"
)


@helper
def _total(sums: Lanes, room: Floats) -> np.float32:
    """The sum over all lanes, as many as `room` has places."""
    store(room, 0, sums)
    n = room.size // 2
    while n:
        for i in range(n):
            room[i] += room[i + n]
        n //= 2
    return room[0]


@kernel(_DOT_TILE)
def dot_tile(tile: Floats, x: Floats, out: Floats) -> None:
    """``out[s, r] = tile[r] . x[s]`` for rows of float32, a whole number of `TILE_N` columns each.

    Two rows times four vectors at once. Where there are fewer, the last one is done again in their place.
    """
    n_rows, n_cols = tile.shape
    n_vectors = x.shape[0]
    w, v = tile.reshape(-1), x.reshape(-1)
    room, nothing = aligned(TILE_N), aligned(TILE_N)
    nothing[:] = np.float32(0.0)
    zero = load_lanes(TILE_N, nothing, 0)
    for s0 in range(0, n_vectors, 4):
        s1, s2, s3 = min(s0 + 1, n_vectors - 1), min(s0 + 2, n_vectors - 1), min(s0 + 3, n_vectors - 1)
        at0, at1, at2, at3 = s0 * n_cols, s1 * n_cols, s2 * n_cols, s3 * n_cols
        for r0 in range(0, n_rows, 2):
            r1 = min(r0 + 1, n_rows - 1)
            from0, from1 = r0 * n_cols, r1 * n_cols
            a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
            for c in range(0, n_cols, TILE_N):
                wa, wb = load_lanes(TILE_N, w, from0 + c), load_lanes(TILE_N, w, from1 + c)
                x0, x1 = load_lanes(TILE_N, v, at0 + c), load_lanes(TILE_N, v, at1 + c)
                x2, x3 = load_lanes(TILE_N, v, at2 + c), load_lanes(TILE_N, v, at3 + c)
                a0, b0 = a0 + wa * x0, b0 + wb * x0
                a1, b1 = a1 + wa * x1, b1 + wb * x1
                a2, b2 = a2 + wa * x2, b2 + wb * x2
                a3, b3 = a3 + wa * x3, b3 + wb * x3
            out[s0, r0], out[s0, r1] = _total(a0, room), _total(b0, room)
            out[s1, r0], out[s1, r1] = _total(a1, room), _total(b1, room)
            out[s2, r0], out[s2, r1] = _total(a2, room), _total(b2, room)
            out[s3, r0], out[s3, r1] = _total(a3, room), _total(b3, room)


@kernel(_DOT)
def dot_q8_0(data: Bytes, x: Floats, out: Floats) -> None:
    """``out[r] = row r . x`` for rows of Q8_0; as many rows as `out` has."""
    n_blocks = x.size // 32
    room, nothing = aligned(N), aligned(N)
    nothing[:] = np.float32(0.0)
    for row in range(out.size):
        sums = load_lanes(N, nothing, 0)
        for block in range(n_blocks):
            at = 34 * (row * n_blocks + block)
            d = f16_to_float(load_u16(data, at))
            sums = sums + byte_to_float(load_lanes(N, data, at + 2)) * load_lanes(N, x, 32 * block) * d
        out[row] = _total(sums, room)


@kernel(_DOT)
def dot_q4_k(data: Bytes, x: Floats, out: Floats) -> None:
    """``out[r] = row r . x`` for rows of Q4_K. A sub-block's minimum is taken from all its values at once."""
    n_blocks = x.size // 256
    room, nothing = aligned(N), aligned(N)
    nothing[:] = np.float32(0.0)
    x_sums = np.empty(8 * n_blocks, np.float32)
    for i in range(x_sums.size):
        x_sums[i] = _total(load_lanes(N, x, 32 * i), room)
    for row in range(out.size):
        sums = load_lanes(N, nothing, 0)
        minima = np.float32(0.0)
        for block in range(n_blocks):
            at = 144 * (row * n_blocks + block)
            d = f16_to_float(load_u16(data, at))
            dmin = f16_to_float(load_u16(data, at + 2))
            for pair in range(4):
                codes = byte_to_int(load_lanes(N, data, at + 16 + 32 * pair))
                for half in range(2):
                    j = 2 * pair + half
                    if j < 4:
                        scale = data[at + 4 + j] & 63
                        low = data[at + 8 + j] & 63
                    else:
                        scale = (data[at + 8 + j] & 15) | (data[at + j] >> 6) << 4
                        low = (data[at + 8 + j] >> 4) | (data[at + 4 + j] >> 6) << 4
                    levels = to_float((codes >> (4 * half)) & 15)
                    sums = sums + levels * load_lanes(N, x, 256 * block + 32 * j) * np.float32(d * np.float32(scale))
                    minima += dmin * np.float32(low) * x_sums[8 * block + j]
        out[row] = _total(sums, room) - minima
