"""How far decoded values are from their source, and what a tensor's values are like: sums that add up over pieces."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import inf, nan, sqrt
from typing import TYPE_CHECKING, Self

import numpy as np

from dsv4tools.formats import compile as compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KERNELS = "sums"
N_EXPONENTS = 256


@dataclass(slots=True)
class ErrorSums:
    """Sums over values found and their source; values found that are not finite are only counted.

    Attributes
    ----------
    n, n_not_finite:
        How many values took part, and how many could not.
    squared_error, product, squared_found, squared_source:
        Sums of ``(f - s)**2``, ``f * s``, ``f**2`` and ``s**2``.
    largest_error, largest_at:
        The largest ``|f - s|`` and the flat index of its value, -1 where there is no error.
    """

    n: int = 0
    squared_error: float = 0.0
    product: float = 0.0
    squared_found: float = 0.0
    squared_source: float = 0.0
    largest_error: float = 0.0
    largest_at: int = -1
    n_not_finite: int = 0

    def add(self, other: Self) -> None:
        """Take another piece's sums in."""
        if other.largest_error > self.largest_error:
            self.largest_error, self.largest_at = other.largest_error, other.largest_at
        for f in fields(self):
            if not f.name.startswith("largest"):
                setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def times(self, n: float) -> Self:
        """The sums of `n` times as many values like these."""
        scaled = {f.name: getattr(self, f.name) * n for f in fields(self) if f.type == "float"}
        return replace(self, **scaled | {"largest_error": self.largest_error, "n": round(self.n * n)})

    @property
    def relative_rmse(self) -> float:
        """Root mean square error over the source's root mean square.

        Infinite where the source is zero and the values are not, and where values are not finite.
        """
        if self.n_not_finite:
            return inf
        if self.squared_source:
            return sqrt(self.squared_error / self.squared_source)
        return inf if self.squared_error else 0.0

    @property
    def cosine(self) -> float:
        """Of the angle between found and source; 1 where both are zero, NaN where one is."""
        if self.squared_found and self.squared_source:
            # One root after the other: the product of two tiny sums would be zero.
            return self.product / sqrt(self.squared_found) / sqrt(self.squared_source)
        return nan if self.squared_found or self.squared_source else 1.0

    @property
    def factor(self) -> float:
        """The number that the source is best multiplied with to give what was found; NaN for a source of zeros."""
        return self.product / self.squared_source if self.squared_source else nan


@dataclass(slots=True)
class ValueSums:
    """What values are like. Those that are not finite are counted in `n_not_finite` and nowhere else.

    `n_small` counts magnitudes below 2^-14, the normal numbers of F16, zeros included; `n_large` finite ones of 65504,
    its largest, or above.
    """

    n: int = 0
    total: float = 0.0
    squared: float = 0.0
    highest: float = -inf
    lowest: float = inf
    n_zero: int = 0
    n_not_finite: int = 0
    n_small: int = 0
    n_large: int = 0

    def add(self, other: Self) -> None:
        """Take another piece's sums in."""
        highest, lowest = max(self.highest, other.highest), min(self.lowest, other.lowest)
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
        self.highest, self.lowest = highest, lowest

    @property
    def mean(self) -> float:
        """NaN where there are no finite values."""
        return self.total / self.n if self.n else nan

    @property
    def rms(self) -> float:
        """Root mean square; NaN where there are no finite values."""
        return sqrt(self.squared / self.n) if self.n else nan


def prepare() -> None:
    """Compile or load the kernels, so that later calls start at once."""
    compiled.load(_KERNELS)


def measure_errors(found: NDArray[np.float32], source: NDArray[np.float32]) -> ErrorSums:
    """The sums over two contiguous float32 arrays of one size. Source values that are not finite count as 0."""
    sums = np.zeros(8, np.float64)
    compiled.load(_KERNELS).sum_errors(found.reshape(-1), source.reshape(-1), sums)
    n, squared, product, of_found, of_source, largest, at, n_bad = sums.tolist()
    return ErrorSums(int(n), squared, product, of_found, of_source, largest, int(at), int(n_bad))


def measure_cells(
    found: NDArray[np.float32], source: NDArray[np.float32], n_cell: int
) -> NDArray[np.float64]:
    """For each run of `n_cell` values: squared error, squared source, values found not finite; float64 [cells, 3]."""
    sums = np.zeros((-(-found.size // n_cell), 3), np.float64)
    compiled.load(_KERNELS).sum_cells(found.reshape(-1), source.reshape(-1), n_cell, sums)
    return sums


class ValueMeter:
    """Measures one run of values after the other: `measure_values` without an object for each."""

    def __init__(self) -> None:
        self._sums = np.array([0, 0, 0, -inf, inf, 0, 0, 0, 0], np.float64)
        self._add = compiled.load(_KERNELS).sum_values

    def take(self, values: NDArray[np.float32]) -> bool:
        """Add a contiguous, one-dimensional run; whether all of its values are finite."""
        n_finite = self._sums[0]
        self._add(values, self._sums)
        return bool(self._sums[0] - n_finite == len(values))

    def result(self) -> ValueSums:
        """The sums of all runs so far."""
        n, total, squared, highest, lowest, *counts = self._sums.tolist()
        return ValueSums(int(n), total, squared, highest, lowest, *map(int, counts))


def measure_values(values: NDArray[np.float32]) -> ValueSums:
    """What a contiguous float32 array holds."""
    meter = ValueMeter()
    meter.take(values.reshape(-1))
    return meter.result()


def count_exponents(values: NDArray[np.float32], counts: NDArray[np.int64]) -> None:
    """Add to `counts` [256] how many values have each exponent byte of float32: 127 is 1 up to 2, 0 is zero."""
    compiled.load(_KERNELS).count_exponents(values.reshape(-1), counts)
