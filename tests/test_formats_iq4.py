"""IQ4_NL and IQ4_XS: bytes that ggml wrote, values that gguf-py reads, and scales beyond F16."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from quant_reference import differing_blocks
from test_formats_k import INPUTS, differing_rows

from dsv4tools.formats.codecs import dequantize, encode_rows, quantize
from dsv4tools.formats.source import FaultKind, SourceKind, SourceRows
from dsv4tools.formats.table import FORMATS

DATA = np.load(Path(__file__).parent / "data" / "quant_iq4.npz")
GOLDEN = {tuple(key.split("/")): blocks for key, blocks in DATA.items() if not key.startswith("hard/")}
NAMES = ("IQ4_NL", "IQ4_XS")


@pytest.mark.parametrize(("name", "kind", "importance"), sorted(GOLDEN))
def test_blocks_are_those_of_ggml(name, kind, importance):
    weights = None if importance == "none" else INPUTS[f"im/{importance}"]
    found = quantize(INPUTS[f"in/{kind}"], name, weights)
    assert not (report := differing_blocks(found, GOLDEN[name, kind, importance], FORMATS[name].block_bytes)), report


def test_golden_data_covers_both_types_with_all_kinds():
    kinds, importance = ("gauss", "fp4", "sparse", "outlier", "edge"), ("none", "imat", "imat_zeros")
    assert set(GOLDEN) == {(name, kind, i) for name in NAMES for kind in kinds for i in importance}


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_hard_to_search(name):
    assert differing_rows(name, DATA[f"hard/{name}"]) == []


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_decoded_as_gguf_does(name):
    blocks = np.random.default_rng(0).integers(0, 256, (2000, FORMATS[name].block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):   # F16 scales that are infinite or NaN
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    found = dequantize(blocks, name)
    assert ((found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))).all()
    assert np.isfinite(expected).mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_scale_beyond_f16_is_a_fault(name, weighted):
    x = np.random.default_rng(1).normal(size=(3, 1024)).astype(np.float32)
    x[1, 512 : 512 + FORMATS[name].block_values] *= np.float32(1e12)
    importance = np.ones(1024, np.float32) if weighted else None
    out = np.full(3 * FORMATS[name].row_bytes(1024), 0xAA, np.uint8)
    source = SourceRows(SourceKind.F32, x.reshape(-1).view(np.uint8), 3, 1024)
    faults = encode_rows(source, FORMATS[name], out, importance=importance)
    assert (faults.n_source, faults.n_target, faults.first) == (0, 1, (FaultKind.BLOCK_OVERFLOW, 1, 512))
    assert not out.any()


@pytest.mark.parametrize("name", NAMES)
def test_the_sixteen_numbers_are_exact(name):
    """Each of them twice, in any order, under a scale of 1 in IQ4_NL and d = -1/32 with level 0 in IQ4_XS."""
    numbers = np.float32([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
    x = np.random.default_rng(4).permuted(np.tile(numbers, (8, 2)), axis=1).reshape(-1)
    blocks = quantize(x, name)
    assert (dequantize(blocks, name) == x).all()
    levels = np.searchsorted(numbers, x).reshape(8, 2, 16)
    packed = (levels[:, 0] | levels[:, 1] << 4).astype(np.uint8)
    if name == "IQ4_NL":
        assert (blocks.reshape(8, 18)[:, :2].copy().view(np.float16) == 1).all()
        assert (blocks.reshape(8, 18)[:, 2:] == packed).all()
    else:
        assert (blocks[8:].reshape(8, 16) == packed).all()
