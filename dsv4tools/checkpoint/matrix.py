"""A logical matrix of a checkpoint: a weight, its scales where it has any, and how to read a run of its rows.

The dtype decides how a matrix is stored; the name never does. Layouts: packed FP4 is I8 [rows, columns / 2] with
E8M0 scales [rows, columns / 32]; F8_E4M3 [rows, columns] has scales [ceil(rows / b0), ceil(columns / b1)] with the
block size of config.json; everything else is plain. A GGUF's matrices are rows of plain numbers, or of blocks of their
ggml type, which hold their own scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import InputError
from dsv4tools.formats.source import SOURCE_BITS, SourceKind, SourceRows
from dsv4tools.formats.unpack import decoded_kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from dsv4tools.checkpoint.checkpoint import SourceTensor
    from dsv4tools.formats.table import Format

FP4_SCALE_COLUMNS = 32
_FP4 = ("I8", "U8", "F4")
SCALED_DTYPES = frozenset({"F8_E4M3", *_FP4})   # what is nothing without its scale
_PLAIN = {"F32": SourceKind.F32, "F16": SourceKind.F16, "BF16": SourceKind.BF16}
_INTEGERS: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4")}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of `n_rows` x `n_cols` values (a vector has one row).

    `kind` is None for integers (the routing tables). `block` is the size (rows, columns) that one scale covers.
    `stored_format` is the ggml type that the bytes have already where they lie in a GGUF; `kind` is then what its
    blocks are decoded to.
    """

    weight: SourceTensor
    scale: SourceTensor | None
    kind: SourceKind | None
    n_rows: int
    n_cols: int
    block: tuple[int, int] = (1, 1)
    stored_format: Format | None = None

    @property
    def blocks(self) -> Format | None:
        """The ggml type whose blocks its rows are; None for plain numbers, and in a checkpoint."""
        held = self.stored_format
        return None if held is None or held.name in _PLAIN or held.name in _INTEGERS else held

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row of values, without scales."""
        if self.blocks is not None:
            return self.blocks.row_bytes(self.n_cols, self.weight.where)
        return self.n_cols * SOURCE_BITS[self.kind] // 8 if self.kind is not None else 0

    @property
    def shard_names(self) -> set[str]:
        """The shards that its bytes are in: weight and scale may lie apart."""
        return {t.shard.path.name for t in (self.weight, self.scale) if t is not None}

    @property
    def at_hand(self) -> bool:
        """Whether its bytes can be read at no price to speak of."""
        return all(t.shard.at_hand for t in (self.weight, self.scale) if t is not None)

    @property
    def n_bytes(self) -> int:
        """Stored bytes, scales included."""
        return self.weight.n_bytes + (self.scale.n_bytes if self.scale else 0)


def bind_matrix(
    tensors: Mapping[str, SourceTensor], name: str, shape: tuple[int, ...], fp8_block: tuple[int, int] | None
) -> Matrix:
    """The matrix called `name`, checked against the logical `shape` that it must have.

    Raises
    ------
    InputError
        Shape or dtype is not as expected, a scale is missing or of the wrong shape. A missing weight is a KeyError: the
        caller lists all of them.
    """
    weight = tensors[name]
    n_rows, n_cols = prod(shape[:-1]), shape[-1]
    if weight.format is not None and weight.dtype not in _INTEGERS and weight.dtype not in _PLAIN:
        return Matrix(weight, None, decoded_kind(weight.format), n_rows, n_cols, stored_format=weight.format)
    if weight.dtype in _INTEGERS:
        _expect(weight, shape)
        return Matrix(weight, None, None, n_rows, n_cols, stored_format=weight.format)
    if weight.dtype in _PLAIN:
        _expect(weight, shape)
        return Matrix(weight, None, _PLAIN[weight.dtype], n_rows, n_cols, stored_format=weight.format)
    if weight.dtype in SCALED_DTYPES and len(shape) != 2:
        raise InputError(weight.where, f"is a vector of {weight.dtype}, expected BF16, F16 or F32")
    if weight.dtype == "F8_E4M3":
        if fp8_block is None:
            raise InputError(weight.where, "is F8_E4M3, config.json has no quantization_config.weight_block_size")
        _expect(weight, shape)
        return Matrix(weight, _find_scale(tensors, weight, shape, fp8_block), SourceKind.FP8, n_rows, n_cols, fp8_block)
    if weight.dtype in _FP4:
        if n_cols % FP4_SCALE_COLUMNS:
            raise InputError(weight.where, f"is packed FP4 with {n_cols} columns, expected a multiple of 32")
        _expect(weight, shape if weight.dtype == "F4" else (*shape[:-1], n_cols // 2))
        block = (1, FP4_SCALE_COLUMNS)
        return Matrix(weight, _find_scale(tensors, weight, shape, block), SourceKind.FP4, n_rows, n_cols, block)
    raise InputError(weight.where, f"has dtype {weight.dtype}, which no DeepSeek-V4 weight has",
                     hint="expected F8_E4M3, packed FP4 (I8), BF16, F16, F32 or, for tid2eid, I64")


def _expect(tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise InputError(tensor.where, f"has shape {list(tensor.shape)} ({tensor.dtype}), "
                         f"config.json implies {list(shape)}")


def _find_scale(
    tensors: Mapping[str, SourceTensor], weight: SourceTensor, shape: tuple[int, ...], block: tuple[int, int]
) -> SourceTensor:
    name = scale_name(weight.name)
    if name not in tensors:
        raise InputError(weight.where, f"is {weight.dtype} and its scale {name!r} is missing")
    scale = tensors[name]
    expected = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    if scale.dtype not in ("F8_E8M0", "U8") or scale.shape != expected:
        raise InputError(scale.where, f"is {scale.dtype} {list(scale.shape)}, expected F8_E8M0 {list(expected)} "
                         f"for a weight of {list(shape)} in blocks of {list(block)}")
    return scale


def scale_name(weight_name: str) -> str:
    """``X.weight`` -> ``X.scale``."""
    return weight_name.removesuffix("weight") + "scale"


class RowReader:
    """Reads runs of rows into buffers that are used again and again: one per worker.

    The buffers grow to the largest run asked for and stay; a returned SourceRows is valid until the next read.
    """

    def __init__(self) -> None:
        self._data = np.empty(0, np.uint8)
        self._scales = np.empty(0, np.uint8)

    def read_rows(self, matrix: Matrix, first_row: int, n_rows: int) -> SourceRows:
        """Rows ``first_row .. first_row + n_rows - 1`` of a matrix of values, as stored, with their scales.

        Raises ResourceError and VerifyError as `Shard.read_into` does.
        """
        if matrix.kind is None:
            raise InputError(matrix.weight.where, f"has integers ({matrix.weight.dtype}) where weights are expected")
        row_bytes = matrix.row_bytes
        self._data = _grown(self._data, n_rows * row_bytes)
        data = self._data[: n_rows * row_bytes]
        weight = matrix.weight
        weight.shard.read_into(weight.begin + first_row * row_bytes, data.data)
        if matrix.scale is None:
            return SourceRows(matrix.kind, data, n_rows, matrix.n_cols, blocks=matrix.blocks)
        block_rows, block_cols = matrix.block
        n_scale_cols = matrix.scale.shape[1]
        first, last = first_row // block_rows, (first_row + n_rows - 1) // block_rows
        n_scales = (last - first + 1) * n_scale_cols
        self._scales = _grown(self._scales, n_scales)
        scales = self._scales[:n_scales]
        matrix.scale.shard.read_into(matrix.scale.begin + first * n_scale_cols, scales.data)
        return SourceRows(matrix.kind, data, n_rows, matrix.n_cols, scales.reshape(-1, n_scale_cols), block_rows,
                          block_cols, first_row - first * block_rows)

    def read_ids(self, matrix: Matrix, first_row: int, n_rows: int, limit: int) -> NDArray[np.int32]:
        """Rows of a routing table as int32 [n_rows, n_cols]; InputError names the first id outside ``[0, limit)``."""
        weight = matrix.weight
        if matrix.kind is not None:
            raise InputError(weight.where, f"is {weight.dtype}, expected integers (I64)")
        dtype = _INTEGERS[weight.dtype]
        stored = weight.stored_columns or matrix.n_cols
        n_bytes = n_rows * stored * dtype.itemsize
        self._data = _grown(self._data, n_bytes)
        weight.shard.read_into(weight.begin + first_row * stored * dtype.itemsize, self._data[:n_bytes].data)
        ids = self._data[:n_bytes].view(dtype).reshape(n_rows, stored)[:, : matrix.n_cols]
        bad = np.argwhere((ids < 0) | (ids >= limit))
        if len(bad):
            row, column = (int(n) for n in bad[0])
            raise InputError(weight.where, f"row {first_row + row} column {column} routes to expert "
                             f"{ids[row, column]}, expected 0 to {limit - 1}")
        return np.ascontiguousarray(ids, np.int32)


def _grown(buffer: NDArray[np.uint8], n_bytes: int) -> NDArray[np.uint8]:
    return buffer if len(buffer) >= n_bytes else np.zeros(n_bytes, np.uint8)
