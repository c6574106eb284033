"""Grids and lists of near points, against gguf-py's grids and a search that is written out."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest

from dsv4tools.formats.grids import GRIDS, find_cells, find_grid, sign_bytes

N_POINTS = {"IQ2_XXS": 256, "IQ2_XS": 512, "IQ2_S": 1024, "IQ3_XXS": 256, "IQ3_S": 512}
N_DISTANCES = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3}


def test_all_formats_with_a_grid_are_there():
    assert set(N_POINTS) == GRIDS


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_the_grid_is_that_of_gguf(name):
    theirs = getattr(gguf.quants, name)
    theirs.init_grid()
    grid = find_grid(name)
    assert grid.values.shape == (N_POINTS[name], 8 if name.startswith("IQ2") else 4)
    assert (grid.values == theirs.grid[0, 0]).all()
    assert (np.array(theirs.grid_map)[grid.levels] == grid.values).all()
    assert grid.n_levels == len(theirs.grid_map)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_near_points_are_those_of_a_search(name):
    grid, cells = find_grid(name), find_cells(name)
    n_dims = grid.levels.shape[1]
    points = [tuple(map(int, levels)) for levels in grid.levels]
    assert len(cells.point) == len(cells.start) - 1 == grid.n_levels**n_dims
    every = list(itertools.product(range(grid.n_levels), repeat=n_dims))   # the last one varies fastest
    for number in range(0, len(every), 151):
        cell = every[number][::-1]
        by_distance = sorted((sum((a - b) ** 2 for a, b in zip(cell, p, strict=True)), i) for i, p in enumerate(points))
        allowed = sorted({distance for distance, _ in by_distance})[: N_DISTANCES[name]]
        expected = [i for distance, i in by_distance if distance in allowed]
        if cell in points:
            expected = [points.index(cell)]
            assert cells.point[number] == expected[0]
        else:
            assert cells.point[number] == -1
        assert cells.near[cells.start[number] : cells.start[number + 1]].tolist() == expected
    assert (cells.point >= 0).sum() == len(points)


def test_signs_are_those_of_gguf():
    assert sign_bytes().tobytes() == gguf.quants.IQ2_XXS.ksigns
