"""Hyper-connections: n residual streams, mixed per token by a doubly stochastic matrix (Sinkhorn)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.model.functions import rms, sigmoid, softmax

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4tools.checkpoint import Config
    from dsv4tools.model.functions import Floats
    from dsv4tools.model.weights import Weights


class HyperConnection:
    """What surrounds attention and MoE: streams [S, n, D] -> one vector per token -> streams.

    `name` is ``blk.3.hc_attn`` or alike; its tensors are ``_fn`` [(2 + n) n, n D], ``_scale`` [3] and
    ``_base`` [(2 + n) n].
    """

    def __init__(self, weights: Weights, config: Config, name: str) -> None:
        self.weights, self.config, self.name = weights, config, name

    def __call__(self, X: Floats, inner: Callable[[Floats], Floats]) -> Floats:
        """Streams [S, n, D] after ``inner``, a function of [S, D]."""
        pre, post, C = self.mix(X)
        y = inner(np.einsum("si,sid->sd", pre, X))
        # Stream k takes from stream j what C[j, k] says: the sum runs over the first index.
        mixed: Floats = np.einsum("sjk,sjd->skd", C, X)
        return post[:, :, None] * y[:, None, :] + mixed

    def mix(self, X: Floats) -> tuple[Floats, Floats, Floats]:
        """Of each token: pre [S, n], post [S, n] and the matrix that mixes the streams [S, n, n]."""
        n, eps = self.config.hc_mult, self.config.hc_eps
        m = project(self.weights, self.config, self.name, X)                              # [S, (2 + n) n]
        scale, base = self.weights.vector(f"{self.name}_scale.weight"), self.weights.vector(f"{self.name}_base.weight")
        pre = sigmoid(m[:, :n] * scale[0] + base[:n]) + eps
        post = 2 * sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        Z = (m[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n)                  # [S, source, destination]
        return pre, post, sinkhorn(Z, self.config.hc_sinkhorn_iters, eps)


def sinkhorn(Z: Floats, n_iterations: int, eps: float) -> Floats:
    """Make ``softmax(Z)`` [S, n, n] nearly doubly stochastic: columns once, then rows and columns in turn.

    `n_iterations` counts the column steps; the first row step is the softmax, and the last step is one of columns.
    """
    C: Floats = softmax(Z, axis=2) + eps
    C /= C.sum(axis=1, keepdims=True) + eps
    for _ in range(n_iterations - 1):
        C /= C.sum(axis=2, keepdims=True) + eps
        C /= C.sum(axis=1, keepdims=True) + eps
    return C


def merge_streams(weights: Weights, config: Config, X: Floats) -> Floats:
    """The streams [S, n, D] as one vector per token [S, D], before the output head."""
    m = project(weights, config, "output_hc", X)                                          # [S, n]
    scale, base = weights.vector("output_hc_scale.weight"), weights.vector("output_hc_base.weight")
    merged: Floats = np.einsum("si,sid->sd", sigmoid(m * scale[0] + base) + config.hc_eps, X)
    return merged


def project(weights: Weights, config: Config, name: str, X: Floats) -> Floats:
    """``fn`` times the normalized streams, laid end to end: [S, n, D] -> [S, rows of fn]."""
    return weights.matmul(f"{name}_fn.weight", rms(X.reshape(len(X), -1), config.rms_norm_eps))
