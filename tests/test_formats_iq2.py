"""IQ2_XXS, IQ2_XS and IQ2_S: bytes that ggml wrote, values that gguf-py reads, importance that must not be missing."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from quant_reference import Ggml, decode_fp4, differing_blocks, kinds_of_importance, kinds_of_rows
from test_formats_k import INPUTS, differing_rows

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.derive import UnitDeriver
from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.codecs import NEEDS_IMPORTANCE, add_column_energy, dequantize, encode_rows, quantize
from dsv4tools.formats.source import FaultKind, SourceKind, SourceRows
from dsv4tools.formats.table import FORMATS
from dsv4tools.plan import make_plan, tensor_units

DATA = np.load(Path(__file__).parent / "data" / "quant_iq2.npz")
GOLDEN = {tuple(key.split("/")): blocks for key, blocks in DATA.items() if not key.startswith("hard/")}
NAMES = ("IQ2_XXS", "IQ2_XS", "IQ2_S")
ONES = np.ones(1024, np.float32)


@pytest.mark.parametrize(("name", "kind", "importance"), sorted(GOLDEN))
def test_blocks_are_those_of_ggml(name, kind, importance):
    weights = None if importance == "none" else INPUTS[f"im/{importance}"]
    found = quantize(INPUTS[f"in/{kind}"], name, weights)
    assert not (report := differing_blocks(found, GOLDEN[name, kind, importance], FORMATS[name].block_bytes)), report


def test_golden_data_covers_all_types_with_all_kinds():
    kinds, importance = ("gauss", "fp4", "sparse", "outlier", "edge"), ("none", "imat", "imat_zeros")
    expected = {(name, kind, i) for name in NAMES for kind in kinds for i in importance}
    assert set(GOLDEN) == {key for key in expected if key[0] == "IQ2_S" or key[2] != "none"}
    assert all((DATA[f"hard/{name}"][1:] != 0).mean() > 0.8 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_hard_to_search(name):
    """Where ggml stops at an assertion, or writes a scale beyond F16, we have to refuse."""
    assert differing_rows(name, DATA[f"hard/{name}"]) == []


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_decoded_as_gguf_does(name):
    blocks = np.random.default_rng(0).integers(0, 256, (2000, FORMATS[name].block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):   # F16 scales that are infinite or NaN
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    found = dequantize(blocks, name)
    assert ((found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))).all()
    assert np.isfinite(expected).mean() > 0.9


@pytest.mark.parametrize("name", sorted(NEEDS_IMPORTANCE))
def test_importance_must_not_be_missing(name):
    x = np.zeros((1, 256), np.float32)
    with pytest.raises(UsageError, match=f"^importance: {name} cannot be encoded without; give a weight for each"):
        quantize(x, name)
    source = SourceRows(SourceKind.F32, x.reshape(-1).view(np.uint8), 1, 256)
    with pytest.raises(UsageError, match=f"{name} cannot be encoded without"):
        encode_rows(source, FORMATS[name], np.zeros(FORMATS[name].row_bytes(256), np.uint8))
    assert {"IQ2_XXS", "IQ2_XS"} == NEEDS_IMPORTANCE


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_beyond_f16_is_a_fault(name):
    x = np.random.default_rng(1).normal(size=(3, 1024)).astype(np.float32)
    x[1, 512:768] *= np.float32(1e12)
    out = np.full(3 * FORMATS[name].row_bytes(1024), 0xAA, np.uint8)
    source = SourceRows(SourceKind.F32, x.reshape(-1).view(np.uint8), 3, 1024)
    faults = encode_rows(source, FORMATS[name], out, importance=ONES)
    assert (faults.n_source, faults.n_target, faults.first) == (0, 1, (FaultKind.BLOCK_OVERFLOW, 1, 512))
    assert not out.any()


@pytest.mark.parametrize(
    ("name", "size", "weight"), [*((name, 1e20, 1.0) for name in NAMES), ("IQ2_XS", 1e4, 3e38), ("IQ2_S", 1e4, 3e38)]
)
def test_what_ggml_gives_up_on_is_a_fault(name, size, weight):
    """Squares, or weights, beyond float32. IQ2_XXS, like ggml, makes zeros of blocks whose weights are."""
    x = np.random.default_rng(2).normal(size=(1, 256)).astype(np.float32) * np.float32(size)
    with pytest.raises(InputError, match="needs a scale beyond the range of F16"):
        quantize(x, name, np.full(256, weight, np.float32))


def test_energy_is_summed_row_after_row():
    rng = np.random.default_rng(4)
    packed, scales = rng.integers(0, 256, (300, 160), np.uint8), rng.integers(110, 140, (300, 10), np.uint8)
    expected = np.zeros(320, np.float32)
    for row in decode_fp4(packed, scales):
        expected = expected + row * row
    energy = np.zeros(320, np.float32)
    for first, last in ((0, 1), (1, 130), (130, 300)):
        source = SourceRows(SourceKind.FP4, packed[first:last].reshape(-1), last - first, 320, scales, 1, 32, first)
        assert add_column_energy(source, energy).first is None
    assert energy.tobytes() == expected.tobytes()
    assert (energy != (decode_fp4(packed, scales).astype(np.float64) ** 2).sum(0).astype(np.float32)).any()


def test_faulty_values_have_no_energy():
    x = np.full((3, 5000), 2, np.float32)
    x[1, 4999] = np.nan
    energy = np.ones(5000, np.float32)
    faults = add_column_energy(SourceRows(SourceKind.F32, x.reshape(-1).view(np.uint8), 3, 5000), energy)
    assert (faults.n_source, faults.first) == (1, (FaultKind.NOT_FINITE, 1, 4999))
    assert energy.tolist() == [13] * 4999 + [9]
    with pytest.raises(InputError, match=r"expected contiguous float32 \[5000\]"):
        add_column_energy(SourceRows(SourceKind.F32, x.reshape(-1).view(np.uint8), 3, 5000), energy[1:])


def test_experts_weighed_by_their_energy_are_those_of_the_c_quantizer(tiny_6e, data):
    expected = json.loads((data / "tiny-6e.tensors.json").read_text())["q2"]
    experts = [name for name, tensor in expected.items() if tensor["type"] == "IQ2_XXS"]
    deriver = UnitDeriver(n_experts=12)
    for planned in make_plan(open_checkpoint(tiny_6e)).tensors:
        if planned.name not in experts:
            continue
        digest = hashlib.sha256()
        for unit in tensor_units(planned):   # one per expert
            rows = deriver.read(unit)
            assert isinstance(rows, SourceRows)
            energy = np.zeros(rows.n_cols, np.float32)
            add_column_energy(rows, energy)
            out = np.zeros(rows.n_rows * FORMATS["IQ2_XXS"].row_bytes(rows.n_cols), np.uint8)
            encode_rows(rows, FORMATS["IQ2_XXS"], out, importance=energy)
            digest.update(out)
        assert digest.hexdigest() == expected[planned.name]["sha256"], planned.name
        experts.remove(planned.name)
    assert experts == []


if "DSV4TOOLS_GGML_LIB" in os.environ:

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("seed", range(4))
    def test_blocks_of_a_ggml_library(name, seed):
        """Not collected without a library: there is nothing to compare with then."""
        ggml = Ggml(os.environ["DSV4TOOLS_GGML_LIB"])
        rng = np.random.default_rng(seed)
        weights = kinds_of_importance(rng, 1024)
        if name in NEEDS_IMPORTANCE:
            del weights["none"]
        for kind, x in kinds_of_rows(rng, 50, 1024).items():
            for importance in weights.values():
                try:
                    found = quantize(x, name, importance)
                except InputError:   # a scale beyond F16, or what ggml stops the process for
                    continue
                expected = ggml.quantize(x, name, importance)
                assert not (report := differing_blocks(found, expected, FORMATS[name].block_bytes)), f"{kind}: {report}"
