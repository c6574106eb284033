"""A GGUF in llama.cpp's dialect, written by gguf-py from a checkpoint: no code of dsv4tools makes its tensors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from independent import EXPERTS, Weights

from dsv4tools.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def pack_mxfp4(weights: Weights, name: str) -> np.ndarray:
    """The experts of a tensor as MXFP4 blocks: the scale byte, then codes 0-15 in low and 16-31 in high nibbles."""
    _, layer, rest = name.split(".", 2)
    experts = []
    for e in range(weights.config["n_routed_experts"]):
        source = f"layers.{layer}.ffn.experts.{e}.{EXPERTS[rest]}"
        _, shape, data = weights.raw[f"{source}.weight"]
        pairs = np.frombuffer(data, np.uint8).reshape(shape)
        codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(shape[0], -1, 32)
        scales = np.frombuffer(weights.raw[f"{source}.scale"][2], np.uint8).reshape(shape[0], -1, 1)
        experts.append(np.concatenate([scales, codes[..., :16] | codes[..., 16:] << 4], -1).reshape(shape[0], -1))
    return np.stack(experts)


def write_mainline(checkpoint: Path, entries: dict[str, Any], out: Path, *, change=lambda name, kind: kind) -> Path:
    """Write `out` with llama.cpp's `entries` and its types, or those that `change` makes of them.

    Types: experts MXFP4, what is FP8 or BF16 in the checkpoint BF16, the rest F32.
    """
    weights = Weights(checkpoint)
    vocabulary = open_checkpoint(checkpoint).vocabulary
    texts = {"tokens": vocabulary.tokens, "token_type": [int(t) for t in vocabulary.types], "merges": vocabulary.merges}
    writer = GGUFWriter(out, "deepseek4")
    for key, entry in entries.items():
        kind, *item = (GGUFValueType[t] for t in entry["type"])
        value = entry["value"]
        if isinstance(value, dict):
            value = texts.get(key.rpartition(".")[2], "{{ messages }}")
        if key != "general.architecture":
            writer.add_key_value(key, value, kind, sub_type=item[0] if item else None)
    plain = {"F32": "F32", "I64": "I32"}
    # The checkpoint's order, which is not that of the template tables.
    for name in sorted(weights.names()):
        experts = name.split(".", 2)[-1] in EXPERTS
        kind = "MXFP4" if experts else plain.get(weights.dtype(name), "BF16")
        kind = change(name, "F32" if len(weights.shape(name)) == 1 else kind)
        if kind == "MXFP4":
            writer.add_tensor(name, pack_mxfp4(weights, name), raw_dtype=GGMLQuantizationType.MXFP4)
        elif kind == "I32":
            writer.add_tensor(name, weights.gguf(name).astype("<i4"))
        else:
            form = GGMLQuantizationType[kind]
            values = np.ascontiguousarray(weights.gguf(name), np.float32)
            writer.add_tensor(name, quantize(values, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def mainline_entries(data: Path) -> dict[str, Any]:
    """What llama.cpp's converter wrote for the shared checkpoint."""
    return json.loads((data / "tiny-6e.mainline_kv.json").read_text("utf-8"))
