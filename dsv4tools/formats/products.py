"""Products of rows of weights with vectors: of encoded rows without decoding them to memory, of float32 tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import InputError
from dsv4tools.formats import compile as compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.formats.table import Format

# Format -> its kernel in `dots`. Other formats are decoded to a tile and multiplied from there.
_KERNELS = {"Q8_0": "dot_q8_0", "Q4_K": "dot_q4_k"}
MULTIPLIABLE = frozenset(_KERNELS)


def prepare() -> None:
    """Compile or load the kernels of products, so that the first one starts at once."""
    compiled.load("dots")


def multiply_rows(
    data: NDArray[np.uint8], source_format: Format, x: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """``out[r] = row r . x`` for encoded rows, in float32. Releases the GIL.

    Parameters
    ----------
    data:
        uint8 [n_rows * source_format.row_bytes(n_cols)], contiguous.
    source_format:
        A format of `MULTIPLIABLE`.
    x:
        float32 [n_cols], contiguous.
    out:
        float32 [n_rows], contiguous.

    Raises
    ------
    InputError:
        An array does not have the size or type that goes with the others.
    """
    _check("data", data, np.uint8, (len(out) * source_format.row_bytes(len(x)),))
    _check("x", x, np.float32, (len(x),))
    _check("out", out, np.float32, (len(out),))
    getattr(compiled.load("dots"), _KERNELS[source_format.name])(data, x, out)


def multiply_tile(tile: NDArray[np.float32], x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """``out[s, r] = tile[r] . x[s]`` on this thread: tile [n_rows, n_cols], x [S, n_cols], out [S, n_rows].

    Releases the GIL. `tile` and `x` are contiguous, `out` may be part of a larger array. InputError where an array does
    not have the size or type that goes with the others.
    """
    n_rows, n_cols = tile.shape
    _check("tile", tile, np.float32, (n_rows, n_cols))
    _check("x", x, np.float32, (len(x), n_cols))
    if out.dtype != np.float32 or out.shape != (len(x), n_rows):
        raise InputError("out", f"found {out.dtype} {list(out.shape)}, expected float32 {[len(x), n_rows]}")
    kernels = compiled.load("dots")
    short = -n_cols % kernels.TILE_N
    if short:
        tile, x = (np.pad(a, ((0, 0), (0, short))) for a in (tile, x))
    if out.size:
        kernels.dot_tile(tile, x, out)


def _check(name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        found, expected = f"{array.dtype} {list(array.shape)}", f"contiguous {np.dtype(dtype)} {list(shape)}"
        raise InputError(name, f"found {found}, expected {expected}")
