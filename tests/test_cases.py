"""The 46 cases that a converter must survive, each with the exit code it must have and one line that says why.

Other modules look at most of these things more closely; here is the list, whole. Each refusal must cost little, touch
no input, and leave nothing under the output's name: the fixture `refused` looks at that.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from bounds import cheap
from conftest import SMALL
from gguf_bytes import EVERY_TYPE, F32, T_F32, alignment, gguf, kv_arr, kv_u32, tensor, text
from gguf_catalogue import CASES as GGUF_CASES
from hub_server import TOKEN, HubServer
from independent import payload
from nursery import Nursery
from process import COMMAND, ROOM_SECONDS, error_line, failed, messages, run, start
from small_output import SmallOutput
from tamper import (
    INDEX,
    REMOVED,
    add_tensor,
    drop_tensor,
    edit_config,
    edit_header,
    edit_json,
    find_tensor,
    load_shard,
    replace_tensor,
    save_shard,
    shards,
    write_tensor,
)
from test_faults import NAMESPACE, on_disk

import dsv4tools as dt
from dsv4tools import lock as lock_module
from dsv4tools.formats.codecs import prepare
from dsv4tools.formats.compile import cache_key, cache_root
from dsv4tools.options import RunOptions
from dsv4tools.workers import StopRequest

WEIGHT, SCALE = "layers.1.attn.wkv.weight", "layers.1.attn.wkv.scale"
EXPERT, EXPERT_SCALE = "layers.1.ffn.experts.2.w1.weight", "layers.1.ffn.experts.2.w1.scale"


@pytest.fixture
def source(make_checkpoint):
    """A small checkpoint that the test may change."""
    return make_checkpoint()


@pytest.fixture
def good(pair, tmp_path):
    """A GGUF that the test may change."""
    return Path(shutil.copy(pair[1], tmp_path / "good.gguf"))


@pytest.fixture(scope="module")
def pair(_written, tmp_path_factory):
    """A checkpoint and its GGUF. Not to be changed."""
    source = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    source = Path(shutil.copytree(source, tmp_path_factory.mktemp("pair") / "checkpoint"))
    return source, dt.convert(dt.plan(dt.open_checkpoint(source)), source.parent / "right.gguf").path


@pytest.fixture
def refused(source, tmp_path, dsv4tools):
    """``refused(code, *said, options)``: a conversion of `source` that ends so, quickly, and leaves all as it is."""

    def refuse(code, *said, options=(), out=None, checkpoint=source, seconds=2.0) -> str:
        before = look_at(checkpoint)
        out = out or tmp_path / "out.gguf"
        held = out.read_bytes() if out.is_file() else None
        with cheap(seconds, None):
            message = dsv4tools("convert", checkpoint, out, *options).failed(code)
        for text_ in said:
            assert text_ in message
        assert look_at(checkpoint) == before
        assert (out.read_bytes() if out.is_file() else None) == held
        return message

    return refuse


def look_at(directory) -> object:
    """What is in a directory, without opening what must not be opened."""
    if not directory.is_dir():
        return None
    return {p.name: (p.lstat().st_mode, p.lstat().st_size, p.lstat().st_mtime_ns) for p in directory.iterdir()}


def plan_of(source, **options):
    return dt.plan(dt.open_checkpoint(source), **options)


def header_of(shard, text_: bytes, data=b"") -> None:
    shard.write_bytes(len(text_).to_bytes(8, "little") + text_ + data)


def spoil_index(source, change) -> None:
    edit_json(source / INDEX, change)


# -------------------------------------------------------------------------------------------------- inputs: checkpoint


def test_case_01_index_missing_or_no_index(source, refused):
    index = source / INDEX
    good = index.read_text()
    for content, said in (
        ("{", "is not valid JSON"), ("[]", "holds a JSON list, expected an object"), ('{"a": 1, "a": 1}', "twice"),
        ('{"weight_map": 7}', "weight_map"), ("", "is not valid JSON"), ('{"a": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "nested too deeply"), ('{"weight_map": {"a": 1}}', "is not a plain file name"),
    ):  # fmt: skip
        index.write_text(content)
        refused(3, INDEX, said)
    with index.open("wb") as file:
        file.truncate(100_000_001)
    refused(3, INDEX, "100,000,00")
    index.unlink()
    refused(3, INDEX, "is missing, and the directory holds 2 .safetensors files")
    index.write_text(good)


@pytest.mark.parametrize("name", [
    "../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x\0.safetensors", "C:\\x.safetensors",
    "http://host/x.safetensors", "..", "", ".hidden.safetensors", "x.safetensors\n", "x.bin", "-r.safetensors",
    "\u202ex.safetensors",
])  # fmt: skip
def test_case_02_shard_names_that_must_not_be_opened(name, source, refused, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(str(path)) or real(path, *rest, **more))
    spoil_index(source, lambda index: index["weight_map"].update({"head.weight": name}))
    refused(3, "is not a plain file name ending in .safetensors")
    assert not [path for path in opened if path.endswith((".safetensors", ".bin"))]


def test_case_03_index_and_shards_disagree(source, refused):
    first, second = shards(source)
    hidden = second.rename(source / "hidden")
    refused(3, f"{second.name} is named by the index but missing")
    shutil.copy(first, source / "extra.safetensors")
    refused(3, f"{second.name} is named by the index but missing, extra.safetensors is not named by the index")
    (source / "extra.safetensors").unlink()
    hidden.rename(second)
    save_shard(second, load_shard(second) | {"norm.weight2": ("F32", [1], bytes(4)), "embed.weight": (
        "F32", [1], bytes(4))})
    refused(3, "tensor 'norm.weight2' of model-00002-of-00002.safetensors is not in the index",
            "tensor 'embed.weight' is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors")


def test_case_04_shards_that_are_no_files(source, refused, tmp_path):
    shard = shards(source)[1]
    kept = shard.rename(tmp_path / "kept")
    shard.mkdir()
    refused(3, shard.name, "is not a regular file")
    shard.rmdir()
    os.mkfifo(shard)
    refused(3, shard.name, "is not a regular file")
    shard.unlink()
    for target, said in (
        ("/dev/zero", "outside the checkpoint"), (kept, "outside the checkpoint"), (source / "none", "is missing"),
        (shard.name, "link to itself"), ("..", "outside the checkpoint"), (source, "is not a regular file"),
    ):  # fmt: skip
        shard.symlink_to(target)
        refused(3, shard.name, said)
        shard.unlink()
    kept.rename(shard)
    out = tmp_path / "hard.gguf"
    out.hardlink_to(shard)
    refused(2, "is one of the inputs", out=out, options=("--overwrite",))


@pytest.mark.parametrize("head", [
    b"", bytes(7), bytes(8), (2**63).to_bytes(8, "little") + b"{}", (100_000_001).to_bytes(8, "little") + b"{}",
    (1000).to_bytes(8, "little") + b"{}", (1).to_bytes(8, "little") + b"{", b"version https://git-lfs.github.com/spec",
], ids=range(8))  # fmt: skip
def test_case_05_header_lengths(head, source, refused):
    shards(source)[1].write_bytes(head)
    with cheap(2.0):
        refused(3, "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("text_", [
    b"\xff\xfe", b"[]", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b" {}", b'{"a": 1', b"null", b'{"a": 1e999}',
    b'{"n": ' + b"9" * 5000 + b"}",
], ids=range(10))  # fmt: skip
def test_case_05_headers(text_, source, refused):
    header_of(shards(source)[1], text_)
    with cheap(2.0):
        refused(3, "model-00002-of-00002.safetensors")


def test_case_06_offsets(source, refused):
    shard = shards(source)[1]
    good = shard.read_bytes()
    header = json.loads(good[8: 8 + int.from_bytes(good[:8], "little")])
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    first, second = names[:2]
    begin, end = header[first]["data_offsets"]

    def offsets(value):
        edit_header(shard, lambda h: h[first].update(data_offsets=value))

    for value, said in (
        ([begin, end + 8], "span"), ([end, begin], "span"), ([-8, end - 8], "non-negative integers"),
        ([begin, 2**62], "span"), ([float(begin), end], "non-negative integers"), ([True, end], "non-negative"),
        ([begin], "non-negative integers"), ("0-8", "non-negative integers"), ([begin, end, 3], "non-negative"),
        ([2**64, 2**64 + end - begin], "non-negative integers"),
    ):  # fmt: skip
        shard.write_bytes(good)
        offsets(value)
        refused(3, f"tensor {first!r}", said)
    for value, said in ((4, "overlaps"), (-4, "leaves a hole")):
        shard.write_bytes(good)
        edit_header(shard, lambda h, value=value: h[second].update(
            data_offsets=[n - value for n in h[second]["data_offsets"]]))
        refused(3, second, said)
    shard.write_bytes(good + b"x")
    refused(3, shard.name, "has bytes behind its last tensor")
    shard.write_bytes(good[:-1])
    refused(3, shard.name, "is truncated")
    many = b'{"a":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}' + b"".join(
        b',"%d":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}' % i for i in range(150_000)) + b"}"
    header_of(shard, many)      # a hundredth of what the format allows, in a hundredth of the time
    refused(3, INDEX, seconds=10)


def test_case_07_shapes(source, refused, dsv4tools, tmp_path):
    shard = find_tensor(source, "head.weight")[0]
    good = shard.read_bytes()
    for change, said in (
        ({"shape": [511, 256]}, "span"), ({"shape": [2**48, 2**48]}, "span"), ({"shape": [2**64, 1]}, "list of sizes"),
        ({"shape": [-1, 256]}, "list of sizes"), ({"shape": [512.0, 256]}, "list of sizes"),
        ({"dtype": "F7"}, "unknown dtype 'F7'"), ({"dtype": "F4", "shape": [3]}, "12 bits"), ({"shape": []}, "span"),
        ({"shape": [1] * 65}, "list of sizes"), ({"shape": "512x256"}, "list of sizes"), ({"dtype": None}, "dtype"),
    ):  # fmt: skip
        shard.write_bytes(good)
        edit_header(shard, lambda h, change=change: h["head.weight"].update(change))
        refused(3, "head.weight", said)
    shard.write_bytes(good)
    replace_tensor(source, "head.weight", "BF16", [], bytes(2))
    refused(3, "head.weight", "has shape []")
    shard.write_bytes(good)
    add_tensor(source, "mtp.0.nothing.weight", "F32", [0, 7], b"")       # of no size: allowed where nobody uses it
    assert dsv4tools("convert", source, tmp_path / "out.gguf").code == 0


def test_case_08_a_key_twice_in_a_header(source, refused):
    shard = shards(source)[1]
    raw = shard.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    name = next(k for k in header if k != "__metadata__")
    text_ = raw[8:8 + n].rstrip()[:-1] + f",{json.dumps(name)}:{json.dumps(header[name])}}}".encode()
    header_of(shard, text_, raw[8 + n:])
    refused(3, shard.name, f"key {name!r} appears twice")


def test_case_09_flipped_bytes_against_a_known_hash(pair, good, source, tmp_path, dsv4tools):
    """Of the Hub: test_hub.py. Of a manifest: here. A directory without hashes converts, and the plan says so."""
    manifest = tmp_path / "m"
    out = tmp_path / "good.gguf"
    dt.convert(plan_of(source), out, overwrite=True, manifest=manifest)
    assert dsv4tools("verify", out, "--manifest", manifest).code == 0
    raw = bytearray(out.read_bytes())
    raw[-1000] ^= 1
    out.write_bytes(raw)
    assert dsv4tools("verify", out, "--manifest", manifest).code == 5
    assert "not hash-verified" in dsv4tools("convert", source, tmp_path / "x.gguf", "--dry-run").out
    assert dsv4tools("convert", source, tmp_path / "x.gguf", "--dry-run", "--json").data["hash_verified"] is False
    with HubServer({"org/tiny": source}) as hub:
        hub.fault("lfs", shards(source)[0].name, corrupt=5000)
        ended = run("download", "org/tiny", tmp_path / "fetched", environment=hub.environment(tmp_path / "home"))
    assert ended.returncode == 5
    assert "came twice with another sha256" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [10, 11])
def test_case_10_11_a_shard_changes_while_it_is_read(number, source, tmp_path, monkeypatch, dsv4tools):
    """Truncated under the reader: 4, no SIGBUS. Replaced since the plan: 5, "source changed"."""
    module = sys.modules["dsv4tools.checkpoint.shard"]
    shard, position, _ = find_tensor(source, "head.weight")
    real = module.pread_into

    def truncate(fd, out, begin):
        if os.fstat(fd).st_ino == shard.stat().st_ino:
            os.truncate(shard, position)
        return real(fd, out, begin)

    def exchange(self, begin, out):
        shutil.copy2(self.path, self.path.with_suffix(".copy"))
        self.path.with_suffix(".copy").replace(self.path)
        real_read(self, begin, out)

    real_read = module.Shard.read_into
    if number == 10:
        monkeypatch.setattr(module, "pread_into", truncate)
    else:
        monkeypatch.setattr(module.Shard, "read_into", exchange)
    message = dsv4tools("convert", source, tmp_path / "out.gguf", "--threads", 1).failed(4 if number == 10 else 5)
    assert ("while it was being read" if number == 10 else "source changed since the plan was made: inode") in message
    assert not (tmp_path / "out.gguf").exists()


def test_case_12_config(source, refused):
    good = (source / "config.json").read_text()
    for change, said in (
        ({"hidden_size": REMOVED}, "hidden_size"), ({"hidden_size": "256"}, "hidden_size"),
        ({"hidden_size": 2**70}, "hidden_size"), ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"n_routed_experts": 3}, "experts.3"), ({"n_routed_experts": 5}, "experts.4"),
        ({"num_hidden_layers": 4}, "compress_ratios"), ({"compress_ratios": [0, 4]}, "compress_ratios"),
        ({"rms_norm_eps": float("1e39")}, "rms_norm_eps"), ({"vocab_size": 511}, "511"),
    ):  # fmt: skip
        (source / "config.json").write_text(good)
        edit_config(source, **change)
        refused(3, said)


def test_case_13_experts_and_scales(source, make_checkpoint, refused):
    changes = {
        "a missing expert": (lambda c: drop_tensor(c, EXPERT), EXPERT),
        "an extra expert": (lambda c: add_tensor(c, EXPERT.replace(".2.", ".4."), "I8", [4], bytes(4)), "experts.4"),
        "a missing scale": (lambda c: drop_tensor(c, SCALE), SCALE),
        "a scale of another shape": (lambda c: replace_tensor(c, EXPERT_SCALE, "F8_E8M0", [128, 8], bytes(1024)),
                                     "expected F8_E8M0 [256, 8]"),
        "a scale of another type": (lambda c: replace_tensor(c, EXPERT_SCALE, "F32", [256, 8], bytes(8192)), "is F32"),
        "FP4 columns": (lambda c: replace_tensor(c, EXPERT, "I8", [256, 120], bytes(256 * 120)), "[256, 120]"),
        "a missing tensor": (lambda c: drop_tensor(c, "norm.weight"), "norm.weight"),
    }
    for i, (change, said) in enumerate(changes.values()):
        checkpoint = make_checkpoint(f"spoiled-{i}")
        change(checkpoint)
        refused(3, said, checkpoint=checkpoint)


@pytest.mark.parametrize(("name", "data", "at"), [
    (EXPERT_SCALE, b"\xff", 42), (WEIGHT, b"\x7f", 5), ("head.weight", b"\x80\x7f", 4), ("head.weight", b"\xc1\x7f", 4),
])  # fmt: skip
def test_case_14_values_that_are_no_numbers(name, data, at, source, refused, dsv4tools, tmp_path):
    write_tensor(source, name, data, at)
    refused(3, name, "the value at row", "begin anew with --nan zero --restart to convert such values to 0")
    done = dsv4tools("convert", source, tmp_path / "zero.gguf", "--nan", "zero", "--json").data
    assert sum(done["zeroed"].values()) == (32 if name == EXPERT_SCALE else 1)


def test_case_14_denormal_scales_are_numbers(source, tmp_path):
    write_tensor(source, EXPERT_SCALE, b"\x00", 42)      # 2^-127
    out = tmp_path / "out.gguf"
    dt.convert(plan_of(source), out)
    assert dt.verify(out, source=source).ok


def test_case_15_routing_ids_beyond_the_experts(source, refused, tmp_path):
    for expert in (4, -1, 2**40):
        write_tensor(source, "layers.0.ffn.gate.tid2eid", expert.to_bytes(8, "little", signed=True), at=8 * 2 * 7)
        for i, options in enumerate(((), ("--experts-per-token", "1"), ("--nan", "zero"))):
            refused(3, "'layers.0.ffn.gate.tid2eid': row 7 column 0 routes to expert", options=options,
                    out=tmp_path / f"{i}.gguf")


def test_case_16_tokenizer(source, refused):
    path = source / "tokenizer.json"
    good = path.read_text("utf-8")

    def vocab(change):
        def edit(t):
            change(t["model"])

        return edit

    for change, said in (
        (vocab(lambda m: m["vocab"].update({"one more": 7})), "7"), (vocab(lambda m: m.pop("merges")), "merges"),
        (vocab(lambda m: m["vocab"].update({"too many": 512})), "512"), (vocab(lambda m: m.update(vocab=[])), "vocab"),
        (vocab(lambda m: m.update(merges=["one"])), "merge"), (vocab(lambda m: m.update(type="WordPiece")), "no BPE"),
    ):  # fmt: skip
        path.write_text(good, "utf-8")
        edit_json(path, change)
        refused(3, "tokenizer.json", said)
    path.write_bytes(b'{"model": "\xff\xfe"}')
    refused(3, "tokenizer.json", "UTF-8")
    path.unlink()
    refused(3, "tokenizer.json", "is missing")


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for x in range(10**9) %}{{ x }}{% endfor %}", "{{ 1/0 }}",
    "{% import 'os' as os %}{{ os.system('touch /tmp/owned') }}", "\x1b[2J\u202e", "x" * 500_000, "{% unclosed",
], ids=range(7))  # fmt: skip
def test_case_17_a_hostile_chat_template_is_copied_and_never_rendered(template, source, tmp_path, dsv4tools):
    edit_json(source / "tokenizer_config.json", lambda config: config.update(chat_template=template))
    out = tmp_path / "out.gguf"
    with cheap(20.0, None):
        ended = dsv4tools("convert", source, out)
        shown = dsv4tools("inspect", out)
    assert (ended.code, shown.code) == (0, 0)
    assert all(c.isprintable() or c in "\n\t" for c in ended.out + shown.out)
    with dt.gguf.reader.open_gguf(out) as file:
        assert file.value("tokenizer.chat_template") == template
    assert "jinja2" not in sys.modules


def test_case_18_another_precision_than_published(source, tmp_path):
    """BF16 where FP8 is expected, as in a checkpoint that somebody dequantized: supported, by the dtype."""
    values = np.random.default_rng(0).standard_normal((128, 256), np.float32)
    raw = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    drop_tensor(source, SCALE)
    replace_tensor(source, WEIGHT, "BF16", [128, 256], raw)
    out = tmp_path / "out.gguf"
    dt.convert(plan_of(source, policy="f32"), out)
    assert dt.verify(out, source=source).ok
    from gguf import GGUFReader  # noqa: PLC0415  - an independent reader

    found = next(t for t in GGUFReader(out).tensors if t.name == "blk.1.attn_kv.weight")
    assert payload(found) == (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).tobytes()


def test_case_18_a_dtype_without_a_meaning_is_refused(source, refused):
    replace_tensor(source, "head.weight", "F64", [512, 256], bytes(512 * 256 * 8))
    refused(3, "head.weight", "F64")


# -------------------------------------------------------------------------------------------------------- inputs: GGUF


def test_case_19_every_file_of_the_catalogue(tmp_path, source, dsv4tools):
    """test_gguf_catalogue.py asks the reader; here `verify` says 5, and other commands 3."""
    path = tmp_path / "case.gguf"
    for case in GGUF_CASES:
        path.write_bytes(case.raw)
        with cheap(2.0, None):
            ended = dsv4tools("verify", path)
        assert ended.code == 5 if case.verdict == "reject" else ended.code in {0, 5}, (case.name, ended)
        assert "a bug in" not in ended.err
    for name in ("HEADER_BAD_MAGIC", "KV_DUPLICATE_KEY", "TENSORS_BAD_OFFSET"):
        path.write_bytes(next(c.raw for c in GGUF_CASES if c.name == name))
        assert str(path) in dsv4tools("convert", source, tmp_path / "o.gguf", "--template", path).failed(3)


def test_case_20_data_beyond_the_file(good, source, tmp_path, dsv4tools, monkeypatch):
    """Refused before anything is read, in whatever tensor: memory that is nobody's never gets into an output."""
    n_bytes = good.stat().st_size
    for cut in (1, 10_000, n_bytes // 2):
        os.truncate(good, n_bytes - cut)
        assert dsv4tools("verify", good).code == 5
        dsv4tools("reroute", good, tmp_path / "o.gguf", "--experts-per-token", 1).failed(3)
        assert not (tmp_path / "o.gguf").exists()
        shutil.copy(good, tmp_path / "again")
    small = gguf([], [tensor("a", (1 << 28,), T_F32, 0)], bytes(200))
    (tmp_path / "claims.gguf").write_bytes(small)
    with cheap(2.0):
        assert dsv4tools("verify", tmp_path / "claims.gguf").code == 5


def split(directory, index, count, n_tensors=2, name=None, extra=()) -> Path:
    """One file of a split set."""
    path = directory / (name or f"m-{index + 1:05}-of-{count:05}.gguf")
    kvs = [kv_u16("split.no", index), kv_u16("split.count", count), kv_i32("split.tensors.count", n_tensors), *extra]
    path.write_bytes(gguf(kvs, [tensor(f"t{index}", (8,))], bytes(32)))
    return path


def kv_u16(key, value) -> bytes:
    return text(key) + (2).to_bytes(4, "little") + value.to_bytes(2, "little")


def kv_i32(key, value) -> bytes:
    return text(key) + (5).to_bytes(4, "little") + value.to_bytes(4, "little")


def test_case_21_split_sets(tmp_path, dsv4tools):
    """We write none; `verify` reads them: with a part missing, misnamed or of another set it says 5."""
    first, second = (split(tmp_path, i, 2) for i in (0, 1))
    assert "missing" not in dsv4tools("verify", first).out
    second.unlink()
    assert dsv4tools("verify", first).code == 5
    split(tmp_path, 0, 2, name="m-00002-of-00002.gguf")
    assert dsv4tools("verify", first).code == 5
    split(tmp_path, 1, 3, name="m-00002-of-00002.gguf")
    assert dsv4tools("verify", first).code == 5
    split(tmp_path, 1, 2, n_tensors=9)
    assert dsv4tools("verify", first).code == 5


def test_case_22_big_endian(tmp_path, source, dsv4tools):
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(16))
    ended = dsv4tools("verify", path)
    assert ended.code == 5
    assert "big-endian" in ended.out + ended.err
    assert "big-endian" in dsv4tools("convert", source, tmp_path / "o.gguf", "--template", path).failed(3)


@pytest.mark.parametrize(("value", "code"), [(2**31, 5), (1, 5), (8, 0), (4096, 0), (0, 5), (13, 5)])
def test_case_23_alignments(value, code, tmp_path, dsv4tools):
    """Memory stays bounded. 1 is what ggml takes and the format forbids: a multiple of 8."""
    path = tmp_path / "a.gguf"
    data = bytes(32 if value > 4096 else max(value, 32))
    path.write_bytes(gguf([alignment(value)], [tensor("t", (8,))], data, align=min(max(value, 1), 4096)))
    with cheap(2.0):
        ended = dsv4tools("verify", path)
    if value == 1:
        assert ended.code in {0, 5}
    else:
        assert ended.code == code, ended


def test_case_24_many_entries_and_huge_arrays(tmp_path, dsv4tools):
    """Time and memory in proportion to the file: a tenth of 10^6 entries in a tenth of the time."""
    path = tmp_path / "many.gguf"
    path.write_bytes(gguf([kv_u32(f"k{i}", i) for i in range(100_000)], [], b""))
    with cheap(10.0, None):
        assert dsv4tools("verify", path).code in {0, 5}
    path.write_bytes(gguf([kv_arr("a", F32, 5_000_000, bytes(20_000_000)), *EVERY_TYPE], [], b""))
    with cheap(10.0, 200_000_000):
        dsv4tools("verify", path)
    path.write_bytes(gguf([kv_arr("a", F32, 1 << 62)], [], b""))
    with cheap(2.0):
        assert dsv4tools("verify", path).code == 5


def test_case_25_a_block_whose_scale_is_no_number(good, dsv4tools):
    """Structure does not show it, `verify --deep` does, and names the block."""
    from gguf import GGUFReader  # noqa: PLC0415  - an independent reader

    tensor_ = next(t for t in GGUFReader(good).tensors if t.tensor_type.name == "Q8_0")
    raw = bytearray(good.read_bytes())
    at = int(tensor_.data_offset) + 3 * 34
    raw[at:at + 2] = b"\x00\x7e"      # NaN, F16
    good.write_bytes(raw)
    assert dsv4tools("verify", good).code == 0
    ended = dsv4tools("verify", good, "--deep")
    assert ended.code == 5
    assert tensor_.name in ended.out
    assert "block 3" in ended.out


# ------------------------------------------------------------------------------------------------ policy, command line


POLICIES = {
    "an unknown type": '[[rule]]\ntensors = "*"\ntype = "Q9"\n',
    "no glob": '[[rule]]\ntensors = "a b"\ntype = "F16"\n',
    "decides nothing": '[[rule]]\ntensors = "nothing.*"\ntype = "F16"\n[[rule]]\ntensors = "*"\ntype = "F16"\n',
    "matches not all": '[[rule]]\ntensors = "blk.*"\ntype = "F16"\n',
    "a key twice": '[[rule]]\ntensors = "*"\ntype = "F16"\ntype = "F32"\n',
    "a byte order mark and no sense": "\ufeff[[rule]\r\n",
    "no number": 'x = nan\n[[rule]]\ntensors = "*"\ntype = "F16"\n',
    "layers": '[[rule]]\ntensors = "*"\nlayers = "0-999999999999"\ntype = 7\n',
    "nothing": "", "binary": "\0\0\0", "deep": "x = " + "[" * 50_000,
    "a glob against time": f'[[rule]]\ntensors = "{"*a" * 60}b"\ntype = "F16"\n',
    "an unknown key": '[[rule]]\ntensors = "*"\ntype = "F16"\nlayer = 3\n',
}  # fmt: skip


@pytest.mark.parametrize("case", POLICIES)
def test_case_26_policies(case, refused, tmp_path):
    (tmp_path / "mine.toml").write_text(POLICIES[case], "utf-8")
    refused(3, "mine", options=("--policy", tmp_path / "mine.toml"))


def test_case_26_a_policy_with_mark_and_crlf_is_read(source, tmp_path, dsv4tools):
    raw = b'\xef\xbb\xbfdescription = "x"\r\n[[rule]]\r\ntensors = "*"\r\ntype = "F16"\r\n'
    (tmp_path / "mine.toml").write_bytes(raw)
    ended = dsv4tools("convert", source, tmp_path / "o.gguf", "--policy", tmp_path / "mine.toml")
    assert ended.code in {0, 3}       # taken, or refused by line: never misread
    assert ended.code == 0 or "line 1" in ended.err


def test_case_26_a_type_that_does_not_fit_the_rows(make_checkpoint, refused):
    refused(3, "288 columns are not a whole number of Q4_K blocks", checkpoint=make_checkpoint("odd", hidden=288))


def test_case_27_outputs(refused, tmp_path):
    (tmp_path / "out.gguf").write_text("mine")
    refused(2, "exists; --overwrite replaces it")
    refused(4, "is no directory; create it first", out=tmp_path / "none" / "out.gguf")
    refused(4, "is no directory", out=tmp_path / "out.gguf" / "x.gguf")


def test_case_27_a_directory_that_cannot_be_written_to(refused, tmp_path, monkeypatch, source):
    (tmp_path / "locked").mkdir()
    if os.geteuid():
        (tmp_path / "locked").chmod(0o500)
    elif NAMESPACE:      # nothing is locked for root but a disk that only reads
        ended = on_disk(tmp_path / "disk", "9m", """
            mount -o remount,ro "$DISK" && exec "$PYTHON" -m dsv4tools convert "$SOURCE" "$DISK/out.gguf"
        """, SOURCE=source)  # fmt: skip
        assert "cannot be written to" in failed(ended, 4)
        return
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    refused(4, "cannot be written to", out=tmp_path / "locked" / "out.gguf")


def test_case_28_an_output_that_is_an_input(source, refused, tmp_path, dsv4tools):
    shard = shards(source)[0]
    refused(2, "is one of the inputs", out=shard, options=("--overwrite",))
    refused(2, "lies in the source directory", out=source / "new.gguf")
    for suffix in (".partial", ".journal", ".lock"):
        name = tmp_path / f"out.gguf{suffix}"
        name.symlink_to(shard)
        refused(2, "is one of the inputs")
        name.unlink()
        name.hardlink_to(shard)
        refused(2, "is one of the inputs")
        name.unlink()
    template = tmp_path / "t.gguf"
    assert dsv4tools("template", source, template).code == 0
    refused(2, "is one of the inputs", out=template, options=("--template", template, "--overwrite"))
    policy = tmp_path / "p.toml"
    policy.write_text('description = "x"\n[[rule]]\ntensors = "*"\ntype = "F16"\n')
    refused(2, "is one of the inputs", out=policy, options=("--policy", policy, "--overwrite"))


@pytest.mark.parametrize("options", [("--threads", "0"), ("--threads", "-1"), ("--threads", "1000000"),
                                     ("--threads", "many"), ("--part", "0/3"), ("--part", "4/3"), ("--part", "1/0"),
                                     ("--split-max-size", "0"), ("--experts-per-token", "0")])
def test_case_29_numbers_out_of_range(options, refused):
    """We write no split sets: their option does not exist, which is 2 as well."""
    refused(2, options[0], options=options)


# ------------------------------------------------------------------------------------------------- environment, faults


def test_case_30_a_disk_that_is_too_small(refused, monkeypatch):
    """A real disk of that size: test_faults.py."""
    monkeypatch.setattr("dsv4tools.outfile.free_bytes", lambda directory: 4 << 20)
    refused(4, "4.19 MB (4.00 MiB) free, the output needs ", "free some space or write elsewhere", seconds=1)


@pytest.mark.parametrize(("call", "number", "said"), [
    ("pwrite", errno.ENOSPC, "the disk is full"), ("pwrite", errno.EDQUOT, "the disk quota is used up"),
    ("pwrite", errno.EFBIG, "allows no file of this size"), ("pwrite", errno.EROFS, "the file system is read-only"),
    ("fdatasync", errno.EIO, "Input/output error"), ("fsync", errno.ENOSPC, "the disk is full"),
])  # fmt: skip
def test_case_31_faults_midway_and_at_the_end(call, number, said, tmp_path, monkeypatch):
    """Whatever call says it, and whenever: 4, no final name, and the next run ends with the right bytes."""
    small = SmallOutput(tmp_path / "out.gguf")
    monkeypatch.setattr(sys.modules["dsv4tools.output"], "BATCH_BYTES", 150)
    monkeypatch.setattr(sys.modules["dsv4tools.files"], "_PAUSES", (0, 0))
    real = getattr(os, call)
    for n in range(0, 12, 2):
        calls = []

        def fail(*arguments, n=n, calls=calls):
            calls.append(arguments)
            if len(calls) > n:
                raise OSError(number, os.strerror(number))
            return real(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            try:
                small.convert()
            except dt.ResourceError as e:
                assert said in str(e)  # noqa: PT017  - later ones may succeed
                assert not small.path.exists()
        small.convert()
        assert small.path.read_bytes() == small.expected()
        assert small.files() == ["out.gguf"]
        small.path.unlink()


def test_case_31_a_real_disk_that_fills_up_and_a_journal_that_has_no_room(source, tmp_path):
    """The output is reserved and fits to the byte; then somebody else takes what was left for the journal."""
    if not NAMESPACE:     # where no disk can be made: test_case_31 above
        return
    ended = on_disk(tmp_path / "disk", "9m", """
        "$PYTHON" -c "$EATEN" "$SOURCE" "$DISK/out.gguf"
        echo "code $?"
        ls "$DISK"
        rm "$DISK/filler"
        "$PYTHON" -m dsv4tools convert "$SOURCE" "$DISK/out.gguf" > /dev/null; echo "code $?"
        ls "$DISK"
    """, SOURCE=source, EATEN=EATEN)  # fmt: skip
    said, code, *left = ended.stdout.splitlines()
    assert "the disk is full; run the same command again to continue" in said
    assert (code, left) == ("code 4", ["filler", "out.gguf.journal", "out.gguf.partial", "code 0", "out.gguf"])


EATEN = """
import os, sys
import dsv4tools as dt
import dsv4tools.output, dsv4tools.plan, dsv4tools.working
output = sys.modules["dsv4tools.output"]
output.BATCH_SECONDS = 0
source, out = sys.argv[1:]
def eat(n_bytes):
    try:
        with open(os.path.join(os.path.dirname(out), "filler"), "ab", 0) as f:
            while True:
                f.write(bytes(512))
    except OSError:
        pass
try:
    dt.convert(dt.plan(dt.open_checkpoint(source)), out, threads=1, progress=eat)
except dt.ResourceError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_case_32_short_writes(source, pair, tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:4099], at))
    dt.convert(plan_of(source), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == pair[1].read_bytes()


SLOW = """
import itertools, os, sys, time
import dsv4tools.cli.convert
from dsv4tools.cli.main import main
from dsv4tools.output import OutputFile
real, numbers = OutputFile.write, itertools.count(1)
def write(self, *arguments):
    n = next(numbers)      # in one step: several threads come here
    if n == 10:
        os.write(2, b"at work\\n")
    while n >= 10 and os.path.exists(sys.argv[3] + ".wait"):
        time.sleep(0.01)
    return real(self, *arguments)
OutputFile.write = write
main()
"""


@pytest.fixture
def start_slow():
    """Start a conversion that comes to its tenth unit and waits there while ``out.wait`` exists."""
    started = []

    def start(source, out):
        wait = out.with_name(out.name + ".wait")
        wait.touch()
        command = [sys.executable, "-c", SLOW, "convert", str(source), str(out)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        while process.stderr.readline() != "at work\n":
            assert process.poll() is None
        return process, wait

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code", "case"), [(signal.SIGINT, 130, 33), (signal.SIGTERM, 143, 34)])
def test_case_33_34_signals(number, code, case, source, pair, tmp_path, start_slow):
    out = tmp_path / "out.gguf"
    process, wait = start_slow(source, out)
    process.send_signal(number)
    assert process.stderr.readline() == "stopping after the units in hand; once more leaves at once\n"
    wait.unlink()
    _, said = process.communicate(timeout=ROOM_SECONDS)
    assert process.returncode == code
    assert error_line(said) == "error: stopped; run the same command again to continue"
    process, wait = start_slow(source, out)          # goes on, and is told twice
    process.send_signal(number)
    process.stderr.readline()
    process.send_signal(number)                      # what it has in hand would take for ever
    process.communicate(timeout=ROOM_SECONDS)
    assert process.returncode == code
    process, wait = start_slow(source, out)
    process.kill()                                   # OOM, `docker kill`, a power cut: test_power_loss.py
    process.communicate(timeout=ROOM_SECONDS)
    assert not out.exists()
    ended = run("convert", source, out)
    assert ended.returncode == 0
    assert "ended without cleaning up" in ended.stderr
    assert out.read_bytes() == pair[1].read_bytes()
    wait.unlink()
    assert [p.name for p in tmp_path.glob("out*")] == ["out.gguf"]


@pytest.mark.parametrize("what", ["torn", "newer than the data", "of another version", "of another plan",
                                  "of another source"])
def test_case_35_state_that_is_not_to_be_trusted(what, source, pair, tmp_path, dsv4tools):
    out = tmp_path / "out.gguf"
    journal, partial = out.with_name("out.gguf.journal"), out.with_name("out.gguf.partial")
    stop_after(source, out, 40)
    if what == "torn":
        journal.write_bytes(journal.read_bytes()[:-7])
    elif what == "newer than the data":      # a disk that lied about its syncs: the last megabyte is not there
        with partial.open("r+b") as file:
            written = max(u for u in dt.journal.read_journal(journal).units)
            file.seek(written)
            file.write(bytes(200_000))
    elif what == "of another version":
        import zlib  # noqa: PLC0415

        first, *rest = journal.read_bytes().splitlines(keepends=True)
        body = first.rpartition(b" ")[0].replace(b'"version":1', b'"version":7')
        journal.write_bytes(body + b" %08x\n" % zlib.crc32(body) + b"".join(rest))
        assert "journal version is 1, was 7" in dsv4tools("convert", source, out).failed(2)
        assert dsv4tools("convert", source, out, "--restart").code == 0
    elif what == "of another plan":
        assert "policy is q8 (" in dsv4tools("convert", source, out, "--policy", "q8").failed(2)
    else:
        shard = shards(source)[0]
        good = shard.read_bytes()
        add = {"__metadata__": {"format": "np"}}
        edit_header(shard, lambda h: h.update(add))
        assert f"shard {shard.name} is " in dsv4tools("convert", source, out).failed(2)
        shard.write_bytes(good)
    if what != "of another version":
        assert dsv4tools("convert", source, out).code == 0
    assert out.read_bytes() == pair[1].read_bytes()


def stop_after(source, out, n) -> None:
    stop, seen = StopRequest(), []

    def progress(n_bytes):
        seen.append(n_bytes)
        if len(seen) >= n:
            stop.request(signal.SIGINT)

    module = sys.modules["dsv4tools.output"]
    real = module.OutputFile.write
    with pytest.MonkeyPatch.context() as patched:     # slow enough to be stopped in the middle
        patched.setattr(module.OutputFile, "write", lambda *a: time.sleep(0.002) or real(*a))
        with pytest.raises(dt.errors.Interrupted):
            dt.convert(plan_of(source), out, run=RunOptions(threads=1, progress=progress, stop=stop))


def test_case_36_two_runs_and_stale_locks(source, pair, tmp_path, dsv4tools, start_slow):
    out = tmp_path / "out.gguf"
    lock = out.with_name("out.gguf.lock")
    process, wait = start_slow(source, out)
    message = dsv4tools("convert", source, out).failed(4)
    assert f"is held by process {process.pid} on {socket.gethostname()} since 20" in message
    process.kill()
    process.communicate()
    wait.unlink()
    assert lock.exists()
    ended = dsv4tools("convert", source, out)         # of a process that is gone: taken, and said
    assert ended.code == 0
    assert f"note: the last run (process {process.pid} on " in ended.err
    out.unlink()
    lock.write_text(json.dumps({"pid": 7, "host": "node-7", "boot": "x", "since": "2026-01-01 00:00:00"}))
    message = dsv4tools("convert", source, out).failed(4)
    assert "was left by process 7 on node-7 since 2026-01-01 00:00:00, which cannot be asked from here" in message
    assert message.endswith("if you are sure that it is gone, --steal-lock")
    assert dsv4tools("convert", source, out, "--steal-lock").code == 0
    assert out.read_bytes() == pair[1].read_bytes()


def test_case_37_times_are_not_trusted_alone(source, pair, tmp_path, monkeypatch):
    """A clock that jumps back and times of one second: content decides."""
    out = tmp_path / "out.gguf"
    for shard in shards(source):
        os.utime(shard, (2**31, 2**31))
    stop_after(source, out, 40)
    for shard in shards(source):
        os.utime(shard, (5, 5))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    notes = []
    dt.convert(plan_of(source), out, run=RunOptions(notify=notes.append))
    assert notes[0].startswith("modification time or inode changed: ")
    assert out.read_bytes() == pair[1].read_bytes()
    # Another file of the same name, size, header and time: the inode tells.
    out.unlink()
    stop_after(source, out, 40)
    shard = shards(source)[0]
    info = shard.stat()
    copy = shutil.copy(shard, shard.with_suffix(".copy"))
    with Path(copy).open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x01\x02")
    os.utime(copy, ns=(info.st_atime_ns, info.st_mtime_ns))
    Path(copy).replace(shard)
    dt.convert(plan_of(source), out)
    assert dt.verify(out, source=source).ok


@pytest.mark.parametrize(("error", "code", "said"), [
    (MemoryError(), 4, "not enough memory; use fewer --threads"), (ZeroDivisionError("x"), 1, "a bug in dsv4tools"),
])  # fmt: skip
def test_case_38_a_worker_fails(error, code, said, source, pair, tmp_path, monkeypatch, dsv4tools):
    out = tmp_path / "out.gguf"
    deriver = sys.modules["dsv4tools.derive"].UnitDeriver
    real, seen = deriver.encode, []

    def encode(self, unit, rows):
        seen.append(unit.planned.name)
        if len(seen) == 40:
            raise error
        return real(self, unit, rows)

    with monkeypatch.context() as patched:
        patched.setattr(deriver, "encode", encode)
        message = dsv4tools("convert", source, out, "--threads", 1).failed(code)
    assert said in message
    assert code == 1 or f"error: {seen[39]}: " in message
    ended = dsv4tools("convert", source, out)
    assert "note: continuing " in ended.err
    assert out.read_bytes() == pair[1].read_bytes()


def test_case_39_a_part_run_twice(source, pair, tmp_path):
    """By two machines at once: test_parts.py."""
    out = tmp_path / "out.gguf"
    for i in (1, 2):
        command = ("convert", source, out, "--part", f"{i}/2")
        assert run(*command).returncode == 0
    part = tmp_path / "out.gguf.part-00001-of-00002"
    before = part.read_bytes()
    assert "was there already" in run("convert", source, out, "--part", "1/2").stdout
    assert part.read_bytes() == before
    part.unlink()
    racing = [start("convert", source, out, "--part", "1/2") for _ in range(2)]
    codes = sorted(process.wait(ROOM_SECONDS) for process in racing)
    for process in racing:
        process.communicate()
    assert codes[0] == 0
    assert codes[1] in {0, 4}      # on one machine the lock keeps the second out, or it finds the part there
    assert part.read_bytes() == before
    assert run("assemble", out).returncode == 0
    assert out.read_bytes() == pair[1].read_bytes()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_case_40_network_disks(number, call, source, pair, tmp_path, monkeypatch, dsv4tools):
    """A fault that passes is tried again, the file opened again; one that stays is 4. No locks there, either."""
    monkeypatch.setattr(sys.modules["dsv4tools.files"], "_PAUSES", (0.001, 0.002))
    monkeypatch.setattr(lock_module, "try_lock", lambda fd: None)
    out = tmp_path / "out.gguf"
    real, calls, failed_before = getattr(os, call), [], set()

    def flaky(fd, data, position, *, last=10**9):
        calls.append(position)
        if len(calls) > last or (position % 3 == 0 and position not in failed_before):
            failed_before.add(position)
            raise OSError(number, os.strerror(number))
        return real(fd, data, position)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, partial(flaky, last=60))
        message = dsv4tools("convert", source, out, "--threads", 1).failed(4)
        assert os.strerror(number) in message
        patched.setattr(os, call, flaky)
        assert dsv4tools("convert", source, out, "--threads", 1).code == 0
    assert len(failed_before) > 10
    assert out.read_bytes() == pair[1].read_bytes()


@pytest.mark.parametrize("what", ["a cache that cannot be written", "a damaged cache"])
def test_case_41_the_kernel_cache(what, source, pair, tmp_path):
    """Stale helpers and wrong code: test_formats_compile.py and the self-test before every conversion."""
    cache = tmp_path / "cache"
    if what == "a damaged cache":
        prepare(["F32"])
        kernels = cache_root() / cache_key() / "floats"
        (cache / "dsv4tools" / cache_key()).mkdir(parents=True)
        shutil.copytree(kernels, cache / "dsv4tools" / cache_key() / "floats")
        code = list(cache.rglob("floats*.nbc"))
        assert code
        for path in code:
            path.write_bytes(path.read_bytes()[:100])
    else:
        cache.write_text("a file where a directory should be")
    out = tmp_path / "out.gguf"
    ended = run("convert", source, out, "--policy", "f32", environment={"NUMBA_CACHE_DIR": str(cache)})
    assert ended.returncode == 0, ended
    assert all(line.startswith(("warning: ", "note: ")) for line in ended.stderr.splitlines())
    assert ended.stderr.count("note: compiling kernels, once per version and machine") == 1
    assert what == "a damaged cache" or "kernels are compiled for this process only" in ended.stderr
    assert dt.verify(out, source=source).ok


LIMITED = """
import resource, sys
from dsv4tools.cli.main import main
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv.pop(1)),) * 2)
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
main()
"""
PEAK = r"""
import re, sys
from dsv4tools.cli.main import main
try:
    main()
except SystemExit as end:
    status = open("/proc/self/status").read()
    peaks = [int(re.search(key + r":\s+(\d+) kB", status)[1]) * 1024 for key in ("VmPeak", "VmHWM")]
    print(*peaks, file=sys.stderr)
    sys.exit(end.code)
"""


def test_case_42_few_handles_and_little_memory(make_checkpoint, tmp_path):
    """60 shards and 20 handles; an address space of what a run takes and a tenth; VmHWM within what the plan says."""
    source = make_checkpoint(shards=60)
    out, again = tmp_path / "out.gguf", tmp_path / "again.gguf"
    if sys.platform != "linux":      # no /proc, and address spaces are not limited: handles alone
        command = [sys.executable, "-c", LIMITED, str(2**62), "convert", str(source), str(out)]
        subprocess.run(command, check=True, timeout=ROOM_SECONDS)
        return
    command = [sys.executable, "-c", PEAK, "convert", source, out, "--threads", "2"]
    ended = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=ROOM_SECONDS, check=True)
    peak, resident = map(int, ended.stderr.split()[-2:])
    plan = plan_of(source)
    assert resident < 400_000_000 + plan.memory_bytes(2)
    command = [sys.executable, "-c", LIMITED, peak * 11 // 10, "convert", source, again, "--threads", "2"]
    ended = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=ROOM_SECONDS, check=False)
    assert (ended.returncode, messages(ended.stderr)) == (0, []), ended
    assert again.read_bytes() == out.read_bytes()


def test_case_43_names_and_locales(make_checkpoint, refused, tmp_path):
    source = make_checkpoint("Prüf stand \u4e2d")
    out = tmp_path / "aus gabe \u00fc.gguf"
    ended = run("convert", source, out, environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert (ended.returncode, messages(ended.stderr)) == (0, [])
    assert out.is_file()
    deep = tmp_path
    while len(str(deep)) < 1500:
        deep /= "d" * 100
    deep.mkdir(parents=True)
    assert run("convert", source, deep / "out.gguf").returncode == 0
    refused(4, "File name too long", out=tmp_path / ("x" * 250))


def test_case_43_a_file_system_for_small_files(source, tmp_path, monkeypatch, dsv4tools):
    """FAT ends at 4 GiB: reserving says nothing there, setting the size says EFBIG. `ulimit -f`: test_faults.py."""

    def unknown(fd, n_bytes):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def limited(fd, n_bytes):
        if n_bytes:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(sys.modules["dsv4tools.files"], "_reserve", unknown)
    monkeypatch.setattr(os, "ftruncate", limited)
    out = tmp_path / "out.gguf"
    message = dsv4tools("convert", source, out).failed(4)
    assert "out.gguf.partial: cannot be written: the file system, or a limit of this process, allows no file" in message
    assert not list(tmp_path.glob("out*"))


def test_case_44_terminals_and_pipes(source, tmp_path):
    """More of it in test_cli.py."""
    shell = f"'{COMMAND[0]}' -m dsv4tools convert '{source}' --dry-run | head -1"
    ended = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=ROOM_SECONDS, check=True)
    assert ended.stderr == ""
    for variables in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}):
        ended = run("convert", source, tmp_path / "o.gguf", "--overwrite", environment=variables)
        assert ended.returncode == 0
        assert "\x1b" not in ended.stdout + ended.stderr
        assert "\r" not in ended.stdout + ended.stderr


def test_case_45_networks(source, tmp_path):
    """Of downloads: bodies cut short, ranges ignored and connections lost are in test_hub.py.

    A conversion of what is on the Hub is refused in the same words.
    """
    with HubServer({"org/tiny": source, "org/gated": source}) as hub:
        hub.repositories["org/gated"].gated = True
        environment = hub.environment(tmp_path / "home")
        with Nursery(tmp_path, "dsv4tools.cli.download", "dsv4tools.cli.convert", "huggingface_hub",
                     environment=environment) as nursery:
            for name, options, token, fault, said in (
                ("tiny", (), "", {"status": 429, "retry_after": 3600}, "too many requests (429)"),
                ("tiny", ("--revision", "v9"), "", {}, "v9"), ("none", (), "", {}, "org/none"),
                ("gated", (), "", {}, "is gated"), ("tiny", (), f"{TOKEN}x", {}, "access denied (401)"),
                ("tiny", (), TOKEN, {"status": 403}, "403"),
            ):  # fmt: skip
                hub.clear()
                if fault:
                    hub.fault("info", **fault)
                ended = nursery.run("download", f"org/{name}", tmp_path / "fetched", *options, HF_TOKEN=token)
                assert ended.code == 4, ended
                assert said in ended.err.splitlines()[-1]
                assert ended.err.count("error: ") == 1
                assert TOKEN not in ended.err + ended.out
            ended = nursery.run("convert", "hf://org/tiny", tmp_path / "o.gguf")
            assert ended.code == 4
            assert "org/tiny: access denied (403)" in error_line(ended.err)
            assert not list(tmp_path.glob("o.gguf*"))


def test_case_46_the_result_is_looked_at_before_it_has_its_name(source, tmp_path, monkeypatch, dsv4tools):
    """Names, shapes, types, offsets and size against the plan, and a row of every tensor against its source."""
    out = tmp_path / "out.gguf"
    module = sys.modules["dsv4tools.convert"]
    plan_module = sys.modules["dsv4tools.plan"]
    real_header = plan_module.Plan.header.fget

    def other_header(self):
        return real_header(self).replace(b"output_norm.weight", b"output_nurm.weight")

    with monkeypatch.context() as patched:
        patched.setattr(plan_module.Plan, "header", property(other_header))
        message = dsv4tools("convert", source, out).failed(1)
        assert "was written wrongly" in message
    deriver = module.UnitDeriver
    real = deriver.encode
    with monkeypatch.context() as patched:
        patched.setattr(deriver, "encode", lambda self, unit, rows: (np.zeros_like(real(self, unit, rows)[0]), 0))
        assert "is not that of" in dsv4tools("convert", source, out, "--restart").failed(1)
    assert not list(tmp_path.glob("out*"))
    assert dsv4tools("convert", source, out).code == 0
    assert dt.verify(out, source=source).ok


def test_all_46_are_here():
    names = [name for name in globals() if name.startswith("test_case_")]
    numbers = {int(part) for name in names for part in name.split("_")[2:4] if part.isdigit()}
    assert numbers == set(range(1, 47))
