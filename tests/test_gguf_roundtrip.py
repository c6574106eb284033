"""Properties: what is encoded is read back, gguf-py reads the same, and no mutation of a good file can do harm."""

from __future__ import annotations

import struct
import time

import gguf
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv4tools.errors import InputError
from dsv4tools.formats.table import FORMATS
from dsv4tools.gguf.header import TensorInfo, encode_header, lay_out
from dsv4tools.gguf.reader import open_gguf, scan_gguf
from dsv4tools.gguf.values import KV

BITS = {"u8": 8, "i8": 8, "u16": 16, "i16": 16, "u32": 32, "i32": 32, "u64": 64, "i64": 64}
DTYPES = {"f32": "<f4", "f64": "<f8"} | {name: f"<{name[0]}{bits // 8}" for name, bits in BITS.items()}

STRINGS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
KEYS = st.text("abcdefghijklmnopqrstuvwxyz0123456789_.", min_size=1, max_size=20).filter(
    lambda key: key != "general.alignment"
)
KNOWN = [f for f in FORMATS.values() if f.name in gguf.GGMLQuantizationType.__members__]   # to gguf-py of any age
NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=63)


def items(name):
    if name in BITS:
        low, bits = (-(1 << BITS[name] - 1), BITS[name]) if name[0] == "i" else (0, BITS[name])
        return st.integers(low, low + (1 << bits) - 1)
    return {
        "f32": st.floats(width=32, allow_nan=False), "f64": st.floats(allow_nan=False), "bool": st.booleans(),
        "str": STRINGS,
    }[name]


ITEM_TYPES = [*DTYPES, "bool", "str"]


@st.composite
def entries(draw, key):
    value_type = draw(st.sampled_from([*ITEM_TYPES, "arr"]))
    if value_type != "arr":
        return KV(key, value_type, draw(items(value_type)))
    item_type = draw(st.sampled_from(ITEM_TYPES))
    value = draw(st.lists(items(item_type), max_size=6))
    return KV(key, "arr", np.array(value, DTYPES[item_type]) if item_type in DTYPES else value, item_type)


@st.composite
def contents(draw, min_size=0):
    """Metadata, tensors laid out, alignment, and the data section of a file that is right."""
    keys = draw(st.lists(KEYS, unique=True, max_size=6))
    kvs = [draw(entries(key)) for key in keys]
    alignment = draw(st.sampled_from([32, 32, 8, 64, 4096]))
    if alignment != 32 or draw(st.booleans()):
        kvs.insert(draw(st.integers(0, len(kvs))), KV("general.alignment", "u32", alignment))
    shapes = []
    for name in draw(st.lists(NAMES, unique=True, min_size=min_size, max_size=5)):
        tensor_format = draw(st.sampled_from(KNOWN))
        n_blocks, *rest = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
        shapes.append((name, (n_blocks * tensor_format.block_values, *rest), tensor_format))
    offsets, n_bytes = lay_out([f.n_bytes(ne) for _, ne, f in shapes], alignment)
    tensors = [TensorInfo(*shape, offset) for shape, offset in zip(shapes, offsets, strict=True)]
    data = bytearray(n_bytes)
    for number, tensor in enumerate(tensors):
        data[tensor.offset : tensor.offset + tensor.n_bytes] = bytes([number + 1]) * tensor.n_bytes
    return kvs, tensors, alignment, bytes(data)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("roundtrip") / "a.gguf"


@settings(deadline=None, max_examples=150)
@given(contents())
def test_what_is_encoded_is_read_back(path, content):
    kvs, tensors, alignment, data = content
    path.write_bytes(encode_header(kvs, tensors, alignment) + data)
    with open_gguf(path) as file:
        assert file.findings == []
        assert list(file.kvs.values()) == kvs
        assert list(file.tensors.values()) == tensors
        assert file.alignment == alignment
        assert file.data_offset % alignment == 0
        for number, tensor in enumerate(tensors):
            assert file.read_tensor_bytes(tensor.name).tobytes() == bytes([number + 1]) * tensor.n_bytes


NAMES_THERE = {
    "u8": "UINT8", "i8": "INT8", "u16": "UINT16", "i16": "INT16", "u32": "UINT32", "i32": "INT32", "f32": "FLOAT32",
    "bool": "BOOL", "str": "STRING", "arr": "ARRAY", "u64": "UINT64", "i64": "INT64", "f64": "FLOAT64",
}


@settings(deadline=None, max_examples=60)
@given(contents(min_size=1))
def test_gguf_py_reads_the_same(path, content):
    kvs, tensors, alignment, data = content
    kvs = [kv for kv in kvs if kv.type != "arr" or len(kv.value)]   # gguf-py forgets the type of an empty array
    assume(all(tensor.format.name != "Q8_1" for tensor in tensors))  # gguf-py counts 40 bytes, ggml.h has 36
    path.write_bytes(encode_header(kvs, tensors, alignment) + data)
    theirs = gguf.GGUFReader(path)
    with open_gguf(path) as file:
        assert [key for key in theirs.fields if not key.startswith("GGUF.")] == list(file.kvs)
        for kv in kvs:
            field = theirs.fields[kv.key]
            value = kv.value.tolist() if isinstance(kv.value, np.ndarray) else kv.value
            assert field.contents() == value
            types = [kv.type, kv.item_type] if kv.type == "arr" else [kv.type]
            assert [t.name for t in field.types] == [NAMES_THERE[t] for t in types]
        assert theirs.alignment == alignment
        assert theirs.data_offset == file.data_offset
        for tensor, other in zip(tensors, theirs.tensors, strict=True):
            assert (other.name, tuple(other.shape.tolist())) == (tensor.name, tensor.ne)
            assert other.tensor_type.name == tensor.format.name
            assert (other.n_bytes, other.data_offset) == (tensor.n_bytes, file.data_offset + tensor.offset)
            assert other.data.tobytes() == file.read_tensor_bytes(tensor.name).tobytes()


EDGES = [0, 1, 2, 7, 8, 31, 32, 33, 63, 64, 255, 2**31, 2**32 - 1, 2**33, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@st.composite
def mutations(draw):
    """A good file with one field overwritten, or cut, lengthened, or with bytes taken out or put in."""
    kvs, tensors, alignment, data = draw(contents())
    header = encode_header(kvs, tensors, alignment)
    raw = bytearray(header + data)
    at = draw(st.integers(0, len(header) - 1))
    kind = draw(st.sampled_from(["u64", "u64", "u32", "byte", "cut", "insert", "remove", "append"]))
    edge = draw(st.sampled_from(EDGES))
    if kind == "u64":
        raw[at : at + 8] = struct.pack("<Q", edge)
    elif kind == "u32":
        raw[at : at + 4] = struct.pack("<I", edge & 0xFFFFFFFF)
    elif kind == "byte":
        raw[at] = draw(st.integers(0, 255))
    elif kind == "cut":
        del raw[at:]
    elif kind == "insert":
        raw[at:at] = draw(st.binary(min_size=1, max_size=16))
    elif kind == "remove":
        del raw[at : at + draw(st.integers(1, 16))]
    else:
        raw += draw(st.binary(min_size=1, max_size=64))
    return bytes(raw), draw(st.booleans())


@settings(deadline=None, max_examples=400)
@given(mutations())
def test_a_mutation_is_judged_quickly_and_by_our_errors_only(path, mutation):
    raw, template = mutation
    path.write_bytes(raw)
    start = time.process_time()
    with scan_gguf(path, template=template) as file:
        assert time.process_time() - start < 1
    for finding in file.findings:
        assert finding.offset is None or 0 <= finding.offset <= len(raw)
        assert str(finding).isprintable()
    if not file.ok:
        with pytest.raises(InputError):
            open_gguf(path, template=template)
        return
    with open_gguf(path, template=template) as again:
        for name, tensor in again.tensors.items():
            if not again.template:
                assert again.read_tensor_bytes(name).size == tensor.n_bytes


@settings(deadline=None, max_examples=300)
@given(mutations())
def test_a_file_without_findings_is_what_the_encoder_would_write(path, mutation):
    """So nothing in an accepted header is overlooked: reading it and writing it back gives the same bytes."""
    raw, _ = mutation
    path.write_bytes(raw)
    with scan_gguf(path) as file:
        # Python widens float32 through the FPU, which may change the payload of a NaN.
        assume(not any(kv.type == "f32" and kv.value != kv.value for kv in file.kvs.values()))
        if file.findings or file.version != 3:
            return
        header = encode_header(list(file.kvs.values()), list(file.tensors.values()), file.alignment)
    assert header[: len(raw)] == raw[: len(header)]


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_at_all_are_judged(path, tail, with_magic):
    path.write_bytes((b"GGUF\3\0\0\0" + bytes([1, 0, 0, 0, 0, 0, 0, 0]) * 2 if with_magic else b"") + tail)
    with scan_gguf(path) as file:
        assert file.ok is not any(f.severity == "error" for f in file.findings)
