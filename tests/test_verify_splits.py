"""Split sets: verified, compared and run as the one model they are; what is wrong with a part is a fault of the set."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from gguf_edit import Edit

import dsv4tools as dt
from dsv4tools.diff import diff
from dsv4tools.errors import InputError
from dsv4tools.gguf.header import TensorInfo, encode_header, lay_out
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.gguf.splits import open_whole, scan_whole, split_kvs, split_name
from dsv4tools.model import open_model

N_PARTS = 3
LATE = "blk.2.ffn_down_exps.weight"     # in the last part


@pytest.fixture(scope="module")
def model(_written, tmp_path_factory):
    """A checkpoint and its GGUF. Not to be changed."""
    from conftest import SMALL  # noqa: PLC0415  - the suite's own module

    source = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    out = tmp_path_factory.mktemp("splits") / "whole.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(source)), out)
    return source, out


def cut(path, directory):
    """The file in `N_PARTS` parts, as gguf-split cuts it."""
    with open_gguf(path) as file:
        names = list(file.tensors)
        paths = []
        for index in range(N_PARTS):
            mine = names[len(names) * index // N_PARTS : len(names) * (index + 1) // N_PARTS]
            infos = [file.tensors[name] for name in mine]
            offsets, n_bytes = lay_out([i.n_bytes for i in infos])
            kvs = [*(file.kvs.values() if index == 0 else ()), *split_kvs(index, N_PARTS, len(names))]
            header = encode_header(kvs, [TensorInfo(i.name, i.ne, i.format, o)
                                         for i, o in zip(infos, offsets, strict=True)])
            data = bytearray(n_bytes)
            for info, offset in zip(infos, offsets, strict=True):
                data[offset : offset + info.n_bytes] = file.read_tensor_bytes(info.name).tobytes()
            paths.append(directory / split_name("model", index, N_PARTS))
            paths[-1].write_bytes(header + data)
    return paths


@pytest.fixture
def parts(model, tmp_path):
    return cut(model[1], tmp_path)


def test_a_set_is_one_model(model, parts, dsv4tools):
    source, whole = model
    for path in parts:
        ended = dsv4tools("verify", path, "--source", source, "--deep", "--engine", "llama.cpp")
        assert ended.succeeded
        assert "92 of 92 tensors are what the source gives, byte for byte" in ended.out
        assert f"{path}: right: 92 tensors, " in ended.out
    report = dt.verify(parts[0])
    assert report.n_file_bytes == sum(p.stat().st_size for p in parts)
    assert list(report.contents) == list(dt.verify(whole).contents)
    result = diff(whole, parts[1])
    assert result.same
    assert result.n_tensors_same == 92


def test_a_fault_in_a_later_part_is_found_and_named(model, parts, dsv4tools):
    source, _ = model
    Edit(parts[2]).flip(LATE, 144 * 300 + 77, 2).write(parts[2])
    ended = dsv4tools("verify", parts[0], "--source", source, "--engine", "none")
    assert (ended.code, ended.err) == (5, "")
    assert f"error: tensor {LATE} (Q4_K): 1 of " in ended.out
    assert "block 300 (expert 1 row 44 column 0): one bit is flipped: bit 2 of byte 77" in ended.out
    Edit(parts[2]).put(LATE, b"\x00\x7e", 0).write(parts[2])
    ended = dsv4tools("verify", parts[0], "--deep", "--engine", "none")
    assert ended.code == 5
    assert f"error: {LATE}: block 0 (expert 0 row 0 column 0): d is NaN\n" in ended.out


@pytest.mark.parametrize("damage", ["missing", "cut", "copied", "renamed"])
def test_a_set_with_a_wrong_part(damage, model, parts, tmp_path, dsv4tools):
    path = parts[0]
    if damage == "missing":
        parts[1].unlink()
    elif damage == "cut":
        parts[1].write_bytes(parts[1].read_bytes()[:-64])
    elif damage == "copied":
        shutil.copy(parts[2], parts[1])
    else:
        path = parts[0].rename(tmp_path / "first.gguf")
    for options in ((), ("--source", model[0], "--deep")):
        ended = dsv4tools("verify", path, *options)
        assert (ended.code, ended.err) == (5, "")
        assert {"missing": "parts are missing: model-00002-of-00003.gguf", "cut": "model-00002-of-00003.gguf: ",
                "copied": "split.no: is 2, the file's name says 1",
                "renamed": "says it is one of 3 parts"}[damage] in ended.out
    dsv4tools("diff", path, model[1]).failed(3)
    with pytest.raises(InputError):
        open_whole(path)


def test_a_set_runs(model, parts):
    with open_model(model[1]) as whole, open_model(parts[0]) as split:
        assert np.array_equal(whole.forward([1, 2, 3]), split.forward([1, 2, 3]))
        assert list(split.weights.paths) == parts


def test_handles_are_given_back(parts):
    with scan_whole(parts[0]) as file:
        assert file.paths == parts
        assert file.read_tensor_bytes(LATE).size == file.tensors[LATE].n_bytes
    with pytest.raises(Exception, match="closed"):
        file.read_tensor_bytes(LATE)
    with scan_whole(parts[0]) as file, pytest.raises(InputError, match="no tensor"):
        file.read_tensor_bytes("none")
