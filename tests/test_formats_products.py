"""Products of encoded rows against exact sums over what gguf-py decodes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4tools.errors import InputError
from dsv4tools.formats.products import MULTIPLIABLE, multiply_rows, multiply_tile
from dsv4tools.formats.table import FORMATS

RNG = np.random.default_rng(0)


def exact(w, x):
    """Sums of float64 products, rounded once; and the sums of their magnitudes, which bound the error."""
    terms = w.astype(np.float64) * x.astype(np.float64)
    return np.array([math.fsum(row) for row in terms]), np.abs(terms).sum(axis=1)


def random_rows(name, n_rows, n_cols):
    """Any bytes are valid blocks but for their F16 scales, which are made ordinary."""
    fmt = FORMATS[name]
    blocks = RNG.integers(0, 256, (n_rows * n_cols // fmt.block_values, fmt.block_bytes), np.uint8)
    n_scales = {"Q8_0": 1, "Q4_K": 2}[name]
    blocks[:, : 2 * n_scales] = RNG.normal(0, 0.1, (len(blocks), n_scales)).astype("<f2").view(np.uint8)
    return blocks.reshape(-1)


@pytest.mark.parametrize("name", sorted(MULTIPLIABLE))
@pytest.mark.parametrize(("n_rows", "n_blocks"), [(1, 1), (3, 2), (7, 16), (64, 5)])
def test_encoded_rows(name, n_rows, n_blocks):
    n_cols = 256 * n_blocks
    data = random_rows(name, n_rows, n_cols)
    x = RNG.standard_normal(n_cols).astype(np.float32)
    w = dequantize(data.reshape(n_rows, -1), GGMLQuantizationType[name])
    out = np.full(n_rows, np.nan, np.float32)
    multiply_rows(data, FORMATS[name], x, out)
    expected, size = exact(w, x)
    # Q4_K takes a sub-block's minimum out of the sum, which is larger than what is left: hence the second bound.
    assert (np.abs(out - expected) <= 1e-6 * (size + np.abs(w).max() * np.abs(x).sum())).all()


@pytest.mark.parametrize("name", sorted(MULTIPLIABLE))
@pytest.mark.parametrize("bits", [b"\0\x7c", b"\0\x7e"])
def test_faulty_scales_show_in_their_row_only(name, bits):
    data = random_rows(name, 3, 512)
    data[len(data) // 3 : len(data) // 3 + 2] = np.frombuffer(bits, np.uint8)
    out = np.zeros(3, np.float32)
    multiply_rows(data, FORMATS[name], np.ones(512, np.float32), out)
    assert np.isfinite(out).tolist() == [True, False, True]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 70), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_tiles(n_rows, n_vectors, n_cols, margin):
    """Any number of rows, vectors and columns; `out` may be part of a larger array, whose rest stays as it is."""
    tile = RNG.standard_normal((n_rows, n_cols)).astype(np.float32)
    x = RNG.standard_normal((n_vectors, n_cols)).astype(np.float32)
    whole = np.full((n_vectors, n_rows + 2 * margin), 7.0, np.float32)
    multiply_tile(tile, x, whole[:, margin : margin + n_rows])
    for s in range(n_vectors):
        expected, size = exact(tile, x[s])
        assert (np.abs(whole[s, margin : margin + n_rows] - expected) <= 1e-6 * size).all()
    np.testing.assert_array_equal(np.delete(whole, np.s_[margin : margin + n_rows], axis=1), 7.0)


def test_arrays_that_do_not_fit():
    x, out, q8 = np.zeros(64, np.float32), np.zeros(2, np.float32), FORMATS["Q8_0"]
    data = np.zeros(4 * 34, np.uint8)
    multiply_rows(data, q8, x, out)
    for wrong in (
        (data[:-1], q8, x, out), (data, q8, x.astype(np.float64), out), (data, q8, x[::2], out), (data, q8, x, out[:1]),
        (data[::2], q8, x, out[:1]), (data, q8, np.zeros(65, np.float32), out),
    ):
        with pytest.raises(InputError):
            multiply_rows(*wrong)
    tile = np.zeros((2, 64), np.float32)
    for wrong in ((tile, x, out[None]), (tile, x[None], out[None, :1]), (tile[:, ::2], x[None, :32], out[None]),
                  (tile, x[None], out[None].astype(np.float64))):
        with pytest.raises((InputError, ValueError)):
            multiply_tile(*wrong)
