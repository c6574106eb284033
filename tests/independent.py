"""The weights of a checkpoint, and what they must become, derived without any code of dsv4tools.

Number formats: OCP Microscaling specification (E2M1, E8M0), OCP FP8 specification (E4M3). Blocks: gguf-py. Names: those
that llama.cpp and ds4 load.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from tamper import load_shard, shards

if TYPE_CHECKING:
    from pathlib import Path

    from gguf import ReaderTensor

# The code of -0 is read as +0, as the C quantizer has it; E4M3 keeps its -0.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _e4m3(code: int) -> float:
    sign, exponent, fraction = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return sign * (fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([_e4m3(code) for code in range(256)], np.float32)
E8M0 = np.array([*(2.0 ** (byte - 127) for byte in range(255)), np.nan], np.float32)

# GGUF name in a layer -> name in a layer of the checkpoint; an F marks a stack of all experts.
LAYER = {
    **{f"hc_{part}_{kind}.weight": f"hc_{part}_{kind}" for part in ("attn", "ffn") for kind in ("base", "fn", "scale")},
    "attn_sinks.weight": "attn.attn_sink",
    "attn_q_a.weight": "attn.wq_a.weight",
    "attn_q_b.weight": "attn.wq_b.weight",
    "attn_q_a_norm.weight": "attn.q_norm.weight",
    "attn_kv.weight": "attn.wkv.weight",
    "attn_kv_a_norm.weight": "attn.kv_norm.weight",
    "attn_output_a.weight": "attn.wo_a.weight",
    "attn_output_b.weight": "attn.wo_b.weight",
    "attn_compressor_ape.weight": "attn.compressor.ape",
    "attn_compressor_kv.weight": "attn.compressor.wkv.weight",
    "attn_compressor_gate.weight": "attn.compressor.wgate.weight",
    "attn_compressor_norm.weight": "attn.compressor.norm.weight",
    "indexer.attn_q_b.weight": "attn.indexer.wq_b.weight",
    "indexer.proj.weight": "attn.indexer.weights_proj.weight",
    "indexer_compressor_ape.weight": "attn.indexer.compressor.ape",
    "indexer_compressor_kv.weight": "attn.indexer.compressor.wkv.weight",
    "indexer_compressor_gate.weight": "attn.indexer.compressor.wgate.weight",
    "indexer_compressor_norm.weight": "attn.indexer.compressor.norm.weight",
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn_gate_shexp.weight": "ffn.shared_experts.w1.weight",
    "ffn_down_shexp.weight": "ffn.shared_experts.w2.weight",
    "ffn_up_shexp.weight": "ffn.shared_experts.w3.weight",
    "ffn_gate_inp.weight": "ffn.gate.weight",
    "exp_probs_b.bias": "ffn.gate.bias",
    "ffn_gate_tid2eid.weight": "ffn.gate.tid2eid",
}
EXPERTS = {"ffn_gate_exps.weight": "w1", "ffn_down_exps.weight": "w2", "ffn_up_exps.weight": "w3"}
MODEL = {
    "token_embd.weight": "embed.weight", "output.weight": "head.weight", "output_norm.weight": "norm.weight",
    "output_hc_base.weight": "hc_head_base", "output_hc_fn.weight": "hc_head_fn",
    "output_hc_scale.weight": "hc_head_scale",
}  # fmt: skip


class Weights:
    """All tensors of a checkpoint as numbers."""

    def __init__(self, checkpoint: Path) -> None:
        self.config = json.loads((checkpoint / "config.json").read_text("utf-8"))
        self.raw = {name: t for shard in shards(checkpoint) for name, t in load_shard(shard).items()}

    def source(self, name: str) -> np.ndarray:
        """A checkpoint tensor: float32, or int64 for a routing table."""
        dtype, shape, data = self.raw[name]
        if dtype == "F32":
            return np.frombuffer(data, "<f4").reshape(shape)
        if dtype == "I64":
            return np.frombuffer(data, "<i8").reshape(shape)
        if dtype == "BF16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
        if dtype == "F16":
            return np.frombuffer(data, "<f2").astype(np.float32).reshape(shape)
        codes = np.frombuffer(data, np.uint8).reshape(shape)
        _, scale_shape, scale_data = self.raw[name.removesuffix("weight") + "scale"]
        scales = E8M0[np.frombuffer(scale_data, np.uint8)].reshape(scale_shape)
        if dtype == "I8":   # two E2M1 codes per byte, the low nibble first; a scale per 32 columns
            values = E2M1[np.stack([codes & 15, codes >> 4], -1)].reshape(shape[0], -1)
            return values * np.repeat(scales, 32, 1)
        rows, cols = self.config["quantization_config"]["weight_block_size"]
        return E4M3[codes] * np.repeat(np.repeat(scales, rows, 0), cols, 1)[: shape[0], : shape[1]]

    def _origin(self, name: str) -> str:
        """The checkpoint's tensor that a GGUF tensor is made of, or its first expert's."""
        if name in MODEL:
            return MODEL[name]
        _, layer, rest = name.split(".", 2)
        part = f"ffn.experts.0.{EXPERTS[rest]}.weight" if rest in EXPERTS else LAYER[rest]
        return f"layers.{layer}.{part}"

    def dtype(self, name: str) -> str:
        """How the checkpoint stores what a GGUF tensor is made of."""
        return self.raw[self._origin(name)][0]

    def shape(self, name: str) -> list[int]:
        """The stored shape of what a GGUF tensor is made of."""
        return list(self.raw[self._origin(name)][1])

    def gguf(self, name: str) -> np.ndarray:
        """The values of a GGUF tensor, rows first."""
        if name in MODEL:
            return self.source(MODEL[name])
        _, layer, rest = name.split(".", 2)
        prefix = f"layers.{layer}."
        if rest not in EXPERTS:
            return self.source(prefix + LAYER[rest])
        n_experts = self.config["n_routed_experts"]
        return np.stack([self.source(f"{prefix}ffn.experts.{e}.{EXPERTS[rest]}.weight") for e in range(n_experts)])

    def names(self) -> set[str]:
        """The GGUF tensors that the checkpoint gives."""
        found = {ours for ours, theirs in MODEL.items() if theirs in self.raw}
        for layer in range(self.config["num_hidden_layers"]):
            found |= {f"blk.{layer}.{ours}" for ours, theirs in LAYER.items() if f"layers.{layer}.{theirs}" in self.raw}
            found |= {f"blk.{layer}.{ours}" for ours in EXPERTS}
        return found


def payload(tensor: ReaderTensor) -> bytes:
    """The stored bytes of a tensor as gguf-py reads them."""
    return tensor.data.tobytes()


def check_file(path: Path, weights: Weights, *, experts_per_token: int | None = None) -> dict[str, str]:
    """Compare every tensor of a GGUF with the checkpoint; returns name -> type.

    Exact for F32, F16, BF16, Q8_0 and I32. Q4_K has many valid encodings: its error must be that of four bits.
    """
    reader = GGUFReader(path)
    types = {}
    assert {t.name for t in reader.tensors} == weights.names()
    for tensor in reader.tensors:
        expected = weights.gguf(tensor.name)
        types[tensor.name] = tensor.tensor_type.name
        if expected.dtype == np.int64:
            expected = expected[:, :experts_per_token].astype("<i4")
        assert list(map(int, tensor.shape)) == list(expected.shape[::-1]), tensor.name
        if tensor.tensor_type == GGMLQuantizationType.Q4_K:
            _check_q4_k(tensor, expected)
        elif tensor.tensor_type == GGMLQuantizationType.I32:
            assert payload(tensor) == expected.tobytes(), tensor.name
        else:
            assert payload(tensor) == quantize(expected, tensor.tensor_type).tobytes(), tensor.name
    return types


def _check_q4_k(tensor: ReaderTensor, expected: np.ndarray) -> None:
    found = dequantize(tensor.data, tensor.tensor_type).reshape(-1, 256)
    x = expected.reshape(-1, 256)
    # Sixteen levels over a sub-block's range, whose scale and minimum have six bits of the largest of eight.
    largest = np.abs(x).max(1, keepdims=True)
    assert (np.abs(found - x) <= 0.2 * largest).all(), tensor.name
    assert np.sqrt(((found - x) ** 2).mean()) <= 0.08 * np.sqrt((x**2).mean()), tensor.name
