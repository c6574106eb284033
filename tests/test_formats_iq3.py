"""IQ3_XXS and IQ3_S: bytes that ggml wrote, values that gguf-py reads, what ggml would not encode, and a flaw of it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from quant_reference import differing_blocks
from test_formats_k import INPUTS, differing_rows

from dsv4tools.errors import InputError
from dsv4tools.formats.codecs import dequantize, encode_rows, quantize
from dsv4tools.formats.iq3 import GROUP, make_tables
from dsv4tools.formats.source import FaultKind, SourceKind, SourceRows
from dsv4tools.formats.table import FORMATS

DATA = np.load(Path(__file__).parent / "data" / "quant_iq3.npz")
GOLDEN = {tuple(key.split("/")): blocks for key, blocks in DATA.items() if not key.startswith("hard/")}
NAMES = ("IQ3_XXS", "IQ3_S")


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
    x[1, 512:768] *= np.float32(1e12)
    importance = np.ones(1024, np.float32) if weighted else None
    out = np.full(3 * FORMATS[name].row_bytes(1024), 0xAA, np.uint8)
    source = SourceRows(SourceKind.F32, x.reshape(-1).view(np.uint8), 3, 1024)
    faults = encode_rows(source, FORMATS[name], out, importance=importance)
    assert (faults.n_source, faults.n_target, faults.first) == (0, 1, (FaultKind.BLOCK_OVERFLOW, 1, 512))
    assert not out.any()


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_stop_ggml_are_an_error(name):
    x = np.random.default_rng(5).normal(size=(1, 256)).astype(np.float32) * 10
    with pytest.raises(InputError, match=r"^x\[0, 0\]: the block that starts here"):
        quantize(x, name, np.full(256, 3e38, np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_tables_hold_every_near_point_once_and_in_order(name):
    """A search written out, for cells that are no points: those as near as the nearest, and the next distances."""
    groups, cells, places, numbers = make_tables(name)
    levels = np.arange(4096)[:, None] >> 3 * np.arange(4) & 7
    points = np.flatnonzero(numbers >= 0)
    assert (places[points] == 0).all()
    for cell in np.flatnonzero(numbers < 0)[::29]:
        distances = ((levels[points] - levels[cell]) ** 2).sum(axis=1)
        limit = np.unique(distances)[{"IQ3_XXS": 1, "IQ3_S": 2}[name]]
        near = points[np.argsort(distances, kind="stable")][: (distances <= limit).sum()]
        first, length = places[cell] >> 6, places[cell] & 63
        listed = cells[GROUP * first :][:length]
        assert listed.tolist() == near.tolist()
        values = groups[4 * GROUP * first :][: 4 * GROUP * -(-length // GROUP)].reshape(-1, 4, GROUP)
        assert (values.transpose(0, 2, 1).reshape(-1, 4)[:length] == 2 * levels[listed] + 1).all()


def test_ggml_puts_what_follows_empty_sub_blocks_of_iq3_s_too_far_ahead():
    """Its pointers stay where they are at a sub-block of zeros; a reader then finds the next one's values there."""
    x = np.random.default_rng(6).normal(size=(1, 256)).astype(np.float32)
    x[0, 32:64] = 0
    shifted = dequantize(quantize(x, "IQ3_S"), "IQ3_S")[0].reshape(8, 32)
    parts = x.reshape(8, 32)
    assert np.corrcoef(shifted[0], parts[0])[0, 1] > 0.9
    assert all((np.sign(shifted[j]) == np.sign(parts[j + 1])).all() for j in range(1, 7))
    assert (np.sign(dequantize(quantize(x, "IQ3_XXS"), "IQ3_XXS")[0, 64:]) == np.sign(x[0, 64:])).mean() > 0.9
