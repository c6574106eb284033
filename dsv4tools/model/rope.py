"""Rotary position embedding on the last channels of a vector, with YaRN frequencies for the compressed layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.checkpoint import Config


class Rope:
    """The rotations of one kind of layer.

    Frequencies and angles are float32 whatever the vectors are: DeepSeek's code (inference/model.py,
    precompute_freqs_cis) computes them so, and from position 1e5 on their rounding is visible in the logits.
    """

    def __init__(self, config: Config, *, compressed: bool) -> None:
        self.frequencies = yarn_frequencies(config) if compressed else plain_frequencies(config)   # [R/2]

    def rotate(self, x: NDArray[Any], positions: NDArray[np.int64], *, inverse: bool = False) -> NDArray[Any]:
        """Rotate the last R channels of `x` [S, ..., d], pairs of neighbours, by the angles of `positions` [S]."""
        angles = positions.astype(np.float32)[:, None] * self.frequencies                        # [S, R/2]
        angles = angles.astype(x.dtype).reshape(len(x), *[1] * (x.ndim - 2), -1)                 # [S, 1.., R/2]
        cos, sin = np.cos(angles), np.sin(-angles if inverse else angles)
        n_rotated = 2 * len(self.frequencies)
        out = x.copy()
        a, b = x[..., -n_rotated::2], x[..., x.shape[-1] - n_rotated + 1 :: 2]
        out[..., -n_rotated::2] = a * cos - b * sin
        out[..., x.shape[-1] - n_rotated + 1 :: 2] = a * sin + b * cos
        return out


def plain_frequencies(config: Config) -> NDArray[np.float32]:
    """Those of the layers that only see their window, theta ** (-2i / R): float32 [R/2]."""
    return _geometric(config.rope_theta, config.qk_rope_head_dim)


def yarn_frequencies(config: Config) -> NDArray[np.float32]:
    """Frequencies of the compressed layers, at every length, float32 [R/2].

    Those that turn often within the original context stay, those that hardly turn are divided by the factor, and
    between the two it goes linearly (YaRN, arXiv 2309.00071, section 3.2); cosine and sine are not scaled.
    """
    n = config.qk_rope_head_dim
    frequencies = _geometric(config.compress_rope_theta, n)
    original = config.rope_scaling_original_max_position_embeddings

    def index_of(turns: float) -> float:
        return n * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.compress_rope_theta))

    low = max(math.floor(index_of(config.rope_scaling_beta_fast)), 0)
    high = min(math.ceil(index_of(config.rope_scaling_beta_slow)), n - 1)
    span = high - low if high != low else 0.001
    stretched = np.clip((np.arange(n // 2, dtype=np.float32) - np.float32(low)) / np.float32(span), 0, 1)
    slow: NDArray[np.float32] = frequencies / np.float32(config.rope_scaling_factor)
    blended: NDArray[np.float32] = slow * stretched + frequencies * (1 - stretched)
    return blended


def _geometric(theta: float, n: int) -> NDArray[np.float32]:
    exponents = np.arange(0, n, 2, dtype=np.float32) / np.float32(n)
    frequencies: NDArray[np.float32] = np.float32(1) / np.float32(theta) ** exponents
    return frequencies
