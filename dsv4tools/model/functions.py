"""The small functions of the model, each as the paper writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.formats.products import multiply_tile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]   # float32 or float64, as the model was opened


def multiply(x: Floats, w: Floats) -> Floats:
    """``x @ w.T`` for vectors x [..., S, k] and rows w [n, k]: [..., S, n].

    In float32 not by numpy: the threads of its BLAS go on spinning behind each product and take the cores from ours.
    """
    if x.dtype != np.float32:
        return x @ w.T
    vectors = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    out = np.empty((len(vectors), len(w)), np.float32)
    multiply_tile(np.ascontiguousarray(w), vectors, out)
    return out.reshape(*x.shape[:-1], len(w))


def rms(x: Floats, eps: float) -> Floats:
    """Root mean square normalization over the last axis: x / sqrt(mean(x^2) + eps)."""
    mean_square: Floats = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + x.dtype.type(eps))


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    e: Floats = np.exp(-np.abs(x))
    numerator: Floats = np.where(x >= 0, 1, e)
    return numerator / (1 + e)


def clamped_swiglu(gate: Floats, up: Floats, limit: float) -> Floats:
    """silu(min(gate, limit)) * clip(up, -limit, limit).

    The gate is clamped from above only and before silu, the other factor on both sides.
    """
    gate = np.minimum(gate, limit)
    return gate * sigmoid(gate) * np.clip(up, -limit, limit)


def softmax_with_sink(scores: Floats, sink: Floats) -> Floats:
    """Softmax over the last axis of `scores` [S, H, n], whose denominator has one more term: exp(sink[h])."""
    sink = np.broadcast_to(sink[:, None], (*scores.shape[:-1], 1))
    largest = np.maximum(scores.max(axis=-1, keepdims=True), sink)
    weights: Floats = np.exp(scores - largest)
    total: Floats = weights.sum(axis=-1, keepdims=True) + np.exp(sink - largest)
    return weights / total


def softmax(scores: Floats, axis: int) -> Floats:
    """Softmax along `axis`; a score of minus infinity has weight 0."""
    weights: Floats = np.exp(scores - scores.max(axis=axis, keepdims=True))
    total: Floats = weights.sum(axis=axis, keepdims=True)
    return weights / total
