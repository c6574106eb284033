"""DeepSeek-V4's forward pass in plain floating point: what a checkpoint or a GGUF computes, without any engine.

Written from DeepSeek's inference/model.py and the V4 report; rounding of activations, which their GPU code does and
each engine does differently, is not imitated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from dsv4tools.errors import InputError, UsageError
from dsv4tools.model.attention import Attention, AttentionCache
from dsv4tools.model.functions import rms
from dsv4tools.model.hyper import HyperConnection, merge_streams
from dsv4tools.model.moe import MoE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray

    from dsv4tools.checkpoint import Config
    from dsv4tools.model.functions import Floats
    from dsv4tools.model.observe import Observer
    from dsv4tools.model.weights import Weights

CHUNK = 512   # tokens of a prompt that go through the layers together


@dataclass
class Cache:
    """The state between calls: how many tokens are in it, and what each layer keeps of them."""

    n_tokens: int
    layers: list[AttentionCache]


class Layer:
    """One layer: attention, then mixture of experts, each between hyper-connections."""

    def __init__(self, weights: Weights, config: Config, layer: int) -> None:
        self.weights, self.config, self.name = weights, config, f"blk.{layer}"
        self.around_attention = HyperConnection(weights, config, f"{self.name}.hc_attn")
        self.around_experts = HyperConnection(weights, config, f"{self.name}.hc_ffn")
        self.attention = Attention(weights, config, layer)
        self.experts = MoE(weights, config, layer)

    def __call__(
        self, X: Floats, tokens: NDArray[np.int64], start: int, cache: AttentionCache, observe: Observer | None
    ) -> Floats:
        """Residual streams [S, n, D] of `tokens` [S] at positions `start` .. before and after the layer."""
        X = self.around_attention(X, lambda x: self.attention(self._norm(x, "attn_norm"), start, cache, observe))
        return self.around_experts(X, lambda x: self.experts(self._norm(x, "ffn_norm"), tokens, observe))

    def _norm(self, x: Floats, name: str) -> Floats:
        return rms(x, self.config.rms_norm_eps) * self.weights.vector(f"{self.name}.{name}.weight")


class Model:
    """A model ready to run; made by `open_model`."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.config, self._closed = weights, weights.config, False
        self.layers = [Layer(weights, self.config, layer) for layer in range(self.config.num_hidden_layers)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give threads and files back; may be called twice."""
        self._closed = True
        self.weights.close()

    def new_cache(self) -> Cache:
        """The state before the first token."""
        return Cache(0, [layer.attention.new_cache() for layer in self.layers])

    def forward(
        self, tokens: ArrayLike, cache: Cache | None = None, *, last_only: bool = False, observe: Observer | None = None
    ) -> Floats:
        """Logits [S, vocab] of `tokens` [S], the next ones after those in `cache`; of the last one only if asked so.

        Raises
        ------
        UsageError
            No tokens, an id outside the vocabulary, or the model was closed.
        InputError
            A weight is not finite; names tensor, row and column. Or the numbers grow beyond the arithmetic's range.
        """
        if self._closed:
            raise UsageError("model", "was closed")
        ids = self.check_tokens(tokens)
        cache = self.new_cache() if cache is None else cache
        with np.errstate(all="ignore"):   # what is not finite is found where it can be named
            return self._forward(ids, cache, last_only=last_only, observe=observe)

    def _forward(
        self, ids: NDArray[np.int64], cache: Cache, *, last_only: bool, observe: Observer | None
    ) -> Floats:
        embedded = self.weights.rows("token_embd.weight", ids)                           # [S, D]
        X = np.repeat(embedded[:, None, :], self.config.hc_mult, axis=1)                 # [S, n, D], n equal streams
        if observe is not None:
            observe("streams", -1, X)
        for number, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            X = layer(X, ids, cache.n_tokens, layer_cache, observe)
            if not np.isfinite(X).all():
                raise InputError(f"layer {number}", f"the residual streams grow beyond {X.dtype}",
                                 hint="are the weights damaged?")
            if observe is not None:
                observe("streams", number, X)
        cache.n_tokens += len(ids)
        return self._head(X[-1:] if last_only else X)

    def run(
        self, tokens: ArrayLike, *, chunk: int = CHUNK, observe: Observer | None = None
    ) -> Iterator[Floats]:
        """Logits of a whole prompt, `chunk` tokens at a time: arrays [<= chunk, vocab].

        Nothing of the size S x S is built. Raises what `forward` does.
        """
        ids = self.check_tokens(tokens)
        cache = self.new_cache()
        for first in range(0, len(ids), chunk):
            yield self.forward(ids[first : first + chunk], cache, observe=observe)

    def check_tokens(self, tokens: ArrayLike) -> NDArray[np.int64]:
        """`tokens` as int64 [S]; UsageError unless they are a list of ids of this vocabulary, at least one."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
            raise UsageError("tokens", f"found {ids.dtype} {list(ids.shape)}, expected a list of one or more ids")
        bad = np.flatnonzero((ids < 0) | (ids >= self.config.vocab_size))
        if len(bad):
            raise UsageError("tokens", f"id {ids[bad[0]]} at position {bad[0]}, expected 0 to "
                             f"{self.config.vocab_size - 1}")
        return ids.astype(np.int64)

    def _head(self, X: Floats) -> Floats:
        """Residual streams [S, n, D] -> logits [S, vocab]."""
        x = rms(merge_streams(self.weights, self.config, X), self.config.rms_norm_eps)
        return self.weights.matmul("output.weight", x * self.weights.vector("output_norm.weight"))
