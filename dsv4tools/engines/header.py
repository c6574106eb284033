"""What is judged: everything a GGUF says before its weights, of a plan or of a file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.checkpoint import Config
from dsv4tools.gguf.header import TensorInfo
from dsv4tools.gguf.splits import open_split, split_kvs
from dsv4tools.template.tables import load_tables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsv4tools.engines.profile import Profile
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.gguf.values import KV
    from dsv4tools.plan import Plan

SPLIT_COUNT = "split.count"
_IN_NO_SHAPE = frozenset({
    "max_position_embeddings", "num_key_value_heads", "qk_rope_head_dim", "sliding_window", "index_topk",
    "hc_sinkhorn_iters", "num_nextn_predict_layers", "rope_scaling_original_max_position_embeddings",
})


@dataclass(frozen=True)
class Header:
    """Metadata by key, tensors by name, the version of GGUF."""

    kvs: Mapping[str, KV]
    tensors: Mapping[str, TensorInfo]
    version: int = 3

    @cached_property
    def values(self) -> dict[str, Any]:
        """Every value as plain Python; arrays as lists."""
        return {key: kv.value.tolist() if isinstance(kv.value, np.ndarray) else kv.value
                for key, kv in self.kvs.items()}


def header_of_plan(plan: Plan) -> Header:
    """The header that a conversion would write."""
    tensors = {t.name: TensorInfo(t.name, t.tensor.ne, t.format, t.offset) for t in plan.tensors}
    marks = split_kvs(0, len(plan.files), len(tensors)) if len(plan.files) > 1 else []
    return Header({kv.key: kv for kv in (*plan.kvs, *marks)}, tensors)


def header_of_file(file: GgufFile) -> Header:
    """The header of a file; for a part of a split set the metadata of its first part and the tensors of all.

    InputError where other parts are missing or wrong.
    """
    count = file.value(SPLIT_COUNT, 0)
    if not isinstance(count, int) or count < 2:
        return Header(file.kvs, file.tensors, file.version)
    parts = open_split(file.path)
    for part in parts:
        part.close()
    tensors = {name: t for part in parts for name, t in part.tensors.items()}
    return Header(parts[0].kvs, tensors, parts[0].version)


def value_type(kv: KV) -> str:
    """Type of an entry as profiles write it: ``u32``, ``arr[i32]``."""
    return f"arr[{kv.item_type}]" if kv.type == "arr" else kv.type


def read_dimensions(header: Header, profile: Profile) -> Config | None:
    """What tensor shapes are made of, as the metadata say it, whatever types they say it in.

    A `Config` in which only whole numbers and compress_ratios are filled in; None where one that a shape needs is
    missing, is no whole number, or differs between layers.
    """
    tables = load_tables(profile.tables)
    values: dict[str, Any] = {f.name: None for f in fields(Config)}
    whole = {f.name for f in fields(Config) if f.type == "int"}
    for row in tables.metadata:
        name = (row.config or "").replace(".", "_")
        value = header.values.get(f"{tables.architecture}.{row.key}")
        if isinstance(value, list) and name in whole and len(set(map(repr, value))) == 1:
            value = value[0]   # one and the same for each layer
            value = int(value) if isinstance(value, bool) else value   # llama.cpp counts with them
        if name in whole and values[name] is None and type(value) is int and value >= 0:
            values[name] = value
        elif name == "compress_ratios" and isinstance(value, list):
            values[name] = tuple(value)
    for key in (profile.key(profile.vocabulary), f"{tables.architecture}.vocab_size", "tokenizer.ggml.tokens"):
        vocabulary = header.values.get(key)
        values["vocab_size"] = len(vocabulary) if isinstance(vocabulary, list) else vocabulary
        if type(values["vocab_size"]) is int:
            break
    else:
        return None
    ratios, n_layers = values["compress_ratios"], values["num_hidden_layers"]
    if any(values[name] is None for name in whole - _IN_NO_SHAPE) or ratios is None or values["o_groups"] == 0:
        return None
    known = len(ratios) >= n_layers and set(ratios[:n_layers]) <= set(tables.overlaps)
    return Config(**values) if known else None
