"""Weights by their GGUF names, whichever file they lie in; matrices are decoded tile by tile inside a product.

Nothing is loaded whole: a product reads the rows that it needs, vectors are kept once they were asked for.
"""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import InputError
from dsv4tools.files import usable_cpus
from dsv4tools.formats.products import multiply_tile
from dsv4tools.model.stored import Buffers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from dsv4tools.checkpoint import Config
    from dsv4tools.model.functions import Floats
    from dsv4tools.model.stored import StoredTensor

TILE_VALUES = 1 << 17       # decoded weights of a tile: 512 KiB of float32, which stay in a core's cache
MIN_SHARE_VALUES = 1 << 18  # a thread that gets fewer weights than this is not worth waking


class Weights:
    """All weights of a model.

    Attributes
    ----------
    config:
        The structural values that the shapes follow from.
    dtype:
        float32 or float64: of all arrays that come out.
    paths:
        The files that they lie in.
    """

    def __init__(
        self, config: Config, tensors: Mapping[str, StoredTensor], paths: Iterable[Path], *,
        dtype: type[np.floating[Any]] = np.float32, threads: int | None = None, close: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.dtype, self.paths = config, np.dtype(dtype), tuple(paths)
        self._tensors, self._threads, self._close = tensors, threads or usable_cpus(), close
        self._vectors: dict[str, Floats] = {}
        self._local, self._all_buffers = threading.local(), list[Buffers]()
        self._pool = ThreadPoolExecutor(self._threads, "matmul")

    def close(self) -> None:
        """Give threads and files back."""
        self._pool.shutdown()
        if self._close is not None:
            self._close()

    @property
    def n_bytes_read(self) -> Counter[str]:
        """Stored bytes read so far of each tensor (of each expert's matrix, in a checkpoint)."""
        return sum((b.n_bytes_read for b in self._all_buffers), Counter())

    def vector(self, name: str) -> Floats:
        """A small tensor in its own shape; kept in memory from then on. Errors of `matmul`."""
        found = self._vectors.get(name)
        if found is None:
            t = self._tensors[name]
            rows = t.decode(0, t.n_rows, self._buffers())
            if not np.isfinite(rows).all():
                raise self._not_finite(t, 0, t.n_rows)
            found = self._vectors[name] = rows.reshape(t.shape).astype(self.dtype)
        return found

    def rows(self, name: str, numbers: NDArray[np.int64]) -> Floats:
        """Rows of a matrix by number: [S] -> [S, n_cols]. Errors of `matmul`."""
        t = self._tensors[name]
        out = np.empty((len(numbers), t.n_cols), self.dtype)
        for i, row in enumerate(numbers):
            out[i] = t.decode(int(row), 1, self._buffers())[0]
            if not np.isfinite(out[i]).all():
                raise self._not_finite(t, int(row), 1)
        return out

    def ids(self, name: str, numbers: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
        """Rows of a table of ids: [S] -> [S, n_cols]; InputError where one is not in 0 .. `limit` - 1."""
        t = self._tensors[name]
        out = np.empty((len(numbers), t.n_cols), np.int64)
        for i, row in enumerate(numbers):
            out[i] = t.ids(int(row), limit, self._buffers())
        return out

    def matmul(self, name: str, x: Floats, rows: tuple[int, int] | None = None) -> Floats:
        """``x @ W.T`` for a matrix W, or for its rows ``rows[0] .. rows[1] - 1``: [S, n_cols] -> [S, n rows].

        Raises
        ------
        InputError
            A weight is NaN or infinite, or the product overflows; names tensor, row and column.
        ResourceError, VerifyError
            The file cannot be read, or was exchanged.
        """
        t = self._tensors[name]
        first, stop = rows or (0, t.n_rows)
        x = np.ascontiguousarray(x, self.dtype)
        out = np.empty((len(x), stop - first), self.dtype)
        if len(x):
            n_shares = max(1, min(self._threads, (stop - first) * t.n_cols // MIN_SHARE_VALUES))
            if self.dtype != np.float32:
                n_shares = 1   # these products are numpy's, which has threads of its own
            bounds = [first + (stop - first) * i // n_shares for i in range(n_shares + 1)]
            if n_shares == 1:
                self._multiply(t, x, first, stop, out)
            else:
                list(self._pool.map(
                    lambda a, b: self._multiply(t, x, a, b, out[:, a - first : b - first]), bounds[:-1], bounds[1:]
                ))
        if not np.isfinite(out).all():
            raise self._not_finite(t, first, stop - first)
        return out

    def _multiply(self, t: StoredTensor, x: Floats, first: int, stop: int, out: Floats) -> None:
        """One thread's share of a product: ``out[:, i] = x @ row (first + i)``."""
        buffers = self._buffers()
        if len(x) == 1 and x.dtype == np.float32 and t.product(first, stop - first, x[0], out[0], buffers):
            return
        step = max(1, TILE_VALUES // t.n_cols)
        for a in range(first, stop, step):
            b = min(a + step, stop)
            tile = t.decode(a, b - a, buffers)
            part = out[:, a - first : b - first]
            if x.dtype == np.float32:
                multiply_tile(tile, x, part)
            else:
                np.matmul(x, tile.astype(self.dtype).T, out=part)

    def _buffers(self) -> Buffers:
        mine: Buffers | None = getattr(self._local, "buffers", None)
        if mine is None:
            mine = self._local.buffers = Buffers()
            self._all_buffers.append(mine)
        return mine

    def _not_finite(self, t: StoredTensor, first: int, n: int) -> InputError:
        """Why a product with these rows is not finite."""
        for row in range(first, first + n):
            values = t.decode(row, 1, self._buffers())[0]
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                return InputError(t.where(row), f"column {bad[0]} is {values[bad[0]]}, expected a finite weight")
        return InputError(t.where(first), f"a product with it is beyond {self.dtype}", hint="are the weights damaged?")
