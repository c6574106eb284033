"""Q2_K, Q3_K, Q5_K and Q6_K: bytes that ggml wrote, values that gguf-py reads, and scales beyond F16.

`HARD` holds rows of kinds that a search might trip over, as BF16 bits, and of each of ggml's rows of blocks the first
four bytes of SHA-256: out/TYPE [importance, kind, row], in the order of the keys; 0 where a scale is beyond F16.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from quant_reference import Ggml, differing_blocks, kinds_of_importance, kinds_of_rows

from dsv4tools.errors import InputError
from dsv4tools.formats.codecs import NEEDS_IMPORTANCE, dequantize, encode_rows, quantize
from dsv4tools.formats.source import FaultKind, SourceKind, SourceRows
from dsv4tools.formats.table import FORMATS

DATA = Path(__file__).parent / "data"
INPUTS = np.load(DATA / "quant_in.npz")
GOLDEN = {tuple(key.split("/")): blocks for key, blocks in np.load(DATA / "quant_k.npz").items()}
HARD = np.load(DATA / "quant_hard.npz")
NAMES = ("Q2_K", "Q3_K", "Q5_K", "Q6_K")
KINDS = [key[3:] for key in HARD if key.startswith("in/")]
IMPORTANCE = ["none"] + [key[3:] for key in HARD if key.startswith("im/")]


def differing_rows(name, expected=None):
    """Which rows of HARD, as (importance, kind, row), do not get ggml's bytes."""
    expected = HARD[f"out/{name}"] if expected is None else expected
    wrong = []
    for i, importance in enumerate(IMPORTANCE):
        weights = None if importance == "none" else HARD[f"im/{importance}"]
        if weights is None and name in NEEDS_IMPORTANCE:
            continue
        for j, kind in enumerate(KINDS):
            x = (HARD[f"in/{kind}"].astype(np.uint32) << 16).view(np.float32)
            for k, row in enumerate(x):
                try:
                    blocks = quantize(row, name, weights)
                    found = int.from_bytes(hashlib.sha256(blocks.tobytes()).digest()[:4], "little")
                except InputError:
                    found = 0
                if found != expected[i, j, k]:
                    wrong.append((importance, kind, k))
    return wrong


@pytest.mark.parametrize(("name", "kind", "importance"), sorted(GOLDEN))
def test_blocks_are_those_of_ggml(name, kind, importance):
    weights = None if importance == "none" else INPUTS[f"im/{importance}"]
    found = quantize(INPUTS[f"in/{kind}"], name, weights)
    assert not (report := differing_blocks(found, GOLDEN[name, kind, importance], FORMATS[name].block_bytes)), report


def test_golden_data_covers_all_types_with_all_kinds():
    kinds, importance = ("gauss", "fp4", "sparse", "outlier", "edge"), ("none", "imat", "imat_zeros")
    assert set(GOLDEN) == {(name, kind, i) for name in NAMES for kind in kinds for i in importance}
    assert len(KINDS) == 21
    assert IMPORTANCE == ["none", "spread", "some zeros", "zeros", "one column", "tiny", "huge"]


@pytest.mark.parametrize("name", [*NAMES, "Q4_K"])
def test_rows_that_are_hard_to_search(name):
    assert differing_rows(name) == []


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
    x[1, 512:768] *= np.float32(1e12)
    importance = np.ones(1024, np.float32) if weighted else None
    out = np.full(3 * FORMATS[name].row_bytes(1024), 0xAA, np.uint8)
    source = SourceRows(SourceKind.F32, x.reshape(-1).view(np.uint8), 3, 1024)
    faults = encode_rows(source, FORMATS[name], out, importance=importance)
    assert (faults.n_source, faults.n_target, faults.first) == (0, 1, (FaultKind.BLOCK_OVERFLOW, 1, 512))
    assert not out.any()


@pytest.mark.parametrize("name", NAMES)
def test_fp4_rows_get_the_bytes_of_their_values(name):
    rng = np.random.default_rng(2)
    packed = rng.integers(0, 256, (5, 256), dtype=np.uint8)
    source = SourceRows(SourceKind.FP4, packed.reshape(-1), 5, 512, rng.integers(110, 122, (5, 16), np.uint8), 1, 32)
    table = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(5, 512)
    x = table[codes] * np.exp2(np.repeat(source.scales.astype(np.float32) - 127, 32, axis=1))
    out = np.zeros(5 * FORMATS[name].row_bytes(512), np.uint8)
    assert encode_rows(source, FORMATS[name], out).first is None
    assert (out == quantize(x.astype(np.float32), name).reshape(-1)).all()


if "DSV4TOOLS_GGML_LIB" in os.environ:

    @pytest.mark.parametrize("name", [*NAMES, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS"])
    @pytest.mark.parametrize("seed", range(4))
    def test_blocks_of_a_ggml_library(name, seed):
        """Not collected without a library: there is nothing to compare with then."""
        ggml = Ggml(os.environ["DSV4TOOLS_GGML_LIB"])
        rng = np.random.default_rng(seed)
        weights = kinds_of_importance(rng, 1024)
        for kind, x in kinds_of_rows(rng, 50, 1024).items():
            for importance in weights.values():
                try:
                    found = quantize(x, name, importance)
                except InputError:   # a scale beyond F16
                    continue
                expected = ggml.quantize(x, name, importance)
                assert not (report := differing_blocks(found, expected, FORMATS[name].block_bytes)), f"{kind}: {report}"
