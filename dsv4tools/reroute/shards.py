"""Rewriting one safetensors file with narrower routing tables: same order, all other tensors as they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.checkpoint.shard import DTYPE_BITS
from dsv4tools.files import pwrite_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dsv4tools.checkpoint.shard import Shard, ShardTensor
    from dsv4tools.reroute.tables import TableCutter

CHUNK_BYTES = 1 << 23
TABLE_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4")}


@dataclass(frozen=True)
class NarrowShard:
    """What a shard becomes when the tables in it (tensor name -> columns kept) are cut.

    `header` includes the eight bytes of its length; `n_bytes` is the size of the new file, `n_cut_bytes` what its
    tensors lose.
    """

    shard: Shard
    columns: Mapping[str, int]
    header: bytes
    n_bytes: int
    n_cut_bytes: int


def narrow_shard(shard: Shard, columns: Mapping[str, int]) -> NarrowShard:
    """Plan the rewriting of `shard`: its header keeps order, metadata and keys; only shapes and offsets change."""
    prefix = bytearray(8)
    shard.read_into(0, memoryview(prefix))
    raw = bytearray(int.from_bytes(prefix, "little"))
    shard.read_into(8, memoryview(raw))
    head = json.loads(raw)   # was accepted when the shard was opened, and has not changed since
    end = 0
    for name, tensor in _in_file_order(shard):
        n_bytes = _kept_bytes(tensor, columns.get(name))
        if name in columns:
            head[name]["shape"] = [tensor.shape[0], columns[name]]
        head[name]["data_offsets"] = [end, end + n_bytes]
        end += n_bytes
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    n_cut = sum(t.n_bytes for t in shard.tensors.values()) - end
    return NarrowShard(shard, columns, len(text).to_bytes(8, "little") + text, 8 + len(text) + end, n_cut)


def write_narrow_shard(
    plan: NarrowShard, cutters: Mapping[str, TableCutter], fd: int, progress: Callable[[int], None]
) -> None:
    """Write the file that `plan` describes to `fd`, in chunks; errors of `Shard.read_into` and `TableCutter.cut`."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    pwrite_all(fd, memoryview(plan.header), 0)
    progress(len(plan.header))
    position = len(plan.header)
    for name, tensor in _in_file_order(plan.shard):
        for data in read_chunks(plan.shard, tensor, buffer, cutters.get(name)):
            pwrite_all(fd, data, position)
            position += len(data)
            progress(len(data))


def read_chunks(
    shard: Shard, tensor: ShardTensor, buffer: memoryview, cutter: TableCutter | None
) -> Iterator[memoryview]:
    """The bytes of `tensor` in order, at most ``len(buffer)`` at a time, through `cutter` if it is a table."""
    step = len(buffer)
    if cutter is not None:
        dtype = TABLE_DTYPES[tensor.dtype]
        row_bytes = cutter.n_columns * dtype.itemsize
        step = max(step // row_bytes, 1) * row_bytes
        if step > len(buffer):
            buffer = memoryview(bytearray(step))
    for begin in range(0, tensor.n_bytes, step):
        part = buffer[: min(step, tensor.n_bytes - begin)]
        shard.read_into(tensor.begin + begin, part)
        yield part if cutter is None else \
            cutter.cut(np.frombuffer(part, dtype).reshape(-1, cutter.n_columns)).data.cast("B")


def _in_file_order(shard: Shard) -> list[tuple[str, ShardTensor]]:
    return sorted(shard.tensors.items(), key=lambda item: (item[1].begin, item[1].n_bytes))


def _kept_bytes(tensor: ShardTensor, n_columns: int | None) -> int:
    if n_columns is None:
        return tensor.n_bytes
    return tensor.shape[0] * n_columns * DTYPE_BITS[tensor.dtype] // 8
