"""Where a tensor stands in the model, from its name: its layer, its role there, and the family of roles."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

_IN_LAYER = re.compile(r"blk\.([0-9]{1,6})\.(.+)", re.DOTALL)

# The first pattern that matches a role decides.
_FAMILIES = (
    ("routed experts", ("ffn_*_exps",)),
    ("shared expert", ("ffn_*_shexp",)),
    ("router", ("ffn_gate_inp", "ffn_gate_tid2eid", "exp_probs_b.bias")),
    ("embedding and output", ("token_embd", "output")),
    ("hyper-connections", ("hc_*", "output_hc_*")),
    ("indexer", ("indexer*",)),
    ("norms", ("*_norm",)),
    ("attention", ("attn_*",)),
    ("other", ("*",)),
)
FAMILIES = tuple(family for family, _ in _FAMILIES)


def place_of(name: str) -> tuple[int | None, str]:
    """Layer (None for tensors of the whole model) and role: ``blk.3.attn_kv.weight`` is ``(3, "attn_kv")``."""
    match = _IN_LAYER.fullmatch(name)
    layer, role = (int(match[1]), match[2]) if match else (None, name)
    return layer, role.removesuffix(".weight")


def family_of(name: str) -> str:
    """One of `FAMILIES`."""
    _, role = place_of(name)
    return next(family for family, patterns in _FAMILIES if any(fnmatchcase(role, p) for p in patterns))
