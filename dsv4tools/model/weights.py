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
from dsv4tools.formats import codecs, products
from dsv4tools.model.stored import Buffers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dsv4tools.checkpoint import Config
    from dsv4tools.model.functions import Floats
    from dsv4tools.model.observe import ProductObserver
    from dsv4tools.model.stored import StoredTensor

TILE_VALUES = 1 << 17       # decoded weights of a tile: 512 KiB of float32, which stay in a core's cache
MIN_PIECE_VALUES = 1 << 18  # weights of a piece of work: fewer are not worth waking a thread for
PIECES_PER_THREAD = 2       # more than one, so that a thread that was held up can be helped
# A matrix by name, vectors [S, n_cols] to multiply with it, and which of its rows (None: all).
Product = tuple[str, "Floats", tuple[int, int] | None]


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
    watch:
        Sees the inputs of every product, where somebody wants to (`observe.ProductObserver`).
    """

    def __init__(
        self, config: Config, tensors: Mapping[str, StoredTensor], paths: Iterable[Path], *,
        dtype: type[np.floating[Any]] = np.float32, threads: int | None = None, close: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.dtype, self.paths = config, np.dtype(dtype), tuple(paths)
        self._tensors, self._threads, self._close = tensors, threads or usable_cpus(), close
        self.watch: ProductObserver | None = None
        self._vectors: dict[str, Floats] = {}
        self._local, self._all_buffers = threading.local(), list[Buffers]()
        self._pool = ThreadPoolExecutor(self._threads, "matmul")

    def prepare(self) -> None:
        """Compile or load the kernels of these weights, so that the first product starts at once."""
        codecs.prepare({t.format_name for t in self._tensors.values()} - {"I32"})
        products.prepare()

    def close(self) -> None:
        """Give threads and files back."""
        self._pool.shutdown()
        if self._close is not None:
            self._close()

    @property
    def n_bytes_read(self) -> Counter[str]:
        """Stored bytes read so far of each tensor (of each expert's matrix, in a checkpoint)."""
        return sum((b.n_bytes_read for b in self._all_buffers), Counter())

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, rows before columns, experts before rows."""
        return self._tensors[name].shape

    def show_inputs(self, name: str, x: Floats) -> None:
        """Let `watch` see the inputs [S, n_cols] of a product that is not needed."""
        if self.watch is not None:
            self.watch(name, None, x)

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
                raise self._not_finite(t, int(row), int(row) + 1)
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
        return self.matmul_all([(name, x, rows)])[0]

    def matmul_all(self, products: Sequence[Product]) -> list[Floats]:
        """Several `matmul` at once: threads that are done with one go on with the next."""
        tasks, outs = [], []
        n_values = sum(self._n_values(product) for product in products)
        piece = max(MIN_PIECE_VALUES, n_values // (PIECES_PER_THREAD * self._threads))
        for name, x, rows in products:
            if self.watch is not None:
                self.watch(name, rows, x)
            t = self._tensors[name]
            first, stop = rows or (0, t.n_rows)
            x_rows = np.ascontiguousarray(x, self.dtype)
            out = np.empty((len(x), stop - first), self.dtype)
            outs.append(out)
            step = max(1, piece // t.n_cols)
            tasks += [(t, x_rows, a, min(a + step, stop), out[:, a - first : a - first + step])
                      for a in range(first, stop, step)]
        # Products in float64 are numpy's, which has threads of its own.
        run = map if len(tasks) == 1 or self.dtype != np.float32 else self._pool.map
        for _ in run(lambda task: self._multiply(*task), tasks):
            pass
        for (name, _, rows), out in zip(products, outs, strict=True):
            if not np.isfinite(out).all():
                t = self._tensors[name]
                raise self._not_finite(t, *(rows or (0, t.n_rows)))
        return outs

    def _n_values(self, product: Product) -> int:
        t = self._tensors[product[0]]
        first, stop = product[2] or (0, t.n_rows)
        return (stop - first) * t.n_cols

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
                products.multiply_tile(tile, x, part)
            else:
                np.matmul(x, tile.astype(self.dtype).T, out=part)

    def _buffers(self) -> Buffers:
        mine: Buffers | None = getattr(self._local, "buffers", None)
        if mine is None:
            mine = self._local.buffers = Buffers()
            self._all_buffers.append(mine)
        return mine

    def _not_finite(self, t: StoredTensor, first: int, stop: int) -> InputError:
        """Why a product with these rows is not finite."""
        for row in range(first, stop):
            values = t.decode(row, 1, self._buffers())[0]
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                return InputError(t.where(row), f"column {bad[0]} is {values[bad[0]]}, expected a finite weight")
        return InputError(t.where(first), f"a product with it is beyond {self.dtype}", hint="are the weights damaged?")
