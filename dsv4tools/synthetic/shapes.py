"""The structural numbers of a DeepSeek-V4 model, and the config.json that states them.

Values of the presets: config.json of deepseek-ai/DeepSeek-V4-Flash, -V4-Flash-0731 and -V4-Pro.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from dsv4tools.errors import UsageError

ROPE_DIMS = 64
FP4_GROUP = 32
"""Columns that share one scale byte in a packed FP4 matrix."""

_EXPERT_DTYPES = ("fp4", "fp8", None)
_DRAFTS = ("mtp", "dspark")
_COUNTS_FROM_ZERO = frozenset({"hash_layers", "draft_blocks"})


@dataclass(frozen=True, slots=True)
class Shape:
    """Every structural number of a checkpoint. The defaults make a model of a few MB with all parts of the real one.

    Raises UsageError for numbers that the published layout cannot hold.

    Attributes
    ----------
    layers, hidden, vocab:
        Transformer layers, width of the residual stream, rows of the embedding.
    heads, head_dim, q_lora, o_groups, o_lora:
        Attention: query heads, their width, rank of the query projection, groups and rank of the output projection.
    experts, experts_per_token, expert_hidden:
        Routed experts, how many of them a token visits, width of one expert.
    hash_layers:
        Layers, counted from the first, that route by token id (``tid2eid``) and not by score.
    lead_ratios:
        Compression ratios of the first layers; behind them even layers have 4 and odd layers 128. Ratios are 0, 4, 128.
    index_heads, index_head_dim, index_topk:
        The indexer of the ratio-4 layers.
    draft, draft_blocks:
        What ``mtp.*`` holds: ``"mtp"`` blocks (any number) or the three stages of ``"dspark"`` (release 0731).
    draft_rank:
        Rank of the Markov head of a ``"dspark"`` draft.
    expert_dtype:
        As in config.json: ``"fp4"``; ``"fp8"`` stores experts like every other matrix; None is FP4 with the key absent,
        as the first release had it.
    fp8_block:
        Rows and columns that share one scale byte in an FP8 matrix.
    merges:
        Merges of the tokenizer: a count, or None for those of a few dozen common words.
    """

    layers: int = 6
    hidden: int = 256
    vocab: int = 512
    heads: int = 8
    head_dim: int = 128
    q_lora: int = 256
    o_groups: int = 4
    o_lora: int = 128
    experts: int = 8
    experts_per_token: int = 2
    expert_hidden: int = 256
    hash_layers: int = 3
    lead_ratios: tuple[int, ...] = (0, 0)
    index_heads: int = 16
    index_head_dim: int = 128
    index_topk: int = 16
    window: int = 128
    route_scale: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    draft: str = "mtp"
    draft_blocks: int = 1
    draft_rank: int = 256
    expert_dtype: str | None = "fp4"
    fp8_block: tuple[int, int] = (128, 128)
    merges: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in _COUNTS_FROM_ZERO else 1
            if field.type == "int" and (type(value) is not int or value < least):
                raise UsageError(f"shape, {field.name}", f"found {value!r}, expected a whole number from {least} up")
        self._require(self.hidden % FP4_GROUP == 0, "hidden", f"a multiple of {FP4_GROUP}")
        self._require(self.expert_hidden % FP4_GROUP == 0, "expert_hidden", f"a multiple of {FP4_GROUP}")
        self._require(self.head_dim >= ROPE_DIMS, "head_dim", f"at least the {ROPE_DIMS} rotary dimensions")
        self._require(self.index_head_dim >= ROPE_DIMS, "index_head_dim", f"at least the {ROPE_DIMS} rotary dimensions")
        self._require(self.heads * self.head_dim % self.o_groups == 0, "o_groups", "a divisor of heads * head_dim")
        self._require(self.experts_per_token <= self.experts, "experts_per_token", f"at most {self.experts} experts")
        self._require(self.hash_layers <= self.layers, "hash_layers", f"at most {self.layers} layers")
        self._require(set(self.lead_ratios) <= {0, 4, 128}, "lead_ratios", "ratios 0, 4 and 128")
        self._require(self.expert_dtype in _EXPERT_DTYPES, "expert_dtype", f"one of {_EXPERT_DTYPES}")
        self._require(self.draft in _DRAFTS, "draft", f"one of {_DRAFTS}")
        self._require(self.draft != "dspark" or self.draft_blocks == 3, "draft_blocks", "3 for a dspark draft")
        self._require(
            len(self.fp8_block) == 2 and all(type(n) is int and n > 0 for n in self.fp8_block),
            "fp8_block", "two positive whole numbers",
        )  # fmt: skip

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise UsageError(f"shape, {name}", f"found {getattr(self, name)!r}, expected {expected}")

    @property
    def ratios(self) -> tuple[int, ...]:
        """Compression ratio of each layer: 0, 4 or 128."""
        lead = self.lead_ratios[: self.layers]
        return lead + tuple(4 if i % 2 == 0 else 128 for i in range(len(lead), self.layers))


TINY = Shape()

FLASH = Shape(
    layers=43, hidden=4096, vocab=129_280, heads=64, head_dim=512, q_lora=1024, o_groups=8, o_lora=1024,
    experts=256, experts_per_token=6, expert_hidden=2048, index_heads=64, index_topk=512,
    expert_dtype=None, merges=127_741,
)  # fmt: skip

FLASH_0731 = Shape(
    layers=43, hidden=4096, vocab=129_280, heads=64, head_dim=512, q_lora=1024, o_groups=8, o_lora=1024,
    experts=256, experts_per_token=6, expert_hidden=2048, index_heads=64, index_topk=512,
    expert_dtype="fp4", merges=127_741, draft="dspark", draft_blocks=3,
)  # fmt: skip

PRO = Shape(
    layers=61, hidden=7168, vocab=129_280, heads=128, head_dim=512, q_lora=1536, o_groups=16, o_lora=1024,
    experts=384, experts_per_token=6, expert_hidden=3072, index_heads=64, index_topk=1024,
    lead_ratios=(128, 128), route_scale=2.5, merges=127_741,
)  # fmt: skip


def make_config(shape: Shape) -> dict[str, Any]:
    """config.json of a checkpoint of `shape`, its keys in the published order."""
    config: dict[str, Any] = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": shape.expert_dtype,
        "hc_eps": 1e-06,
        "hc_mult": shape.hc_mult,
        "hc_sinkhorn_iters": 20,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "index_head_dim": shape.index_head_dim,
        "index_n_heads": shape.index_heads,
        "index_topk": shape.index_topk,
        "initializer_range": 0.02,
        "max_position_embeddings": 1_048_576,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": shape.expert_hidden,
        "n_routed_experts": shape.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.experts_per_token,
        "num_hidden_layers": shape.layers,
        "num_hash_layers": shape.hash_layers,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": shape.draft_blocks if shape.draft == "mtp" else 1,
        "o_groups": shape.o_groups,
        "o_lora_rank": shape.o_lora,
        "q_lora_rank": shape.q_lora,
        "qk_rope_head_dim": ROPE_DIMS,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": list(shape.fp8_block),
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65_536,
            "type": "yarn",
        },
        "rope_theta": 10_000,
        "routed_scaling_factor": shape.route_scale,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": shape.window,
        "swiglu_limit": shape.swiglu_limit,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": shape.vocab,
        "compress_rope_theta": 160_000,
        "compress_ratios": [*shape.ratios, *[0] * shape.draft_blocks],
    }
    if shape.expert_dtype is None:
        del config["expert_dtype"]
    if shape.draft == "dspark":
        config["dspark_block_size"] = 5
        config["dspark_noise_token_id"] = min(128_799, shape.vocab - 1)
        config["dspark_target_layer_ids"] = list(range(shape.layers))[-3:]
        config["dspark_markov_rank"] = shape.draft_rank
    return config
