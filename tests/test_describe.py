"""Plans, checkpoints and GGUF files as plain data, and the name of an output."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import gguf_bytes
import pytest
from tamper import edit_json

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.describe import describe_checkpoint, describe_gguf, describe_plan, estimate_seconds, output_name
from dsv4tools.errors import InputError
from dsv4tools.gguf.reader import scan_gguf
from dsv4tools.gguf.values import KV
from dsv4tools.plan import make_plan
from dsv4tools.reroute import reroute
from dsv4tools.template_file import write_template


def strict(value):
    """`value` after a journey through JSON that knows no NaN."""
    return json.loads(json.dumps(value, allow_nan=False))


@pytest.fixture
def checkpoint(make_checkpoint):
    return open_checkpoint(make_checkpoint())


# Plans


def test_a_plan(checkpoint, tmp_path):
    plan = make_plan(reroute(checkpoint, 1), nan="zero")
    found = strict(describe_plan(plan, tmp_path / "out.gguf", 4))
    assert found["out"] == str(tmp_path / "out.gguf")
    assert found["total_bytes"] == found["data_bytes"] + found["data_offset"] == plan.total_bytes
    assert (found["n_tensors"], len(found["tensors"])) == (len(plan.tensors),) * 2
    assert (found["experts_per_token"], found["nan"], found["threads"]) == (1, "zero", 4)
    assert found["policy"]["name"] == "q4k"
    assert found["fits"] is True
    assert found["hash_verified"] is False
    experts = next(t for t in found["tensors"] if t["name"] == "blk.0.ffn_up_exps.weight")
    assert experts["ne"] == [256, 256, 4]
    assert experts["type"] == "Q4_K"
    assert experts["n_bytes"] == 4 * 256 * 144
    assert experts["sources"] == [f"layers.0.ffn.experts.{e}.w3.weight" for e in range(4)]
    assert experts["rule"] == "q4k rule 1: blk.*.ffn_*_exps.weight"
    assert sum(found["bytes_by_type"].values()) == sum(t["n_bytes"] for t in found["tensors"])


def test_a_plan_for_a_directory_that_is_not_there(checkpoint, tmp_path):
    found = describe_plan(make_plan(checkpoint), tmp_path / "no" / "out.gguf", 4)
    assert (found["free_bytes"], found["fits"]) == (None, False)


def test_a_plan_that_does_not_fit(flash_plan, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv4tools.describe.free_bytes", lambda directory: 164_000_000_000)
    found = describe_plan(flash_plan, tmp_path / "out.gguf", 4)
    assert (found["free_bytes"], found["fits"]) == (164_000_000_000, False)


def test_the_estimate_is_by_processor_or_by_disk(flash_plan, monkeypatch):
    disk = (flash_plan.source_bytes + flash_plan.total_bytes) / 500e6
    assert 600 < disk < 700
    assert estimate_seconds(flash_plan, 1000) == pytest.approx(disk)
    monkeypatch.setattr("dsv4tools.describe.DISK_BYTES_PER_SECOND", 1e15)
    assert estimate_seconds(flash_plan, 1) == pytest.approx(2 * estimate_seconds(flash_plan, 2))
    assert 284e9 / 2e9 < estimate_seconds(flash_plan, 1) < 284e9 / 100e6   # 284 G values, at rates between these


def test_a_plan_is_printed_briefly(flash_plan):
    """Python prints objects when an assertion fails: a plan of full size in full would take gigabytes."""
    for part in (flash_plan, flash_plan.template, flash_plan.checkpoint, flash_plan.tensors[-1],
                 next(flash_plan.units())):  # fmt: skip
        assert len(repr(part)) < 5000


# Names


def named(checkpoint, **changes):
    plan = make_plan(checkpoint)
    kvs = [KV(kv.key, kv.type, changes.get(kv.key.rpartition(".")[2], kv.value), kv.item_type) for kv in plan.kvs]
    return output_name(replace(plan, kvs=tuple(kvs)))


@pytest.mark.parametrize(("name", "expected"), [
    ("DeepSeek-V4-Flash", "DeepSeek-V4-Flash"), ("DeepSeek V4 Flash", "DeepSeek-V4-Flash"), ("tiny-6e", "tiny6e"),
    ("DeepSeek-V4-Flash-0731", "DeepSeek-V4-Flash-0731"), ("a.b_c/d", "a-b-c-d"), ("深度求索", "model"), ("", "model"),
    ("../../etc/passwd", "etc-passwd"), ("-rf", "rf"), ("a\0b\n", "a-b"), ("x" * 1000, "x" * 100),
    ("V4 深 Pro", "V4-Pro"),
])
def test_names_of_outputs(checkpoint, name, expected):
    assert named(checkpoint, name=name) == f"{expected}-4x4.3M-v1.0-Q8_0.gguf"


def test_the_name_of_flash(flash_plan):
    assert output_name(flash_plan) == "flash-256x8.4B-v1.0-Q4_K.gguf"


def test_the_name_of_a_re_routed_model(tiny_6e):
    checkpoint = open_checkpoint(tiny_6e)
    assert output_name(make_plan(checkpoint)) == "tiny6e-12x7.3M-v1.0-Q4_K.gguf"
    assert output_name(make_plan(reroute(checkpoint, 4))) == "tiny6e-12x7.3M-4Expert-v1.0-Q4_K.gguf"


def test_a_template_file_cannot_name_a_path(checkpoint, tmp_path):
    assert named(checkpoint, size_label="../../../x") == named(checkpoint)
    plan = make_plan(checkpoint)
    bare = replace(plan, kvs=tuple(kv for kv in plan.kvs if kv.key not in ("general.name", "general.size_label")))
    write_template(bare, tmp_path / "t.gguf")
    again = make_plan(checkpoint, template_file=tmp_path / "t.gguf")
    assert "general.name" not in {kv.key for kv in again.kvs}
    assert output_name(again) == output_name(plan)
    assert Path(output_name(again)).name == output_name(again)


def test_a_template_file_whose_name_is_no_text(checkpoint):
    assert named(checkpoint, name=7) == "7-4x4.3M-v1.0-Q8_0.gguf"


# Checkpoints


def test_a_checkpoint(checkpoint):
    found = strict(describe_checkpoint(checkpoint))
    assert (found["kind"], found["name"], found["n_shards"]) == ("checkpoint", "checkpoint", 2)
    assert found["n_bytes"] == sum(path.stat().st_size for path in checkpoint.directory.glob("*.safetensors"))
    assert found["n_tensors"] == len(checkpoint.tensors)
    assert sum(entry["n_tensors"] for entry in found["dtypes"].values()) == found["n_tensors"]
    assert found["dtypes"]["I8"]["n_tensors"] == 3 * 4 * 3
    assert found["layers"] == {"n": 3, "by_compress_ratio": {"0": 1, "4": 1, "128": 1}, "hash_routed": [0]}
    assert found["experts"] == {"routed": 4, "per_token": 2, "shared": 1}
    assert found["config"]["hidden_size"] == 256
    assert found["tokenizer"]["n_tokens"] == 512
    assert found["tokenizer"]["special_ids"] == {"bos": 0, "eos": 1, "padding": 1}


def test_a_checkpoint_with_a_bad_tokenizer_is_still_described(checkpoint):
    edit_json(checkpoint.directory / "tokenizer.json", lambda t: t["model"].pop("merges"))
    found = strict(describe_checkpoint(checkpoint))
    assert "'model.merges': is missing or empty" in found["tokenizer"]["error"]
    assert found["n_tensors"] > 100


def test_flash_is_described_at_once(flash_plan):
    found = strict(describe_checkpoint(flash_plan.checkpoint))
    assert found["layers"]["by_compress_ratio"] == {"0": 2, "4": 21, "128": 20}
    assert found["layers"]["hash_routed"] == [0, 1, 2]
    assert found["tokenizer"]["n_merges"] == 127_741


# GGUF files


def described(path, raw):
    path.write_bytes(raw)
    with scan_gguf(path, template=True) as file:
        return strict(describe_gguf(file))


def test_a_gguf(checkpoint, tmp_path):
    plan = make_plan(checkpoint)
    write_template(plan, tmp_path / "t.gguf", sparse=True)
    with scan_gguf(tmp_path / "t.gguf") as file:
        found = strict(describe_gguf(file))
    assert (found["kind"], found["architecture"], found["alignment"]) == ("gguf", "deepseek4", 32)
    assert found["experts"] == {"routed": 4, "per_token": 2, "shared": 1}
    assert found["hash_routed"] == [0]
    assert found["header_only"] is False
    assert found["types"]["Q4_K"] == {"n_tensors": 9, "n_bytes": plan.bytes_by_format()["Q4_K"]}
    assert found["metadata"]["tokenizer.ggml.tokens"] == {"n": 512, "first": checkpoint.vocabulary.tokens[:8]}
    assert found["metadata"]["deepseek4.attention.compress_ratios"] == [0, 4, 128]
    assert found["findings"] == []


ODD = [
    gguf_bytes.kv("nan", gguf_bytes.F32, struct.pack("<f", float("nan"))),
    gguf_bytes.kv("inf", gguf_bytes.F64, struct.pack("<d", float("-inf"))),
    gguf_bytes.kv_arr("nans", gguf_bytes.F32, 2, struct.pack("<2f", float("nan"), 1)),
    gguf_bytes.kv_arr("many nans", gguf_bytes.F32, 200, struct.pack("<200f", *[float("nan")] * 200)),
    gguf_bytes.kv("big", gguf_bytes.U64, b"\xff" * 8), gguf_bytes.kv_str("bytes", b"\xff\xfe"),
    gguf_bytes.kv_str(b"\xff", "x"), gguf_bytes.kv_str("esc", "\x1b[2J"), gguf_bytes.kv_arr("bools", 7, 2, b"\0\1"),
    gguf_bytes.kv_arr("none", 4, 0),
]


@pytest.mark.parametrize("kvs", [
    ODD,
    [gguf_bytes.kv_arr("general.architecture", gguf_bytes.U32, 2, bytes(8))],
    [gguf_bytes.kv_str("general.architecture", "x"), gguf_bytes.kv_str("x.hash_layer_count", "many")],
    [gguf_bytes.kv_str("general.architecture", "x"), gguf_bytes.kv("x.hash_layer_count", 10, b"\xff" * 8)],
    [gguf_bytes.kv_str("general.architecture", "x"), gguf_bytes.kv("x.hash_layer_count", 5, b"\xff" * 4)],
    [gguf_bytes.kv_str("general.architecture", "x"), gguf_bytes.kv_arr("x.expert_count", 4, 300, bytes(1200))],
    [],
], ids=["odd values", "architecture", "text", "huge", "negative", "list", "nothing"])
def test_odd_metadata_is_described_in_strict_json(tmp_path, kvs):
    found = described(tmp_path / "x.gguf", gguf_bytes.gguf(kvs, gguf_bytes.THREE, gguf_bytes.THREE_DATA))
    assert found["n_tensors"] == 3
    assert found["hash_routed"] == []


@pytest.mark.parametrize("raw", [b"", b"GGUF", b"GGUF" + bytes(20), b"x" * 100, b"GGUF\3\0\0\0" + b"\xff" * 16])
def test_what_is_no_gguf_is_described_by_its_findings(tmp_path, raw):
    found = described(tmp_path / "x.gguf", raw)
    assert (found["n_bytes"], found["n_tensors"]) == (len(raw), 0)
    assert raw[:8] == b"GGUF" + bytes(4) or found["findings"]
    with pytest.raises(InputError):
        open_checkpoint(tmp_path / "x.gguf")
