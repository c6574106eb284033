"""F32, F16 and BF16: encoders, decoders, and the decoder of every source format to float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import (
    bf16_to_float,
    bits_float,
    f16_to_float,
    float_bits,
    float_to_bf16,
    float_to_f16,
    load_u16,
    load_u32,
    store_u16,
    store_u32,
)
from dsv4tools.formats.compile import helper, kernel
from dsv4tools.formats.lanes import aligned
from dsv4tools.formats.tiles import (
    DECODE,
    DECODE_SOURCE,
    ENCODE,
    N_TARGET,
    TARGET_OVERFLOW,
    fill_tile,
    load_tile,
    note_fault,
    note_source_faults,
)

if TYPE_CHECKING:
    from dsv4tools.formats.tiles import Bytes, FaultSlots, Floats, Shape

_TILE = 4096


@helper
def _note_overflow(out: Bytes, first: int, count: int, infinity: int, faults: FaultSlots) -> None:
    for i in range(first, first + count):
        if load_u16(out, 2 * i) & 0x7FFF == infinity:
            note_fault(faults, N_TARGET, TARGET_OVERFLOW, i, 1)


@kernel(ENCODE)
def encode_f32(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to F32."""
    tile = aligned(_TILE)
    for first in range(0, shape[0] * shape[1], _TILE):
        for i in range(fill_tile(kind, shape, data, scales, first, tile, faults)):
            store_u32(out, 4 * (first + i), float_bits(tile[i]))


@kernel(ENCODE)
def encode_f16(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to F16."""
    tile = aligned(_TILE)
    for first in range(0, shape[0] * shape[1], _TILE):
        count = fill_tile(kind, shape, data, scales, first, tile, faults)
        largest = np.uint16(0)
        for i in range(count):
            half = float_to_f16(tile[i])
            largest = max(largest, np.uint16(half & 0x7FFF))
            store_u16(out, 2 * (first + i), half)
        if largest >= 0x7C00:
            _note_overflow(out, first, count, 0x7C00, faults)


@kernel(ENCODE)
def encode_bf16(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    """Rows of any source to BF16."""
    tile = aligned(_TILE)
    for first in range(0, shape[0] * shape[1], _TILE):
        count = fill_tile(kind, shape, data, scales, first, tile, faults)
        largest = np.uint16(0)
        for i in range(count):
            bits = float_to_bf16(tile[i])
            largest = max(largest, np.uint16(bits & 0x7FFF))
            store_u16(out, 2 * (first + i), bits)
        if largest >= 0x7F80:
            _note_overflow(out, first, count, 0x7F80, faults)


@kernel(DECODE)
def decode_f32(data: Bytes, out: Floats) -> None:
    """F32 to float32."""
    for i in range(out.size):
        out[i] = bits_float(load_u32(data, 4 * i))


@kernel(DECODE)
def decode_f16(data: Bytes, out: Floats) -> None:
    """F16 to float32."""
    for i in range(out.size):
        out[i] = f16_to_float(load_u16(data, 2 * i))


@kernel(DECODE)
def decode_bf16(data: Bytes, out: Floats) -> None:
    """BF16 to float32."""
    for i in range(out.size):
        out[i] = bf16_to_float(load_u16(data, 2 * i))


@kernel(DECODE_SOURCE)
def decode_source(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, out: Floats, faults: FaultSlots
) -> None:
    """Rows of any source to float32; what is not finite stays as it is, and is counted."""
    for first in range(0, out.size, _TILE):
        count = min(_TILE, out.size - first)
        tile = out[first : first + count]
        if not load_tile(kind, shape, data, scales, first, count, tile):
            note_source_faults(kind, shape, data, scales, first, count, tile, False, faults)


@kernel(DECODE_SOURCE)
def add_squares(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, out: Floats, faults: FaultSlots
) -> None:
    """Add the squares of a run's values to their columns' sums in `out`, row after row; faulty values count as 0."""
    n_rows, n_cols, _, _, _ = shape
    tile = aligned(_TILE)
    for row in range(n_rows):
        for column in range(0, n_cols, _TILE):
            part = tile[: min(_TILE, n_cols - column)]
            fill_tile(kind, shape, data, scales, row * n_cols + column, part, faults)
            for i in range(part.size):
                out[column + i] += part[i] * part[i]
