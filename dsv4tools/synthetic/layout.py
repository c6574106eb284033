"""Every tensor of a checkpoint in file order: name, dtype, shape, and how its values are drawn.

Names, dtypes and shapes are those of the published checkpoints. The order is also the order in which random
numbers are drawn: moving a row changes the values of all rows behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import TYPE_CHECKING

from dsv4tools.synthetic.shapes import FP4_GROUP

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsv4tools.synthetic.shapes import Shape

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I32": 4, "I64": 8}


class Draw(Enum):
    """How the values of a tensor come about; ``gain`` and ``fan`` are the row's."""

    NORMAL = "gain * N(0, 1) / sqrt(fan)"
    AROUND_ONE = "gain * (1 + 0.2 * N(0, 1)), as weights of a norm"
    UNIFORM = "0.5 + U(0, 1)"
    MATRIX = "gain * N(0, 1) / sqrt(columns), quantized; its scales follow"
    SCALES = "the scales of the matrix before it"
    EXPERT_IDS = "per row the first ids of a permutation of `fan` experts"


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a checkpoint.

    Attributes
    ----------
    name, dtype, shape:
        As in the safetensors header.
    draw, gain, fan:
        How its values are drawn, see `Draw`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    draw: Draw
    gain: float = 1.0
    fan: int = 1

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return DTYPE_BYTES[self.dtype] * prod(self.shape)


def tensor_rows(shape: Shape) -> Iterator[TensorRow]:
    """All tensors of a checkpoint of `shape`, in file order."""
    hidden = shape.hidden
    yield TensorRow("embed.weight", "BF16", (shape.vocab, hidden), Draw.NORMAL)
    for layer, ratio in enumerate(shape.ratios):
        yield from _block(shape, f"layers.{layer}.", ratio, hashed=layer < shape.hash_layers)
    yield _norm("norm", hidden)
    yield TensorRow("head.weight", "BF16", (shape.vocab, hidden), Draw.NORMAL, 3.0, hidden)
    yield from _hyper_connection(shape, "hc_head_", shape.hc_mult, 1)
    yield from (_mtp if shape.draft == "mtp" else _dspark)(shape)


def inventory(shape: Shape) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) of every tensor, in file order."""
    return {row.name: (row.dtype, row.shape) for row in tensor_rows(shape)}


def _norm(prefix: str, n: int, gain: float = 1.0) -> TensorRow:
    return TensorRow(f"{prefix}.weight", "BF16", (n,), Draw.AROUND_ONE, gain)


def _fp8(shape: Shape, prefix: str, rows: int, cols: int, gain: float = 1.0) -> Iterator[TensorRow]:
    block_rows, block_cols = shape.fp8_block
    yield TensorRow(f"{prefix}.weight", "F8_E4M3", (rows, cols), Draw.MATRIX, gain, cols)
    yield TensorRow(f"{prefix}.scale", "F8_E8M0", (-(-rows // block_rows), -(-cols // block_cols)), Draw.SCALES)


def _fp4(prefix: str, rows: int, cols: int, gain: float = 1.0) -> Iterator[TensorRow]:
    yield TensorRow(f"{prefix}.weight", "I8", (rows, cols // 2), Draw.MATRIX, gain, cols)
    yield TensorRow(f"{prefix}.scale", "F8_E8M0", (rows, cols // FP4_GROUP), Draw.SCALES)


def _hyper_connection(shape: Shape, prefix: str, rows: int, scales: int) -> Iterator[TensorRow]:
    width = shape.hc_mult * shape.hidden
    yield TensorRow(f"{prefix}fn", "F32", (rows, width), Draw.NORMAL, 0.8, width)
    yield TensorRow(f"{prefix}base", "F32", (rows,), Draw.NORMAL, 0.7)
    yield TensorRow(f"{prefix}scale", "F32", (scales,), Draw.UNIFORM)


def _compressor(shape: Shape, prefix: str, ratio: int, head_dim: int) -> Iterator[TensorRow]:
    width = (2 if ratio == 4 else 1) * head_dim  # ratio 4 compresses overlapping windows: two halves
    yield TensorRow(f"{prefix}ape", "F32", (ratio, width), Draw.NORMAL, 0.5)
    yield TensorRow(f"{prefix}wkv.weight", "BF16", (width, shape.hidden), Draw.NORMAL, 1.0, shape.hidden)
    yield TensorRow(f"{prefix}wgate.weight", "BF16", (width, shape.hidden), Draw.NORMAL, 1.5, shape.hidden)
    yield _norm(f"{prefix}norm", head_dim, 1.3)


def _attention(shape: Shape, prefix: str, ratio: int) -> Iterator[TensorRow]:
    hidden, head_dim, q_lora = shape.hidden, shape.head_dim, shape.q_lora
    o_width = shape.o_groups * shape.o_lora
    yield TensorRow(f"{prefix}attn_sink", "F32", (shape.heads,), Draw.NORMAL)
    yield from _fp8(shape, f"{prefix}wq_a", q_lora, hidden)
    yield _norm(f"{prefix}q_norm", q_lora)
    yield from _fp8(shape, f"{prefix}wq_b", shape.heads * head_dim, q_lora)
    yield from _fp8(shape, f"{prefix}wkv", head_dim, hidden)
    yield _norm(f"{prefix}kv_norm", head_dim, 1.5)
    yield from _fp8(shape, f"{prefix}wo_a", o_width, shape.heads * head_dim // shape.o_groups)
    yield from _fp8(shape, f"{prefix}wo_b", hidden, o_width)
    if ratio:
        yield from _compressor(shape, f"{prefix}compressor.", ratio, head_dim)
    if ratio == 4:
        yield from _fp8(shape, f"{prefix}indexer.wq_b", shape.index_heads * shape.index_head_dim, q_lora)
        yield TensorRow(
            f"{prefix}indexer.weights_proj.weight", "BF16", (shape.index_heads, hidden), Draw.NORMAL, 1.0, hidden
        )
        yield from _compressor(shape, f"{prefix}indexer.compressor.", 4, shape.index_head_dim)


def _experts(shape: Shape, prefix: str, *, fp8: bool) -> Iterator[TensorRow]:
    hidden, width = shape.hidden, shape.expert_hidden
    # Gains: gate and up reach the clamp of the activation now and then, down brings the sum back to order one.
    matrices = (("w1", width, hidden, 5.0), ("w2", hidden, width, 1 / 8), ("w3", width, hidden, 5.0))
    for name, rows, cols, gain in matrices:
        yield from _fp8(shape, prefix + name, rows, cols, gain) if fp8 else _fp4(prefix + name, rows, cols, gain)


def _block(shape: Shape, prefix: str, ratio: int, *, hashed: bool) -> Iterator[TensorRow]:
    hidden, mult = shape.hidden, shape.hc_mult
    yield from _hyper_connection(shape, f"{prefix}hc_attn_", (2 + mult) * mult, 3)
    yield from _hyper_connection(shape, f"{prefix}hc_ffn_", (2 + mult) * mult, 3)
    yield _norm(f"{prefix}attn_norm", hidden)
    yield _norm(f"{prefix}ffn_norm", hidden)
    yield from _attention(shape, f"{prefix}attn.", ratio)
    yield TensorRow(f"{prefix}ffn.gate.weight", "BF16", (shape.experts, hidden), Draw.NORMAL, 2.0, hidden)
    if hashed:
        ids = (shape.vocab, shape.experts_per_token)
        yield TensorRow(f"{prefix}ffn.gate.tid2eid", "I64", ids, Draw.EXPERT_IDS, fan=shape.experts)
    else:
        yield TensorRow(f"{prefix}ffn.gate.bias", "F32", (shape.experts,), Draw.NORMAL, 0.3)
    for expert in range(shape.experts):
        yield from _experts(shape, f"{prefix}ffn.experts.{expert}.", fp8=shape.expert_dtype == "fp8")
    yield from _experts(shape, f"{prefix}ffn.shared_experts.", fp8=True)


def _mtp(shape: Shape) -> Iterator[TensorRow]:
    hidden = shape.hidden
    for number in range(shape.draft_blocks):
        prefix = f"mtp.{number}."
        yield from _block(shape, prefix, 0, hashed=False)
        yield from _fp8(shape, f"{prefix}e_proj", hidden, hidden)
        yield from _fp8(shape, f"{prefix}h_proj", hidden, hidden)
        for name in ("enorm", "hnorm", "norm"):
            yield _norm(prefix + name, hidden)
        yield from _hyper_connection(shape, f"{prefix}hc_head_", shape.hc_mult, 1)


def _dspark(shape: Shape) -> Iterator[TensorRow]:
    hidden, rank, last = shape.hidden, shape.draft_rank, shape.draft_blocks - 1
    for number in range(shape.draft_blocks):
        yield from _block(shape, f"mtp.{number}.", 0, hashed=False)
    yield from _fp8(shape, "mtp.0.main_proj", hidden, 3 * hidden)
    yield _norm("mtp.0.main_norm", hidden)
    yield _norm(f"mtp.{last}.norm", hidden)
    yield from _hyper_connection(shape, f"mtp.{last}.hc_head_", shape.hc_mult, 1)
    for name in ("markov_w1", "markov_w2"):
        yield TensorRow(f"mtp.{last}.markov_head.{name}.weight", "BF16", (shape.vocab, rank), Draw.NORMAL, 1.0, rank)
    yield TensorRow(
        f"mtp.{last}.confidence_head.proj.weight", "BF16", (1, hidden + rank), Draw.NORMAL, 1.0, hidden + rank
    )
