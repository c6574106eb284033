"""Opening and reading GGUF files: what no catalogue of bytes can show."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import (
    EVERY_TYPE,
    T_F32,
    T_I8,
    THREE,
    THREE_DATA,
    U8,
    alignment,
    gguf,
    kv,
    kv_arr,
    kv_str,
    kv_u32,
    padded,
    tensor,
    text,
)

from dsv4tools.errors import InputError, ResourceError, UsageError
from dsv4tools.gguf.reader import open_gguf, scan_gguf


@pytest.fixture
def write(tmp_path):
    def write(raw, name="a.gguf"):
        path = tmp_path / name
        path.write_bytes(raw)
        return path

    return write


def open_handles():
    return len(list(Path("/dev/fd").iterdir()))


def test_values_have_the_documented_python_types(write):
    with open_gguf(write(gguf(EVERY_TYPE, THREE, THREE_DATA))) as file:
        values = {key: entry.value for key, entry in file.kvs.items()}
        assert {k: v for k, v in values.items() if k not in {"arr.i32", "empty.array"}} == {
            "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31), "f32": 1.5,
            "bool": True, "str": "grüße", "arr": ["", "b"], "u64": 2**64 - 1, "i64": -(2**63), "f64": 0.1,
            "empty.string": "", "arr.bool": [False, True],
        }
        assert type(values["bool"]) is bool
        for key, dtype, items in (("arr.i32", np.int32, [1, -2, 3]), ("empty.array", np.uint8, [])):
            assert values[key].dtype == dtype
            assert values[key].tolist() == items
            assert not values[key].flags.writeable
        assert {k: (e.type, e.item_type) for k, e in file.kvs.items() if e.type == "arr"} == {
            "arr": ("arr", "str"), "arr.i32": ("arr", "i32"), "arr.bool": ("arr", "bool"), "empty.array": ("arr", "u8"),
        }
        assert (file.value("u8"), file.value("none"), file.value("none", 3)) == (255, None, 3)
        assert (file.version, file.alignment, file.template, file.ok) == (3, 32, False, True)
        assert file.data_offset == file.n_file_bytes - 160
        assert [(t.name, t.ne, t.format.name, t.offset, t.n_bytes) for t in file.tensors.values()] == [
            ("a", (8,), "F32", 0, 32), ("b", (32, 2), "Q8_0", 32, 68), ("c", (3,), "I8", 128, 3),
        ]


def test_all_findings_are_reported_each_at_its_byte(write):
    """A broken descriptor does not hide the next, and one wrong offset is one finding."""
    kvs = [kv_u32("k", 1), kv_u32("", 2), kv_u32("k", 3), kv_str("s", b"\xff"), kv("b", 7, b"\5")]
    tensors = [
        tensor("a", (8,), offset=0), tensor("hole", (8,), offset=96), tensor("next", (8,), offset=128),
        tensor("odd", (8,), offset=161), tensor("back", (8,), offset=192), tensor("a", (8,), offset=224),
        tensor("kind", (8,), 77, 256), tensor("after", (8,), offset=512), tensor("five", (1,) * 5, offset=544),
        tensor("x" * 70, (8,), offset=576),
    ]
    raw = gguf(kvs, tensors, bytes(608))
    with scan_gguf(write(raw)) as file:
        found = [(f.severity, f.code, f.where[:8], f.offset) for f in file.findings]
    starts = [24]
    for part in (*kvs, *tensors):
        starts.append(starts[-1] + len(part))
    k, t = starts[: len(kvs)], starts[len(kvs) :]
    assert found == [
        ("error", "key-empty", "metadata", k[1]),
        ("error", "key-duplicate", "k", k[2]),
        ("error", "utf8", "s", k[4] - 1),
        ("warning", "bool", "b", t[0] - 1),
        ("error", "name-duplicate", "a", t[5]),
        ("error", "tensor-type", "kind", t[7] - 12),
        ("error", "tensor-n-dims", "five", t[8] + 12),
        ("error", "name-too-long", "xxxxxxxx", t[9]),
        ("error", "tensor-offset", "hole", t[2] - 8),
        ("error", "tensor-offset", "odd", t[4] - 8),
    ]
    assert file.kvs["k"].value == 1
    assert file.tensors["a"].offset == 0


def test_an_offset_error_says_what_it_is(write):
    tensors = [tensor("a"), tensor("hole", offset=64), tensor("next", (16,), offset=96),
               tensor("overlap", offset=128), tensor("odd", offset=194)]
    with scan_gguf(write(gguf((), tensors, bytes(256)))) as file:
        messages = {f.where: f.message for f in file.findings if f.code == "tensor-offset"}
    assert messages == {
        "hole": "offset is 64, expected 32; a hole of 32 bytes",
        "overlap": "offset is 128, expected 160; it overlaps what comes before",
        "odd": "offset is 194, expected 192; it is no multiple of the alignment 32",
    }


def test_behind_a_tensor_of_unknown_size_an_offset_must_still_be_aligned(write):
    tensors = [tensor("a"), tensor("kind", (8,), 77, 32), tensor("odd", offset=500), tensor("next", offset=544)]
    with scan_gguf(write(gguf((), tensors, bytes(576)))) as file:
        assert [(f.where, f.code) for f in file.findings] == [("kind", "tensor-type"), ("odd", "tensor-offset")]


def test_the_last_finding_says_that_reading_stopped(write):
    with scan_gguf(write(gguf([kv("k", 13, bytes(8)), kv_u32("", 1)], n_kvs=2))) as file:
        assert [(f.code, f.where) for f in file.findings] == [("value-type", "k")]
        assert "nothing behind this byte was read" in file.findings[0].message
        assert file.data_offset == 0


def test_findings_are_bounded(write):
    tensors = [tensor(f"{i}", (0,)) for i in range(10_050)] + [tensor("bad", (-1,))]
    with scan_gguf(write(gguf((), tensors, b""))) as file:
        assert len(file.findings) == 10_001
        assert str(file.findings[-1]) == "error: file: 51 more findings, 1 of them errors, are not listed"
        assert not file.ok


def test_opening_names_the_first_error_and_counts_the_others(write):
    path = write(gguf([kv_u32("k", 1), kv_u32("k", 1), kv_u32("k", 1)]))
    with pytest.raises(InputError) as caught:
        open_gguf(path)
    assert str(caught.value) == (
        f"{path}: k: metadata key appears twice, expected once (byte 41); 1 more errors in this file"
    )


def test_hostile_names_cannot_reach_the_terminal(write):
    raw = gguf((), [tensor("\x1b]0;pwned\x07\x9b2J\u202e", (8, 0), offset=8)], b"")
    with scan_gguf(write(raw)) as file:
        assert not file.ok
        assert all(str(f).isprintable() for f in file.findings)
    with pytest.raises(InputError) as caught:
        open_gguf(file.path)
    assert str(caught.value).isprintable()


# templates

def test_a_template_is_accepted_when_declared_and_named_when_not(write):
    for raw in (gguf(EVERY_TYPE, THREE), gguf(EVERY_TYPE, THREE, b"")):
        path = write(raw)
        with open_gguf(path, template=True) as file:
            assert (file.template, file.findings, list(file.tensors)) == (True, [], ["a", "b", "c"])
            with pytest.raises(InputError, match="data ends at byte"):
                file.read_tensor_bytes("a")
        with pytest.raises(InputError, match="looks like a template"):
            open_gguf(path)


def test_a_template_extended_by_a_hole_is_a_normal_file(write):
    raw = gguf(EVERY_TYPE, THREE, b"")
    path = write(raw)
    os.truncate(path, len(raw) + 160)
    for template in (False, True):
        with open_gguf(path, template=template) as file:
            assert (file.template, file.findings) == (False, [])
            assert not file.read_tensor_bytes("b").any()


@pytest.mark.parametrize("n_bytes", [1, 31, 32, 127, 131, 159])
def test_a_template_with_part_of_its_data_is_a_broken_file(write, n_bytes):
    path = write(gguf(EVERY_TYPE, THREE, THREE_DATA[:n_bytes]))
    with pytest.raises(InputError):
        open_gguf(path, template=True)


def test_a_template_may_leave_the_layout_open_but_not_misstate_it(write):
    open_layout = gguf((), [tensor("a"), tensor("b"), tensor("c")], b"")
    with open_gguf(write(open_layout), template=True) as file:
        assert [f.code for f in file.findings] == ["template-offsets"]
    with pytest.raises(InputError):
        open_gguf(write(open_layout + bytes(96)))
    with pytest.raises(InputError, match="a hole"):
        open_gguf(write(gguf((), [tensor("a"), tensor("b", offset=64)], b"")), template=True)


def test_a_file_without_tensors_is_no_template(write):
    with open_gguf(write(gguf(EVERY_TYPE)), template=True) as file:
        assert not file.template


# tensor bytes

def test_tensor_bytes_by_range(write):
    with open_gguf(write(gguf(EVERY_TYPE, THREE, THREE_DATA))) as file:
        b = file.read_tensor_bytes("b")
        assert b.dtype == np.uint8
        assert b.tolist() == list(range(1, 69))
        assert file.read_tensor_bytes("b", 60).tolist() == list(range(61, 69))
        assert file.read_tensor_bytes("b", 5, 3).tolist() == [6, 7, 8]
        assert file.read_tensor_bytes("b", 68).size == 0
        assert file.read_tensor_bytes("b", 0, 0).size == 0
        out = np.zeros((2, 34), np.uint8)
        file.read_tensor_into("b", out)
        assert out.ravel().tolist() == list(range(1, 69))
        for start, n in ((-1, 1), (0, 69), (69, 0), (60, 9), (69, None), (2**64, 1)):
            with pytest.raises(UsageError, match="b: bytes"):
                file.read_tensor_bytes("b", start, n)
        with pytest.raises(UsageError, match="contiguous"):
            file.read_tensor_into("b", np.zeros((4, 4), np.uint8)[:, :2])
        with pytest.raises(InputError, match="has no tensor none"):
            file.read_tensor_bytes("none")


def test_tensor_bytes_without_preadv(write, monkeypatch):
    monkeypatch.delattr(os, "preadv", raising=False)
    with open_gguf(write(gguf(EVERY_TYPE, THREE, THREE_DATA))) as file:
        assert file.read_tensor_bytes("b").tolist() == list(range(1, 69))


def test_short_reads_are_continued(write, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:3]], at))
    with open_gguf(write(gguf(EVERY_TYPE, THREE, THREE_DATA))) as file:
        assert file.read_tensor_bytes("b").tolist() == list(range(1, 69))


def test_a_scanned_file_with_errors_never_reads_beyond_its_end(write):
    raw = gguf((), [tensor("a"), tensor("far", (1 << 20,), offset=32)], bytes(64))
    with scan_gguf(write(raw)) as file:
        assert not file.ok
        assert file.read_tensor_bytes("a").size == 32
        with pytest.raises(InputError, match="far: data ends at byte"):
            file.read_tensor_bytes("far", 0, 4)


def test_a_file_that_shrinks_under_the_reader_is_a_clean_error(write):
    path = write(gguf(EVERY_TYPE, THREE, THREE_DATA))
    with open_gguf(path) as file:
        os.truncate(path, file.data_offset + 50)
        with pytest.raises(ResourceError, match="shrank"):
            file.read_tensor_bytes("b")


def test_a_read_error_is_a_clean_error(write, monkeypatch):
    path = write(gguf(EVERY_TYPE, THREE, THREE_DATA))

    def fail(*_):
        raise OSError(5, "Input/output error")

    with open_gguf(path) as file:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ResourceError, match="Input/output error"):
            file.read_tensor_bytes("b")
    before = open_handles()
    with pytest.raises(ResourceError, match="Input/output error"):
        scan_gguf(path)
    assert open_handles() == before


def test_data_beyond_4_gib(write):
    n_big = 5 << 30
    header = gguf((), [tensor("big", (n_big,), T_I8), tensor("w", (4,), T_F32, n_big)], b"")
    path = write(header)
    os.truncate(path, len(header) + n_big + 32)
    with path.open("r+b") as file:
        file.seek(len(header) + n_big)
        file.write(np.arange(4, dtype="<f4").tobytes())
    with open_gguf(path) as file:
        assert file.findings == []
        assert file.read_tensor_bytes("w").view("<f4").tolist() == [0, 1, 2, 3]
        assert file.read_tensor_bytes("big", n_big - 5).tolist() == [0] * 5


# handles

def test_handles_are_given_back(write):
    path = write(gguf(EVERY_TYPE, THREE, THREE_DATA))
    before = open_handles()
    with open_gguf(path) as file:
        assert open_handles() == before + 1
    file.close()
    assert open_handles() == before
    with pytest.raises(UsageError, match="closed"):
        file.read_tensor_bytes("a")
    scan_gguf(path)  # nobody keeps it
    assert open_handles() == before
    path.write_bytes(b"GGUX")
    with pytest.raises(InputError):
        open_gguf(path)
    assert open_handles() == before


# paths

def test_what_is_no_regular_file_is_refused_without_hanging(tmp_path, write):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    write(b"", "file")
    with socket.socket(socket.AF_UNIX) as server:
        cwd = Path.cwd()
        os.chdir(tmp_path)  # socket paths are short
        try:
            server.bind("socket")
        finally:
            os.chdir(cwd)
    for path, error, message in (
        (tmp_path / "none.gguf", InputError, "no such file"),
        (tmp_path / "dangling", InputError, "no such file"),
        (tmp_path, InputError, "is a directory, expected a file"),
        (tmp_path / "pipe", InputError, "is a pipe, expected a file"),
        (tmp_path / "socket", InputError, "is no regular file"),
        (Path("/dev/zero"), InputError, "is no regular file"),
        (tmp_path / "loop", ResourceError, "cannot be opened"),
        (tmp_path / "file" / "x", ResourceError, "cannot be opened"),
        (tmp_path / "a\0b", InputError, "null"),
    ):
        for function in (scan_gguf, open_gguf):
            with pytest.raises(error, match=message):
                function(path)


def test_links_and_unusual_names_are_followed(tmp_path, write):
    path = write(gguf(EVERY_TYPE, THREE, THREE_DATA), "größe und 空 白.gguf")
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    for name in (path, link, str(link)):
        with open_gguf(name) as file:
            assert file.ok


# cost

def test_a_real_vocabulary_is_read_at_once(write):
    """129,280 tokens, 127,741 merges: published headers; gguf-py takes about ten seconds for them."""
    n_tokens, n_merges = 129_280, 127_741
    tokens = b"".join(text(f"token{i}é") for i in range(n_tokens))
    merges = b"".join(text(f"left{i} right{i}") for i in range(n_merges))
    raw = gguf(
        [kv_arr("tokens", 8, n_tokens, tokens), kv_arr("merges", 8, n_merges, merges),
         kv_arr("types", 5, n_tokens, np.ones(n_tokens, "<i4").tobytes())],
        THREE, THREE_DATA,
    )
    path = write(raw)
    start = time.process_time()
    with open_gguf(path) as file:
        seconds = time.process_time() - start
        assert file.value("tokens")[-1] == f"token{n_tokens - 1}é"
        assert file.value("merges")[-1] == f"left{n_merges - 1} right{n_merges - 1}"
        assert len(file.value("types")) == n_tokens
    assert seconds < 1


def test_memory_follows_the_header_not_the_file(write):
    raw = gguf((), [tensor("w", (1 << 35,), T_I8)], b"")
    path = write(raw)
    os.truncate(path, len(raw) + (1 << 35))
    tracemalloc.start()
    with open_gguf(path) as file:
        assert file.ok
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_many_entries_take_memory_in_proportion(write):
    raw = gguf([kv_u32(f"k{i}", i) for i in range(50_000)])
    path = write(raw)
    tracemalloc.start()
    with open_gguf(path) as file:
        assert len(file.kvs) == 50_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * len(raw)


@pytest.mark.parametrize("entry", [
    kv_arr("k", U8, 1 << 34),
    kv("k", 8, (1 << 34).to_bytes(8, "little")),
    kv_arr("k", 8, 2, text("a") + (1 << 34).to_bytes(8, "little")),
    kv_arr("k", 8, 1 << 24),
], ids=["array", "string", "item", "empty-strings"])
def test_a_header_has_a_limit_in_a_file_of_any_size(write, entry):
    """The file (a hole) does have the bytes that it claims; a header of gigabytes is refused before any are read."""
    path = write(gguf([entry], n_tensors=1))
    os.truncate(path, 1 << 40)
    start = time.process_time()
    with scan_gguf(path) as file:
        assert [f.code for f in file.findings] == ["header-too-long"]
    assert time.process_time() - start < 10


def test_padding_checks_are_bounded(write):
    tensors = [tensor(f"{i}", (1,), T_I8, i << 20) for i in range(64)]
    raw = padded(gguf([alignment(1 << 20)], tensors), 1 << 20)
    path = write(raw)
    os.truncate(path, len(raw) + (64 << 20))
    tracemalloc.start()
    with open_gguf(path) as file:
        assert file.findings == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_the_reader_starts_without_the_compiler():
    code = "import sys, dsv4tools.gguf.reader, dsv4tools.gguf.splits; print({'numba', 'llvmlite'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "set()"
