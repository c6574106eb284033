"""Fewer experts per token: a view of a checkpoint, used by `convert --experts-per-token` and by re-routing alike."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dsv4tools.checkpoint.checkpoint import ROUTING_TABLE
from dsv4tools.errors import UsageError

if TYPE_CHECKING:
    from dsv4tools.checkpoint import Checkpoint


def reroute(checkpoint: Checkpoint, experts_per_token: int) -> Checkpoint:
    """A view of `checkpoint` in which each token uses `experts_per_token` experts.

    The config value changes and each ``tid2eid`` table [vocabulary, experts per token] shows its first columns;
    layers without a table choose their best experts at run time and need no change.

    Raises
    ------
    UsageError
        More experts than the checkpoint routes to (its tables have no further columns), or fewer than one.
    """
    config = checkpoint.config
    have = config.num_experts_per_tok
    if not 1 <= experts_per_token <= have:
        raise UsageError("--experts-per-token", f"is {experts_per_token}, the checkpoint routes each token to {have}: "
                         f"its tid2eid tables have no further columns", hint=f"choose 1 to {have}")
    if experts_per_token == have:
        return checkpoint
    tensors = {
        name: replace(t, shape=(t.shape[0], experts_per_token), stored_columns=t.stored_columns or t.shape[1])
        if ROUTING_TABLE.fullmatch(name) else t
        for name, t in checkpoint.tensors.items()
    }
    return replace(checkpoint, config=replace(config, num_experts_per_tok=experts_per_token), tensors=tensors)
