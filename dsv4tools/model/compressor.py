"""The compressor: one key for each window of `ratio` tokens, by a softmax over the window per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.model.functions import rms, softmax

if TYPE_CHECKING:
    from dsv4tools.checkpoint import Config
    from dsv4tools.model.functions import Floats
    from dsv4tools.model.rope import Rope
    from dsv4tools.model.weights import Weights

OVERLAPPING_RATIO = 4   # these windows look at the one before them too: two halves of twice as many channels


@dataclass(frozen=True, slots=True)
class Windows:
    """How many tokens a row stands for, and its width."""

    ratio: int
    width: int

    @property
    def overlap(self) -> bool:
        """Whether a row looks at the window before its own too."""
        return self.ratio == OVERLAPPING_RATIO


class Rows:
    """Vectors [n, width] that grow at the end; the room doubles, so that adding one costs no copy of all."""

    def __init__(self, width: int, dtype: Any) -> None:  # noqa: ANN401  - a numpy dtype
        self._room = np.empty((16, width), dtype)
        self._n = 0

    def append(self, rows: Floats) -> None:
        """Add `rows` [m, width]."""
        needed = self._n + len(rows)
        if needed > len(self._room):
            room = np.empty((max(needed, 2 * len(self._room)), self._room.shape[1]), self._room.dtype)
            room[: self._n] = self._room[: self._n]
            self._room = room
        self._room[self._n : needed] = rows
        self._n = needed

    @property
    def values(self) -> Floats:
        """All of them, [n, width]."""
        return self._room[: self._n]


@dataclass
class CompressorCache:
    """Between calls: finished rows, and keys and scores of the tokens that later rows need.

    `keys` and `scores` [n, columns] begin with the window before the open one where windows overlap.
    """

    rows: Rows
    keys: Floats
    scores: Floats


class Compressor:
    """Compressed keys of one layer, for attention (width `head_dim`) or for the indexer.

    `name` is ``blk.2.attn_compressor`` or ``blk.2.indexer_compressor``.
    """

    def __init__(self, weights: Weights, config: Config, name: str, windows: Windows, rope: Rope) -> None:
        self.weights, self.config, self.name, self.windows, self.rope = weights, config, name, windows, rope

    def new_cache(self) -> CompressorCache:
        """The cache before the first token."""
        dtype, windows = self.weights.dtype, self.windows
        # Before the first window there is one that has no weight.
        n_before, n_columns = (windows.ratio, 2 * windows.width) if windows.overlap else (0, windows.width)
        keys = np.zeros((n_before, n_columns), dtype)
        return CompressorCache(Rows(windows.width, dtype), keys, np.full_like(keys, -np.inf))

    def extend(self, x: Floats, start: int, cache: CompressorCache) -> Floats:
        """Take in tokens `start` .. from their layer inputs `x` [S, D]; all rows that are complete now, [T, width]."""
        w, r, d = self.weights, self.windows.ratio, self.windows.width
        ape = w.vector(f"{self.name}_ape.weight")                                        # [r, columns]
        offsets = (start + np.arange(len(x))) % r
        scores = w.matmul(f"{self.name}_gate.weight", x) + ape[offsets]                  # [S, columns]
        keys = np.concatenate((cache.keys, w.matmul(f"{self.name}_kv.weight", x)))
        scores = np.concatenate((cache.scores, scores))
        n_windows = len(keys) // r
        K, G = (a[: n_windows * r].reshape(n_windows, r, a.shape[1]) for a in (keys, scores))   # [windows, r, columns]
        if self.windows.overlap:   # slots: the previous window's first half of channels, the own window's second half
            K = np.concatenate((K[:-1, :, :d], K[1:, :, d:]), axis=1)                    # [windows - 1, 2 r, d]
            G = np.concatenate((G[:-1, :, :d], G[1:, :, d:]), axis=1)
        n_new, n_done = len(K), len(cache.rows.values)
        if n_new:
            c = np.sum(softmax(G, axis=1) * K, axis=1)                                   # [new, d], per channel
            c = rms(c, self.config.rms_norm_eps) * w.vector(f"{self.name}_norm.weight")
            cache.rows.append(self.rope.rotate(c, (n_done + np.arange(n_new)) * r))      # at its window's first token
        cache.keys, cache.scores = keys[n_new * r :].copy(), scores[n_new * r :].copy()
        return cache.rows.values
