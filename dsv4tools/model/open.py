"""Opening a model from either side: the tensors of a checkpoint, or of a GGUF, under the same names."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.checkpoint import Checkpoint, open_checkpoint
from dsv4tools.checkpoint.matrix import RowReader
from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.codecs import DECODABLE, decode_rows, decode_source
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.model.gguf_config import read_gguf_config
from dsv4tools.model.model import Model
from dsv4tools.model.weights import Weights
from dsv4tools.plan import TEMPLATE_KEY
from dsv4tools.reroute import reroute
from dsv4tools.template.tables import load_tables
from dsv4tools.template.tensors import derive_tensors, expand_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.gguf.header import TensorInfo
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.model.weights import Buffers
    from dsv4tools.template.tensors import TemplateTensor


def open_model(
    source: str | Path | Checkpoint, *, experts_per_token: int | None = None,
    dtype: type[np.floating[Any]] = np.float32, threads: int | None = None,
) -> Model:
    """Open a model to run: headers are read and checked, no weights.

    Parameters
    ----------
    source:
        A checkpoint (directory, or opened, or a re-routed view), or a GGUF file.
    experts_per_token:
        Route each token to fewer experts than the checkpoint does.
    dtype:
        Of the arithmetic: float32 or float64.
    threads:
        How many share a product; all usable cores by default.

    Raises
    ------
    InputError
        Missing tensors (all are listed), a wrong shape, an unknown layer kind, a type that cannot be decoded.
    UsageError
        `experts_per_token` for a GGUF, or more than the checkpoint has.
    """
    if isinstance(source, Checkpoint) or Path(source).is_dir():
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
        if experts_per_token is not None:
            checkpoint = reroute(checkpoint, experts_per_token)
        tensors, _ = derive_tensors(checkpoint, load_tables())
        stored = {t.name: CheckpointTensor(t) for t in tensors}
        return Model(Weights(_supported(checkpoint.config, checkpoint.directory), stored, dtype=dtype, threads=threads))
    if experts_per_token is not None:
        raise UsageError("--experts-per-token", "is for checkpoints: a GGUF has its number of experts in its tables",
                         hint="re-route the GGUF first, or use the checkpoint")
    file = open_gguf(source, template=True)
    try:
        if file.template or file.value(TEMPLATE_KEY) is True:
            raise InputError(file.path, "is a template: it holds no weights", hint="convert the checkpoint first")
        config = _supported(read_gguf_config(file), file.path)
        return Model(Weights(config, gguf_tensors(file, config), dtype=dtype, threads=threads, close=file.close))
    except BaseException:
        file.close()
        raise


def _supported(config: Any, where: object) -> Any:
    if (config.n_group or 0) > 1:
        raise InputError(where, f"routes within {config.n_group} groups of experts, expected one", hint="no DeepSeek-V4 does")
    return config


def gguf_tensors(file: GgufFile, config: Any) -> dict[str, GgufTensor]:
    """The tensors that a model of `config` needs, checked against it."""
    missing, problems = [], []
    found = {}
    for row, layer, shape in expand_rows(config, load_tables()):
        name = row.name.format(layer=layer)
        info = file.tensors.get(name)
        if info is None:
            missing.append(name)
            continue
        allowed = {"I32"} if row.integers else DECODABLE
        if info.ne != shape[::-1]:
            problems.append(f"tensor {name} is {list(info.ne)}, the metadata imply {list(shape[::-1])}")
        elif info.format.name not in allowed:
            problems.append(f"tensor {name} is {info.format.name}, which cannot be used here (expected {', '.join(sorted(allowed))})")
        else:
            found[name] = GgufTensor(file, info)
    if missing:
        problems.insert(0, f"{len(missing)} tensors missing: {', '.join(missing)}")
    if problems:
        raise InputError(file.path, "; ".join(problems))
    return found


class GgufTensor:
    """A tensor of a GGUF."""

    def __init__(self, file: GgufFile, info: TensorInfo) -> None:
        self._file, self._info = file, info
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
        return False

    def ids(self, row: int, buffers: Buffers) -> NDArray[np.int32]:
        """See StoredTensor."""
        return self._read(row, 1, buffers).view("<i4")

    def where(self, row: int) -> str:
        """See StoredTensor."""
        place = f"row {row}"
        if len(self.shape) == 3:
            place = "expert {} row {}".format(*divmod(row, self.shape[1]))
        return f"{self._file.path}: tensor {self._info.name}: {place}"


class CheckpointTensor:
    """A tensor as a GGUF has it, put together from the matrices of a checkpoint."""

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

    def product(self, first: int, n: int, x: NDArray[np.float32], out: NDArray[np.float32], buffers: Buffers) -> bool:
        """See StoredTensor."""
        return False

    def ids(self, row: int, buffers: Buffers) -> NDArray[np.int32]:
        """See StoredTensor."""
        return buffers.reader.read_ids(self._sources[0], row, 1, 1 << 31)[0]

    def where(self, row: int) -> str:
        """See StoredTensor."""
        number, row = divmod(row, self._rows_each)
        return f"{self._sources[number].weight.where}: row {row}"
