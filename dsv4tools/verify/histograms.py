"""Histograms of a report as numbers: bars with labels and titles."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import isfinite, log10
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4tools.verify.report import DepthCheck

_N_BARS = 40
_BIAS = 127                # of the exponents of float32
_LEAST_SHARE = 1e-5        # magnitudes rarer than this at both ends are left out


@dataclass(frozen=True, slots=True)
class Bars:
    """Heights, what stands below each bar, and what is said when one points at it."""

    counts: list[float]
    labels: list[str]
    titles: list[str]


def error_histogram(errors: Sequence[float]) -> Bars | None:
    """Of relative errors, on a logarithmic axis; None where there are none but zeros and infinities."""
    logs = np.array([log10(e) for e in errors if e > 0 and isfinite(e)])
    if not len(logs):
        return None
    low, high = float(logs.min()), float(logs.max())
    if high - low < 0.1:   # a tenth of a decade at least: not noise over the whole width
        low, high = (low + high) / 2 - 0.05, (low + high) / 2 + 0.05
    counts, edges = np.histogram(logs, _N_BARS, (low, high))
    values = [10.0**e for e in edges.tolist()]
    spans = list(itertools.pairwise(values))
    labels = [f"{(a * b) ** 0.5:.3g}" for a, b in spans]
    titles = [f"{n} from {a:.3g} to {b:.3g}" for n, (a, b) in zip(counts.tolist(), spans, strict=True)]
    return Bars([float(n) for n in counts], labels, titles)


def exponent_histogram(checks: Sequence[DepthCheck]) -> Bars | None:
    """Of the magnitudes in a sample of the values of some tensors, by powers of two; zeros are left out."""
    counts = np.zeros(256, np.int64)
    for check in checks:
        if check.exponents:
            counts += np.array(check.exponents)
    counts[[0, 255]] = 0   # zeros and subnormals; NaN and infinity
    total = int(counts.sum())
    if not total:
        return None
    shares = counts / total
    seen = np.flatnonzero(shares >= _LEAST_SHARE)
    span = range(int(seen[0]), int(seen[-1]) + 1)
    titles = [f"2^{i - _BIAS} to 2^{i - _BIAS + 1}: {shares[i]:.3%}" for i in span]
    return Bars([float(shares[i]) for i in span], [f"2^{i - _BIAS}" for i in span], titles)
