"""Bytes of the encoders against bytes that ggml wrote, and against the numpy reference for everything else."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from quant_reference import (
    Ggml,
    differing_blocks,
    kinds_of_importance,
    kinds_of_rows,
    quantize_q4_k,
    quantize_q8_0,
)

from dsv4tools.errors import InputError
from dsv4tools.formats.codecs import encode_rows, quantize
from dsv4tools.formats.source import SourceKind, SourceRows
from dsv4tools.formats.table import FORMATS

DATA = Path(__file__).parent / "data"
INPUTS = np.load(DATA / "quant_in.npz")
GOLDEN = {
    (name, *key.split("/")): expected
    for name in ("Q8_0", "Q4_K")
    for key, expected in np.load(DATA / f"quant_{name.lower()}.npz").items()
}


def encode(x, name, importance=None):
    """Blocks, and which of them have finite scales, without the zeroing of what has not."""
    target = FORMATS[name]
    rows = [SourceRows(SourceKind.F32, row.view(np.uint8), 1, row.size) for row in np.ascontiguousarray(x)]
    out = np.zeros((len(rows), target.row_bytes(x.shape[1])), np.uint8)
    faulty = [encode_rows(row, target, line, importance=importance).first for row, line in zip(rows, out, strict=True)]
    return out, np.array([fault is None for fault in faulty])


def finite_rows(blocks, n_bytes, n_scale_bytes):
    """Which rows have only finite F16 scales at the start of their blocks."""
    scales = blocks.reshape(len(blocks), -1, n_bytes)[:, :, :n_scale_bytes].copy().view(np.uint16)
    return (scales & 0x7FFF < 0x7C00).all(axis=(1, 2))


@pytest.mark.parametrize(("name", "kind", "importance"), sorted(GOLDEN))
def test_blocks_are_those_of_ggml(name, kind, importance):
    weights = None if importance == "none" else INPUTS[f"im/{importance}"]
    found = quantize(INPUTS[f"in/{kind}"], name, weights)
    assert not (report := differing_blocks(found, GOLDEN[name, kind, importance], FORMATS[name].block_bytes)), report


def test_golden_data_covers_both_types_with_all_kinds():
    assert {(name, kind) for name, kind, _ in GOLDEN} == {
        (name, kind) for name in ("Q8_0", "Q4_K") for kind in ("gauss", "fp4", "sparse", "outlier", "edge")
    }
    assert {importance for name, _, importance in GOLDEN if name == "Q4_K"} == {"none", "imat", "imat_zeros"}


@pytest.mark.parametrize("weights", kinds_of_importance(np.random.default_rng(0), 768))
def test_q4_k_is_that_of_the_reference(weights):
    rng = np.random.default_rng(7)
    importance = kinds_of_importance(rng, 768)[weights]
    for kind, x in kinds_of_rows(rng, 5, 768).items():
        expected = quantize_q4_k(x, importance)
        found, fine = encode(x, "Q4_K", importance)
        assert (fine == finite_rows(expected, 144, 4)).all(), kind
        assert not (report := differing_blocks(found[fine], expected[fine], 144)), f"{kind}: {report}"


def test_q8_0_is_that_of_the_reference():
    for kind, x in kinds_of_rows(np.random.default_rng(8), 5, 768).items():
        expected = quantize_q8_0(x)
        found, fine = encode(x, "Q8_0")
        assert (fine == finite_rows(expected, 34, 2)).all(), kind
        assert not (report := differing_blocks(found[fine], expected[fine], 34)), f"{kind}: {report}"


# Bits as they come, up to 2^23: signs, zeros, subnormal numbers and magnitudes that have nothing to do with each other.
ANY_FLOATS = st.one_of(
    st.integers(0, 0x4B000000).flatmap(lambda bits: st.sampled_from([bits, bits | 0x80000000])),
    st.sampled_from([0, 0x80000000, 1, 0x80000001, 0x00800000, 0x007FFFFF, 0x3F800000, 0xBF800000]),
)


@settings(deadline=None, max_examples=60)
@given(arrays(np.uint32, (2, 256), elements=ANY_FLOATS), st.booleans(), st.data())
def test_any_finite_values(bits, weighted, data):
    x = bits.view(np.float32)
    importance = None
    if weighted:
        sizes = st.integers(0, 0x60000000)
        importance = data.draw(arrays(np.uint32, 256, elements=sizes)).view(np.float32)
    for name, expected in (("Q4_K", quantize_q4_k(x, importance)), ("Q8_0", quantize_q8_0(x))):
        found, fine = encode(x, name, importance if name == "Q4_K" else None)
        n = FORMATS[name].block_bytes
        assert not (report := differing_blocks(found[fine], expected[fine], n)), report


def test_subnormal_scales_of_q8_0():
    """Where 1/d is at the end of float32, and just beyond it."""
    exponents = np.arange(-149, -100)
    x = np.ldexp(np.linspace(-1.99, 1.99, 32, dtype=np.float32), exponents[:, None]).astype(np.float32)
    assert not differing_blocks(quantize(x, "Q8_0"), quantize_q8_0(x), 34)


def test_halves_of_q8_0_round_away_from_zero():
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = 127, 0.5, -0.5, 1.5, -2.5, np.nextafter(np.float32(0.5), np.float32(0))
    assert quantize(x, "Q8_0")[0, 2:8].view(np.int8).tolist() == [127, 1, -1, 2, -3, 0]


def around_middles(spacing_bits):
    """float32 around each middle between two numbers that have `spacing_bits` fewer bits, of either sign."""
    middles = np.arange(0, 0x7F800000, 1 << spacing_bits, dtype=np.int64) + (1 << (spacing_bits - 1))
    bits = (middles[:, None] + np.array([-(1 << (spacing_bits - 1)), -1, 0, 1])).astype(np.uint32).reshape(-1)
    return np.concatenate([bits, bits | np.uint32(0x80000000)]).view(np.float32)


def test_f16_is_that_of_numpy():
    x = around_middles(13)
    x = np.concatenate([x, np.ldexp(np.float32([1, 1.5, 1.5000001, 3, 2.9999998]), -25), [65519.996]])[None]
    x = x[:, np.abs(x[0]) < 65520].astype(np.float32)
    assert (quantize(x, "F16") == x.astype(np.float16).view(np.uint8)).all()


def test_bf16_is_that_of_gguf():
    x = around_middles(16)[None]
    x = x[:, np.abs(x[0]) < np.uint32(0x7F7F8000).view(np.float32)]
    assert (quantize(x, "BF16") == gguf.quants.quantize(x, gguf.GGMLQuantizationType.BF16)).all()


def test_f32_is_a_copy():
    bits = np.random.default_rng(0).integers(0, 0x7F800000, (3, 77), dtype=np.uint32)
    assert (quantize(bits.view(np.float32), "F32").reshape(3, 77, 4).view(np.uint32)[:, :, 0] == bits).all()


if "DSV4TOOLS_GGML_LIB" in os.environ:

    @pytest.mark.parametrize("seed", range(8))
    def test_blocks_of_a_ggml_library(seed):
        """Not collected without a library: there is nothing to compare with then."""
        ggml = Ggml(os.environ["DSV4TOOLS_GGML_LIB"])
        rng = np.random.default_rng(seed)
        weights = kinds_of_importance(rng, 1024)
        for kind, x in kinds_of_rows(rng, 50, 1024).items():
            for name, n in (("Q8_0", 34), ("Q4_K", 144)):
                for importance in weights.values() if name == "Q4_K" else [None]:
                    try:
                        found = quantize(x, name, importance)
                    except InputError:   # a scale beyond F16
                        continue
                    expected = ggml.quantize(x, name, importance)
                    assert not (report := differing_blocks(found, expected, n)), f"{kind}: {report}"
