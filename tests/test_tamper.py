"""The helpers that damage checkpoints do the damage they name, and no other."""

from __future__ import annotations

import json

import pytest
import safetensors
import tamper


def names_by_library(directory):
    found = []
    for shard in tamper.shards(directory):
        with safetensors.safe_open(shard, framework="np") as file:
            found += file.offset_keys()
    return found


def all_tensors(directory):
    return {name: tensor for shard in tamper.shards(directory) for name, tensor in tamper.load_shard(shard).items()}


def weight_map(directory):
    return json.loads((directory / tamper.INDEX).read_text("utf-8"))["weight_map"]


def test_checkpoints_of_the_factory_do_not_share_files(make_checkpoint):
    first, second = make_checkpoint("a"), make_checkpoint("b")
    tamper.write_tensor(first, "norm.weight", b"\xff\xff", at=2)
    assert tamper.read_tensor(first, "norm.weight")[:6][2:4] == b"\xff\xff"
    assert all_tensors(make_checkpoint("c")) == all_tensors(second)
    assert {n for n, t in all_tensors(first).items() if t != all_tensors(second)[n]} == {"norm.weight"}


def test_write_tensor_stays_inside(make_checkpoint):
    directory = make_checkpoint()
    n_bytes = tamper.find_tensor(directory, "norm.weight")[2]
    with pytest.raises(ValueError, match="do not fit"):
        tamper.write_tensor(directory, "norm.weight", b"12", at=n_bytes - 1)
    with pytest.raises(KeyError):
        tamper.read_tensor(directory, "no.such.tensor")


@pytest.mark.parametrize("count", [1, 2])
def test_drop_replace_add_leave_valid_files(make_checkpoint, count):
    directory = make_checkpoint(shards=count)
    before = all_tensors(directory)
    tamper.drop_tensor(directory, "norm.weight")
    tamper.add_tensor(directory, "strange", "F32", [2], bytes(8))
    tamper.replace_tensor(directory, "layers.0.attn.attn_sink", "BF16", [8], bytes(16))
    expected = {n: t for n, t in before.items() if n != "norm.weight"} | {
        "strange": ("F32", [2], bytes(8)),
        "layers.0.attn.attn_sink": ("BF16", [8], bytes(16)),
    }
    assert all_tensors(directory) == expected
    assert sorted(names_by_library(directory)) == sorted(expected)
    if count > 1:
        assert weight_map(directory) == {n: tamper.find_tensor(directory, n)[0].name for n in expected}


def test_edit_config_sets_and_removes(make_checkpoint):
    directory = make_checkpoint()
    before = json.loads((directory / "config.json").read_text("utf-8"))
    tamper.edit_config(directory, hidden_size=7, swiglu_limit=tamper.REMOVED)
    after = json.loads((directory / "config.json").read_text("utf-8"))
    assert after.pop("hidden_size") == 7
    assert after == {k: v for k, v in before.items() if k not in {"hidden_size", "swiglu_limit"}}


def test_edit_header_keeps_the_data(make_checkpoint):
    shard = tamper.shards(make_checkpoint(shards=1))[0]
    before = tamper.load_shard(shard)
    tamper.edit_header(shard, lambda header: header["norm.weight"].update(dtype="F16"))
    after = tamper.load_shard(shard)
    assert after["norm.weight"] == ("F16", *before["norm.weight"][1:])
    assert {n for n in before if before[n] != after[n]} == {"norm.weight"}
