"""Q4_0, Q4_1, Q5_0 and Q5_1: bytes that ggml wrote, values that gguf-py reads, and scales beyond F16."""

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

DATA = Path(__file__).parent / "data"
GOLDEN = {tuple(key.split("/")): blocks for key, blocks in np.load(DATA / "quant_legacy.npz").items()}
NAMES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.mark.parametrize(("name", "kind", "importance"), sorted(GOLDEN))
def test_blocks_are_those_of_ggml(name, kind, importance):
    weights = None if importance == "none" else INPUTS[f"im/{importance}"]
    found = quantize(INPUTS[f"in/{kind}"], name, weights)
    assert not (report := differing_blocks(found, GOLDEN[name, kind, importance], FORMATS[name].block_bytes)), report


def test_golden_data_covers_all_types_with_all_kinds():
    kinds, importance = ("gauss", "fp4", "sparse", "outlier", "edge"), ("none", "imat", "imat_zeros")
    assert set(GOLDEN) == {(name, kind, i) for name in NAMES for kind in kinds for i in importance}


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_hard_to_search(name):
    assert differing_rows(name) == []


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_decoded_as_gguf_does(name):
    blocks = np.random.default_rng(0).integers(0, 256, (3000, FORMATS[name].block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):   # F16 scales that are infinite or NaN
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    found = dequantize(blocks, name)
    assert ((found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))).all()
    assert np.isfinite(expected).mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_cols", [32, 96, 1024, 8192])
def test_weights_depend_on_the_whole_row(name, n_cols):
    """However rows and tiles lie, each row's bytes are those of the row alone; scaled rows differ in their weights."""
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(37, n_cols)) * 10.0 ** rng.uniform(-3, 2, (37, 1))).astype(np.float32)
    importance = rng.random(n_cols, np.float32)
    together = quantize(x, name, importance)
    assert all((quantize(row, name, importance) == line).all() for row, line in zip(x, together, strict=True))
    with_outlier = np.concatenate([x[:1], np.full((1, n_cols), 1e4, np.float32)], axis=1)
    first_half = quantize(with_outlier, name, np.tile(importance, 2))[0, : together.shape[1]]
    assert n_cols < 1024 or (first_half != together[0]).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_scale_beyond_f16_is_a_fault(name, weighted):
    x = np.random.default_rng(1).normal(size=(3, 1024)).astype(np.float32)
    x[1, 512:544] *= np.float32(1e9)
    importance = np.ones(1024, np.float32) if weighted else None
    out = np.full(3 * FORMATS[name].row_bytes(1024), 0xAA, np.uint8)
    source = SourceRows(SourceKind.F32, x.reshape(-1).view(np.uint8), 3, 1024)
    faults = encode_rows(source, FORMATS[name], out, importance=importance)
    assert (faults.n_source, faults.n_target, faults.first) == (0, 1, (FaultKind.BLOCK_OVERFLOW, 1, 512))
    assert not out.any()


@pytest.mark.parametrize("name", NAMES)
def test_faults_are_counted_once(name):
    """With importance rows are read twice."""
    x = np.zeros((2, 64), np.float32)
    x[1, 3] = np.nan
    out = np.zeros(2 * FORMATS[name].row_bytes(64), np.uint8)
    source = SourceRows(SourceKind.F32, x.reshape(-1).view(np.uint8), 2, 64)
    faults = encode_rows(source, FORMATS[name], out, importance=np.ones(64, np.float32), zero_nan=True)
    assert (faults.n_source, faults.first) == (1, (FaultKind.NOT_FINITE, 1, 3))
    x[1, 3] = 0
    assert (out.reshape(2, -1) == quantize(x, name, np.ones(64, np.float32))).all()


def test_a_block_by_hand():
    """-8 .. 7 and 0 are exact under d = 1 in Q4_0; the nibble of x is x + 8."""
    x = np.float32([*range(-8, 8), *[0] * 16])
    expected = [(8 << 4) | (i + 8) for i in range(-8, 8)]
    assert quantize(x, "Q4_0").tolist() == [*np.float16(1).tobytes(), *expected]
