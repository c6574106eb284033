"""Split sets: names, marks, and everything that can be wrong between the parts."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import pytest
from gguf_bytes import I32, U16, U32, gguf, kv, kv_str, kv_u32, tensor

from dsv4tools.errors import InputError, UsageError
from dsv4tools.gguf.header import TensorInfo, encode_header
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.gguf.splits import open_split, split_kvs, split_name
from dsv4tools.gguf.values import KV


def mark(index, count=3, n_tensors=3):
    return [
        kv("split.no", U16, struct.pack("<H", index)), kv("split.count", U16, struct.pack("<H", count)),
        kv("split.tensors.count", I32, struct.pack("<i", n_tensors)),
    ]


def part(index, kvs=(), name=None, **fields):
    return gguf([*kvs, *mark(index, **fields)], [tensor(name or f"t{index}")], bytes([index + 1]) * 32)


@pytest.fixture
def parts(tmp_path):
    """Three parts with a tensor each; the first has the model's metadata."""
    paths = [tmp_path / f"model-0000{i + 1}-of-00003.gguf" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(part(i, [kv_str("general.architecture", "x")] if i == 0 else []))
    return paths


def close(files):
    for file in files:
        file.close()


def test_any_part_opens_the_set_in_order(parts):
    for path in parts:
        files = open_split(path)
        assert [f.path for f in files] == parts
        assert [f.read_tensor_bytes(f"t{i}")[0] for i, f in enumerate(files)] == [1, 2, 3]
        close(files)


def test_a_file_that_is_no_part_comes_alone(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf([kv_u32("k", 1)]))
    for raw in (gguf([kv_u32("k", 1)]), gguf([kv("split.count", U16, b"\0\0")])):  # what merging leaves behind
        path.write_bytes(raw)
        (file,) = open_split(str(path))
        assert file.path == path
        file.close()


def test_a_set_of_one(tmp_path):
    path = tmp_path / "m-00001-of-00001.gguf"
    path.write_bytes(part(0, count=1, n_tensors=1))
    close(open_split(path))


def test_parts_may_be_links_with_other_names_behind(parts, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, path in enumerate(parts):
        path.rename(blobs / f"{i}abc")
        path.symlink_to(blobs / f"{i}abc")
    close(open_split(parts[0]))


@pytest.mark.parametrize(("index", "raw", "message"), [
    (1, part(2), r"00002-of-00003\.gguf: split\.no: is 2, the file's name says 1"),
    (0, part(1), r"split\.no: is 1, the file's name says 0"),
    (1, part(1, count=4), r"split\.count: is 4, the file's name says 3"),
    (2, part(2, n_tensors=4), r"split\.tensors\.count: is 4, the 3 parts hold 3"),
    (1, part(1, [kv_str("general.architecture", "x")]), r"general\.architecture: stands in a later part"),
    (1, part(1, name="t0"), r"00002-of-00003\.gguf: t0: is also in model-00001-of-00003\.gguf"),
    (1, gguf(mark(1)[1:], [tensor("t1")], bytes(32)), r"split\.no: is missing, expected a u16"),
    (1, gguf([kv("split.no", U32, b"\1\0\0\0"), *mark(1)[1:]], [tensor("t1")], bytes(32)),
     r"split\.no: is u32, expected a u16"),
    (0, gguf([*mark(0)[:2], kv_u32("split.tensors.count", 3)], [tensor("t0")], bytes(32)),
     r"split\.tensors\.count: is u32, expected a i32"),
    (2, part(2)[:-1], r"00003-of-00003\.gguf: t2: data ends at byte"),
    (1, b"", r"00002-of-00003\.gguf: header: the file is empty"),
    (1, gguf(data=b""), r"split\.no: is missing"),
], ids=str)
def test_what_does_not_fit_together_is_refused(parts, index, raw, message):
    before = len(list(Path("/dev/fd").iterdir()))
    parts[index].write_bytes(raw)
    for path in parts:
        with pytest.raises(InputError, match=message):
            open_split(path)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_missing_parts_are_named(parts):
    parts[1].unlink()
    with pytest.raises(InputError, match=r"parts are missing: model-00002-of-00003\.gguf"):
        open_split(parts[0])
    parts[2].unlink()
    with pytest.raises(InputError, match=r"00002-of-00003\.gguf, model-00003"):
        open_split(parts[0])


def test_many_missing_parts_are_counted(tmp_path):
    path = tmp_path / "m-00002-of-65535.gguf"
    path.write_bytes(part(1))
    with pytest.raises(InputError, match="and 65531 more"):
        open_split(path)


@pytest.mark.parametrize("name", ["m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-00001-of-99999.gguf"])
def test_impossible_names_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(part(0))
    with pytest.raises(InputError, match="is named part"):
        open_split(tmp_path / name)


def test_a_renamed_part_is_refused(parts, tmp_path):
    shutil.copy(parts[0], tmp_path / "renamed.gguf")
    with pytest.raises(InputError, match="one of 3 parts"):
        open_split(tmp_path / "renamed.gguf")


def test_a_part_that_is_a_pipe_does_not_hang(parts):
    parts[1].unlink()
    os.mkfifo(parts[1])
    with pytest.raises(InputError, match="is a pipe"):
        open_split(parts[0])


def test_names_and_marks_are_those_of_the_convention(tmp_path):
    assert split_name("dir/M", 0, 3) == "dir/M-00001-of-00003.gguf"
    assert split_name("M", 65534, 65535) == "M-65535-of-65535.gguf"
    for index, count in ((3, 3), (-1, 3), (0, 0), (0, 65536)):
        with pytest.raises(UsageError):
            split_name("M", index, count)
    assert split_kvs(1, 3, 1328) == [
        KV("split.no", "u16", 1), KV("split.count", "u16", 3), KV("split.tensors.count", "i32", 1328),
    ]
    file = tmp_path / split_name("M", 0, 1)
    with open_gguf(_write(tmp_path / "by-hand.gguf", part(0, count=1, n_tensors=1))) as by_hand:
        t0: TensorInfo = by_hand.tensors["t0"]
    _write(file, encode_header(split_kvs(0, 1, 1), [t0]) + b"\1" * 32)
    assert file.read_bytes() == (tmp_path / "by-hand.gguf").read_bytes()
    close(open_split(file))


def _write(path, raw):
    path.write_bytes(raw)
    return path
