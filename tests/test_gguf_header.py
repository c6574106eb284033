"""The header encoder: its bytes, and what it refuses to write."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf_bytes import EVERY_TYPE, THREE, THREE_DATA, padded
from gguf_bytes import gguf as build

from dsv4tools.errors import Dsv4Error, InputError
from dsv4tools.formats.table import FORMATS
from dsv4tools.gguf.header import TensorInfo, encode_header, lay_out
from dsv4tools.gguf.reader import scan_gguf
from dsv4tools.gguf.values import KV, VALUE_TYPES

F32 = FORMATS["F32"]

KVS = [
    KV("u8", "u8", 255), KV("i8", "i8", -128), KV("u16", "u16", 65535), KV("i16", "i16", -32768),
    KV("u32", "u32", 2**32 - 1), KV("i32", "i32", -(2**31)), KV("f32", "f32", 1.5), KV("bool", "bool", value=True),
    KV("str", "str", "grüße"), KV("arr", "arr", ["", "b"], "str"), KV("u64", "u64", 2**64 - 1),
    KV("i64", "i64", -(2**63)), KV("f64", "f64", 0.1), KV("empty.string", "str", ""),
    KV("empty.array", "arr", [], "u8"), KV("arr.i32", "arr", [1, -2, 3], "i32"),
    KV("arr.bool", "arr", [False, True], "bool"),
]
TENSORS = [
    TensorInfo("a", (8,), F32, 0), TensorInfo("b", (32, 2), FORMATS["Q8_0"], 32),
    TensorInfo("c", (3,), FORMATS["I8"], 128),
]


def test_bytes_of_a_small_header():
    header = encode_header([KV("a", "u32", 7), KV("bc", "str", "")], [TensorInfo("w", (4, 2), F32, 0)])
    assert header.hex(" ") == (
        "47 47 55 46 03 00 00 00 "                                            # magic, version
        "01 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00 "                    # tensors, entries
        "01 00 00 00 00 00 00 00 61 04 00 00 00 07 00 00 00 "                 # a: u32 7
        "02 00 00 00 00 00 00 00 62 63 08 00 00 00 00 00 00 00 00 00 00 00 "  # bc: an empty string
        "01 00 00 00 00 00 00 00 77 02 00 00 00 "                             # w: two dimensions
        "04 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00 "                    # 4, 2
        "00 00 00 00 00 00 00 00 00 00 00 00 "                                # F32, offset 0
    ) + " ".join(["00"] * 24)                                                 # 104 bytes become 128


def test_every_value_type_is_encoded_as_by_hand():
    assert {kv.type for kv in KVS} == set(VALUE_TYPES)
    assert encode_header(KVS, TENSORS) == padded(build(EVERY_TYPE, THREE))


def test_same_bytes_as_gguf_py(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "made-up")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_float32("f32", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("str", "grüße")
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float64("f64", 0.1)
    writer.add_array("tokens", ["a", "", "日本"])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, -0.25])
    writer.add_array("bools", [True, False])
    a = np.arange(10, dtype=np.float32).reshape(2, 5)
    b = np.arange(3, dtype=np.int8)
    writer.add_tensor("a", a)
    writer.add_tensor("b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    kvs = [
        KV("general.architecture", "str", "made-up"), *(kv for kv in KVS[:8] if kv.type != "f32"),
    ]
    kvs.insert(7, KV("f32", "f32", 0.1))
    kvs += [
        KV("str", "str", "grüße"), KV("u64", "u64", 2**64 - 1), KV("i64", "i64", -(2**63)), KV("f64", "f64", 0.1),
        KV("tokens", "arr", ["a", "", "日本"], "str"), KV("ints", "arr", [1, -2, 3], "i32"),
        KV("floats", "arr", np.array([0.5, -0.25]), "f32"), KV("bools", "arr", [True, False], "bool"),
    ]
    offsets, n_bytes = lay_out([40, 3])
    header = encode_header(
        kvs, [TensorInfo("a", (5, 2), F32, offsets[0]), TensorInfo("b", (3,), FORMATS["I8"], offsets[1])]
    )
    data = padded(a.tobytes()) + padded(b.tobytes())
    assert len(data) == n_bytes
    assert header + data == (tmp_path / "theirs.gguf").read_bytes()


def test_lay_out_pads_every_tensor():
    assert lay_out([]) == ([], 0)
    assert lay_out([1, 32, 33, 0, 5]) == ([0, 32, 64, 128, 128], 160)
    assert lay_out([1, 2, 3], 1) == ([0, 1, 3], 6)
    assert lay_out([2**62, 2**62, 1])[1] == 2**63 + 32


def test_a_custom_alignment_pads_the_header(tmp_path):
    kvs = [KV("general.alignment", "u32", 256)]
    offsets, n_bytes = lay_out([32, 32], 256)
    assert (offsets, n_bytes) == ([0, 256], 512)
    header = encode_header(kvs, [TensorInfo("a", (8,), F32, 0), TensorInfo("b", (8,), F32, 256)], 256)
    assert len(header) == 256
    path = tmp_path / "a.gguf"
    path.write_bytes(header + bytes(512))
    with scan_gguf(path) as file:
        assert (file.findings, file.alignment, file.data_offset) == ([], 256, 256)


def kv(value_type, value, item_type=None):
    return KV("the.key", value_type, value, item_type)


@pytest.mark.parametrize("entry", [
    kv("u8", 256), kv("u8", -1), kv("i8", 128), kv("u16", 2**16), kv("i16", 2**15), kv("u32", 2**32), kv("i32", 2**31),
    kv("u64", 2**64), kv("u64", -1), kv("i64", 2**63), kv("u32", 1.0), kv("u32", value=True), kv("u32", "1"),
    kv("u32", None), kv("bool", 1), kv("f32", "1"), kv("f32", value=True), kv("f32", 1e39), kv("f64", 10**400),
    kv("str", 1), kv("str", b"raw"), kv("str", "\ud800"), kv("arr", "text", "str"), kv("arr", ["a", 1], "str"),
    kv("arr", [1, "a"], "u32"), kv("arr", [1, 2.5], "u32"), kv("arr", [1, True], "u32"), kv("arr", [256], "u8"),
    kv("arr", [[1]], "arr"), kv("arr", [1], None), kv("arr", [1], "u128"), kv("arr", 5, "u8"), kv("arr", {1}, "u8"),
    kv("arr", np.array([300]), "u8"), kv("arr", np.array([-1]), "u64"), kv("arr", np.array([2**63], np.uint64), "i64"),
    kv("arr", np.array([1.0]), "i32"), kv("arr", np.array([[1]]), "i32"), kv("arr", np.array([1e39]), "f32"),
    kv("arr", np.array([1]), "f32"), kv("arr", np.array([1]), "bool"), kv("arr", np.array(["a"]), "str"),
    kv("u32", 1, "u32"), kv("f16", 1.0), kv("", 1),
], ids=repr)
def test_a_value_that_does_not_fit_its_type_is_refused(entry):
    with pytest.raises(InputError, match=r"^the\.key: "):
        encode_header([entry], [])


def test_numbers_that_fit_are_taken():
    entries = [
        KV("f32.int", "f32", 10000), KV("f32.inf", "f32", float("inf")), KV("np", "u8", np.uint64(255)),
        KV("np.bool", "bool", np.bool_(True)), KV("cast", "arr", np.array([0, 255]), "u8"),
        KV("inf", "arr", np.array([np.inf, np.nan, 1.0]), "f32"), KV("tuple", "arr", (1, 2), "i64"),
        KV("mixed", "arr", [1, 2.5], "f32"), KV("np.bools", "arr", np.array([True, False]), "bool"),
    ]
    expected = [
        b"\x00\x40\x1c\x46", b"\0\0\x80\x7f", b"\xff", b"\1", b"\0\xff", bytes.fromhex("0000807f 0000c07f 0000803f"),
        b"\1".ljust(8, b"\0") + b"\2".ljust(8, b"\0"), b"\0\0\x80\x3f\0\0\x20\x40", b"\1\0",
    ]
    for entry, raw in zip(entries, expected, strict=True):
        start = 24 + 8 + len(entry.key) + 4 + (12 if entry.type == "arr" else 0)
        assert encode_header([entry], [])[start:] == padded(bytes(start) + raw)[start:]


def tensor(name="w", ne=(8,), tensor_format="F32", offset=0):
    return TensorInfo(name, ne, FORMATS[tensor_format], offset)


@pytest.mark.parametrize(("kvs", "tensors", "where"), [
    ([KV("k", "u8", 1), KV("k", "u8", 1)], [], "k: "),
    ([KV("", "u8", 1)], [], "key is empty"),
    ([KV("k" * 65536, "u8", 1)], [], "kkk"),
    ([KV("a\0", "u8", 1)], [], r"a\\x00: "),
    ([KV("\udc80", "u8", 1)], [], "metadata key: "),
    ([], [tensor(), tensor(offset=32)], "w: "),
    ([], [tensor("")], "tensor name is empty"),
    ([], [tensor("n" * 64)], "nnn"),
    ([], [tensor("é" * 32)], "tensor name has 64 bytes"),
    ([], [tensor("a\0b")], r"a\\x00b: "),
    ([], [tensor(ne=(8, 1, 1, 1, 1))], "w: has 5 dimensions"),
    ([], [tensor(ne=(-1,))], "w: dimension 0 is -1"),
    ([], [tensor(ne=(2**63,))], "w: dimension 0"),
    ([], [tensor(ne=(2**33, 2**31))], "w: shape"),
    ([], [tensor(ne=(2**33, 2**31, 0))], "w: shape"),
    ([], [tensor(ne=(2**62,))], "w: F32"),
    ([], [tensor(ne=(255,), tensor_format="Q4_K")], "w: 255 columns"),
    ([], [tensor(offset=32)], "w: offset is 32, expected 0"),
    ([], [tensor(offset=-32)], "w: offset is -32"),
    ([], [tensor(), tensor("v", offset=64)], "v: offset is 64, expected 32"),
    ([], [tensor(ne=(3,)), tensor("v", offset=12)], "v: offset is 12, expected 32"),
    ([], [tensor(f"w{i}", (2**62,), "I8", i * 2**62) for i in range(2)], "a file can hold"),
    ([KV("general.alignment", "u32", 64)], [], "general.alignment: the metadata say 64, the call says 32"),
    ([KV("general.alignment", "i32", 32)], [], "general.alignment: has type i32"),
    ([KV("general.alignment", "u32", 13)], [], "general.alignment: is 13"),
    ([KV("big", "arr", np.zeros(128 << 20, np.uint8), "u8")], [], "header: takes"),
])
def test_what_a_reader_would_refuse_is_not_written(kvs, tensors, where):
    with pytest.raises(InputError, match=where):
        encode_header(kvs, tensors)


@pytest.mark.parametrize("alignment", [0, -1, 3, 48, 2**21])
def test_a_bad_alignment_is_not_written(alignment):
    with pytest.raises(Dsv4Error, match="alignment"):
        encode_header([KV("general.alignment", "u32", alignment)], [], alignment)


def test_an_alignment_that_no_reader_could_know_is_not_written():
    with pytest.raises(InputError, match="metadata say 32, the call says 64"):
        encode_header([], [], 64)


def test_entries_are_equal_when_they_encode_alike():
    nan = float("nan")
    assert KV("k", "f32", nan) == KV("k", "f32", float("nan"))
    assert KV("k", "f32", 0.0) != KV("k", "f32", -0.0)
    assert KV("k", "u32", 1) != KV("k", "i32", 1)
    assert KV("k", "u32", 1) != KV("l", "u32", 1)
    assert KV("k", "bool", value=True) != KV("k", "bool", 1)
    assert KV("k", "arr", ["a"], "str") == KV("k", "arr", ["a"], "str")
    assert KV("k", "arr", ["a"], "str") != KV("k", "arr", ["a", "b"], "str")
    ones = np.ones(2, np.float32)
    assert KV("k", "arr", ones, "f32") == KV("k", "arr", ones.copy(), "f32")
    assert KV("k", "arr", ones, "f32") != KV("k", "arr", -ones, "f32")
    assert len({KV("k", "arr", ones, "f32"), KV("k", "arr", ones.copy(), "f32")}) == 1
    assert KV("k", "u32", 1) != "k"


def test_header_and_data_by_hand_are_read_back(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(encode_header(KVS, TENSORS) + THREE_DATA)
    assert path.stat().st_size % 32 == 0
    with scan_gguf(path) as file:
        assert file.findings == []
        assert [(k.key, k.type, k.item_type) for k in file.kvs.values()] == [(k.key, k.type, k.item_type) for k in KVS]
        assert list(file.tensors.values()) == TENSORS
        assert file.read_tensor_bytes("c").tolist() == [1, 2, 3]
