"""Rows of a GGUF as rows that encoders read: blocks of any ggml type, decoded a few rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.source import SourceKind, SourceRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from dsv4tools.formats.table import Format

CODED = "MXFP4"           # holds what FP4 rows hold: its codes and scales are taken as they are
TILE_VALUES = 1 << 15     # decoded at a time: 128 kB of float32, which a core's cache holds
CODED_VALUES = 1 << 17    # the same of codes, with what is needed on the way
_VALUES, _BYTES = 32, 17


def decoded_kind(stored: Format) -> SourceKind:
    """What rows in blocks of this type are decoded to."""
    return SourceKind.FP4 if stored.name == CODED else SourceKind.F32


def unpacked(
    rows: SourceRows, decode: Callable[[NDArray[np.uint8], Format, int, int, NDArray[np.float32]], None]
) -> Iterator[tuple[int, SourceRows]]:
    """Runs of rows without blocks that are `rows` one after the other, each with the number of its first row.

    `decode` is `codecs.decode_rows`. A run is valid until the next one.
    """
    stored, n_cols = rows.blocks, rows.n_cols
    if stored is None:
        yield 0, rows
        return
    row_bytes = stored.row_bytes(n_cols)
    step = max(1, (CODED_VALUES if stored.name == CODED else TILE_VALUES) // max(1, n_cols))
    tile = np.empty((min(step, rows.n_rows), n_cols), np.float32) if stored.name != CODED else None
    for first in range(0, rows.n_rows, step):
        n = min(step, rows.n_rows - first)
        data = rows.data[first * row_bytes : (first + n) * row_bytes]
        if tile is None:
            yield first, _from_mxfp4(data, n, n_cols)
        else:
            decode(data, stored, n, n_cols, tile[:n])
            yield first, SourceRows(SourceKind.F32, tile[:n].reshape(-1).view(np.uint8), n, n_cols)


def _from_mxfp4(data: NDArray[np.uint8], n_rows: int, n_cols: int) -> SourceRows:
    """FP4 rows with the codes and scales of MXFP4 blocks: values 16 apart share a byte there, neighbours do here."""
    blocks = data.reshape(-1, _BYTES)
    scales = np.ascontiguousarray(blocks[:, 0]).reshape(n_rows, n_cols // _VALUES)
    pairs = np.ascontiguousarray(blocks[:, 1:]).view("<u2")   # of two neighbours and the two 16 behind them
    packed = np.empty((len(blocks), _VALUES // 2), np.uint8)
    for half, shift in ((packed[:, :8], 0), (packed[:, 8:], 4)):
        codes = (pairs >> shift) & 0x0F0F
        codes |= codes >> 4
        half[:] = codes.astype(np.uint8)   # the low byte
    return SourceRows(SourceKind.FP4, packed.reshape(-1), n_rows, n_cols, scales, 1, _VALUES)
