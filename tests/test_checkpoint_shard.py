"""Safetensors files: every rule of the header, each refusal cheap; reads that notice a changed file."""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors
from bounds import cheap
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4tools.checkpoint.shard import DTYPE_BITS, check_header_length, parse_header, read_shard
from dsv4tools.errors import Dsv4Error, InputError, ResourceError, VerifyError

U8_4 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def build(header, data=b"", *, length=None):
    """A safetensors file from a header (an object, text or bytes) and its data."""
    raw = json.dumps(header) if isinstance(header, (dict, list)) else header
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@pytest.fixture
def write(tmp_path):
    def write(header, data=b"", **arguments):
        path = tmp_path / "x.safetensors"
        path.write_bytes(header if isinstance(header, bytes) and not arguments else build(header, data, **arguments))
        return path

    return write


def entry(dtype="U8", shape=(4,), span=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


# What is right


def test_tensors_stand_in_file_order_with_places_counted_from_the_start_of_the_file(write):
    header = {"__metadata__": {"format": "pt"}, "b": entry(span=(4, 8)), "a": entry(), "c": entry("F32", (), (8, 12))}
    path = write(header, bytes(range(12)))
    shard = read_shard(path)
    start = path.stat().st_size - 12
    assert [(n, t.dtype, t.shape, t.begin, t.n_bytes) for n, t in shard.tensors.items()] == [
        ("b", "U8", (4,), start + 4, 4), ("a", "U8", (4,), start, 4), ("c", "F32", (), start + 8, 4)]
    assert shard.metadata == {"format": "pt"}
    assert (shard.n_file_bytes, shard.path) == (start + 12, path)


@pytest.mark.parametrize(("header", "data"), [
    ({}, b""),
    ({"__metadata__": {}}, b""),
    ({"empty": entry("F32", (0, 5), (0, 0)), "a": entry()}, b"1234"),
    ({"a": entry(), "empty": entry("F32", (3, 0), (4, 4))}, b"1234"),
    ({"two empty": entry("I8", (0,), (0, 0)), "of them": entry("I8", (0,), (0, 0))}, b""),
    ({"scalar": entry("I64", (), (0, 8))}, bytes(8)),
    ({"four bits": entry("F4", (2, 3), (0, 3))}, bytes(3)),
    (json.dumps({"a": entry()}) + "  \n\t ", b"1234"),
    ({"ünïcode 漢": entry()}, b"1234"),
], ids=lambda value: str(value)[:40])
def test_legal_oddities_are_read(write, header, data):
    assert read_shard(write(header, data)).n_file_bytes


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_takes_the_bytes_that_the_safetensors_library_gives_it(write, dtype):
    n_bytes = DTYPE_BITS[dtype] * 8 // 8
    path = write({"a": entry(dtype, (8,), (0, n_bytes))}, bytes(n_bytes))
    assert read_shard(path).tensors["a"].n_bytes == n_bytes
    with safetensors.safe_open(path, framework="np") as file:   # refuses a span that is not dtype times shape
        assert file.get_slice("a").get_dtype() == dtype


# What is wrong

DEEP = "[" * 100_000
BAD_FILES = {
    "no bytes": (b"", "has 0 bytes"),
    "seven bytes": (b"1234567", "has 7 bytes"),
    "length 0": (build("{}", length=0), "header length 0 does not fit"),
    "length 1": (build("{", length=1), "header length 1 does not fit"),
    "length 2**63": (build("{}", length=1 << 63), "above the format's cap of 100,000,000"),
    "length 2**64 - 1": (build("{}", length=(1 << 64) - 1), "above the format's cap"),
    "length above the cap": (build("{}", length=100_000_001), "above the format's cap"),
    "length beyond the file": (build("{}", length=3), "header length 3 does not fit a file of 10 bytes"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "not UTF-8": (build(b'{"a\xff": 1}'), "not valid UTF-8 at byte 3"),
    "UTF-16": (build('{"a":1}'.encode("utf-16")), "does not start with '{'"),
    "byte order mark": (build("\ufeff{}"), "does not start with '{'"),
    "space before": (build(" {}"), "does not start with '{'"),
    "an array": (build("[1]"), "does not start with '{'"),
    "not JSON": (build("{]"), "not valid JSON"),
    "text behind": (build("{} {}"), "not valid JSON"),
    "zero bytes behind": (build(b"{}\0\0"), "not valid JSON"),
    "nested lists": (build('{"a":' + DEEP), "nested too deeply"),
    "nested objects": (build('{"a":' * 100_000), "nested too deeply"),
    "NaN": (build('{"a": NaN}'), "NaN is not a JSON number"),
    "integer of many digits": (build('{"a":' + "9" * 5000 + "}"), "not valid JSON"),
    "tensor twice": (build('{"a":1,"a":2}'), "key 'a' appears twice"),
    "shape twice": (build('{"a":{"shape":[1],"shape":[2]}}'), "key 'shape' appears twice"),
    "metadata twice": (build('{"__metadata__":{},"__metadata__":{}}'), "key '__metadata__' appears twice"),
    "metadata no object": (build({"__metadata__": []}), "__metadata__ is not an object of strings"),
    "metadata not of strings": (build({"__metadata__": {"a": 1}}), "__metadata__ is not an object of strings"),
    "entry no object": (build({"a": 1}), "must have exactly dtype, shape and data_offsets"),
    "entry of null": (build({"a": None}), "must have exactly"),
    "entry without shape": (build({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "must have exactly"),
    "entry with more": (build({"a": U8_4 | {"x": 1}}, bytes(4)), "must have exactly"),
    "empty name": (build({"": U8_4}, bytes(4)), "name is empty"),
    "name with escape": (build({"a\x1b[2J": U8_4}, bytes(4)), "control characters"),
    "name with zero": (build({"a\0": U8_4}, bytes(4)), "control characters"),
    "name with newline": (build({"a\nb": U8_4}, bytes(4)), "control characters"),
    "name with half a surrogate": (build('{"\\ud800":' + json.dumps(U8_4) + "}", bytes(4)), "control characters"),
    "name without end": (build({"a" * 100_000: U8_4}, bytes(4)), "more than 1,000 characters"),
    "name without end, twice": (build('{"%s":1,"%s":2}' % (("a" * 100_000,) * 2)), "appears twice"),
    "unknown dtype": (build({"a": entry("F128")}, bytes(4)), "unknown dtype 'F128'"),
    "lower-case dtype": (build({"a": entry("u8")}, bytes(4)), "unknown dtype 'u8'"),
    "dtype no text": (build({"a": U8_4 | {"dtype": ["U8"]}}, bytes(4)), "unknown dtype"),
    "dtype without end": (build({"a": entry("U" * 1_000_000)}, bytes(4)), "unknown dtype"),
    "shape no list": (build({"a": U8_4 | {"shape": 4}}, bytes(4)), "shape 4 is not a list of sizes"),
    "shape of text": (build({"a": U8_4 | {"shape": ["4"]}}, bytes(4)), "is not a list of sizes"),
    "shape of floats": (build({"a": U8_4 | {"shape": [4.0]}}, bytes(4)), "is not a list of sizes"),
    "shape of bools": (build({"a": entry("U8", [True], (0, 1))}, bytes(1)), "is not a list of sizes"),
    "negative shape": (build({"a": entry("U8", [-4, -1])}, bytes(4)), "is not a list of sizes"),
    "shape that wraps to 0": (build({"a": entry("U8", [1 << 32] * 2, (0, 0))}), "needs 18,446,744,073,709,551,616"),
    "shape that wraps to 4": (build({"a": entry("U8", [(1 << 64) + 4])}, bytes(4)), "is not a list of sizes"),
    "shape beyond all floats": (build({"a": entry("U8", [1 << 48] * 50)}, bytes(4)), "needs"),
    "shape without end": (build({"a": entry("U8", [1 << 48] * 200_000)}, bytes(4)), "is not a list of sizes"),
    "spans no list": (build({"a": U8_4 | {"data_offsets": 4}}, bytes(4)), "data_offsets 4 are not two"),
    "one offset": (build({"a": entry(span=[0])}, bytes(4)), "are not two non-negative integers"),
    "three offsets": (build({"a": entry(span=[0, 4, 4])}, bytes(4)), "are not two non-negative integers"),
    "float offsets": (build({"a": entry(span=[0, 4.0])}, bytes(4)), "are not two non-negative integers"),
    "bool offsets": (build({"a": entry(shape=[1], span=[False, True])}, bytes(1)), "are not two non-negative integers"),
    "text offsets": (build({"a": entry(span=["0", "4"])}, bytes(4)), "are not two non-negative integers"),
    "negative offsets": (build({"a": entry(span=[-4, 0])}, bytes(4)), "are not two non-negative integers"),
    "reversed offsets": (build({"a": entry(span=[4, 0])}, bytes(4)), "span -4 bytes"),
    "offsets of 4,300 digits": (build('{"a":{"dtype":"U8","shape":[0],"data_offsets":[%s,%s]}}' % (("9" * 4300,) * 2)),
                                "data_offsets"),
    "span too small": (build({"a": entry(span=[0, 3])}, bytes(3)), "span 3 bytes, shape [4] x U8 needs 4"),
    "span too large": (build({"a": entry(span=[0, 5])}, bytes(5)), "span 5 bytes, shape [4] x U8 needs 4"),
    "span of another dtype": (build({"a": entry("BF16")}, bytes(4)), "shape [4] x BF16 needs 8"),
    "span for a scalar": (build({"a": entry("F32", (), (0, 0))}), "shape [] x F32 needs 4"),
    "half a byte": (build({"a": entry("F4", [3], [0, 2])}, bytes(2)), "shape [3] x F4 needs 12 bits"),
    "half a byte cut off": (build({"a": entry("F4", [3], [0, 1])}, bytes(1)), "shape [3] x F4 needs 12 bits"),
    "overlap": (build({"a": entry(), "b": entry(span=[3, 7])}, bytes(7)), "'b': overlaps tensor 'a'"),
    "same place": (build({"a": entry(), "b": entry()}, bytes(4)), "'b': overlaps tensor 'a'"),
    "hole at the start": (build({"a": entry(span=[1, 5])}, bytes(5)), "'a': leaves a hole after the header"),
    "hole": (build({"a": entry(), "b": entry(span=[5, 9])}, bytes(9)), "'b': leaves a hole after tensor 'a'"),
    "beyond the end": (build({"a": entry()}, bytes(3)), "is truncated"),
    "no data": (build({"a": entry()}), "is truncated"),
    "empty tensor beyond the end": (build({"a": entry(), "b": entry(shape=[0], span=[9, 9])}, bytes(4)), "hole"),
    "trailing byte": (build({"a": entry()}, bytes(5)), "has bytes behind its last tensor"),
    "trailing data without tensors": (build({}, bytes(5)), "has bytes behind its last tensor"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_quickly_and_in_little_memory(write, name):
    raw, expected = BAD_FILES[name]
    path = write(raw)
    with cheap(), pytest.raises(InputError) as caught:
        read_shard(path)
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 2000


SUSPECT = ("length", "not UTF-8", "span", "shape", "hole", "overlap", "beyond the end", "trailing", "offset", "dtype")


@pytest.mark.parametrize("name", [n for n in BAD_FILES if any(word in n for word in SUSPECT)])
def test_the_safetensors_library_refuses_them_too(write, name):
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(write(BAD_FILES[name][0]), framework="np"):
        pass


def test_many_tensors_are_read_in_proportion(write):
    n = 20_000
    path = write({f"layers.{i}.weight": entry("U8", [1], [i, i + 1]) for i in range(n)}, bytes(n))
    with cheap(seconds=3.0):
        assert len(read_shard(path).tensors) == n


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="is not a regular file"):
        read_shard(tmp_path)
    with cheap(), pytest.raises(InputError, match="is not a regular file"):   # must not wait for a writer
        read_shard(tmp_path / "fifo")
    with pytest.raises(InputError, match="is not a regular file"):
        read_shard(Path("/dev/null"))
    for name in ("missing", "dangling"):
        with pytest.raises(InputError, match="is missing"):
            read_shard(tmp_path / name)
    with pytest.raises(InputError, match="is a link to itself"):
        read_shard(tmp_path / "loop")
    with pytest.raises(ResourceError, match="cannot be opened"):
        read_shard(tmp_path / ("x" * 5000))


def test_a_header_cut_while_it_is_read_is_a_fault_of_the_disk(write, monkeypatch):
    path = write({"a": entry()}, b"1234")
    monkeypatch.setattr(os, "pread", lambda fd, n, at: b"" if at > 8 else b"\x10\0\0\0\0\0\0\0"[:n])
    with pytest.raises(ResourceError, match="ended while its header was being read"):
        read_shard(path)


def test_short_reads_of_the_header_are_continued(write, monkeypatch):
    path = write({"a": entry()}, b"1234")
    whole = read_shard(path)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, n if at == 0 else min(n, 7), at))
    assert read_shard(path) == whole


def test_an_error_of_the_disk_while_the_header_is_read(write, monkeypatch):
    path = write({"a": entry()}, b"1234")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ResourceError, match="Input/output error"):
        read_shard(path)


# Headers at random

SHAPES = st.lists(st.integers(0, 5), max_size=4)
TENSORS = st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BITS)), SHAPES), max_size=6)


def file_of(tensors, order):
    """Header and data of tensors whose data lie in `order`; a shape that is no whole number of bytes gets one more."""
    header, data = {}, b""
    for i in order:
        dtype, shape = tensors[i]
        shape = shape if (DTYPE_BITS[dtype] * int(np.prod(shape))) % 8 == 0 else [*shape, 8]
        n_bytes = DTYPE_BITS[dtype] * int(np.prod(shape)) // 8
        header[f"t.{i}"] = entry(dtype, shape, (len(data), len(data) + n_bytes))
        data += bytes((i * 37 + n) % 256 for n in range(n_bytes))
    return {name: header[name] for name in sorted(header)}, data


@settings(deadline=None, max_examples=60)
@given(st.data(), TENSORS)
def test_valid_files_are_read_as_the_safetensors_library_reads_them(tmp_path_factory, draw, tensors):
    order = draw.draw(st.permutations(range(len(tensors))))
    header, data = file_of(tensors, order)
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(build(header, data))
    shard = read_shard(path)
    with safetensors.safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  - safe_open is no mapping
        theirs = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    assert {name: (t.dtype, t.shape) for name, t in shard.tensors.items()} == theirs
    assert list(shard.tensors) == list(header)
    for name, raw in safetensors.deserialize(path.read_bytes()):
        out = bytearray(shard.tensors[name].n_bytes)
        shard.read_into(shard.tensors[name].begin, memoryview(out))
        assert out == raw["data"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6)


@settings(deadline=None, max_examples=150)
@given(st.data(), TENSORS.filter(bool), JSON_VALUES)
def test_one_changed_field_is_read_or_refused_and_nothing_else(draw, tensors, value):
    header, data = file_of(tensors, range(len(tensors)))
    name = draw.draw(st.sampled_from(sorted(header)))
    field = draw.draw(st.sampled_from(["", "dtype", "shape", "data_offsets", "0", "1", "extra"]))
    if field == "":
        header[name] = value
    elif field in "01":
        header[name]["data_offsets"][int(field)] = value
    else:
        header[name][field] = value
    raw = json.dumps(header).encode()
    try:
        found, _ = parse_header(raw, 8 + len(raw) + len(data), "file")
    except InputError:
        return
    assert sum(t.n_bytes for t in found.values()) == len(data)   # the spans still tile the file


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_bytes_changed_at_random_are_read_or_refused_and_nothing_else(draw):
    header, data = file_of([("F32", [2]), ("F4", [4]), ("U8", [3])], [2, 0, 1])
    raw = bytearray(json.dumps({"__metadata__": {"a": "b"}} | header).encode())
    for _ in range(draw.draw(st.integers(1, 3))):
        raw[draw.draw(st.integers(0, len(raw) - 1))] = draw.draw(st.integers(0, 255))
    with suppress(InputError):
        parse_header(bytes(raw), 8 + len(raw) + len(data), "file")


@given(st.binary(min_size=8, max_size=8), st.integers(8, 1 << 40))
def test_header_lengths_at_random(prefix, n_file_bytes):
    try:
        n = check_header_length(prefix, n_file_bytes, "file")
    except InputError:
        return
    assert 2 <= n <= min(100_000_000, n_file_bytes - 8)


# Reading


@pytest.fixture
def shard(write):
    return read_shard(write({"a": entry()}, b"1234"))


def read(shard, n=4):
    out = bytearray(n)
    shard.read_into(shard.tensors["a"].begin, memoryview(out))
    return bytes(out)


def test_reads_give_the_bytes(shard):
    assert read(shard) == b"1234"


def test_short_reads_are_continued(shard, monkeypatch):
    def preadv(fd, buffers, at):
        buffers[0][:1] = os.pread(fd, 1, at)
        return 1

    monkeypatch.setattr(os, "preadv", preadv, raising=False)   # macOS before 11 has none
    assert read(shard) == b"1234"


def test_truncated_while_being_read(shard, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: 0, raising=False)
    with pytest.raises(ResourceError, match=r"ends at byte .* while it was being read") as caught:
        read(shard)
    assert caught.value.exit_code == 4


def test_reading_behind_the_end(shard):
    with pytest.raises(ResourceError, match="ends at byte"):
        read(shard, 5)


def test_error_of_the_disk(shard, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail, raising=False)
    with pytest.raises(ResourceError, match=r"read failed at byte .*Input/output error"):
        read(shard)


def test_file_gone(shard):
    shard.path.unlink()
    with pytest.raises(ResourceError, match="cannot be opened"):
        read(shard)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def exchange(path):
    status = path.stat()
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes())
    os.utime(new, ns=(0, status.st_mtime_ns))
    new.replace(path)


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(("change", "what"), [
    (truncate, "size"), (touch, "modification time"), (exchange, "inode"), (make_pipe, "no longer a regular file"),
])
def test_a_file_that_changed_since_the_plan(shard, change, what):
    change(shard.path)
    with cheap(), pytest.raises(VerifyError, match=f"source changed.*{what}") as caught:
        read(shard)
    assert caught.value.exit_code == 5


def test_no_handle_stays_open(shard):
    def n_open():
        return len(list(Path("/dev/fd").iterdir()))

    before = n_open()
    read(shard)
    with pytest.raises(Dsv4Error):
        read(shard, 5)
    with pytest.raises(InputError):
        read_shard(shard.path.parent)
    assert n_open() == before
