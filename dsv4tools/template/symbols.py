"""The sizes that tensor shapes are made of: one table from the words of the template files to config values."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsv4tools.checkpoint.config import Config

# The words that a shape in a template file may use.
SYMBOLS = frozenset({
    "one", "three", "vocab", "hidden", "streams", "streams_hidden", "stream_mix", "heads", "head_width", "q_rank",
    "q_width", "group_width", "output_ranks", "index_heads", "index_width", "index_q_width", "experts", "experts_used",
    "expert_width", "shared_width", "ratio", "compressor_width", "index_compressor_width",
})


def model_sizes(c: Config) -> dict[str, int]:
    """Symbol -> size, for everything that is the same in all layers."""
    return {
        "one": 1,
        "three": 3,                                              # a gain each for pre, post and combination
        "vocab": c.vocab_size,
        "hidden": c.hidden_size,
        "streams": c.hc_mult,
        "streams_hidden": c.hc_mult * c.hidden_size,
        "stream_mix": (2 + c.hc_mult) * c.hc_mult,               # pre, post and the square that mixes the streams
        "heads": c.num_attention_heads,
        "head_width": c.head_dim,
        "q_rank": c.q_lora_rank,
        "q_width": c.num_attention_heads * c.head_dim,
        "group_width": c.num_attention_heads * c.head_dim // c.o_groups,
        "output_ranks": c.o_groups * c.o_lora_rank,
        "index_heads": c.index_n_heads,
        "index_width": c.index_head_dim,
        "index_q_width": c.index_n_heads * c.index_head_dim,
        "experts": c.n_routed_experts,
        "experts_used": c.num_experts_per_tok,
        "expert_width": c.moe_intermediate_size,
        "shared_width": c.n_shared_experts * c.moe_intermediate_size,
    }


def layer_sizes(c: Config, layer: int, overlaps: Mapping[int, int]) -> dict[str, int]:
    """Symbol -> size, for what depends on the layer's compression; `overlaps` is the template's compression table."""
    ratio = c.compress_ratios[layer]
    return {
        "ratio": ratio,
        "compressor_width": overlaps[ratio] * c.head_dim,
        "index_compressor_width": overlaps[ratio] * c.index_head_dim,
    }
