"""DeepSeek-V4's forward pass once more, as formulas over a whole prompt: float64, S x S, no code of dsv4tools.

Written from the V4 report and DeepSeek's inference/model.py, with the checkpoint's own tensor names. Slow and short.
"""

from __future__ import annotations

from math import ceil, floor, log, pi
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from independent import Weights


def rms(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def logistic(x):
    return 1 / (1 + np.exp(-x))


class PaperModel:
    """`logits` [S, vocab] of a prompt; `margins` [S] then holds how close each token came to another top-k choice."""

    def __init__(self, weights: Weights, experts_per_token: int | None = None) -> None:
        self.weights, self.c = weights, weights.config
        self.n_experts = experts_per_token or self.c["num_experts_per_tok"]
        self.made: dict[str, np.ndarray] = {}

    def w(self, name):
        if name not in self.made:
            raw = self.weights.source(name)
            self.made[name] = raw if raw.dtype == np.int64 else raw.astype(np.float64)
        return self.made[name]

    def logits(self, tokens):
        c, eps = self.c, self.c["rms_norm_eps"]
        self.tokens, self.margins = tokens, np.full(len(tokens), np.inf)
        X = np.stack([self.w("embed.weight")[tokens]] * c["hc_mult"], axis=1)
        for layer in range(c["num_hidden_layers"]):
            at = f"layers.{layer}."
            X = self.connect(X, at + "hc_attn", lambda x, at=at, n=layer: self.attention(
                rms(x, eps) * self.w(at + "attn_norm.weight"), at + "attn.", c["compress_ratios"][n]))
            X = self.connect(X, at + "hc_ffn", lambda x, at=at, n=layer: self.moe(
                rms(x, eps) * self.w(at + "ffn_norm.weight"), at + "ffn.", n < c["num_hash_layers"]))
        m = rms(X.reshape(len(X), -1), eps) @ self.w("hc_head_fn").T
        pre = logistic(m * self.w("hc_head_scale")[0] + self.w("hc_head_base")) + c["hc_eps"]
        x = (pre[..., None] * X).sum(1)
        return (rms(x, eps) * self.w("norm.weight")) @ self.w("head.weight").T

    def connect(self, X, name, f):
        n, eps = self.c["hc_mult"], self.c["hc_eps"]
        m = rms(X.reshape(len(X), -1), self.c["rms_norm_eps"]) @ self.w(name + "_fn").T
        s, base = self.w(name + "_scale"), self.w(name + "_base")
        pre = logistic(m[:, :n] * s[0] + base[:n]) + eps
        post = 2 * logistic(m[:, n : 2 * n] * s[1] + base[n : 2 * n])
        e = np.exp(m[:, 2 * n :] * s[2] + base[2 * n :]).reshape(-1, n, n)               # [S, source, destination]
        C = e / e.sum(2)[:, :, None] + eps
        for step in range(2 * self.c["hc_sinkhorn_iters"] - 1):                          # columns, rows, columns ...
            axis = 1 + step % 2
            C = C / (np.expand_dims(C.sum(axis), axis) + eps)
        y = f((pre[..., None] * X).sum(1))
        return post[..., None] * y[:, None] + np.swapaxes(C, 1, 2) @ X

    def angles(self, positions, ratio):
        c, n = self.c, self.c["qk_rope_head_dim"]
        i = np.arange(n // 2)
        if not ratio:
            return np.outer(positions, c["rope_theta"] ** (-2 * i / n))
        base, yarn = c["compress_rope_theta"], c["rope_scaling"]

        def corner(beta):
            return n * log(yarn["original_max_position_embeddings"] / (2 * pi * beta)) / (2 * log(base))

        low, high = max(floor(corner(yarn["beta_fast"])), 0), min(ceil(corner(yarn["beta_slow"])), n - 1)
        ramp = np.clip((i - low) / (high - low), 0, 1)
        f = base ** (-2 * i / n)
        return np.outer(positions, f * (1 - ramp) + f / yarn["factor"] * ramp)

    def rope(self, x, positions, ratio, sign=1):
        """`x` [S, ..., d]: pairs of the last channels as complex numbers."""
        n = self.c["qk_rope_head_dim"]
        z = x[..., -n::2] + 1j * x[..., -n + 1 :: 2]
        turn = np.exp(sign * 1j * self.angles(positions, ratio))
        z = z * turn.reshape(len(x), *[1] * (x.ndim - 2), -1)
        return np.concatenate([x[..., :-n], np.stack([z.real, z.imag], -1).reshape(*x.shape[:-1], n)], -1)

    def attention(self, x, at, ratio):
        c, eps, S = self.c, self.c["rms_norm_eps"], len(x)
        H, d, G = c["num_attention_heads"], c["head_dim"], c["o_groups"]
        t = np.arange(S)
        qr = rms(x @ self.w(at + "wq_a.weight").T, eps) * self.w(at + "q_norm.weight")
        q = self.rope(rms((qr @ self.w(at + "wq_b.weight").T).reshape(S, H, d), eps), t, ratio)
        k = self.rope(rms(x @ self.w(at + "wkv.weight").T, eps) * self.w(at + "kv_norm.weight"), t, ratio)
        allowed = (t[None] <= t[:, None]) & (t[None] > t[:, None] - c["sliding_window"])         # [S, S]
        if ratio:
            rows = self.compress(x, at + "compressor.", ratio, d)
            visible = np.arange(len(rows))[None] < ((t + 1) // ratio)[:, None]                   # [S, T]
            if ratio == 4:
                visible = self.choose(x, qr, at + "indexer.", visible)
            k, allowed = np.concatenate([k, rows]), np.concatenate([allowed, visible], 1)
        scores = np.einsum("shd,kd->hsk", q, k) / d**0.5
        e = np.exp(np.where(allowed, scores, -np.inf))
        p = e / (e.sum(-1, keepdims=True) + np.exp(self.w(at + "attn_sink"))[:, None, None])
        o = self.rope(np.einsum("hsk,kd->shd", p, k), t, ratio, -1).reshape(S, G, -1)
        wo_a = self.w(at + "wo_a.weight").reshape(G, c["o_lora_rank"], -1)
        return np.einsum("sgi,goi->sgo", o, wo_a).reshape(S, -1) @ self.w(at + "wo_b.weight").T

    def compress(self, x, at, ratio, d):
        kv, gate, ape = x @ self.w(at + "wkv.weight").T, x @ self.w(at + "wgate.weight").T, self.w(at + "ape")
        rows = []
        for i in range(len(x) // ratio):
            slots = []
            for j in range(ratio):
                t = i * ratio + j
                slots.append((kv[t, -d:], gate[t, -d:] + ape[j, -d:]))
                if ratio == 4 and i:
                    slots.append((kv[t - 4, :d], gate[t - 4, :d] + ape[j, :d]))
            values, scores = (np.stack(part) for part in zip(*slots, strict=True))
            weights = np.exp(scores - scores.max(0))
            rows.append((weights * values).sum(0) / weights.sum(0))
        if not rows:
            return np.empty((0, d))
        rows = rms(np.stack(rows), self.c["rms_norm_eps"]) * self.w(at + "norm.weight")
        return self.rope(rows, np.arange(len(rows)) * ratio, ratio)

    def choose(self, x, qr, at, visible):
        H, d, k = self.c["index_n_heads"], self.c["index_head_dim"], self.c["index_topk"]
        rows = self.compress(x, at + "compressor.", 4, d)
        q = self.rope((qr @ self.w(at + "wq_b.weight").T).reshape(len(x), H, d), np.arange(len(x)), 4)
        head_weights = x @ self.w(at + "weights_proj.weight").T / (d * H) ** 0.5
        scores = np.einsum("sh,sht->st", head_weights, np.maximum(np.einsum("shd,td->sht", q, rows), 0))
        kept = np.zeros_like(visible)
        for t, seen in enumerate(visible.sum(1)):
            kept[t, self.best(t, scores[t, :seen], k)] = True
        return kept

    def best(self, t, scores, k):
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        if len(order) > k:
            self.margins[t] = min(self.margins[t], scores[order[k - 1]] - scores[order[k]])
        return order[:k]

    def moe(self, x, at, hashed):
        limit, scores = self.c["swiglu_limit"], np.sqrt(np.log1p(np.exp(x @ self.w(at + "gate.weight").T)))

        def expert(name, v):
            gate, up = v @ self.w(at + name + ".w1.weight").T, v @ self.w(at + name + ".w3.weight").T
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            return (gate * logistic(gate) * up) @ self.w(at + name + ".w2.weight").T

        shares = np.zeros_like(scores)
        for t, s in enumerate(scores):
            chosen = self.w(at + "gate.tid2eid")[self.tokens[t]][: self.n_experts] if hashed else \
                self.best(t, s + self.w(at + "gate.bias"), self.n_experts)
            shares[t, chosen] = self.c["routed_scaling_factor"] * s[chosen] / s[chosen].sum()
        y = expert("shared_experts", x)
        for e in range(scores.shape[1]):
            mine = shares[:, e] > 0
            y[mine] += shares[mine, e, None] * expert(f"experts.{e}", x[mine])
        return y

    def sound(self, smallest=1e-4):
        """How many positions come before the first near-tie: behind it rounding may have chosen otherwise."""
        close = np.flatnonzero(self.margins < smallest)
        return int(close[0]) if len(close) else len(self.margins)
