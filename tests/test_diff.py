"""`diff`: every kind of difference, and the errors of values against what gguf-py decodes."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_bytes import T_F32, alignment, gguf, kv, kv_arr, kv_str, kv_u32, tensor, text
from gguf_edit import Edit

import dsv4tools as dt
from dsv4tools.diff import diff
from dsv4tools.errors import UsageError

DOWN, Q_B = "blk.1.ffn_down_exps.weight", "blk.1.attn_q_b.weight"


@pytest.fixture(scope="module")
def pair(_written, tmp_path_factory):
    """Files of one checkpoint by two policies. Not to be changed."""
    from conftest import SMALL  # noqa: PLC0415  - the suite's own module

    source = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    directory = tmp_path_factory.mktemp("diff")
    for policy in ("q4k", "q8"):
        dt.convert(dt.plan(dt.open_checkpoint(source), policy=policy), directory / f"{policy}.gguf")
    return directory / "q4k.gguf", directory / "q8.gguf"


@pytest.fixture
def right(pair):
    return pair[0]


def decoded(path, name):
    (t,) = [t for t in GGUFReader(path).tensors if t.name == name]
    return dequantize(t.data, t.tensor_type).astype(np.float64).reshape(-1)


def check_errors(errors, a, b):
    """`errors` are those of `b` against `a`."""
    assert errors.n == a.size
    assert errors.relative_rmse == pytest.approx(np.sqrt(((b - a) ** 2).sum() / (a**2).sum()))
    assert errors.cosine == pytest.approx(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))
    assert errors.largest_error == np.float32(np.abs(b - a).max())
    assert abs(b - a)[errors.largest_at] == pytest.approx(errors.largest_error)


def test_the_same(right, tmp_path, dsv4tools):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(right.read_bytes())
    for other in (right, copy):
        ended = dsv4tools("diff", right, other)
        assert ended.succeeded
        n_keys = len(GGUFReader(right).fields) - 3      # gguf-py counts version, tensors and entries among them
        assert ended.out == f"the same: {n_keys} metadata entries, 92 tensors\n"
    data = dsv4tools("diff", right, copy, "--json").data
    assert (data["same"], data["entries"], data["tensors"], data["notes"]) == (True, [], [], [])


def test_one_byte(right, tmp_path, dsv4tools):
    other = Edit(right).flip(DOWN, 144 * 5 + 20, 7).write(tmp_path / "other.gguf")
    ended = dsv4tools("diff", right, other)
    assert (ended.code, ended.err) == (5, "")
    assert "metadata entries: 0 differ, " in ended.out
    assert "tensors: 1 differ, 91 do not" in ended.out
    (t,) = diff(right, other).tensors
    assert (t.name, t.kind, t.a, t.b, t.n_bytes_different) == (DOWN, "bytes", *["Q4_K [256, 256, 4]"] * 2, 1)
    check_errors(t.errors, decoded(right, DOWN), decoded(other, DOWN))


def test_other_types_are_compared_by_value(pair, dsv4tools):
    result = diff(*pair, threads=3)
    assert {t.kind for t in result.tensors} == {"type"}
    names = {t.name for t in GGUFReader(pair[0]).tensors if t.tensor_type.name == "Q4_K"}
    assert {t.name for t in result.tensors if t.a.startswith("Q4_K")} == names
    assert result.n_tensors_same == 92 - len(result.tensors)
    for t in result.tensors:
        check_errors(t.errors, decoded(pair[0], t.name), decoded(pair[1], t.name))
    errors = [t.errors.relative_rmse for t in result.tensors]
    assert errors == sorted(errors, reverse=True)
    assert {e.key for e in result.entries} == {"general.file_type", "dsv4tools.policy", "dsv4tools.policy_sha256"}
    ended = dsv4tools("diff", *pair)
    assert ended.code == 5
    assert "key 'dsv4tools.policy' (value): A str 'q4k'; B str 'q8'" in ended.out


def test_nothing_depends_on_threads_or_pieces(pair, monkeypatch):
    first = diff(*pair, threads=1)
    assert diff(*pair, threads=7) == first
    module = sys.modules["dsv4tools.diff"]
    monkeypatch.setattr(module, "_PIECE_VALUES", 512)
    monkeypatch.setattr(module, "_CHUNK_VALUES", 256)
    small = diff(*pair, threads=3)
    assert [(t.name, t.kind, t.errors.n, t.errors.largest_error) for t in small.tensors] == \
        [(t.name, t.kind, t.errors.n, t.errors.largest_error) for t in first.tensors]


def test_progress_adds_up(pair):
    totals, steps = [], []
    diff(*pair, announce=totals.append, progress=steps.append)
    assert totals == [sum(steps)] == [sum(int(t.n_bytes) for t in GGUFReader(pair[0]).tensors)]


def test_only_some_tensors(pair, dsv4tools):
    data = dsv4tools("diff", *pair, "--tensor", DOWN, "--tensor", "*norm*", "--json")
    assert data.code == 5
    assert [t["name"] for t in data.data["tensors"]] == [DOWN]
    assert data.data["entries"] == []
    assert dsv4tools("diff", *pair, "--tensor", "*norm*").code == 0
    assert "matches no tensor" in dsv4tools("diff", *pair, "--tensor", "none").failed(2)


def small(tmp_path, name, kvs, tensors, data, **options):
    path = tmp_path / name
    path.write_bytes(gguf(kvs, tensors, data, **options))
    return path


def test_tensors_that_are_missing_or_of_another_shape(tmp_path, dsv4tools):
    a = small(tmp_path, "a", [], [tensor("x", (8,)), tensor("y", (4, 2), T_F32, 32)], bytes(64))
    b = small(tmp_path, "b", [], [tensor("y", (8,)), tensor("z", (8,), T_F32, 32)], bytes(64))
    found = {t.name: (t.kind, t.a, t.b, t.errors) for t in diff(a, b).tensors}
    assert found == {
        "x": ("missing", "F32 [8]", "", None), "y": ("shape", "F32 [4, 2]", "F32 [8]", None),
        "z": ("missing", "", "F32 [8]", None),
    }  # fmt: skip
    ended = dsv4tools("diff", a, b)
    assert ended.code == 5
    assert "tensor x (missing): A F32 [8]; B lacks it\n" in ended.out
    assert "tensor y (shape): A F32 [4, 2]; B F32 [8]\n" in ended.out


I32S = struct.pack("<8i", *range(8))
ENTRIES = [
    # key and kind of difference, A, B, what is shown of both
    ("missing", kv_u32("k", 1), None, "u32 1", ""),
    ("missing", None, kv_str("k", "x"), "", "str 'x'"),
    ("type", kv_u32("k", 1), kv("k", 5, struct.pack("<i", 1)), "u32 1", "i32 1"),
    ("value", kv_u32("k", 1), kv_u32("k", 2), "u32 1", "u32 2"),
    ("value", kv("k", 6, struct.pack("<f", 0.0)), kv("k", 6, struct.pack("<f", -0.0)), "f32 0.0", "f32 -0.0"),
    ("value", kv_str("k", "a" * 500), kv_str("k", "b"), "str '" + "a" * 56 + "...", "str 'b'"),
    ("type", kv_arr("k", 5, 8, I32S), kv_arr("k", 4, 8, I32S), "8 i32: 0, 1, 2, 3", "8 u32: 0, 1, 2, 3"),
    ("value", kv_arr("k", 5, 8, I32S), kv_arr("k", 5, 7, I32S[:-4]), "8 i32, from item 7: 7", "7 i32, from item 7: "),
    ("value", kv_arr("k", 8, 3, b"".join(map(text, "abc"))), kv_arr("k", 8, 3, b"".join(map(text, "axc"))),
     "3 str, from item 1: 'b', 'c'", "3 str, from item 1: 'x', 'c'"),
]


@pytest.mark.parametrize(("kind", "a", "b", "shown_a", "shown_b"), ENTRIES, ids=range(len(ENTRIES)))
def test_metadata(kind, a, b, shown_a, shown_b, tmp_path):
    files = [small(tmp_path, name, [kv_u32("same", 7), *filter(None, (entry,))], [], b"")
             for name, entry in (("a", a), ("b", b))]
    result = diff(*files)
    (entry,) = result.entries
    assert (entry.key, entry.kind, entry.a, entry.b) == ("k", kind, shown_a, shown_b)
    assert (result.same, result.n_entries_same) == (False, 1)
    swapped = diff(*files[::-1]).entries[0]
    assert (swapped.kind, swapped.a, swapped.b) == (kind, shown_b, shown_a)
    assert diff(files[0], files[0]).same


def test_nan_is_equal_to_itself(tmp_path):
    nan = kv("k", 6, struct.pack("<f", float("nan")))
    a, b = (small(tmp_path, name, [nan], [tensor("t", (8,))], b"\xff" * 32) for name in "ab")
    assert diff(a, b).same


def test_layout_is_only_noted(tmp_path, dsv4tools):
    kvs = [kv_u32("x", 1), kv_u32("y", 2)]
    a = small(tmp_path, "a", kvs, [tensor("s", (8,)), tensor("t", (8,), T_F32, 32)], bytes(32) + b"\1" * 32)
    b = small(tmp_path, "b", kvs[::-1], [tensor("t", (8,)), tensor("s", (8,), T_F32, 32)], b"\1" * 32 + bytes(32),
              version=b"\2\0\0\0")  # fmt: skip
    result = diff(a, b)
    assert result.same
    assert result.notes == [
        "version is 3 and 2", "metadata entries stand in another order", "tensors stand in another order"]
    ended = dsv4tools("diff", a, b)
    assert ended.code == 0
    assert "note: tensors stand in another order\n" in ended.out
    wide = small(tmp_path, "w", [alignment(64)], [], b"", align=64)
    assert "alignment is 64 and 32" in diff(wide, small(tmp_path, "n", [], [], b"")).notes


def test_values_that_cannot_be_decoded(tmp_path, dsv4tools):
    a = small(tmp_path, "a", [], [tensor("t", (4,), 26), tensor("u", (256,), 16, 32)], bytes(128))
    b = small(tmp_path, "b", [], [tensor("t", (4,), 26), tensor("u", (256,), 16, 32)], bytes(15) + b"\1" + bytes(112))
    (t,) = diff(a, b).tensors
    assert (t.name, t.kind, t.n_bytes_different, t.errors) == ("t", "bytes", 1, None)
    ended = dsv4tools("diff", a, b)
    assert "tensor t (bytes): A I32 [4]; B I32 [4]; bytes that differ: 1\n" in ended.out


def test_a_nan_in_one_file_is_the_worst(right, tmp_path, dsv4tools):
    other = Edit(right).put(DOWN, b"\x00\x7e", 144).flip(Q_B, 1, 6).write(tmp_path / "other.gguf")
    result = diff(right, other)
    assert [t.name for t in result.tensors] == [DOWN, Q_B]
    assert (result.tensors[0].errors.n_not_finite, result.tensors[0].errors.relative_rmse) == (256, np.inf)
    data = dsv4tools("diff", right, other, "--json").data
    assert data["tensors"][0]["errors"]["relative_rmse"] is None


def test_files_that_are_none(right, tmp_path, dsv4tools):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(right.read_bytes()[:-100])
    for pair in ((right, broken), (broken, right)):
        assert "broken.gguf" in dsv4tools("diff", *pair).failed(3)
    assert "none.gguf" in dsv4tools("diff", right, tmp_path / "none.gguf").failed(3)
    with pytest.raises(UsageError, match="--threads"):
        diff(right, right, threads=0)
