"""Attention over a window and compressed rows, with one shared key-value head and a sink per query head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.model.compressor import OVERLAPPING_RATIO, Compressor, CompressorCache, Windows
from dsv4tools.model.functions import multiply, rms, softmax_with_sink
from dsv4tools.model.rope import Rope

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.checkpoint import Config
    from dsv4tools.model.functions import Floats
    from dsv4tools.model.observe import Observer
    from dsv4tools.model.weights import Weights

# Queries are answered in blocks, so that no more than this many scores exist at once, however long the prompt is.
MAX_SCORES = 1 << 22


@dataclass
class AttentionCache:
    """What later tokens need of earlier ones: the last keys [< window, d], compressed rows, rows of the indexer."""

    window: Floats
    compressed: CompressorCache | None
    index: CompressorCache | None


class Attention:
    """Attention of one layer; its kind follows from the layer's compression ratio: 0, 4 or 128."""

    def __init__(self, weights: Weights, config: Config, layer: int) -> None:
        self.weights, self.config, self.layer = weights, config, layer
        self.ratio = config.compress_ratios[layer]
        self.rope = Rope(config, compressed=self.ratio != 0)
        self.compressor = self.indexer = None
        if self.ratio:
            shape = Windows(self.ratio, config.head_dim)
            self.compressor = Compressor(weights, config, f"blk.{layer}.attn_compressor", shape, self.rope)
        if self.ratio == OVERLAPPING_RATIO:
            self.indexer = Indexer(weights, config, layer, self.rope)

    def new_cache(self) -> AttentionCache:
        """The cache before the first token."""
        return AttentionCache(
            np.empty((0, self.config.head_dim), self.weights.dtype),
            self.compressor.new_cache() if self.compressor else None,
            self.indexer.compressor.new_cache() if self.indexer else None,
        )

    def __call__(self, x: Floats, start: int, cache: AttentionCache, observe: Observer | None = None) -> Floats:
        """Tokens `start` .. with layer inputs `x` [S, D]; returns [S, D]."""
        c, w, blk, eps = self.config, self.weights, f"blk.{self.layer}", self.config.rms_norm_eps
        S, H, d = len(x), c.num_attention_heads, c.head_dim
        positions = start + np.arange(S)

        qr = rms(w.matmul(f"{blk}.attn_q_a.weight", x), eps) * w.vector(f"{blk}.attn_q_a_norm.weight")   # [S, q_lora]
        q = rms(w.matmul(f"{blk}.attn_q_b.weight", qr).reshape(S, H, d), eps)
        q = self.rope.rotate(q, positions)                                                               # [S, H, d]
        k = rms(w.matmul(f"{blk}.attn_kv.weight", x), eps) * w.vector(f"{blk}.attn_kv_a_norm.weight")
        keys = np.concatenate((cache.window, self.rope.rotate(k, positions)))            # [<= window - 1 + S, d]
        first = start - len(cache.window)                                                # position of keys[0]
        cache.window = keys[max(0, len(keys) - c.sliding_window + 1) :].copy()

        rows = keys[:0]                                                                  # [T, d]
        if self.compressor and cache.compressed:
            rows = self.compressor.extend(x, start, cache.compressed)
        index = None
        if self.indexer and cache.index:
            index = self.indexer.prepare(x, qr, start, cache.index)

        o = np.empty((S, H, d), w.dtype)
        n_seen = min(len(keys), c.sliding_window + S) + len(rows)
        block = max(1, min(S, MAX_SCORES // (n_seen * max(H, c.index_n_heads))))
        for a in range(0, S, block):
            b = min(S, a + block)
            low = max(0, positions[a] - c.sliding_window + 1 - first)
            chosen = index.choose(a, b, observe) if index is not None else None
            window = keys[low : positions[b - 1] + 1 - first]
            o[a:b] = self._attend(q[a:b], positions[a:b], (window, first + low), (rows, chosen))
        o = self.rope.rotate(o, positions, inverse=True)

        o = o.reshape(S, c.o_groups, -1)                                                 # [S, G, H d / G]
        n = c.o_lora_rank
        z = w.matmul_all([(f"{blk}.attn_output_a.weight", o[:, g], (g * n, g * n + n)) for g in range(c.o_groups)])
        return w.matmul(f"{blk}.attn_output_b.weight", np.concatenate(z, axis=1))

    def _attend(
        self, q: Floats, positions: NDArray[np.int64], window: tuple[Floats, int],
        compressed: tuple[Floats, NDArray[np.int64] | None],
    ) -> Floats:
        """Answer queries [B, H, d] at `positions` [B]; returns [B, H, d].

        `window` is keys [n, d] and the position of the first; `compressed` is rows [T, d] and the numbers [B, k] of
        those that each query may see, or None for all.
        """
        (keys, first), (rows, chosen) = window, compressed
        B, d = len(q), self.config.head_dim
        scale, minus_infinity = d ** -0.5, -np.inf
        age = positions[:, None] - (first + np.arange(len(keys)))                        # [B, n]
        in_window = (age >= 0) & (age < self.config.sliding_window)
        scores = [np.where(in_window[:, None, :], multiply(q, keys) * scale, minus_infinity)]   # [B, H, n]
        if len(rows):
            n_visible = (positions[:, None] + 1) // self.ratio                           # [B, 1]
            if chosen is None:
                numbers, row_scores = np.arange(len(rows)), multiply(q, rows)            # [T], [B, H, T]
            else:
                numbers, picked = chosen, rows[chosen]                                   # [B, k], [B, k, d]
                row_scores = np.stack([multiply(*pair) for pair in zip(q, picked, strict=True)])   # [B, H, k]
            visible = np.broadcast_to(numbers < n_visible, (B, row_scores.shape[2]))
            scores.append(np.where(visible[:, None, :], row_scores * scale, minus_infinity))
        sink = self.weights.vector(f"blk.{self.layer}.attn_sinks.weight")                # [H]
        weights = softmax_with_sink(np.concatenate(scores, axis=2), sink)                # [B, H, n + T or k]
        n = len(keys)
        o = multiply(weights[:, :, :n], keys.T)                                          # a key is its own value
        if len(rows) and chosen is None:
            o += multiply(weights[:, :, n:], rows.T)
        elif len(rows):
            o += np.stack([multiply(p, own.T) for p, own in zip(weights[:, :, n:], picked, strict=True)])
        return o


class Indexer:
    """Chooses which compressed rows a token of a ratio-4 layer attends to."""

    def __init__(self, weights: Weights, config: Config, layer: int, rope: Rope) -> None:
        self.weights, self.config, self.layer, self.rope = weights, config, layer, rope
        shape = Windows(OVERLAPPING_RATIO, config.index_head_dim)
        self.compressor = Compressor(weights, config, f"blk.{layer}.indexer_compressor", shape, rope)

    def prepare(self, x: Floats, qr: Floats, start: int, cache: CompressorCache) -> PreparedIndex | None:
        """Take in tokens `start` .. from layer inputs [S, D] and query ranks [S, q_lora].

        None as long as there are no more rows than every token may keep: then it has nothing to choose.
        """
        c, w, blk = self.config, self.weights, f"blk.{self.layer}"
        rows = self.compressor.extend(x, start, cache)                                   # [T, width]
        if len(rows) <= c.index_topk:
            w.show_inputs(f"{blk}.indexer.attn_q_b.weight", qr)
            w.show_inputs(f"{blk}.indexer.proj.weight", x)
            return None
        S, H, width = len(x), c.index_n_heads, c.index_head_dim
        positions = start + np.arange(S)
        q = w.matmul(f"{blk}.indexer.attn_q_b.weight", qr).reshape(S, H, width)
        q = self.rope.rotate(q, positions)
        head_weights = w.matmul(f"{blk}.indexer.proj.weight", x) * (width ** -0.5 * H ** -0.5)   # [S, H]
        n_visible = (positions + 1) // OVERLAPPING_RATIO
        return PreparedIndex(q, head_weights, rows, n_visible, c.index_topk, self.layer)


@dataclass(frozen=True)
class PreparedIndex:
    """Index queries [S, H, width], head weights [S, H], rows [T, width], and how many rows each token sees [S]."""

    q: Floats
    head_weights: Floats
    rows: Floats
    n_visible: NDArray[np.int64]
    top_k: int
    layer: int

    def choose(self, a: int, b: int, observe: Observer | None) -> NDArray[np.int64]:
        """Row numbers [B, top_k] for tokens a .. b - 1, the best first; of equal scores the lower number.

        Where a token sees fewer rows than `top_k`, numbers of invisible rows fill the end.
        """
        dots = np.maximum(multiply(self.q[a:b], self.rows), 0)                           # [B, H, T]
        scores = np.einsum("bh,bht->bt", self.head_weights[a:b], dots)
        scores[np.arange(len(self.rows)) >= self.n_visible[a:b, None]] = -np.inf
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, : self.top_k]
        if observe is not None:
            observe("index_scores", self.layer, scores)
        return chosen
