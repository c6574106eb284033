"""Comparing two models on the same tokens: their logits, what they choose, and the layer where they part.

A and B may be any two of checkpoint, re-routed view and GGUF. Both run side by side, a chunk at a time, so that neither
logits nor residual streams of a whole prompt are held.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from dsv4tools.model import Model

CHUNK = 128        # tokens that go through both models before they are compared
ROUNDING = 1024    # streams that differ by less than this many units of rounding differ by rounding
TOP = 5


@dataclass(frozen=True)
class Agreement:
    """How the logits of two models differ, position by position: arrays [S].

    Attributes
    ----------
    kl:
        Kullback-Leibler divergence of B's next-token distribution from A's, in nats.
    max_difference, mean_difference:
        Over the vocabulary, of ``abs(logits A - logits B)``.
    same_top:
        Whether both find the same token most likely.
    common_top:
        Share of A's 5 most likely tokens that are among B's.
    """

    kl: NDArray[np.float64]
    max_difference: NDArray[np.float64]
    mean_difference: NDArray[np.float64]
    same_top: NDArray[np.bool_]
    common_top: NDArray[np.float64]


@dataclass
class PromptComparison:
    """One prompt: its agreement, and the surprise of both models at each token but the first, in nats [S - 1]."""

    tokens: NDArray[np.int64]
    agreement: Agreement
    surprise_a: NDArray[np.float64]
    surprise_b: NDArray[np.float64]


@dataclass
class LayerComparison:
    """One layer over all prompts.

    Attributes
    ----------
    layer, ratio:
        Its number and its compression ratio.
    difference:
        The largest, over all tokens, of rms(streams A - streams B) / rms(streams A) after the layer.
    routing:
        Share of the chosen experts that both models chose, of as many as the one that chooses fewer does.
    """

    layer: int
    ratio: int
    difference: float = 0.0
    n_common: int = 0
    n_chosen: int = 0

    @property
    def routing(self) -> float:
        """See above."""
        return self.n_common / self.n_chosen if self.n_chosen else 1.0


@dataclass
class Comparison:
    """The result of `compare`. `layers` is empty where they were not asked for."""

    prompts: list[PromptComparison]
    layers: list[LayerComparison] = field(default_factory=list)
    rounding: float = 0.0

    def all(self, name: str) -> NDArray[Any]:
        """A field of `Agreement` over all positions of all prompts."""
        return np.concatenate([getattr(p.agreement, name) for p in self.prompts])

    @property
    def mean_kl(self) -> float:
        """Over all positions."""
        return float(self.all("kl").mean())

    def perplexity(self, side: str) -> float | None:
        """Of model ``"a"`` or ``"b"`` on the prompts; None where no token follows another."""
        surprise = np.concatenate([getattr(p, f"surprise_{side}") for p in self.prompts])
        return float(np.exp(surprise.mean())) if len(surprise) else None

    @property
    def parting_layer(self) -> int | None:
        """The first layer after which the residual streams differ by more than rounding."""
        return next((entry.layer for entry in self.layers if entry.difference > self.rounding), None)


def compare_logits(a: NDArray[Any], b: NDArray[Any]) -> Agreement:
    """How logits `b` [S, vocab] differ from `a` [S, vocab]; computed in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    log_a, log_b = log_softmax(a), log_softmax(b)
    difference = np.abs(a - b)
    best_a, best_b = (np.argsort(-x, axis=1, kind="stable")[:, :TOP] for x in (a, b))
    common = (best_a[:, :, None] == best_b[:, None, :]).any(axis=2).mean(axis=1)
    # Rounding may leave a divergence of two nearly equal distributions a hair below zero.
    kl = np.maximum(np.sum(np.exp(log_a) * (log_a - log_b), axis=1), 0.0)
    return Agreement(kl, difference.max(axis=1), difference.mean(axis=1), best_a[:, 0] == best_b[:, 0], common)


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log probabilities, over the last axis."""
    shifted: NDArray[np.float64] = logits - logits.max(axis=-1, keepdims=True)
    total: NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted - total


def compare(
    a: Model, b: Model, prompts: Sequence[ArrayLike], *, layers: bool = False, chunk: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Run two models on `prompts` (lists of token ids) and compare them.

    Parameters
    ----------
    a, b:
        The models. Their vocabularies must be of one size; with `layers` also their layers and widths.
    layers:
        Also compare residual streams and routing, layer by layer.
    chunk:
        How many tokens go through both at a time.
    progress:
        Called with the number of tokens done since the last call.

    Raises
    ------
    UsageError
        No prompts, no tokens in one, or an id outside the vocabulary.
    InputError
        The models cannot be compared, or a weight is not finite.
    """
    if not prompts:
        raise UsageError("prompts", "there are none to compare on")
    _check_comparable(a, b, layers=layers)
    watch = _LayerWatch(a, b) if layers else None
    done = [_compare_prompt((a, b), np.asarray(prompt), watch, chunk, progress) for prompt in prompts]
    epsilon = max(np.finfo(a.weights.dtype).eps, np.finfo(b.weights.dtype).eps)
    return Comparison(done, watch.layers if watch else [], float(ROUNDING * epsilon))


def _check_comparable(a: Model, b: Model, *, layers: bool) -> None:
    names = ["vocab_size", *(["num_hidden_layers", "hidden_size", "hc_mult"] if layers else [])]
    for name in names:
        of_a, of_b = getattr(a.config, name), getattr(b.config, name)
        if of_a != of_b:
            raise InputError("A and B", f"differ in {name}: {of_a} and {of_b}",
                             hint="they are no versions of one model")


def _compare_prompt(
    models: tuple[Model, Model], tokens: NDArray[Any], watch: _LayerWatch | None, chunk: int,
    progress: Callable[[int], None] | None,
) -> PromptComparison:
    a, b = models
    parts: list[Agreement] = []
    surprises: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    caches = a.new_cache(), b.new_cache()
    for first in range(0, max(1, tokens.size), chunk):
        part = tokens[first : first + chunk]
        logits_a = a.forward(part, caches[0], observe=watch.see_a if watch else None)
        logits_b = b.forward(part, caches[1], observe=watch.see_b if watch else None)
        parts.append(compare_logits(logits_a, logits_b))
        following = tokens[first + 1 : first + 1 + len(part)]
        rows = np.arange(len(following))
        surprises.append((-log_softmax(logits_a[rows].astype(np.float64))[rows, following],
                          -log_softmax(logits_b[rows].astype(np.float64))[rows, following]))
        if progress is not None:
            progress(len(part))
    agreement = Agreement(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Agreement)))
    of_a, of_b = (np.concatenate(side) for side in zip(*surprises, strict=True))
    return PromptComparison(tokens.astype(np.int64), agreement, of_a, of_b)


class _LayerWatch:
    """Keeps what A showed of a chunk until B has shown the same."""

    def __init__(self, a: Model, b: Model) -> None:
        config = a.config
        self.layers = [LayerComparison(n, config.compress_ratios[n]) for n in range(config.num_hidden_layers)]
        self._n_chosen = min(a.config.num_experts_per_tok, b.config.num_experts_per_tok)
        self._seen: dict[tuple[str, int], NDArray[Any]] = {}

    def see_a(self, what: str, layer: int, array: NDArray[Any]) -> None:
        if what in ("streams", "experts"):
            self._seen[what, layer] = array.copy()

    def see_b(self, what: str, layer: int, array: NDArray[Any]) -> None:
        if what not in ("streams", "experts") or layer < 0:
            return
        entry, of_a = self.layers[layer], self._seen.pop((what, layer))
        if what == "experts":
            entry.n_common += sum(len(set(x) & set(y)) for x, y in zip(of_a.tolist(), array.tolist(), strict=True))
            entry.n_chosen += len(array) * self._n_chosen
            return
        square = np.mean((of_a - array) ** 2, axis=(1, 2)) / np.mean(of_a**2, axis=(1, 2))
        entry.difference = max(entry.difference, float(np.sqrt(square.max())))
