"""config.json, typed and total: every structural number is read from it, none has a default.

A missing, mistyped or contradictory value stops with its key. Keys and meanings: DeepSeek's published config.json
(the raw file: transformers rewrites it on save, which drops keys that a conversion needs).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dsv4tools.checkpoint.strict_json import read_json_object, shown
from dsv4tools.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ARCHITECTURE = "DeepseekV4ForCausalLM"
MAX_INTEGER = (1 << 31) - 1
# A list of all tokens is made before a tensor is looked at: a false size must not become an attack on memory.
_AT_MOST = {"vocab_size": 1 << 22}
# Numbers are written as float32: what that cannot hold would be written as 0 or infinity.
_LEAST_FLOAT32, _LARGEST_FLOAT32 = 2.0**-149, (2 - 2.0**-23) * 2.0**127


@dataclass(frozen=True, slots=True)
class Config:
    """The structural values, each named as its key; a dot in a nested key is an underscore here.

    `weight_block_size` is None where the checkpoint declares no FP8 quantization; `n_group`, `topk_group` and
    `intermediate_size` are None where config.json has no such key, as in the published ones.
    """

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    norm_topk_prob: bool
    scoring_func: str
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling_type: str
    rope_scaling_factor: float
    rope_scaling_original_max_position_embeddings: int
    rope_scaling_beta_fast: float
    rope_scaling_beta_slow: float
    num_nextn_predict_layers: int
    weight_block_size: tuple[int, int] | None
    n_group: int | None
    topk_group: int | None
    intermediate_size: int | None

    def value(self, key: str) -> Any:  # noqa: ANN401  - the keys are of several types
        """The value of a config.json key, nested keys with a dot (``rope_scaling.factor``)."""
        return getattr(self, key.replace(".", "_"))

    def is_hash_layer(self, layer: int) -> bool:
        """Whether the layer's experts are looked up by token id (tid2eid) instead of scored."""
        return layer < self.num_hash_layers


class ConfigReader:
    """Typed access to a JSON object; every failure names file and key.

    `labels` says what a key is called where it came from, for values that were not read from a config.json.
    """

    def __init__(self, raw: dict[str, Any], path: Path, labels: Mapping[str, str] | None = None) -> None:
        self.raw, self.path, self._labels = raw, path, labels or {}

    def fail(self, key: str, found: str, expected: str) -> InputError:
        """The error that names `key`."""
        return InputError(f"{self.path}: key {self._labels.get(key, key)!r}", f"{found}, expected {expected}")

    def get(self, key: str, expected: str) -> Any:  # noqa: ANN401  - checked by the caller
        """The value of `key`, with dots for nested keys."""
        value: Any = self.raw
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise self.fail(key, "is missing", expected)
            value = value[part]
        return value

    def integer(self, key: str, minimum: int = 1) -> int:
        """An integer from `minimum` up."""
        maximum = _AT_MOST.get(key, MAX_INTEGER)
        expected = f"an integer of {minimum} to {maximum:,}"
        value = self.get(key, expected)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.fail(key, f"is {shown(value)}", expected)
        return value

    def optional_integer(self, key: str, minimum: int = 0) -> int | None:
        """An integer from `minimum` up, None where the key is absent or null."""
        return None if self.raw.get(key) is None else self.integer(key, minimum)

    def number(self, key: str) -> float:
        """A positive number."""
        expected = "a positive number within the range of float32"
        value = self.get(key, expected)
        if type(value) not in (int, float) or not _LEAST_FLOAT32 <= value <= _LARGEST_FLOAT32:
            raise self.fail(key, f"is {shown(value)}", expected)
        return float(value)

    def text(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of the words `allowed`."""
        value = self.get(key, f"one of {', '.join(allowed)}")
        if value not in allowed:
            raise self.fail(key, f"is {shown(value)}", f"one of {', '.join(allowed)}")
        return str(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.get(key, "true or false")
        if type(value) is not bool:
            raise self.fail(key, f"is {shown(value)}", "true or false")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of non-negative integers."""
        value = self.get(key, "a list of integers")
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= MAX_INTEGER for n in value):
            raise self.fail(key, f"is {shown(value)}", "a list of non-negative integers")
        return tuple(value)


_FLOATS = {f.name for f in fields(Config) if f.type == "float"}
_MAY_BE_ZERO = {"num_hash_layers", "sliding_window"}
_NESTED = ("rope_scaling",)
SCORING_FUNCTIONS = ("sqrtsoftplus", "sigmoid", "softmax")


def read_config(path: Path) -> Config:
    """Read and check `path` (a config.json); InputError names the key that is missing, mistyped or contradictory."""
    raw = read_json_object(path, max_bytes=10_000_000)
    read = ConfigReader(raw, path)
    architectures = raw.get("architectures")
    if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
        raise read.fail("architectures", f"is {shown(architectures)}", f"a list with {ARCHITECTURE!r}")
    return parse_config(read)


def parse_config(read: ConfigReader) -> Config:
    """The values of a JSON object with config.json's keys, checked; errors of `read_config`."""
    values: dict[str, Any] = {
        "compress_ratios": read.integers("compress_ratios"),
        "norm_topk_prob": read.flag("norm_topk_prob"),
        "scoring_func": read.text("scoring_func", SCORING_FUNCTIONS),
        "rope_scaling_type": read.text("rope_scaling.type", ("yarn",)),
        "num_nextn_predict_layers": read.optional_integer("num_nextn_predict_layers") or 0,
        "weight_block_size": _read_block_size(read),
        "n_group": read.optional_integer("n_group"),
        "topk_group": read.optional_integer("topk_group"),
        "intermediate_size": read.optional_integer("intermediate_size", 1),
    }
    for f in fields(Config):
        if f.name in values:
            continue
        key = f.name
        for nested in _NESTED:
            if key.startswith(nested + "_"):
                key = nested + "." + key.removeprefix(nested + "_")
        values[f.name] = read.number(key) if f.name in _FLOATS else read.integer(key, int(f.name not in _MAY_BE_ZERO))
    config = Config(**values)
    _check_consistent(config, read)
    return config


def _read_block_size(read: ConfigReader) -> tuple[int, int] | None:
    if read.raw.get("quantization_config") is None:
        return None
    quantization = read.get("quantization_config", "an object")
    if not isinstance(quantization, dict):
        raise read.fail("quantization_config", f"is {shown(quantization)}", "an object")
    for key, allowed in (("quant_method", ("fp8",)), ("fmt", ("e4m3",)), ("scale_fmt", ("ue8m0",))):
        if key in quantization:
            read.text(f"quantization_config.{key}", allowed)
    size = read.integers("quantization_config.weight_block_size")
    if len(size) != 2 or min(size) < 1:
        raise read.fail("quantization_config.weight_block_size", f"is {shown(list(size))}", "two positive integers")
    return size[0], size[1]


def _check_consistent(c: Config, read: ConfigReader) -> None:
    n_layers, n_ratios = c.num_hidden_layers, len(c.compress_ratios)
    if n_ratios < n_layers:
        raise read.fail("compress_ratios", f"has {n_ratios} entries", f"at least num_hidden_layers = {n_layers}")
    if any(c.compress_ratios[n_layers:]):
        raise read.fail("compress_ratios", f"has {shown(list(c.compress_ratios[n_layers:]))} behind entry {n_layers}",
                        f"only zeros (draft blocks) behind num_hidden_layers = {n_layers}")
    checks = (
        ("num_key_value_heads", c.num_key_value_heads, c.num_key_value_heads == 1, "1"),
        ("num_experts_per_tok", c.num_experts_per_tok, c.num_experts_per_tok <= c.n_routed_experts,
         f"at most n_routed_experts = {c.n_routed_experts}"),
        ("num_hash_layers", c.num_hash_layers, c.num_hash_layers <= n_layers,
         f"at most num_hidden_layers = {n_layers}"),
        ("qk_rope_head_dim", c.qk_rope_head_dim, c.qk_rope_head_dim <= c.head_dim and c.qk_rope_head_dim % 2 == 0,
         f"even and at most head_dim = {c.head_dim}"),
        ("o_groups", c.o_groups, c.num_attention_heads % c.o_groups == 0,
         f"a divisor of num_attention_heads = {c.num_attention_heads}"),
        ("tie_word_embeddings", read.raw.get("tie_word_embeddings"), not read.raw.get("tie_word_embeddings"),
         "false: the published layout has a separate head"),
    )
    for key, value, good, expected in checks:
        if not good:
            raise read.fail(key, f"is {shown(value)}", expected)
