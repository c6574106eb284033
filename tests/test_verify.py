"""What `verify` says of right files, wrong files, and sources that are no use."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import random
import re
import struct
import sys

import numpy as np
import pytest
from conftest import SMALL
from gguf import GGUFReader
from gguf_bytes import U32, gguf, kv, kv_arr, kv_str, tensor, text
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import payload
from tamper import drop_tensor, find_tensor, write_tensor

import dsv4tools as dt
from dsv4tools.describe import describe_gguf
from dsv4tools.errors import Dsv4Error, InputError, UsageError
from dsv4tools.formats import selftest
from dsv4tools.gguf.header import encode_header
from dsv4tools.gguf.reader import scan_gguf
from dsv4tools.gguf.values import KV

TYPE_IDS = {"F32": 0, "F16": 1, "Q8_0": 8, "Q4_K": 12, "I16": 25, "I32": 26, "BF16": 30}


@pytest.fixture(scope="module")
def pair(_written, tmp_path_factory):
    """A small checkpoint and its GGUF. Not to be changed."""
    source = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    out = tmp_path_factory.mktemp("pair") / "right.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(source)), out)
    return source, out


@pytest.fixture
def source(pair):
    return pair[0]


@pytest.fixture
def right(pair):
    return pair[1]


@pytest.fixture
def changed(right, tmp_path):
    """A copy of the right file with bytes written over: ``changed(position, new_bytes)``."""

    def change(position, new):
        raw = bytearray(right.read_bytes())
        raw[position : position + len(new)] = new
        path = tmp_path / "changed.gguf"
        path.write_bytes(raw)
        return path

    return change


def positions(path) -> dict[str, tuple[int, int]]:
    """Tensor -> first byte in the file, bytes; as gguf-py finds them."""
    return {t.name: (int(t.data_offset), int(t.n_bytes)) for t in GGUFReader(path).tensors}


def find_value(path, key) -> int:
    """Where a scalar's value stands in the file, behind its key and type."""
    encoded = text(key)
    raw = path.read_bytes()
    assert raw.count(encoded) == 1
    return raw.index(encoded) + len(encoded) + 4


def find_type(path, name) -> int:
    """Where a tensor's type stands in the file: behind its name and dimensions."""
    at = path.read_bytes().index(text(name)) + len(text(name))
    n_dims = struct.unpack_from("<I", path.read_bytes(), at)[0]
    return at + 4 + 8 * n_dims


# -------------------------------------------------------------------------------------------------------- right files


def test_a_right_file(source, right, dsv4tools):
    ended = dsv4tools("verify", right)
    assert ended.succeeded
    n_bytes = right.stat().st_size
    assert re.fullmatch(r".*right\.gguf: right: 92 tensors, [\d.]+ MB \([\d.]+ MiB\)", ended.out.splitlines()[-1])
    ended = dsv4tools("verify", right, "--source", source)
    assert ended.succeeded
    assert "92 of 92 tensors are what the source gives, byte for byte" in ended.out
    data = dsv4tools("verify", right, "--source", source, "--json").data
    assert data.keys() == {"path", "ok", "template", "n_tensors", "n_bytes", "findings", "tensors", "engines",
                           "sample_per_cent", "depth", "manifest", "behaviour"}
    assert (data["ok"], data["template"], data["n_tensors"], data["n_bytes"]) == (True, None, 92, n_bytes)
    assert data["findings"] == []
    assert {t["name"]: t["n_bytes"] for t in data["tensors"]} == {n: size for n, (_, size) in positions(right).items()}
    assert all(t["ok"] and t["n_different"] == 0 and t["first_difference"] == "" for t in data["tensors"])


def test_progress_is_announced_and_adds_up(source, right):
    totals, steps = [], []
    report = dt.verify(right, source=source, announce=totals.append, progress=steps.append, threads=2)
    assert report.ok
    assert totals == [sum(steps)] == [sum(size for _, size in positions(right).values())]


# ------------------------------------------------------------------------------------------------------ wrong tensors


FLIPS = [
    # tensor, byte in it, source of that byte: bytes per block, values per block, values per row
    ("token_embd.weight", 2 * (3 * 256 + 17), "byte 0 of the block at row 3 column 17 of embed.weight"),
    ("output.weight", 34 * (8 * 5 + 7) + 33, "byte 33 of the block at row 5 column 224 of head.weight"),
    ("output_norm.weight", 4 * 255 + 3, "byte 3 of the block at row 0 column 255 of norm.weight"),
    ("blk.0.ffn_gate_tid2eid.weight", 4 * (2 * 511 + 1),
     "byte 0 of the block at row 511 column 1 of layers.0.ffn.gate.tid2eid"),
    ("blk.2.ffn_down_exps.weight", 144 * (3 * 256 + 100) + 5,
     "byte 5 of the block at row 100 column 0 of layers.2.ffn.experts.3.w2.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "at", "where"), FLIPS)
def test_a_flipped_byte_is_found_and_named(name, at, where, source, right, changed, dsv4tools):
    start, n_bytes = positions(right)[name]
    was = right.read_bytes()[start + at]
    path = changed(start + at, bytes([was ^ 0x40]))
    ended = dsv4tools("verify", path, "--source", source)
    assert (ended.code, ended.err) == (5, "")
    said = f"byte {at:,} is 0x{was ^ 0x40:02x}, the source gives 0x{was:02x} ({where})"
    assert f"error: tensor {name} (" in ended.out
    assert f"): 1 of {n_bytes:,} bytes differ, first {said}\n" in ended.out
    assert "91 of 92 tensors are what the source gives" in ended.out
    assert "NOT right: 1 error\n" in ended.out
    wrong = [t for t in dsv4tools("verify", path, "--source", source, "--json").data["tensors"] if not t["ok"]]
    assert [(t["name"], t["n_different"], t["first_difference"]) for t in wrong] == [(name, 1, said)]


def test_any_byte_of_any_tensor_counts(source, right, changed):
    """Some bytes of every tensor at once, with small units on many threads: all are counted, the first is named."""
    rng = random.Random(7)
    raw = right.read_bytes()
    flipped, expected = bytearray(raw), {}
    for name, (start, n_bytes) in positions(right).items():
        hits = sorted(rng.sample(range(n_bytes), min(n_bytes, 5)))
        for at in hits:
            flipped[start + at] ^= 1 << rng.randrange(8)
        expected[name] = (len(hits), hits[0])
    path = changed(0, flipped)
    monkeypatch = pytest.MonkeyPatch()
    for threads, values in ((1, 1 << 22), (8, 3000)):
        monkeypatch.setattr(sys.modules["dsv4tools.plan"], "MAX_UNIT_VALUES", values)
        report = dt.verify(path, source=source, threads=threads)
        monkeypatch.undo()
        assert not report.ok
        firsts = {t.name: (t.n_different, int(re.match(r"byte ([\d,]+) ", t.difference)[1].replace(",", "")))
                  for t in report.tensors}  # fmt: skip
        assert firsts == expected


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("fill", ["random", "ones", "zeros"])
def test_tensors_of_nothing_but_noise(fill, threads, source, right, changed, dsv4tools):
    """NaN, infinities and numbers that overflow whatever is computed from them: each tensor is wrong, that is all."""
    raw = bytearray(right.read_bytes())
    begin = min(start for start, _ in positions(right).values())
    noise = {"random": random.Random(3).randbytes, "ones": lambda n: b"\xff" * n, "zeros": bytes}[fill]
    raw[begin:] = noise(len(raw) - begin)
    ended = dsv4tools("verify", changed(0, raw), "--source", source, "--threads", threads, "--json")
    assert (ended.code, ended.err) == (5, "")
    checks = ended.data["tensors"]
    assert len(checks) == 92
    assert not any(check["ok"] for check in checks)
    assert all(0.9 * check["n_bytes"] <= check["n_different"] <= check["n_bytes"] or fill != "ones" for check in checks)


def test_only_the_tensors_asked_for(source, right, changed, dsv4tools):
    start, _ = positions(right)["blk.1.attn_kv.weight"]
    path = changed(start, bytes([right.read_bytes()[start] ^ 1]))
    for globs, code in (
        (["blk.0.*", "output*"], 0), (["blk.1.attn_kv.weight"], 5), (["*kv*"], 5), (["token_embd.weight"], 0),
    ):  # fmt: skip
        options = [o for glob in globs for o in ("--tensor", glob)]
        data = dsv4tools("verify", path, "--source", source, *options, "--json")
        assert data.code == code, globs
        expected = [n for n in positions(right) if any(fnmatch.fnmatchcase(n, glob) for glob in globs)]
        assert [t["name"] for t in data.data["tensors"]] == expected
        assert [t["name"] for t in data.data["tensors"] if not t["ok"]] == (["blk.1.attn_kv.weight"] if code else [])
    assert "matches no tensor of" in dsv4tools("verify", path, "--source", source, "--tensor", "blk.9.*").failed(2)
    assert "needs --source" in dsv4tools("verify", path, "--tensor", "*").failed(2)


# --------------------------------------------------------------------------------------------------- wrong structures


@pytest.mark.parametrize("cut", [0, 1, 3, 8, 24, 100, 5000, -1, -40, -100_000])
@pytest.mark.parametrize("with_source", [False, True])
def test_a_truncated_file(cut, with_source, source, right, tmp_path, dsv4tools):
    path = tmp_path / "cut.gguf"
    path.write_bytes(right.read_bytes()[:cut])
    ended = dsv4tools("verify", path, *(["--source", source] if with_source else []))
    assert (ended.code, ended.err) == (5, "")
    assert "cut.gguf: NOT right" in ended.out
    assert "error: " in ended.out


def test_a_file_cut_at_its_data_is_no_template(right, tmp_path, dsv4tools):
    path = tmp_path / "cut.gguf"
    path.write_bytes(right.read_bytes()[: min(start for start, _ in positions(right).values())])
    ended = dsv4tools("verify", path)
    assert ended.code == 5
    assert "is a template" not in ended.out


@pytest.mark.parametrize("raw", [b"PK\3\4" + bytes(100), b"not a GGUF file at all, just a text\n", bytes(1000)])
def test_no_gguf_at_all(raw, source, tmp_path, dsv4tools):
    path = tmp_path / "other"
    path.write_bytes(raw)
    for options in ((), ("--source", source)):
        ended = dsv4tools("verify", path, *options)
        assert (ended.code, ended.err) == (5, "")
        assert "NOT right" in ended.out


def test_bytes_behind_the_end(right, tmp_path, dsv4tools):
    path = tmp_path / "more.gguf"
    path.write_bytes(right.read_bytes() + b"x")
    assert dsv4tools("verify", path).code == 5


def test_what_is_no_file(source, right, tmp_path, dsv4tools):
    assert "no such file" in dsv4tools("verify", tmp_path / "none.gguf").failed(3)
    assert "directory" in dsv4tools("verify", tmp_path).failed(3)
    assert "is missing" in dsv4tools("verify", right, "--source", tmp_path / "none").failed(3)


def test_a_faulty_source(make_checkpoint, right, dsv4tools):
    source = make_checkpoint("cut")
    shard, position, n_bytes = find_tensor(source, "norm.weight")
    shard.write_bytes(shard.read_bytes()[: position + n_bytes // 2])
    assert "is truncated" in dsv4tools("verify", right, "--source", source).failed(3)
    source = make_checkpoint("scale")
    drop_tensor(source, "layers.1.attn.wkv.scale")
    assert "layers.1.attn.wkv.scale" in dsv4tools("verify", right, "--source", source).failed(3)
    source = make_checkpoint("nan")
    write_tensor(source, "head.weight", b"\xc0\x7f", at=0)
    message = dsv4tools("verify", right, "--source", source).failed(3)
    assert "tensor 'head.weight': the value at row 0 column 0 is NaN or infinite" in message
    assert "--nan" in message


# --------------------------------------------------------------------------- files that do not belong to their source


def test_another_checkpoints_file(make_checkpoint, right, dsv4tools):
    other = make_checkpoint("values", seed=9)     # the same shape
    ended = dsv4tools("verify", right, "--source", other)
    assert (ended.code, ended.err) == (5, "")
    assert "token_embd.weight" in ended.out
    more = make_checkpoint("experts", experts=5)
    ended = dsv4tools("verify", right, "--source", more)
    assert (ended.code, ended.err) == (5, "")
    assert "does not fit the source" in ended.out
    deeper = make_checkpoint("layers", layers=4)
    ended = dsv4tools("verify", right, "--source", deeper)
    assert (ended.code, ended.err) == (5, "")
    n_missing = len([n for n in positions(right) if n.startswith("blk.2.")])    # layer 3 is of the kind of layer 2
    assert f"lacks {n_missing} tensors" in ended.out
    fewer = make_checkpoint("fewer", experts_per_token=1)   # the file routes to two: more than this source can
    assert dsv4tools("verify", right, "--source", fewer).code == 5


@pytest.mark.parametrize(("key", "code", "value"), [
    ("deepseek4.block_count", "I", 4),
    ("deepseek4.expert_used_count", "I", 3),
    ("deepseek4.expert_used_count", "I", 1),
    ("deepseek4.expert_used_count", "I", 0),
    ("deepseek4.expert_count", "I", 2**32 - 1),
    ("deepseek4.attention.layer_norm_rms_epsilon", "f", 1e-5),
    ("deepseek4.rope.freq_base", "f", float("nan")),
    ("deepseek4.embedding_length", "I", 255),
])  # fmt: skip
def test_metadata_that_contradicts_the_source(key, code, value, source, right, changed, dsv4tools):
    path = changed(find_value(right, key), struct.pack("<" + code, value))
    assert dsv4tools("verify", path).code == 0      # it is a fine GGUF, of another model
    ended = dsv4tools("verify", path, "--source", source)
    assert (ended.code, ended.err) == (5, "")
    assert "does not fit the source" in ended.out
    if value != 1:      # a file for one expert is compared with the source as re-routed to one, and its table is wider
        assert key in ended.out


@pytest.mark.parametrize(("name", "was", "becomes", "said"), [
    ("output_norm.weight", "F32", "I32", "output_norm.weight: has type I32, expected F32"),
    ("blk.0.ffn_gate_tid2eid.weight", "I32", "F32", "blk.0.ffn_gate_tid2eid.weight: has type F32, expected I32"),
    ("token_embd.weight", "F16", "I16", "token_embd.weight: has type I16, which cannot be derived again"),
    ("token_embd.weight", "F16", "BF16", "error: tensor token_embd.weight (BF16): "),
])
def test_a_tensor_of_another_type(name, was, becomes, said, source, right, changed, dsv4tools):
    at = find_type(right, name)
    assert struct.unpack_from("<I", right.read_bytes(), at)[0] == TYPE_IDS[was]
    path = changed(at, struct.pack("<I", TYPE_IDS[becomes]))
    assert dsv4tools("verify", path).code == 0
    ended = dsv4tools("verify", path, "--source", source)
    assert (ended.code, ended.err) == (5, "")
    assert said in ended.out


def small_file(tmp_path, *kvs):
    path = tmp_path / "hostile.gguf"
    kvs = [kv_str("general.architecture", "deepseek4"), *kvs]
    path.write_bytes(gguf(kvs, [tensor("token_embd.weight", (8,))], bytes(32)))
    return path


@pytest.mark.parametrize("hostile", [
    kv("tokenizer.ggml.tokens", U32, struct.pack("<I", 7)),
    kv_str("tokenizer.ggml.tokens", "a"),
    kv_arr("tokenizer.ggml.tokens", U32, 2, struct.pack("<2I", 1, 2)),
    kv_str("deepseek4.expert_used_count", "two"),
    kv_arr("deepseek4.expert_used_count", U32, 2, struct.pack("<2I", 1, 2)),
    kv("deepseek4.expert_used_count", 7, b"\1"),
    kv("deepseek4.block_count", 6, struct.pack("<f", float("inf"))),
    kv_arr("deepseek4.attention.compress_ratios", 8, 1, text("x")),
    kv("deepseek4.attention.compress_ratios", U32, struct.pack("<I", 7)),
    kv_str("dsv4tools.nan", "zero"),
    kv("dsv4tools.nan", U32, struct.pack("<I", 7)),
    kv("dsv4tools.template", U32, struct.pack("<I", 1)),
    kv("dsv4tools.template", 7, b"\1"),
], ids=range(13))  # fmt: skip
def test_metadata_of_unexpected_types_is_a_finding(hostile, source, tmp_path, dsv4tools):
    path = small_file(tmp_path, hostile)
    assert dsv4tools("verify", path).code in {0, 5}
    ended = dsv4tools("verify", path, "--source", source)
    assert (ended.code, ended.err) == (5, "")
    assert dsv4tools("inspect", path).code == 0
    assert dsv4tools("inspect", path, "--json").data["n_tensors"] == 1


def test_entries_that_differ_but_contradict_no_weight_are_warnings(source, right, changed, dsv4tools):
    raw = right.read_bytes()
    for key, new, said in (
        ("tokenizer.ggml.tokens", "tokenizer.gGml.tokens", "is missing, the source gives it as str"),
        ("deepseek4.vocab_size", "deepseek4.voCab_size", "is missing, the source gives it as u32"),
    ):
        path = changed(raw.index(text(key)), text(new))
        ended = dsv4tools("verify", path, "--source", source)
        assert ended.succeeded
        assert f"warning: key {key!r}: {said}\n" in ended.out
    at = raw.index("Ġthe".encode(), raw.index(text("tokenizer.ggml.tokens")))
    ended = dsv4tools("verify", changed(at, "Ġtha".encode()), "--source", source)
    assert ended.succeeded
    assert "warning: key 'tokenizer.ggml.tokens': differs from the source's\n" in ended.out


@pytest.mark.parametrize("wrong", [
    ("u32", 7, None), ("str", "x", None), ("bool", True, None), ("f32", float("nan"), None), ("i64", -1, None),
    ("arr", ["x", "y"], "str"), ("arr", [1, 2, 3], "i32"), ("arr", [], "u8"),
], ids=lambda wrong: f"{wrong[0]}-{wrong[2]}")  # fmt: skip
def test_an_entry_of_another_type_contradicts_the_source(wrong, source, right, tmp_path):
    """Each entry in turn, in a file that is right otherwise: a finding where the source says something else."""
    kind, value, item = wrong
    path = tmp_path / "changed.gguf"
    with scan_gguf(right) as file:
        kvs, infos, data = file.kvs, list(file.tensors.values()), right.read_bytes()[file.data_offset :]
    checked = [key for key in kvs if key.startswith("deepseek4.")]
    assert len(checked) > 30
    for key in [*checked, "general.architecture", "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "dsv4tools.policy"]:
        other = KV(key, kind, value, item)
        if other == kvs[key]:
            continue
        path.write_bytes(encode_header([*{**kvs, key: other}.values()], infos) + data)
        report = dt.verify(path, source=source, tensors=["output_norm.weight"])
        assert report.ok == (key in {"dsv4tools.policy", "tokenizer.ggml.merges"}), (key, report.findings)
        assert [key in f"{f.where} {f.message}" for f in report.findings] == [True] * (key != "dsv4tools.policy")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data())
def test_no_header_whatever_raises(pair, tmp_path_factory, data):
    """Bytes of the header exchanged at random: a report, or an error of ours, in no time."""
    source, right = pair
    raw = bytearray(right.read_bytes())
    end = raw.index(b"tokenizer.ggml.tokens")     # behind it long lists of strings follow
    first = raw.index(b"token_embd.weight")
    places = st.one_of(st.integers(0, end + 40), st.integers(first, first + 3000))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(places)
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=1), st.sampled_from([bytes(8), b"\xff" * 8])))
        raw[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(raw)
    with contextlib.suppress(UsageError):    # no tensor of that name any more
        dt.verify(path, source=source, tensors=["output_norm.weight"])
    with scan_gguf(path, template=True) as file:
        json.dumps(describe_gguf(file), allow_nan=False)


# ---------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("sparse", [False, True])
def test_a_template_is_called_one(sparse, source, tmp_path, dsv4tools):
    path = tmp_path / "t.gguf"
    assert dsv4tools("template", source, path, *(["--sparse"] if sparse else [])).code == 0
    ended = dsv4tools("verify", path)
    assert ended.succeeded
    assert "is a template: " + ("extended to full size" if sparse else "header only") in ended.out
    assert "not a model to load" in ended.out
    assert dsv4tools("verify", path, "--json").data["template"] == ("sparse" if sparse else "header")
    ended = dsv4tools("verify", path, "--source", source)
    assert ended.code == 5
    assert "is a template: no weights to compare" in ended.out


def test_a_truncated_template_is_wrong(source, tmp_path, dsv4tools):
    path = tmp_path / "t.gguf"
    dsv4tools("template", source, path)
    path.write_bytes(path.read_bytes()[:-64])
    assert dsv4tools("verify", path).code == 5


# ------------------------------------------------------------------------------------------------------- the function


def test_errors_of_the_call(source, right):
    for threads in (0, -1, 10**6):
        with pytest.raises(UsageError, match="--threads"):
            dt.verify(right, source=source, threads=threads)
    with pytest.raises(UsageError, match="needs --source"):
        dt.verify(right, tensors=["*"])
    with pytest.raises(InputError, match="no such file"):
        dt.verify(right.parent / "none")
    assert issubclass(UsageError, Dsv4Error)


def test_a_report_is_data(source, right):
    report = dt.verify(right, source=source, tensors=["output*"])
    assert report.errors == []
    assert [t.name for t in report.tensors] == [n for n in positions(right) if n.startswith("output")]
    assert report.n_tensors == 92
    assert report.path == right
    norm = next(t for t in GGUFReader(right).tensors if t.name == "output_norm.weight")
    assert np.frombuffer(payload(norm), "<f4").shape == (256,)


def test_a_kernel_that_computes_wrongly_is_noticed(source, right, monkeypatch):
    """A verification must not trust kernels that fail their self-test: it would call right files wrong."""
    monkeypatch.setitem(selftest.ENCODED, "Q4_K", "0" * 16)
    with pytest.raises(Dsv4Error, match="kernel self-test failed"):
        dt.verify(right, source=source)
