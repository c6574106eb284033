"""The table of ggml types against gguf-py's, and the arithmetic that derives from its rows."""

from __future__ import annotations

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.table import BY_ID, FORMATS, REMOVED_IDS, find_format

# gguf-py gives Q8_1 40 bytes (two float32); ggml's block has two float16, 36 bytes.
DIFFERENT = {"Q8_1": (32, 36)}
YOUNGER = {"Q2_0"} - gguf.GGMLQuantizationType.__members__.keys()   # than the gguf-py that is here


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in YOUNGER])
def test_ids_and_blocks_are_gguf_pys(name):
    row = FORMATS[name]
    kind = gguf.GGMLQuantizationType[name]
    assert row.type_id == kind.value
    assert (row.block_values, row.block_bytes) == DIFFERENT.get(name, gguf.GGML_QUANT_SIZES[kind])


def test_the_one_known_difference_is_one():
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_1] != DIFFERENT["Q8_1"]


def test_every_type_of_gguf_py_is_in_the_table():
    assert {kind.name for kind in gguf.GGMLQuantizationType} | YOUNGER == set(FORMATS)


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.file_type is not None])
def test_file_types_are_llama_cpps(name):
    llama = {41: "MOSTLY_Q2_0"} | {kind.value: kind.name for kind in gguf.LlamaFileType}
    found = llama[FORMATS[name].file_type].removeprefix("MOSTLY_").removeprefix("ALL_")
    assert found in {name, f"{name}_S", f"{name}_M", f"{name}_MOE"}


def test_ids_are_unique_and_removed_ones_are_free():
    assert len(BY_ID) == len(FORMATS)
    assert not REMOVED_IDS & set(BY_ID)
    assert {*BY_ID, *REMOVED_IDS} == set(range(max(BY_ID) + 1))


@pytest.mark.parametrize(("name", "bits"), [("F32", 32), ("Q8_0", 8.5), ("Q4_K", 4.5), ("MXFP4", 4.25)])
def test_bits_per_value(name, bits):
    assert FORMATS[name].bits_per_value == bits


@given(st.sampled_from(sorted(FORMATS)), st.lists(st.integers(0, 1 << 40), max_size=3), st.integers(0, 1 << 40))
def test_bytes_of_a_tensor(name, outer, blocks):
    row = FORMATS[name]
    n = blocks * row.block_values
    expected = blocks * row.block_bytes
    for dimension in outer:
        expected *= dimension
    assert row.n_bytes((n, *outer)) == expected   # exact, however large


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.block_values > 1])
@pytest.mark.parametrize("rest", [1, -1])
def test_a_row_that_is_no_whole_number_of_blocks(name, rest):
    n = 3 * FORMATS[name].block_values + rest
    with pytest.raises(InputError, match=rf"{n} columns are not a whole number of {name} blocks"):
        FORMATS[name].row_bytes(n, "here")


def test_a_row_of_less_than_nothing():
    with pytest.raises(InputError):
        FORMATS["F32"].row_bytes(-1)


def test_a_scalar():
    assert FORMATS["F32"].n_bytes(()) == 4
    with pytest.raises(InputError):
        FORMATS["Q8_0"].n_bytes(())


@pytest.mark.parametrize("name", FORMATS)
def test_names_in_any_spelling(name):
    for spelling in (name, name.lower(), name.replace("_", ""), name.replace("_", "-").lower()):
        assert find_format(spelling) is FORMATS[name]


@pytest.mark.parametrize("name", ["", "Q4", "Q4_K_M", "F8", "copy", "\x1b[2J"])
def test_a_name_of_none(name):
    with pytest.raises(UsageError, match="unknown ggml type"):
        find_format(name)
