"""What re-routing changes in compute: experts visited, and about how many parameters a token passes through."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from dsv4tools.checkpoint.checkpoint import ROUTING_TABLE
from dsv4tools.checkpoint.matrix import scale_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.gguf.header import TensorInfo

_PACKED_PAIRS = frozenset({"I8", "U8"})   # two FP4 values in each byte, where the tensor has scales


@dataclass(frozen=True, slots=True)
class Effect:
    """What changes for each token.

    Attributes
    ----------
    experts_before, experts_after:
        Routed experts that a token visits in each layer.
    n_experts:
        Routed experts in each layer.
    hash_layers:
        Layers whose experts are looked up in a table, which was cut.
    scored_layers:
        Layers that choose their best-scored experts at run time: nothing is stored for them.
    active_before, active_after:
        Parameters that a token passes through: all but the experts that it does not visit, the embedding (of which it
        reads one row) and draft blocks.
    """

    experts_before: int
    experts_after: int
    n_experts: int
    hash_layers: tuple[int, ...]
    scored_layers: int
    active_before: int
    active_after: int


def measure_effect(
    counts: tuple[int, int], experts: tuple[int, int, int], hash_layers: Iterable[int], n_layers: int
) -> Effect:
    """The effect on a model of `counts` (parameters outside the routed experts, parameters of all routed experts).

    `experts` are those per token before and after, and those per layer.
    """
    common, routed = counts
    before, after, n_experts = experts
    hashed = tuple(sorted(hash_layers))
    return Effect(before, after, n_experts, hashed, n_layers - len(hashed), common + routed * before // n_experts,
                  common + routed * after // n_experts)


def count_checkpoint(checkpoint: Checkpoint) -> tuple[int, int]:
    """Parameters of a checkpoint outside its routed experts, and in all of them; without embedding and draft blocks."""
    tensors = checkpoint.tensors
    scales = {scale_name(name) for name in tensors if name.endswith(".weight")}
    common = routed = 0
    for name, t in tensors.items():
        if name == "embed.weight" or name.startswith("mtp.") or name in scales or ROUTING_TABLE.fullmatch(name):
            continue
        packed = t.dtype in _PACKED_PAIRS and scale_name(name) in tensors
        n = prod(t.shape) * (2 if packed else 1)
        if ".ffn.experts." in name:
            routed += n
        else:
            common += n
    return common, routed


def count_gguf(tensors: Iterable[TensorInfo]) -> tuple[int, int]:
    """The same for the tensors of a GGUF."""
    common = routed = 0
    for t in tensors:
        if t.name == "token_embd.weight" or t.format.name == "I32":
            continue
        if "_exps." in t.name:
            routed += prod(t.ne)
        else:
            common += prod(t.ne)
    return common, routed
