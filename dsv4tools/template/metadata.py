"""The metadata of a GGUF: model keys by the template tables, tokenizer keys, and what is known of its origin.

The same checkpoint gives the same entries: no time, no path, no host is written.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from dsv4tools.gguf.values import KV

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dsv4tools.checkpoint import Checkpoint, Config
    from dsv4tools.checkpoint.vocabulary import Vocabulary
    from dsv4tools.template.tables import MetadataRow, ModelTables
    from dsv4tools.template.tensors import TemplateTensor

PRE_TOKENIZER = "joyai-llm"   # llama.cpp's name for the regular expressions of DeepSeek-V4's tokenizer
HUB_URL = "https://huggingface.co/"


def model_entries(config: Config, tables: ModelTables, sizes: dict[str, int]) -> list[KV]:
    """``deepseek4.*`` entries; values from config.json, types from the tables."""
    entries = []
    for row in tables.metadata:
        value = sizes[row.symbol] if row.symbol else config.value(row.config or "")
        if value is None and row.optional:
            continue
        entries.append(_model_entry(f"{tables.architecture}.{row.key}", row, value, config.num_hidden_layers))
    return entries


def _model_entry(key: str, row: MetadataRow, value: Any, n_layers: int) -> KV:  # noqa: ANN401  - of the row's type
    if row.values:
        value = row.values[value]
    if row.per_layer:
        value = [value] * n_layers
    if row.type.startswith("arr["):
        return KV(key, "arr", list(value), row.type[4:-1])
    return KV(key, row.type, value)


def tokenizer_entries(vocabulary: Vocabulary) -> list[KV]:
    """``tokenizer.*`` entries: byte-level BPE, called gpt2 in a GGUF; without scores, which neither engine needs."""
    key = "tokenizer.ggml."
    entries = [
        KV(key + "model", "str", "gpt2"),
        KV(key + "pre", "str", PRE_TOKENIZER),
        KV(key + "tokens", "arr", vocabulary.tokens, "str"),
        KV(key + "token_type", "arr", [int(t) for t in vocabulary.types], "i32"),
        KV(key + "merges", "arr", vocabulary.merges, "str"),
    ]
    entries += [KV(f"{key}{name}_token_id", "u32", i) for name, i in vocabulary.special_ids.items()]
    entries.append(KV(key + "add_bos_token", "bool", vocabulary.add_bos))
    entries.append(KV(key + "add_eos_token", "bool", vocabulary.add_eos))
    if vocabulary.chat_template is not None:
        entries.append(KV("tokenizer.chat_template", "str", vocabulary.chat_template))
    return entries


def general_entries(checkpoint: Checkpoint, tables: ModelTables, tensors: Sequence[TemplateTensor]) -> list[KV]:
    """``general.*`` entries that do not depend on the policy."""
    card = checkpoint.card
    entries = [
        KV("general.architecture", "str", tables.architecture),
        KV("general.type", "str", "model"),
        KV("general.name", "str", card.name),
        KV("general.size_label", "str", size_label(tensors)),
    ]
    if card.license:
        entries.append(KV("general.license", "str", card.license))
    if card.base_models:
        entries.append(KV("general.base_model.count", "u32", len(card.base_models)))
        for i, model in enumerate(card.base_models):
            entries.extend(_base_model_entries(f"general.base_model.{i}.", model))
    if card.repository:
        entries.append(KV("general.source.repo_url", "str", HUB_URL + card.repository))
    if card.revision:
        entries.append(KV("general.source.revision", "str", card.revision))
    for name, number in card.sampling.items():
        kind, value = ("i32", number) if name == "top_k" else ("f32", float(number))
        entries.append(KV(f"general.sampling.{name}", kind, value))
    return entries


def _base_model_entries(prefix: str, model: str) -> Iterator[KV]:
    organization, _, name = model.rpartition("/")
    yield KV(prefix + "name", "str", name.replace("-", " "))
    if organization:
        yield KV(prefix + "organization", "str", organization)
        yield KV(prefix + "repo_url", "str", HUB_URL + model)


def size_label(tensors: Sequence[TemplateTensor]) -> str:
    """``256x8.4B``: number of experts, and the parameters with one expert per layer counted (ggml's gguf.md)."""
    shared = one_expert = experts = 0
    for tensor in tensors:
        if "_exps." in tensor.name:
            experts = tensor.ne[2]
            one_expert += prod(tensor.ne[:2])
        else:
            shared += prod(tensor.ne)
    return f"{experts}x{_round_count(shared + one_expert)}" if experts else _round_count(shared)


def _round_count(n: int) -> str:
    for unit, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if n >= unit:
            scaled = n / unit
            return f"{scaled:.{1 if scaled < 9.95 else 0}f}{suffix}"
    return f"{n / 1000:.{1 if n < 9950 else 0}f}K"
