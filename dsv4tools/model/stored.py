"""Tensors as they lie in a file, behind one interface: rows, decoded or multiplied on the way."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dsv4tools.checkpoint.matrix import RowReader
from dsv4tools.errors import InputError
from dsv4tools.formats.codecs import decode_rows, decode_source
from dsv4tools.formats.products import MULTIPLIABLE, multiply_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.gguf.header import TensorInfo
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.template import TemplateTensor

READ_BYTES = 1 << 20   # read and multiplied at a time: many rows, and yet no more than a core's cache holds


class Buffers:
    """What one thread decodes into, used again and again, and how many stored bytes it has read of each tensor."""

    def __init__(self) -> None:
        self._room: dict[str, NDArray[Any]] = {}
        self.reader = RowReader()
        self.n_bytes_read: Counter[str] = Counter()

    def take(self, name: str, n: int, dtype: type[np.generic]) -> NDArray[Any]:
        """An array [n] whose content is undefined; the previous one of this name is no longer valid."""
        room = self._room.get(name)
        if room is None or len(room) < n:
            room = self._room[name] = np.empty(n, dtype)
        return room[:n]


class StoredTensor(Protocol):
    """A tensor in a file, as rows: those of all experts, or of all leading dimensions, one after the other."""

    shape: tuple[int, ...]
    n_rows: int
    n_cols: int
    format_name: str   # "" for the formats of checkpoints

    def decode(self, first: int, n: int, buffers: Buffers) -> NDArray[np.float32]:
        """Rows `first` .. ``first + n - 1`` as float32 [n, n_cols], valid until the next call with these buffers."""

    def product(self, first: int, n: int, x: NDArray[np.float32], out: NDArray[np.float32], buffers: Buffers) -> bool:
        """Put the rows' products with a float32 vector `x` into `out` [n] without decoding them to memory.

        False, and nothing done, where the format has no kernel for that.
        """

    def ids(self, row: int, limit: int, buffers: Buffers) -> NDArray[np.int32]:
        """One row of a table of ids, valid until the next call; InputError where one is not in 0 .. `limit` - 1."""

    def where(self, row: int) -> str:
        """What messages call a row: file, tensor, row."""


class GgufTensor:
    """A tensor of a GGUF."""

    def __init__(self, file: GgufFile, info: TensorInfo) -> None:
        self._file, self._info, self.format_name = file, info, info.format.name
        self.shape = info.ne[::-1]
        self.n_rows, self.n_cols = prod(self.shape[:-1]), self.shape[-1]
        self._row_bytes = info.format.row_bytes(self.n_cols, info.name)

    def _read(self, first: int, n: int, buffers: Buffers) -> NDArray[np.uint8]:
        data = buffers.take("data", n * self._row_bytes, np.uint8)
        self._file.read_tensor_into(self._info.name, data, first * self._row_bytes)
        buffers.n_bytes_read[self._info.name] += len(data)
        return data

    def decode(self, first: int, n: int, buffers: Buffers) -> NDArray[np.float32]:
        """See StoredTensor."""
        data = self._read(first, n, buffers)
        tile = buffers.take("tile", n * self.n_cols, np.float32).reshape(n, self.n_cols)
        decode_rows(data, self._info.format, n, self.n_cols, tile)
        return tile

    def product(self, first: int, n: int, x: NDArray[np.float32], out: NDArray[np.float32], buffers: Buffers) -> bool:
        """See StoredTensor."""
        if self._info.format.name not in MULTIPLIABLE:
            return False
        step = max(1, READ_BYTES // self._row_bytes)
        for a in range(0, n, step):
            b = min(a + step, n)
            multiply_rows(self._read(first + a, b - a, buffers), self._info.format, x, out[a:b])
        return True

    def ids(self, row: int, limit: int, buffers: Buffers) -> NDArray[np.int32]:
        """See StoredTensor."""
        numbers: NDArray[np.int32] = self._read(row, 1, buffers).view("<i4")
        bad = np.flatnonzero((numbers < 0) | (numbers >= limit))
        if len(bad):
            raise InputError(self.where(row), f"column {bad[0]} routes to expert {numbers[bad[0]]}, "
                             f"expected 0 to {limit - 1}")
        return numbers

    def where(self, row: int) -> str:
        """See StoredTensor."""
        place = f"row {row}"
        if len(self.shape) == 3:
            place = "expert {} row {}".format(*divmod(row, self.shape[1]))
        return f"{self._file.path}: tensor {self._info.name}: {place}"


class CheckpointTensor:
    """A tensor as a GGUF has it, put together from the matrices of a checkpoint."""

    format_name = ""

    def __init__(self, tensor: TemplateTensor) -> None:
        self._sources = tensor.sources
        self.shape = tensor.ne[::-1]
        self.n_rows, self.n_cols = prod(self.shape[:-1]), self.shape[-1]
        self._rows_each = self.n_rows // len(self._sources)

    def decode(self, first: int, n: int, buffers: Buffers) -> NDArray[np.float32]:
        """See StoredTensor."""
        tile = buffers.take("tile", n * self.n_cols, np.float32).reshape(n, self.n_cols)
        done = 0
        while done < n:
            number, row = divmod(first + done, self._rows_each)
            m = min(n - done, self._rows_each - row)
            matrix = self._sources[number]
            decode_source(buffers.reader.read_rows(matrix, row, m), tile[done : done + m])
            buffers.n_bytes_read[matrix.weight.name] += m * matrix.n_bytes // matrix.n_rows
            done += m
        return tile

    def product(self, *_: object) -> bool:
        """See StoredTensor."""
        return False

    def ids(self, row: int, limit: int, buffers: Buffers) -> NDArray[np.int32]:
        """See StoredTensor."""
        numbers: NDArray[np.int32] = buffers.reader.read_ids(self._sources[0], row, 1, limit)[0]
        return numbers

    def where(self, row: int) -> str:
        """See StoredTensor."""
        number, row = divmod(row, self._rows_each)
        return f"{self._sources[number].weight.where}: row {row}"
