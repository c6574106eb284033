"""Which parts of a tensor are compared: all, or a share of it chosen by a seed."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from itertools import accumulate
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.plan import Unit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dsv4tools.plan import PlannedTensor

PIECE_VALUES = 1 << 15   # small, so that a few per cent reach every expert; large enough to be read in one go


def sample_units(planned: PlannedTensor, per_cent: float, seed: int = 0) -> Iterator[Unit]:
    """Small pieces that make up `per_cent` of a tensor, in order, and at least one of every expert.

    The same seed chooses the same pieces of a tensor of the same name and shape, whatever else is compared.
    """
    sources = planned.tensor.sources
    n_rows, n_cols = sources[0].n_rows, max(1, sources[0].n_cols)
    step = max(1, PIECE_VALUES // n_cols)
    n_each = -(-n_rows // step)
    rng = np.random.default_rng([seed, zlib.crc32(planned.name.encode(errors="surrogateescape"))])
    chosen = rng.permutation(n_each * len(sources))[: ceil(n_each * len(sources) * per_cent / 100)]
    without = np.setdiff1d(np.arange(len(sources)), chosen // max(1, n_each))
    more = without * n_each + rng.integers(max(1, n_each), size=len(without))
    row_bytes = planned.format.row_bytes(planned.tensor.ne[0], planned.name)
    for number, piece in (divmod(i, n_each) for i in sorted([*chosen.tolist(), *more.tolist()]) if n_each):
        first = piece * step
        n = min(step, n_rows - first)
        yield Unit(planned, sources[number], first, n, (number * n_rows + first) * row_bytes, n * row_bytes)


def sample_pieces(
    tensors: Sequence[PlannedTensor], n_pieces: int, seed: int = 0
) -> Iterator[tuple[PlannedTensor, int, int, int]]:
    """Up to `n_pieces` small pieces of several tensors, evenly spread: tensor, which source matrix, first row, rows.

    The same seed chooses the same pieces of tensors of the same names and shapes.
    """
    steps = [max(1, PIECE_VALUES // max(1, t.tensor.sources[0].n_cols)) for t in tensors]
    n_each = [-(-t.tensor.sources[0].n_rows // step) for t, step in zip(tensors, steps, strict=True)]
    ends = list(accumulate(len(t.tensor.sources) * n for t, n in zip(tensors, n_each, strict=True)))
    names = "\n".join(t.name for t in tensors).encode(errors="surrogateescape")
    rng = np.random.default_rng([seed, zlib.crc32(names)])
    n = min(n_pieces, ends[-1]) if ends else 0
    for i in range(n):
        first, end = i * ends[-1] // n, (i + 1) * ends[-1] // n
        at = int(rng.integers(first, end))
        which = bisect_right(ends, at)
        number, piece = divmod(at - (ends[which - 1] if which else 0), n_each[which])
        row = piece * steps[which]
        yield tensors[which], number, row, min(steps[which], tensors[which].tensor.sources[number].n_rows - row)
