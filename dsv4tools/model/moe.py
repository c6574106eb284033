"""Mixture of experts: routing by token id or by score, the routed experts, and the shared one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.model.functions import clamped_swiglu, sigmoid, softmax

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dsv4tools.checkpoint import Config
    from dsv4tools.model.functions import Floats
    from dsv4tools.model.observe import Observer
    from dsv4tools.model.weights import Weights

# config.json's scoring_func -> the score of each expert from the router's output [S, E].
SCORES: dict[str, Callable[[Floats], Floats]] = {
    "sqrtsoftplus": lambda m: np.sqrt(np.logaddexp(m, 0)),
    "sigmoid": sigmoid,
    "softmax": lambda m: softmax(m, axis=1),
}


class MoE:
    """The feed-forward half of one layer."""

    def __init__(self, weights: Weights, config: Config, layer: int) -> None:
        self.weights, self.config, self.layer = weights, config, layer

    def __call__(self, x: Floats, tokens: NDArray[np.int64], observe: Observer | None = None) -> Floats:
        """Layer inputs [S, D] of `tokens` [S]; returns [S, D]."""
        experts, shares = self.route(x, tokens, observe)                                 # [S, K], [S, K]
        blk, limit, w = f"blk.{self.layer}", self.config.swiglu_limit, self.weights
        gate, up = (w.matmul(f"{blk}.ffn_{name}_shexp.weight", x) for name in ("gate", "up"))
        y = w.matmul(f"{blk}.ffn_down_shexp.weight", clamped_swiglu(gate, up, limit))
        used = np.unique(experts)                                                        # in this order they are summed
        share = [np.where(experts == e, shares, 0).sum(axis=1) for e in used]            # [S] each, mostly zeros
        chosen = [np.flatnonzero(s) for s in share]                                      # the tokens that chose it
        for token, s, out in zip(chosen, share, self._experts(used, [x[token] for token in chosen]), strict=True):
            y[token] += s[token, None] * out
        return y

    def route(
        self, x: Floats, tokens: NDArray[np.int64], observe: Observer | None = None
    ) -> tuple[NDArray[np.int64], Floats]:
        """Ids of the experts of each token, and their weights in the sum: [S, K] each."""
        c, w, blk = self.config, self.weights, f"blk.{self.layer}"
        scores = SCORES[c.scoring_func](w.matmul(f"{blk}.ffn_gate_inp.weight", x))       # [S, E]
        if c.is_hash_layer(self.layer):
            experts = w.ids(f"{blk}.ffn_gate_tid2eid.weight", tokens, c.n_routed_experts)
        else:
            biased = scores + w.vector(f"{blk}.exp_probs_b.bias")   # the bias chooses, it does not weigh
            experts = np.argsort(-biased, axis=1, kind="stable")[:, : c.num_experts_per_tok]
            if observe is not None:
                observe("router_scores", self.layer, biased)
        if observe is not None:
            observe("experts", self.layer, experts)
        shares = np.take_along_axis(scores, experts, axis=1)
        if c.norm_topk_prob:
            shares = shares / shares.sum(axis=1, keepdims=True)
        return experts, shares * c.routed_scaling_factor

    def _experts(self, used: NDArray[np.int64], x: list[Floats]) -> list[Floats]:
        """Routed experts by number, each on the tokens that chose it: [n, D] -> [n, D] for each."""
        c, w, blk = self.config, self.weights, f"blk.{self.layer}"

        def rows_of(expert: int, n: int) -> tuple[int, int]:
            return expert * n, expert * n + n

        inner = [(int(e), v) for e, v in zip(used, x, strict=True)]
        gates, ups = (
            w.matmul_all([(f"{blk}.ffn_{name}_exps.weight", v, rows_of(e, c.moe_intermediate_size)) for e, v in inner])
            for name in ("gate", "up")
        )
        hidden = [clamped_swiglu(gate, up, c.swiglu_limit) for gate, up in zip(gates, ups, strict=True)]
        return w.matmul_all([(f"{blk}.ffn_down_exps.weight", h, rows_of(int(e), c.hidden_size))
                             for e, h in zip(used, hidden, strict=True)])                # h: [n, expert width]
