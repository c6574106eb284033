"""Which shard holds which tensor: names that must never be opened, and everything that does not fit, listed."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from bounds import cheap
from tamper import INDEX, add_tensor, drop_tensor, edit_json, load_shard, save_shard, shards

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.checkpoint import shard as shard_module
from dsv4tools.checkpoint.index import check_shard_name, open_shards, read_weight_map
from dsv4tools.errors import InputError, ResourceError


def small(path, files):
    """A directory of safetensors files, name -> {tensor: one byte}, with the index that fits."""
    path.mkdir()
    for name, tensors in files.items():
        save_shard(path / name, {tensor: ("I8", [1], b"x") for tensor in tensors})
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return path


@pytest.fixture
def pair(tmp_path):
    return small(tmp_path / "pair", {"a.safetensors": ["t1", "t2"], "b.safetensors": ["t3"]})


def refusal(directory, error=InputError):
    with cheap(), pytest.raises(error) as caught:
        open_shards(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def point(directory, tensor, shard):
    edit_json(directory / INDEX, lambda index: index["weight_map"].update({tensor: shard}))


def test_shards_are_opened_by_name(pair):
    found = open_shards(pair)
    assert {name: list(shard.tensors) for name, shard in found.items()} == {
        "a.safetensors": ["t1", "t2"], "b.safetensors": ["t3"]}


# The index file


@pytest.mark.parametrize(("raw", "message"), [
    ("", "is not valid JSON"),
    ("[1]", "holds a JSON list"),
    ("{}", "'weight_map'"),
    ('{"weight_map":{}}', "'weight_map': is missing, empty or no object"),
    ('{"weight_map":["a.safetensors"]}', "'weight_map'"),
    ('{"weight_map":null}', "'weight_map'"),
    ('{"weight_map":{"t1":"a.safetensors"},"weight_map":{}}', "key 'weight_map' appears twice"),
    ('{"weight_map":{"t1":"a.safetensors","t1":"b.safetensors"}}', "key 't1' appears twice"),
    ('{"weight_map":' + '{"a":' * 100_000, "nested too deeply"),
])
def test_an_index_that_is_none(pair, raw, message):
    (pair / INDEX).write_text(raw, "utf-8")
    found = refusal(pair)
    assert message in found
    assert INDEX in found


def test_an_index_of_more_than_100_mb(pair):
    with (pair / INDEX).open("r+b") as file:
        file.truncate(100_000_001)
    with cheap(n_bytes=300_000_000), pytest.raises(InputError, match="is larger than 100,000,000 bytes"):
        open_shards(pair)


HOSTILE_NAMES = [
    "../x.safetensors", "..", "", "/etc/x.safetensors", "a/b.safetensors", "./a.safetensors", "a\\b.safetensors",
    "a.safetensors\0", "\0.safetensors", "C:x.safetensors", "C:\\x.safetensors", "https://host/x.safetensors",
    "file:///x.safetensors", ".hidden.safetensors", "-rf.safetensors", "~.safetensors", "a.safetensors\n",
    "a b.safetensors", "a.bin", "a.safetensors.bin", "x" * 250 + ".safetensors", "ä.safetensors", "$HOME.safetensors",
    None, 1, ["a.safetensors"], {"a": 1}, True,
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: repr(name)[:30])
def test_hostile_shard_names_are_refused_before_anything_is_opened(pair, monkeypatch, name):
    point(pair, "t9", name)
    opened = []
    monkeypatch.setattr(shard_module.os, "open", lambda *arguments: opened.append(arguments))
    assert "is not a plain file name" in refusal(pair)
    assert not opened
    monkeypatch.undo()
    assert INDEX in refusal(pair)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00046.safetensors", "A_b.c-1.safetensors",
                                  "1.safetensors", "a..safetensors"])
def test_plain_names_pass(name):
    assert check_shard_name(name, "index") == name


def test_a_missing_index(pair):
    (pair / INDEX).unlink()
    assert "model.safetensors.index.json: is missing, and the directory holds 2 .safetensors files" in refusal(pair)
    shards(pair)[0].unlink()
    assert list(open_shards(pair)) == ["b.safetensors"]
    shards(pair)[0].unlink()
    assert "holds 0 .safetensors files" in refusal(pair)


def test_an_index_link_that_leads_nowhere_is_no_missing_index(pair):
    shards(pair)[0].unlink()
    (pair / INDEX).unlink()
    (pair / INDEX).symlink_to(pair / "nowhere")
    assert f"{INDEX}: is missing" in refusal(pair)


def test_a_single_file_without_index(make_checkpoint):
    path = make_checkpoint(shards=1)
    assert not (path / INDEX).exists()
    assert list(open_checkpoint(path).shards) == ["model.safetensors"]


def test_a_single_file_with_a_name_that_no_index_could_have(tmp_path):
    path = small(tmp_path / "x", {"my model.safetensors": ["t"]})
    (path / INDEX).unlink()
    assert "is not a plain file name" in refusal(path)


def test_hidden_files_are_not_shards(pair):
    shutil.copy(pair / "a.safetensors", pair / "._a.safetensors")
    assert len(open_shards(pair)) == 2


def test_a_file_where_a_directory_is_expected(pair):
    assert "is no directory" in refusal(pair / INDEX)
    assert "is missing" in refusal(pair / "nowhere")


def test_a_directory_that_cannot_be_listed(pair, monkeypatch):
    def fail(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(pair), "iterdir", fail)
    assert "cannot be listed: Permission denied" in refusal(pair, ResourceError)


# What does not fit


def test_missing_and_extra_shards_are_all_listed(pair):
    save_shard(pair / "c.safetensors", {"t4": ("I8", [1], b"x")})
    save_shard(pair / "d.safetensors", {"t5": ("I8", [1], b"x")})
    shards(pair)[0].unlink()
    point(pair, "t6", "e.safetensors")
    found = refusal(pair)
    for name, what in (("a", "is named by the index but missing"), ("e", "is named by the index but missing"),
                       ("c", "is not named by the index"), ("d", "is not named by the index")):
        assert f"{name}.safetensors {what}" in found
    assert "b.safetensors" not in found


def test_tensors_in_two_shards_outside_the_index_missing_or_elsewhere_are_all_listed(tmp_path):
    path = small(tmp_path / "x", {"a.safetensors": ["both", "extra", "moved", "fine"], "b.safetensors": ["b"]})
    save_shard(path / "b.safetensors", {name: ("I8", [1], b"x") for name in ("both", "b", "extra too")})
    point(path, "both", "a.safetensors")
    point(path, "gone", "a.safetensors")
    point(path, "moved", "b.safetensors")
    edit_json(path / INDEX, lambda index: index["weight_map"].pop("extra"))
    found = refusal(path)
    assert "tensor 'both' is in a.safetensors and in b.safetensors" in found
    assert "tensor 'extra' of a.safetensors is not in the index" in found
    assert "tensor 'extra too' of b.safetensors is not in the index" in found
    assert "tensor 'gone' is missing from a.safetensors" in found
    assert "tensor 'moved' is in a.safetensors, not in b.safetensors" in found
    assert found.count("tensor '") == 5


def test_a_whole_checkpoint_with_such_faults(make_checkpoint):
    path = make_checkpoint()
    first, second = shards(path)
    name = next(iter(load_shard(second)))
    save_shard(first, load_shard(first) | {name: load_shard(second)[name]})
    with pytest.raises(InputError, match=f"tensor '{name}' is in {first.name} and in {second.name}"):
        open_checkpoint(path)


def test_dropping_from_shard_and_index_is_consistent(make_checkpoint):
    path = make_checkpoint()
    drop_tensor(path, "norm.weight")
    add_tensor(path, "other", "I8", [1], b"x")
    assert "norm.weight" not in open_checkpoint(path).tensors   # the template then says that it is missing


# What a shard is


def replace(path, make):
    path.unlink()
    make(path)


def test_shards_that_are_no_files(pair, tmp_path):
    shard = pair / "a.safetensors"
    for make in (lambda p: p.mkdir(), os.mkfifo):
        if shard.is_dir():
            shard.rmdir()
            shard.touch()
        replace(shard, make)
        assert "a.safetensors: is not a regular file" in refusal(pair)


@pytest.mark.parametrize("target", ["missing.safetensors", "../outside.safetensors", "/dev/null", "/etc/hostname",
                                    "../missing.safetensors", "a.safetensors"])
def test_links_that_lead_nowhere_or_outside(pair, target):
    (pair.parent / "outside.safetensors").write_bytes((pair / "a.safetensors").read_bytes())
    replace(pair / "a.safetensors", lambda path: path.symlink_to(target))
    found = refusal(pair)
    assert "a.safetensors: " in found
    assert any(what in found for what in ("is missing", "outside the checkpoint", "link"))


def test_links_inside_the_checkpoint_are_followed(pair):
    (pair / "data").mkdir()
    (pair / "a.safetensors").rename(pair / "data" / "blob")
    (pair / "a.safetensors").symlink_to("data/blob")
    assert len(open_shards(pair)) == 2


def test_a_link_to_the_checkpoint_directory(pair):
    (pair.parent / "link").symlink_to(pair)
    assert len(open_shards(pair.parent / "link")) == 2


@pytest.fixture
def hub_cache(make_checkpoint, tmp_path):
    """The layout of the Hub's cache: the files are links into blobs/."""
    source = make_checkpoint()
    repo = tmp_path / "hub" / "models--owner--some-model"
    snapshot = repo / "snapshots" / ("0123456789abcdef" * 3)[:40]
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        blob = repo / "blobs" / f"{number:064x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_the_layout_of_the_hub_cache(hub_cache, tmp_path):
    checkpoint = open_checkpoint(hub_cache)
    assert len(checkpoint.shards) == 2
    assert checkpoint.vocabulary.tokens
    (tmp_path / "short").symlink_to(hub_cache)   # a link to the snapshot, as people make them
    assert len(open_checkpoint(tmp_path / "short").shards) == 2


def test_a_hub_cache_whose_link_leaves_the_repository(hub_cache, tmp_path):
    shard = next(iter(shards(hub_cache)))
    outside = tmp_path / "hub" / "models--owner--other" / "blobs" / "x"
    outside.parent.mkdir(parents=True)
    outside.write_bytes(shard.read_bytes())
    replace(shard, lambda path: path.symlink_to(outside))
    with pytest.raises(InputError, match="outside the checkpoint"):
        open_checkpoint(hub_cache)


def test_blobs_beside_a_plain_directory_are_outside(pair, tmp_path):
    (tmp_path / "blobs").mkdir()
    (pair / "a.safetensors").rename(tmp_path / "blobs" / "x")
    (pair / "a.safetensors").symlink_to("../blobs/x")
    assert "outside the checkpoint" in refusal(pair)


def test_tensor_names_of_the_index_are_only_compared(pair):
    point(pair, "../../x\x1b[2J", "a.safetensors")
    found = refusal(pair)
    assert "is missing from a.safetensors" in found
    assert "\x1b" not in found


def test_the_weight_map_is_read_as_it_stands(pair):
    assert read_weight_map(pair / INDEX) == {"t1": "a.safetensors", "t2": "a.safetensors", "t3": "b.safetensors"}
