"""The grids of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S, and which of their points are near to any other.

These formats take 8 (IQ2) or 4 (IQ3) values at once: levels 0..2 or 0..7 of theirs make a cell of a lattice, and those
cells that are points of the format's grid can be stored, by their number. In a search a level l stands for ``2 l + 1``,
in a decoded block for `Grid.values`. Where the cell that values fall in is no point, ggml tries the points that are
nearest to it, in the order of `Cells`.

For kernels, which cannot call this: pass them the arrays. A cell's number is the sum of ``level[i] * n_levels**i``,
exact in float32 lanes, and all points are numbered in this order. `nearest` turns `Cells` to what its search reads.

The grids are those of ggml-quants.c and ggml-common.h (iq2xxs_grid and so on), the lists those of its iq2xs_init_impl
and iq3xs_init_impl. Plain numpy: lists are made once per process, in a fraction of a second.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 512   # cells whose distances are worked on at once


@dataclass(frozen=True, slots=True)
class Grid:
    """The points of a format.

    Attributes
    ----------
    levels:
        uint8 [n_points, n_dims]: 0 .. n_levels - 1.
    values:
        uint8 [n_points, n_dims]: what the levels stand for in a decoded block, before scale and sign.
    n_levels:
        3 or 8.
    """

    levels: NDArray[np.uint8]
    values: NDArray[np.uint8]
    n_levels: int


@dataclass(frozen=True, slots=True)
class Cells:
    """For every cell of a format's lattice the points to try.

    Attributes
    ----------
    point:
        int32 [n_cells]: the number of the point that the cell is, -1 where it is none.
    start:
        int32 [n_cells + 1]: the list of cell c is ``near[start[c] : start[c + 1]]``.
    near:
        uint16: numbers of points, by distance and then by number: all that are as near as the nearest one, and
        those at the next larger distances that the format asks for. Of a cell that is a point, that point alone.
    """

    point: NDArray[np.int32]
    start: NDArray[np.int32]
    near: NDArray[np.uint16]


@cache
def find_grid(name: str) -> Grid:
    """The grid of the format `name`, one of `GRIDS`."""
    values, n_dims, bitmap, _ = _ROWS[name]
    n_levels = len(values)
    is_point = np.unpackbits(np.frombuffer(base64.b64decode(bitmap), np.uint8))
    levels = np.flatnonzero(is_point)[:, None] // n_levels ** np.arange(n_dims) % n_levels
    return Grid(levels.astype(np.uint8), np.array(values, np.uint8)[levels], n_levels)


@cache
def find_cells(name: str) -> Cells:
    """The cells of the format `name`, one of `GRIDS`."""
    grid, n_distances = find_grid(name), _ROWS[name][3]
    n_dims = grid.levels.shape[1]
    powers = grid.n_levels ** np.arange(n_dims)
    n_cells = grid.n_levels**n_dims
    levels = (np.arange(n_cells)[:, None] // powers % grid.n_levels).astype(np.float32)
    points = grid.levels.astype(np.float32)
    point = np.full(n_cells, -1, np.int32)
    point[grid.levels @ powers] = np.arange(len(points))
    counts, lists = [], []
    for first in range(0, n_cells, _CHUNK):
        mine = levels[first : first + _CHUNK]
        squares = (mine * mine).sum(1)[:, None] + (points * points).sum(1) - 2 * mine @ points.T
        distances = squares.astype(np.uint8)   # 196 at most, and float32 is exact
        limit = distances.min(1, keepdims=True)
        for _ in range(1, n_distances):
            limit = np.where(distances > limit, distances, np.uint8(255)).min(1, keepdims=True)
        is_near = distances <= np.where(point[first : first + _CHUNK, None] >= 0, np.uint8(0), limit)
        cells, near = np.nonzero(is_near)
        order = np.argsort(cells * 256 + distances[cells, near], kind="stable")
        lists.append(near[order].astype(np.uint16))
        counts.append(is_near.sum(1))
    start = np.zeros(n_cells + 1, np.int32)
    np.cumsum(np.concatenate(counts), out=start[1:])
    return Cells(point, start, np.concatenate(lists))


def sign_bytes() -> NDArray[np.uint8]:
    """uint8 [128]: the signs of eight values (1: negative) of which seven are stored; their number is even."""
    seven = np.arange(128, dtype=np.uint8)
    odd = np.unpackbits(seven[:, None], axis=1).sum(1, dtype=np.uint8) & 1
    return seven | odd << 7


# What levels stand for; values that make a cell; the grid as a bit per cell, in base64; how many distances count.
_ROWS: dict[str, tuple[tuple[int, ...], int, str, int]] = {
    "IQ2_XXS": (
        (8, 25, 43), 8,
        (
            "qqgoqggigoIAICgiAAgAAAAgAgAoAAIAAAAAIAAACggCgogAgCggAgogAgAIAACgCAAACgAAgAAAAgAAgiggAigoAAAgAAAgAAAgAAAAA"
            "AAAIAgAAAAAAAAAACggCAgAAgAgiAAggAgAAgIAgAAAAAAAgCAAAAAAAAggAiACAAAgAAAAAAgAAAAIAAAAAgAIAAAAAAAAAACggAAgAA"
            "ACAAAAiAAAAAAAAAAAgAAAAAACAAAAAAAoIAAAgACAoAAAAAAACAgAAAAAAAoAAAAAAAAAAAACggAAgAIAAAAAAgAAACAAAgAAAAAAAAA"
            "AAAAAAgAAAgAgAAAAAAAgAAAAAAAAAAAAAAAAAAAAgAAAAAAACggigggIgCggAAgAAgAAACAiAAACAgAAAgIAgAAAAggAgAAAAAgACAAA"
            "IAgAAAAAAAAAgAAAAAAAAAAAACggAAiAAAAAAAAgAAAAAAiAIAAAAAAAACAAAAAgAAgiCgAAAAAggAAAgAAAIAAAAAAAgAAAAAAAAAACA"
            "AAAAAAAAAAAAoAAAIAAAAAAAAAAACAAAAAAgAAAAAAgCCAAAAAgAAAAAAAAAgAAAAAAAAAgAAAAAAAAAAAAggAAgAAAgAAAAgAAAAACAA"
            "AAAAAAAgAAAAgAAAAAiAAAAAAAAAAAAAAoAAAAAAAgAAAAAAAAAAAAAAAAAAAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAoIAACA"
            "AAAIAAAAgAgAgAAAAAAAAACAAAAAAAAAAACgiAAgAAgAAAAAgAAAAIAAAAAgAACAAAgAAgAAAAAIAAAAAAAAAAAAAgAAAAAAAAAAAAACA"
            "AAAAAAAAAAAggAggAAAAAACAAAIAAAAAAgAAAAAAAACAAAAAAAAgAAIAgAAAAAAAAAAAAACAAAAAAAAAAAAAAAAAAAAAAAAAAAAACAAAA"
            "AAAgAAAAAAAAAAAAAAAAAAAAAAAIAAAAAgAACAAAACAAAAAAAAAAAAgAAAAAAAAAAAAAAAgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
            "AAAAAAAAAgAAAAAAAgAAAAAAAAAAAAAAAAAAAAAAAAAAA="
        ),
        2,
    ),
    "IQ2_XS": (
        (8, 25, 43), 8,
        (
            "qqqqiqqigqiigCqqqgqiggiggAAqiggCgiAAgIAACqqigqiogCggAAqiggCggCAgAAACggAIoAAAAgAAAqqgiCgggAgAAgKggAAgAAACC"
            "AAAgAAggAAAAAAIgCqqigqiggKggAAqiggCggAAgAoACogAAgAAgAAAAAqiggCigAggAAACggAAgAAAAAAAAgAgAACAAAAAAACgoAAgAg"
            "AAIAAAiAAAAAAAIAAAAAAAAAACAAAAAACqqggCggAAgAAgCggAAggACAAAAAgAAIAAAAAgAAAiggACgAAAAAAAAgAAACAIAAAACACAAIA"
            "AAAAAAAAIgoAgAACAAAgAIAAAAAAAAAgAgAAAgAgAAAAAIoAACqqigqqgiCggAAqiggCggAAiAAICgoACgAAAAAAAAqiigCggAAgAgACg"
            "gAggAAAAAAIAgIAAAggAAAAAACggAAiAgIAAAAAgCAAAggACAAAAAgAAAAAAAAAAAAqiggiggAAgAAACgiAAoAAAAAAAAgAAAAgAAAAAA"
            "AKggCAgAAgCAACAggAAAAAAAggAAAAACAAAAAgAACAgAgACAgAAAACAAAAIAoAAAAAAAAAAAAAAAAACAAACggAAgAgIAIAACgAAAAAAAA"
            "AAAAAAAAgAIAAAAIAAgAIAAAAAAAAAAAAgAAiAAAAAAAgAAAAAAAAAAAAACAAAAAAAAIAAAAAAACAAAAAAAAAAIAAAAAgIAAAAAqiggKg"
            "gAAoAAAqogAAgCCAAAAAAgAAgAAAAAoAAgigqAAgAAgACAAAgAAAAgAAAAAACAAAgAAAAAIAAAAggACAAAIAoAAAgIAAAAAAAAAAAAAAA"
            "IAAAAAggIAiggAAgAIAAgAAAgAAIAAAAgAAAAAAAAAAAIAACAAAiAAAAgggAAAAAAAAACAAAAAAoAAAAAACAAAAAAAAAAAAAACAAAAAAI"
            "AAAAACAAAAAAAAACAAAAAgAAAAAooAgIAAAAAAAgAAAAAACCAAAAAIogAAIAAAAgAAgAAAAAgAAAAACAAAAAAAAAAAAAAAAAAAAAAACAA"
            "AgAAIAogAAAAAAAgggAAAAAAAAoAAAAAAAoAAAAACAAIA="
        ),
        2,
    ),
    "IQ2_S": (
        (8, 25, 43), 8,
        (
            "qqqqiqqiqqigiKqqigqiqiigqCgqiggKqiAAiIgICqqiqqqqqCqiigqqqiiqqigqiggCqiAAiiggCggAAqiqiKqqigiAgAKgqiAiiggCA"
            "gAAgCgIoAgAAAACACqqioqiqqioiigqqqqiqqigqigACiiCgiCgACggAAqiqiiqqigqiggCqqigqiggCggAAiiggCggAAgAAAKqiiAqig"
            "gCgAAAqiggCggACAAAIAggAAgAIAAAAAAqiqiKgqAggIgAKgqCAqCggCggAAgIAIoggAAAoAAiqiigqiggCggAAiiggCggAIgAAACggAA"
            "gACAAAAAAiCgACggAAAIAAKggAAAAAAAACAAAIAIAAAAgAoAACqqqoqqqqCgiigqiqqCqqigqiggCgqggiiggCgAAAqqqqiqqigqiggCq"
            "qigqiggKggAAqiggCggAAgAACCiqigqiggAggAAqiggCggAAgAIACggAAgAAAAAAAAqiqqiqqigqigACqqigqiggCggAAiiggCggACgAA"
            "ACqqigqiggCggAAqiggCggAAgAAACggAIgAAAAAAAAqiggCggIAgAAACggAAgAAAAAAAAgACAAAAAACAAAioqigiiggAggAAqiggCggAA"
            "gACAAggAAgAIAAAACAiiggCggAAgAAACggAAgIAAgAIAAgAAAAAAAAAAgACggAAAAACAAAgAgAAAIAAAAAAAAAAAAAIAAAAAACAqiiiCg"
            "qiAiCgACiqigqigACggACiKgACggAAAAAACqqiAqiggCggAAqiggCggAAgIAACggACgAAAAAAAAiCgACggAAAAAICgAAAgAACAAAAAAAA"
            "IAAAoAIAAICiqggqiggCggAAiCgACggIAAAAACggAAgAAAAAAAIqiggCggAAgAIACggAAgAAAAAAiAgAAAAIAAgAAAACggAIgAAAAAAAC"
            "gAAAACIAAAAAAAAAAAAAAAAAgAAiIgIKggAAAAAIIAAAAgAACAAAAAIIAIoAAAAIoAAiggAAgAAAACAAggACAAAAAAAAAAAAAAAACAAAA"
            "AAAAIAAgAAAAAAAIAAAAAAAgAAIAAAAoAogAAAAAgAAIA="
        ),
        1,
    ),
    "IQ3_XXS": (
        (4, 12, 20, 28, 36, 44, 52, 62), 4,
        (
            "qFGgQCAAABRQoESgQAgAgKhAoFEAQQAEQaAEAAAAAIAAEAABCAEAFEEAACAAIAAAAAAABAAACAAAigAAEABAAFCgUKgBgAAAoECgAAAAA"
            "ABQoECAAAAAIKAAgEACAAIARAAAAACAAAAAAIgAAgAAQAQAAAAAAAAAAAAgAIAAAACgUKJAIAAAAFSgQIAAABGAoEGgAYAEAABAiAAAAA"
            "AAiAAAAAQAEAAAEAABAEAAAAgAAAAAAAAAAFACAAAEAAAAQKBQAACABCCgAIBACgAAAFCABAAAIAAgAEAAEAAAAAAAAACAAQAAIIIAIAA"
            "ABAAAAAgAAgAAEAAAAAAQAACAAAgBAAUAEQAAAAAAAAAAAAgAAIABgACCAAEAAAAEAAAACAAAAABACAAAAAQAEAAAgAAAAAAAAAAABKAA"
            "gAAAAAAAIAAAQAAAgIIAAgAABAAAAAgAIAAAACAgAAAAABAAAACAEQAAAAAgIAAAQAAAAAAAAAAAAIAAAAAACAAgAAAAAAAIAAoACAAAA"
            "EAAAABAAAABAAAAAAgAAAAAggAAAAAAAAAACAAAAAQAAAAAIAAAAAAAEAAAAAAQAEAAAAAAABWAACAAIAAAAAACAIAAAAAAIAAABCAAAI"
            "AEABAAAIAAAABAAEAAAACgAAgAAAAAAAAAAIAAAAAAAAAAAAAAAAA="
        ),
        2,
    ),
    "IQ3_S": (
        (1, 3, 5, 7, 9, 11, 13, 15), 4,
        (
            "5erEEKVQoEnoxJFECABEIMWSRIglUACQEESgUgigAUSAEUggkEAAgCgAohBFAAIQAlAAQAAgAECoAKIQAIgAAOjVoEoACkAg0ohAkECgA"
            "IKAJYggkASAIEmQQYhAACCAFCgAUCKIAABAkECgAEAAAAAAiQAKAAAAUKBABEAAIIDVqlGgVKABlKCRJEggQAAASQBQgUARAEikQChQII"
            "ACAEEAkCRAAAAkCEAgAYAQAIChAEAAAARAAARAAoAQgAAAIFUgVClAEEBUCFAAgACAIoAggCgAgAAAQIhRgFEEABAQQiBAACCIAECgBCA"
            "IAgAQAAIAAEAAAABQAKAEAAAAAIggiSBAgACAIVAghBBEAABQhEAQgAEggAhQoEQAAAAAoAAIAYAAAEAFAEAAAAAgAAAQAAgAAIAAAIQA"
            "gBBAAAAgiCAAiSACCFQgQCAAAAAggEAQggAQAAAhgAEACEAEEEgAgCACAAAAACACAABQAAAAAAAAIAAAACgAIAAAAAAAAFQAUAAAgACAA"
            "IEAAAAIAAAgAAggBCCAgAhAAIAAAAAAAAQAEAAgAJAAAAgAAIAABAAAAIAAAAAAUAAAAAAAAIkAoAKACCAAIEAIABQAAABIgkCAAEAAAC"
            "AAACQAEAAARBCAAACAAAAAACAAIAAAACAAAEAAAAAAgAAAAAAAAAA="
        ),
        3,
    ),
}

GRIDS = frozenset(_ROWS)
