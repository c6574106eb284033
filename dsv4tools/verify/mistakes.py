"""What known mistakes make of a matrix, computed from its source: each is tried on a strip of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite, log2
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.measure import measure_errors
from dsv4tools.verify.bench import decode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dsv4tools.checkpoint.matrix import Matrix
    from dsv4tools.verify.bench import Bench

    Floats = NDArray[np.float32]

MIN_FACTOR = 0.1       # how far a factor must be from 1: closer it is noise that correlates
_UNSCALED = 127        # the E8M0 byte of 1
_SOUGHT_ROWS = 4       # of a strip, that are looked for elsewhere in the matrix
_SAME_ROW = 0.9


@dataclass(frozen=True, slots=True)
class Strip:
    """Some rows of a matrix from row `first` on, as the file and the source have them: float32 [n, n_cols].

    `own_error` is the relative RMSE of our own encoding of them.
    """

    bench: Bench
    matrix: Matrix
    first: int
    found: Floats
    source: Floats
    own_error: float


@dataclass(frozen=True, slots=True)
class Mistake:
    """What is said of it, and the values that it would have left in a strip."""

    what: str
    values: Floats


def whole_mistakes(strip: Strip) -> Iterator[Mistake]:
    """Everything that may have happened to a whole matrix, the cheap ones to try first."""
    yield from _factor(strip)
    if strip.matrix.scale is not None:
        yield from _scales(strip)
    if strip.found.shape[1] % 2 == 0:
        swapped = strip.source.reshape(-1, 2)[:, ::-1].reshape(strip.source.shape)
        yield Mistake("has neighbouring columns swapped: the two FP4 values of each byte in the wrong order",
                      np.ascontiguousarray(swapped))
    if min(strip.matrix.n_rows, strip.matrix.n_cols) > 1:
        yield Mistake("is transposed", _transposed(strip))
    yield from _other_rows(strip)


def name_factor(factor: float) -> str:
    """What to say of values that are `factor` times the source's."""
    if factor < 0:
        return "has the opposite sign" if abs(factor + 1) < 0.05 else f"is {factor:.4g} times the source"
    power = log2(factor) if factor > 0 and isfinite(factor) else 0.5
    if abs(power - round(power)) < 0.1:
        return f"has the wrong scale: 2^{round(power)} times the source"
    return f"has the wrong scale: {factor:.4g} times the source"


def _factor(strip: Strip) -> Iterator[Mistake]:
    if not strip.found.any():
        yield Mistake("is all zeros", np.zeros_like(strip.source))
        return
    factor = measure_errors(strip.found, strip.source).factor
    if isfinite(factor) and abs(factor - 1) > MIN_FACTOR:
        yield Mistake(name_factor(factor), np.float32(factor) * strip.source)


def _scales(strip: Strip) -> Iterator[Mistake]:
    scales = strip.bench.scales(strip.matrix)
    turned = np.ascontiguousarray(scales.T).reshape(scales.shape)
    if not np.array_equal(turned, scales):
        yield Mistake("has its scales transposed", _with_scales(strip, turned))
    ones = np.full_like(scales, _UNSCALED)
    if not np.array_equal(ones, scales):
        yield Mistake("was decoded without its scales", _with_scales(strip, ones))


def _with_scales(strip: Strip, scales: NDArray[np.uint8]) -> Floats:
    rows = strip.bench.stored(strip.matrix, strip.first, len(strip.source))
    return decode(replace(rows, scales=scales, first_row=strip.first))


def _transposed(strip: Strip) -> Floats:
    """The strip's place in the matrix written column by column: a few columns of the source, all of their rows."""
    n_rows, n_cols = strip.matrix.n_rows, strip.matrix.n_cols
    begin, end = strip.first * n_cols, (strip.first + len(strip.source)) * n_cols
    columns = slice(begin // n_rows, -(-end // n_rows))
    turned = np.empty((columns.stop - columns.start, n_rows), np.float32)
    for first, band in strip.bench.bands(strip.matrix):
        turned[:, first : first + len(band)] = band[:, columns].T
    skip = begin - columns.start * n_rows
    return turned.reshape(-1)[skip : skip + end - begin].reshape(strip.source.shape)


def _other_rows(strip: Strip) -> Iterator[Mistake]:
    """Rows of the same matrix in another order: where the first few of the strip come from."""
    rows = strip.found[:_SOUGHT_ROWS]
    best, origin = np.full(len(rows), -1.0), np.zeros(len(rows), np.int64)
    sought = _normalized(rows)
    for first, band in strip.bench.bands(strip.matrix):
        cosine = sought @ _normalized(band).T
        here = cosine.argmax(axis=1)
        better = cosine[np.arange(len(rows)), here] > best
        best = np.where(better, cosine[np.arange(len(rows)), here], best)
        origin = np.where(better, first + here, origin)
    own = strip.first + np.arange(len(rows))
    if (best < _SAME_ROW).any() or (origin == own).any():
        return
    shifts = set(((origin - own) % strip.matrix.n_rows).tolist())
    if len(shifts) == 1:
        wanted = (strip.first + np.arange(len(strip.source)) + shifts.pop()) % strip.matrix.n_rows
        n = int(np.argmin(wanted)) or len(wanted)   # where the last row is followed by the first
        values = [strip.bench.source(strip.matrix, int(part[0]), len(part))
                  for part in (wanted[:n], wanted[n:]) if len(part)]
        yield Mistake(f"has its rows moved: row {own[0]} holds row {origin[0]}, and so on", np.concatenate(values))
        return
    pairs = ", ".join(f"row {a} holds row {b}" for a, b in zip(own.tolist(), origin.tolist(), strict=True))
    mixed = strip.found.copy()   # the other rows of the strip are not known: these must explain
    for i, row in enumerate(origin.tolist()):
        mixed[i] = strip.bench.source(strip.matrix, row, 1)[0]
    yield Mistake(f"has its rows in another order: {pairs}", mixed)


def _normalized(rows: Floats) -> Floats:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    normalized: Floats = (rows / np.where(norms > 0, norms, 1)).astype(np.float32)
    return normalized
