"""Re-routing a checkpoint directory: what changes, what does not, what is refused, and what a kill leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
from conftest import SMALL, TINY_6E, checksums
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import RerouteDirectory, kill_often
from tamper import (
    add_tensor,
    drop_tensor,
    edit_config,
    find_tensor,
    load_shard,
    read_header,
    read_tensor,
    replace_tensor,
    save_shard,
    shards,
    write_tensor,
)

import dsv4tools as dt
from dsv4tools import outfile
from dsv4tools.errors import InputError, ResourceError, UsageError, VerifyError
from dsv4tools.reroute import place
from dsv4tools.reroute.json_edit import replace_number
from dsv4tools.reroute.readme import edit_readme

INDEX = "model.safetensors.index.json"
TABLE = "layers.0.ffn.gate.tid2eid"
SIX = {"experts": 12, "experts_per_token": 6}


def table(checkpoint: Path, name: str, columns: int) -> np.ndarray:
    return np.frombuffer(read_tensor(checkpoint, name), "<i8").reshape(-1, columns)


def tree(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*")}


@pytest.fixture(scope="module")
def rerouted(tiny_6e, tmp_path_factory) -> Path:
    """The shared checkpoint with four experts per token. Not to be changed: two of its files are the original's."""
    out = tmp_path_factory.mktemp("rerouted") / tiny_6e.name
    dt.reroute_checkpoint(tiny_6e, out, 4)
    return out


@pytest.fixture
def six(make_checkpoint) -> Path:
    """A small checkpoint with one hash layer; its table is in the first of two shards."""
    return make_checkpoint("six", **SIX)


# ------------------------------------------------------------------------------------------------------ what is written


def test_tables_keep_their_first_columns(tiny_6e, rerouted):
    for layer in range(3):
        name = f"layers.{layer}.ffn.gate.tid2eid"
        before = table(tiny_6e, name, 6)
        assert read_tensor(rerouted, name) == np.ascontiguousarray(before[:, :4]).tobytes()
        assert table(rerouted, name, 4).shape == (TINY_6E.vocab, 4)


def test_everything_else_is_as_it_was(tiny_6e, rerouted):
    assert [p.name for p in shards(rerouted)] == [p.name for p in shards(tiny_6e)]
    for old, new in zip(shards(tiny_6e), shards(rerouted), strict=True):
        (before, _), (after, start) = read_header(old), read_header(new)
        assert list(before) == list(after), "order of the header"
        assert before["__metadata__"] == after["__metadata__"]
        assert start % 8 == 0
        tensors = load_shard(new)
        for name, (dtype, shape, data) in load_shard(old).items():
            if not name.endswith("tid2eid"):
                assert tensors[name] == (dtype, shape, data)
            assert list(before[name]) == list(after[name])


def test_the_safetensors_library_reads_the_result(rerouted):
    for path in shards(rerouted):
        with safetensors.safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118  - no dict
                if name.endswith("tid2eid"):
                    assert np.array_equal(file.get_tensor(name), table(rerouted, name, 4))


def test_only_the_numbers_change_in_config_and_index(tiny_6e, rerouted):
    old, new = ((d / "config.json").read_text("utf-8") for d in (tiny_6e, rerouted))
    assert new == old.replace('"num_experts_per_tok": 6,', '"num_experts_per_tok": 4,')
    assert new != old
    old, new = ((d / INDEX).read_text("utf-8") for d in (tiny_6e, rerouted))
    total = json.loads(old)["metadata"]["total_size"]
    assert new == old.replace(str(total), str(total - 3 * TINY_6E.vocab * 2 * 8))
    sizes = [len(data) for path in shards(rerouted) for _, _, data in load_shard(path).values()]
    assert json.loads(new)["metadata"]["total_size"] == sum(sizes)


def test_untouched_shards_are_the_same_file(tiny_6e, rerouted):
    same = {path.name: path.samefile(tiny_6e / path.name) for path in shards(rerouted)}
    holds = {path.name: any(name.endswith("tid2eid") for name in read_header(path)[0]) for path in shards(tiny_6e)}
    assert same == {name: not table for name, table in holds.items()}
    assert sorted(same.values()) == [False, False, True]


def test_small_files_come_along_as_copies(tiny_6e, rerouted):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (rerouted / name).read_bytes() == (tiny_6e / name).read_bytes()
        assert not (rerouted / name).samefile(tiny_6e / name), "editing one must not edit the other"


def test_the_same_gguf_comes_from_the_directory_from_the_view_and_from_the_gguf(tiny_6e, rerouted, tmp_path):
    dt.convert(dt.plan(dt.open_checkpoint(rerouted)), tmp_path / "directory.gguf")
    dt.convert(dt.plan(dt.reroute(dt.open_checkpoint(tiny_6e), 4)), tmp_path / "view.gguf")
    dt.convert(dt.plan(dt.open_checkpoint(tiny_6e)), tmp_path / "six.gguf")
    dt.reroute_gguf(tmp_path / "six.gguf", tmp_path / "gguf.gguf", 4)
    view = (tmp_path / "view.gguf").read_bytes()
    assert (tmp_path / "directory.gguf").read_bytes() == view
    assert (tmp_path / "gguf.gguf").read_bytes() == view
    assert (tmp_path / "six.gguf").read_bytes() != view


@pytest.mark.parametrize("n", range(1, 6))
def test_any_smaller_number(six, tmp_path, n):
    done = dt.reroute_checkpoint(six, tmp_path / "out", n)
    assert dt.open_checkpoint(tmp_path / "out").config.num_experts_per_tok == n
    assert np.array_equal(table(tmp_path / "out", TABLE, n), table(six, TABLE, 6)[:, :n])
    assert (done.effect.experts_before, done.effect.experts_after) == (6, n)


def test_in_two_steps_as_in_one(six, tmp_path):
    dt.reroute_checkpoint(six, tmp_path / "five", 5)
    dt.reroute_checkpoint(tmp_path / "five", tmp_path / "steps", 3)
    dt.reroute_checkpoint(six, tmp_path / "once", 3)
    steps, once = checksums(tmp_path / "steps"), checksums(tmp_path / "once")
    assert {n for n in steps if steps[n] != once[n]} == {"README.md"}
    text = (tmp_path / "steps" / "README.md").read_text("utf-8")
    assert text.index("3 experts per token instead of 5") < text.index("5 experts per token instead of 6")


def test_effect_counts_parameters(six, tmp_path):
    effect = dt.reroute_checkpoint(six, tmp_path / "out", 4).effect
    hidden, width, layers = SMALL.hidden, SMALL.expert_hidden, SMALL.layers
    assert effect.active_before - effect.active_after == 2 * layers * 3 * hidden * width
    everything = sum(
        len(data) // {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I8": 1}[dtype] * (2 if dtype == "I8" else 1)
        for path in shards(six) for name, (dtype, _, data) in load_shard(path).items()
        if dtype not in {"F8_E8M0", "I64"} and name != "embed.weight"
    )
    assert effect.active_before == everything - (12 - 6) * layers * 3 * hidden * width
    assert (effect.hash_layers, effect.scored_layers, effect.n_experts) == ((0,), 2, 12)


def test_without_hash_layers_only_texts_change(make_checkpoint, tmp_path):
    source = make_checkpoint("source", hash_layers=0, **SIX)
    done = dt.reroute_checkpoint(source, tmp_path / "out", 4)
    assert done.tables == ()
    assert all(path.samefile(source / path.name) for path in shards(tmp_path / "out"))
    assert dt.open_checkpoint(tmp_path / "out").config.num_experts_per_tok == 4


def test_one_file_without_an_index(make_checkpoint, tmp_path):
    source = make_checkpoint("source", shards=1, **SIX)
    done = dt.reroute_checkpoint(source, tmp_path / "out", 4)
    assert done.files["model.safetensors"] == "rewritten"
    assert not (tmp_path / "out" / INDEX).exists()


def test_other_orders_of_header_and_data(six, tmp_path):
    path, *_ = find_tensor(six, TABLE)
    tensors = load_shard(path)
    save_shard(path, dict(reversed(tensors.items())))   # data reversed
    header, start = read_header(path)
    data = path.read_bytes()[start:]
    moved = {"__metadata__": header.pop("__metadata__") | {"größe": "x"}} | dict(sorted(header.items()))
    moved = {k: moved[k] for k in [*list(moved)[1:], "__metadata__"]}
    text = json.dumps(moved, indent=2, ensure_ascii=False).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    dt.reroute_checkpoint(six, tmp_path / "out", 4)
    after, _ = read_header(tmp_path / "out" / path.name)
    assert list(after) == list(moved)
    assert after["__metadata__"] == moved["__metadata__"]
    by_place = sorted((e["data_offsets"][0], n) for n, e in after.items() if n != "__metadata__")
    assert [n for _, n in by_place] == list(reversed(tensors))
    new = load_shard(tmp_path / "out" / path.name)
    assert all(new[n] == tensors[n] for n in tensors if n != TABLE)


def test_int32_tables(six, tmp_path):
    ids = table(six, TABLE, 6).astype("<i4")
    replace_tensor(six, TABLE, "I32", list(ids.shape), ids.tobytes())
    dt.reroute_checkpoint(six, tmp_path / "out", 2)
    assert read_tensor(tmp_path / "out", TABLE) == np.ascontiguousarray(ids[:, :2]).tobytes()


def test_folders_hidden_things_and_permissions(six, tmp_path):
    (six / "inference").mkdir()
    (six / "inference" / "config.json").write_text('{"vocab_size": 512,\n  "n_activated_experts":6, "x": 1e-06}\n')
    (six / "inference" / "run.sh").write_text("#!/bin/sh\n")
    (six / "inference" / "run.sh").chmod(0o755)
    (six / "empty").mkdir()
    (six / ".gitattributes").write_text("* filter\n")
    (six / ".cache" / "huggingface").mkdir(parents=True)
    (six / ".cache" / "huggingface" / "x").write_text("x")
    before = tree(six)
    out = tmp_path / "out"
    dt.reroute_checkpoint(six, out, 4)
    assert (out / "inference" / "config.json").read_text() == \
        '{"vocab_size": 512,\n  "n_activated_experts":4, "x": 1e-06}\n'
    assert os.access(out / "inference" / "run.sh", os.X_OK)
    assert (out / ".gitattributes").read_text() == "* filter\n"
    assert tree(out) == {n for n in before if not n.startswith(".cache")} - {"empty"} | {"README.md"}


def test_a_snapshot_in_the_hubs_cache(six, tmp_path):
    home = tmp_path / "hub" / "models--deepseek-ai--DeepSeek-V4-Flash"
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, path in enumerate(sorted(six.iterdir())):
        path.rename(home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    done = dt.reroute_checkpoint(snapshot, tmp_path / "out", 4)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    linked = [name for name, how in done.files.items() if how == "linked"]
    assert linked
    assert all((tmp_path / "out" / name).samefile(snapshot / name) for name in linked)
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert text.startswith("---\nbase_model: deepseek-ai/DeepSeek-V4-Flash\n---\n\n> **Re-routed from [deepseek-ai/")
    assert dt.open_checkpoint(tmp_path / "out").card.base_models == ("deepseek-ai/DeepSeek-V4-Flash",)


# --------------------------------------------------------------------------------------------- links, clones and copies


def test_copies_on_demand(six, tmp_path):
    done = dt.reroute_checkpoint(six, tmp_path / "out", 4, link="copy")
    assert set(done.files.values()) <= {"rewritten", "edited", "copied", "cloned"}
    for path in shards(tmp_path / "out"):
        assert path.stat().st_nlink == 1
        if done.files[path.name] != "rewritten":
            assert path.read_bytes() == (six / path.name).read_bytes()


def refuse_links(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)


def test_where_links_cannot_be(six, tmp_path, monkeypatch):
    refuse_links(monkeypatch)
    with pytest.raises(UsageError, match=r"cannot be hard-linked to the output: Invalid cross-device link; --link"):
        dt.reroute_checkpoint(six, tmp_path / "out", 4, link="hard")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["six"]
    monkeypatch.setattr(place, "clone_file", lambda source, target: False)
    done = dt.reroute_checkpoint(six, tmp_path / "out", 4)
    assert list(done.files.values()).count("linked") == 0
    assert done.n_bytes_written == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())


def test_clones_where_the_file_system_has_them(six, tmp_path, monkeypatch):
    def clone(source: int, target: int) -> bool:   # stands in for a file system that shares blocks
        os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)
        return True

    monkeypatch.setattr(place, "clone_file", clone)
    refuse_links(monkeypatch)
    done = dt.reroute_checkpoint(six, tmp_path / "out", 4)
    assert "cloned" in done.files.values()
    assert all((tmp_path / "out" / n).read_bytes() == (six / n).read_bytes()
               for n, how in done.files.items() if how in {"cloned", "copied"})


def test_progress_adds_up_to_what_is_announced(six, tmp_path):
    totals, steps = [], []
    done = dt.reroute_checkpoint(six, tmp_path / "out", 4, link="copy", announce=totals.append, progress=steps.append)
    assert totals == [done.n_bytes_written] == [sum(steps)]


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(error, source, out, n=4, **options) -> str:
    with pytest.raises(error) as caught:
        dt.reroute_checkpoint(source, out, n, **options)
    assert not os.path.lexists(out) or out.is_dir()
    assert not out.with_name(out.name + ".partial").exists()
    return str(caught.value)


@pytest.mark.parametrize(("n", "words"), [
    (7, "is 7, the checkpoint routes each token to 6: its tid2eid tables have no further columns; choose 1 to 6"),
    (6, "is 6, which the checkpoint has already: nothing to change; choose 1 to 5"),
    (0, "choose 1 to 6"),
])
def test_more_or_as_many_experts(six, tmp_path, n, words):
    assert words in refused(UsageError, six, tmp_path / "out", n)


def test_a_view_is_no_source(six, tmp_path):
    view = dt.reroute(dt.open_checkpoint(six), 4)
    assert "is a view with 4 experts per token, stored are 6" in refused(UsageError, view, tmp_path / "out", 3)


@pytest.mark.parametrize(("row", "column", "expert"), [(0, 0, -1), (7, 3, 12), (511, 5, 2**40)])
def test_an_id_that_is_no_expert(six, tmp_path, row, column, expert):
    write_tensor(six, TABLE, expert.to_bytes(8, "little", signed=True), (row * 6 + column) * 8)
    message = refused(InputError, six, tmp_path / "out")
    assert f"tensor '{TABLE}': row {row} column {column} routes to expert {expert}, expected 0 to 11" in message
    assert "model-00001-of-00002.safetensors" in message


def test_config_and_table_disagree(six, tmp_path):
    edit_config(six, num_experts_per_tok=5)
    assert "has shape [512, 6], config.json says num_experts_per_tok = 5" in refused(InputError, six, tmp_path / "out")


def test_too_few_and_too_many_tables(six, tmp_path):
    ids = read_tensor(six, TABLE)
    edit_config(six, num_hash_layers=2)
    message = refused(InputError, six, tmp_path / "out")
    assert "has no tid2eid table for layers 1, num_hash_layers in config.json is 2" in message
    edit_config(six, num_hash_layers=1)
    add_tensor(six, "layers.2.ffn.gate.tid2eid", "I64", [512, 6], ids)
    message = refused(InputError, six, tmp_path / "out")
    assert "has a tid2eid table for layers 2, num_hash_layers in config.json is 1" in message
    drop_tensor(six, "layers.2.ffn.gate.tid2eid")
    drop_tensor(six, TABLE)
    assert "has no tid2eid table for layers 0" in refused(InputError, six, tmp_path / "out")


def test_tables_of_other_shapes_and_types(six, tmp_path):
    replace_tensor(six, TABLE, "I64", [256, 6], bytes(256 * 6 * 8))
    assert "has 256 rows, config.json says vocab_size = 512" in refused(InputError, six, tmp_path / "out")
    replace_tensor(six, TABLE, "F64", [512, 6], bytes(512 * 6 * 8))
    assert "is F64, expected integers (I64 or I32)" in refused(InputError, six, tmp_path / "out")


@pytest.mark.parametrize(("value", "words"), [
    (4, "is 4, config.json says num_experts_per_tok = 6"), ("6", "is '6'"), (True, "is True"),
])
def test_inference_config_disagrees(six, tmp_path, value, words):
    (six / "inference").mkdir()
    (six / "inference" / "config.json").write_text(json.dumps({"n_activated_experts": value}))
    message = refused(InputError, six, tmp_path / "out")
    assert words in message
    assert "'n_activated_experts'" in message


def test_inference_config_without_the_key_stays(six, tmp_path):
    (six / "inference").mkdir()
    (six / "inference" / "config.json").write_text("[1]")
    dt.reroute_checkpoint(six, tmp_path / "out", 4)
    assert (tmp_path / "out" / "inference" / "config.json").read_text() == "[1]"


def test_links_out_of_the_checkpoint_and_odd_files(six, tmp_path):
    (tmp_path / "secret").write_text("x")
    (six / "link.txt").symlink_to(tmp_path / "secret")
    assert f"links to {tmp_path / 'secret'}, outside the checkpoint" in refused(InputError, six, tmp_path / "out")
    (six / "link.txt").unlink()
    (six / "folder").symlink_to(".")
    assert "is no regular file" in refused(InputError, six, tmp_path / "out")
    (six / "folder").unlink()
    os.mkfifo(six / "pipe")
    assert "is no regular file" in refused(InputError, six, tmp_path / "out")
    (six / "pipe").unlink()
    (six / "README.md").symlink_to("/nowhere")
    assert "outside the checkpoint" in refused(InputError, six, tmp_path / "out")


def test_readme_that_is_no_text(six, tmp_path):
    (six / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\n")
    assert "is not valid UTF-8 at byte 21" in refused(InputError, six, tmp_path / "out")


def test_base_model_that_is_no_name(six, tmp_path):
    message = refused(UsageError, six, tmp_path / "out", base_model="a: b")
    assert message == "--base-model: is 'a: b', expected OWNER/NAME"


def test_outputs_that_are_in_the_way(six, tmp_path):
    before = checksums(six)
    assert "lies in the source directory" in refused(UsageError, six, six)
    assert "lies in the source directory" in refused(UsageError, six, six / "out")
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").touch()
    assert "exists and is not empty" in refused(UsageError, six, out)
    (out / "x").unlink()
    dt.reroute_checkpoint(six, out, 4)   # an empty one will do
    assert (out / "config.json").exists()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "link", "dangling"):
        with pytest.raises(UsageError, match="exists and is no directory"):
            dt.reroute_checkpoint(six, tmp_path / name, 4)
    assert "is no directory; create it first" in refused(ResourceError, six, tmp_path / "none" / "out")
    assert checksums(six) == before


def test_a_foreign_partial_directory_is_left_alone(six, tmp_path):
    foreign = tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"out\.partial: is in the way and was not left by an earlier run"):
        dt.reroute_checkpoint(six, tmp_path / "out", 4)
    assert (foreign / "thesis.txt").read_text() == "x"
    shutil.rmtree(foreign)
    foreign.write_text("x")
    with pytest.raises(UsageError, match="is in the way"):
        dt.reroute_checkpoint(six, tmp_path / "out", 4)


def test_what_a_killed_run_left_is_removed_without_harm(six, tmp_path):
    """The stale files are links to the source's shards: they must lose their names, not their bytes."""
    before = checksums(six)
    content = tmp_path / "out.partial" / "content"
    (content / "inference").mkdir(parents=True)
    (tmp_path / "out.partial" / "dsv4tools.lock").touch()
    for path in six.iterdir():
        os.link(path, content / path.name)
    (content / "inference" / "old.py").touch()
    dt.reroute_checkpoint(six, tmp_path / "out", 4)
    assert checksums(six) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "six"]
    assert not (tmp_path / "out" / "inference").exists()


def test_a_second_writer_waits_for_nobody(six, tmp_path):
    messages = []

    def intrude(_: int) -> None:
        if not messages:
            with pytest.raises(ResourceError) as caught:
                dt.reroute_checkpoint(six, tmp_path / "out", 3)
            messages.append(str(caught.value))

    dt.reroute_checkpoint(six, tmp_path / "out", 4, progress=intrude)
    assert "is being written by another" in messages[0]
    assert dt.open_checkpoint(tmp_path / "out").config.num_experts_per_tok == 4


def test_no_space(six, tmp_path, monkeypatch):
    monkeypatch.setattr(outfile, "free_bytes", lambda _: 1_000_000)
    message = refused(ResourceError, six, tmp_path / "out")
    assert "1.00 MB" in message
    assert "free some space" in message


def test_a_disk_that_fills_up(six, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(place, "pwrite_all", full)
    assert "the disk is full" in refused(ResourceError, six, tmp_path / "out")


@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_that_changes_after_it_was_opened(six, tmp_path, shard):
    checkpoint = dt.open_checkpoint(six)
    path = shards(six)[shard]
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw)
    assert "source changed since" in refused(VerifyError, checkpoint, tmp_path / "out")


def test_an_interruption_leaves_nothing(six, tmp_path):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dt.reroute_checkpoint(six, tmp_path / "out", 4, progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["six"]


def test_nothing_of_the_source_is_opened_for_writing(six, tmp_path, monkeypatch):
    opened = []
    system_open = os.open

    def spy(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR):
            opened.append(Path(path).name if not isinstance(path, int) else path)
        return system_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", spy)
    for path in six.iterdir():
        path.chmod(0o400)
    done = dt.reroute_checkpoint(six, tmp_path / "out", 4)
    assert set(opened) == {n for n, how in done.files.items() if how != "linked"} | {"dsv4tools.lock"}


def test_repeated_experts_are_a_warning(six, tmp_path):
    ids = table(six, TABLE, 6).copy()
    ids[5, 5] = ids[5, 0]        # among the columns that are cut off: no matter
    ids[9, 3] = ids[9, 1]
    ids[200, 2] = ids[200, 0]
    write_tensor(six, TABLE, ids.tobytes())
    done = dt.reroute_checkpoint(six, tmp_path / "out", 4)
    [warning] = done.warnings
    assert warning.startswith(f"model-00001-of-00002.safetensors: tensor '{TABLE}': 2 of 512 tokens have an expert ")
    assert warning.endswith(f"in the first 4 columns, first token 9 (expert {ids[9, 1]}): they use fewer experts")


# ----------------------------------------------------------------------------------------------------------- JSON edits

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(st.none() | st.booleans() | NUMBERS | st.text(), lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(), inner, max_size=3), max_leaves=10)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.text(), VALUES, max_size=4), st.text(), st.text(), NUMBERS, st.integers(), st.data())
def test_one_number_is_replaced_wherever_it_stands(siblings, outer, key, old, new, data):
    members = siblings | {key: old}
    members = dict(data.draw(st.permutations(list(members.items()))))
    value = {"before": [siblings], outer: members} if data.draw(st.booleans()) else {outer: members, "behind": 1}
    separators = data.draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\r\n\t", " : ")]))
    options = {"ensure_ascii": data.draw(st.booleans()), "indent": data.draw(st.sampled_from([None, 0, 3]))}
    raw = json.dumps(value, separators=separators, **options).encode("utf-8", "surrogatepass")
    try:
        raw.decode()
    except UnicodeDecodeError:
        return
    edited = replace_number(raw, [outer, key], new, "x.json")
    expected = json.loads(raw)
    expected[outer][key] = new
    assert json.loads(edited) == expected
    assert list(json.loads(edited)[outer]) == list(members)
    back = replace_number(edited, [outer, key], 0, "x.json")
    assert back == replace_number(raw, [outer, key], 0, "x.json"), "more than the number was changed"


@pytest.mark.parametrize(("raw", "words"), [
    (b"{}", "'a.b': is missing"), (b"[]", "'a.b': is missing"), (b'{"a": 1}', "'a.b': is missing"),
    (b'{"a": {"b": "1"}}', "'a.b': is '1', expected a number"), (b'{"a": {"b": true}}', "is True, expected a number"),
    (b'{"b": 1, "a": {"c": {"b": 1}}}', "'a.b': is missing"),
])
def test_no_number_there(raw, words):
    with pytest.raises(InputError, match=r"^x\.json: ") as caught:
        replace_number(raw, ["a", "b"], 1, "x.json")
    assert words in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- README

NOTE = "> **Re-routed from [o/n](https://huggingface.co/o/n) with dsv4tools: 4 experts per token instead of 6.**"


@pytest.mark.parametrize(("front", "expected"), [
    ("license: mit", "license: mit\nbase_model: o/n"),
    ("base_model: a/b\nlicense: mit", "base_model: o/n\nlicense: mit"),
    ("base_model:\n- a/b\n- c/d\n\n# a word\nlicense: mit", "base_model: o/n\n\n# a word\nlicense: mit"),
    ("tags: [x,\n  y]\nbase_model: [a/b,\n c/d] # old", "tags: [x,\n  y]\nbase_model: o/n # old"),
    ("# nothing", "# nothing\nbase_model: o/n"),
    ("base_model:", "base_model: o/n"),
    ("x:\n  base_model: a/b", "x:\n  base_model: a/b\nbase_model: o/n"),
])
def test_front_matter_keeps_all_but_the_base_model(front, expected):
    text = edit_readme(f"---\n{front}\n---\n# Model\n\ntext\n", "o/n", 6, 4, "README.md")
    assert text.startswith(f"---\n{expected}\n---\n\n{NOTE}")
    assert text.endswith("was.\n\n# Model\n\ntext\n")


def test_readme_without_front_matter_and_without_base_model():
    assert edit_readme("# Model\n", "o/n", 6, 4, "x").startswith(f"---\nbase_model: o/n\n---\n\n{NOTE}")
    assert edit_readme("", "o/n", 6, 4, "x").startswith(f"---\nbase_model: o/n\n---\n\n{NOTE}")
    text = edit_readme("---\nlicense: mit\n---", None, 6, 4, "x")
    assert text.startswith("---\nlicense: mit\n---\n\n> **Re-routed with dsv4tools: 4 experts per token instead of 6")
    assert edit_readme("# Model", None, 6, 4, "x").startswith("> **Re-routed with")


def test_front_matter_that_is_empty_or_behind_a_byte_order_mark():
    assert edit_readme("---\n---\n# A\n", "o/n", 6, 4, "x").startswith(f"---\nbase_model: o/n\n---\n\n{NOTE}")
    assert edit_readme("---\n---\n# A\n", "o/n", 6, 4, "x").endswith("was.\n\n# A\n")
    assert edit_readme("---\n---\n# A\n", None, 6, 4, "x").startswith("---\n---\n\n> **")
    text = edit_readme("\ufeff---\nlicense: mit\n---\n# A\n", "o/n", 6, 4, "x")
    assert text.startswith(f"---\nlicense: mit\nbase_model: o/n\n---\n\n{NOTE}")


def test_line_ends_of_another_system():
    text = edit_readme("---\r\nbase_model: a/b\r\nlicense: mit\r\n---\r\n# Model\r\n", "o/n", 6, 4, "x")
    assert text.startswith("---\r\nbase_model: o/n\r\nlicense: mit\r\n---\r\n\r\n> **Re-routed")
    assert text.count("\n") == text.count("\r\n")


@pytest.mark.parametrize("front", ["a: [", "- a", "{a: b}", "a", "x: *y"])
def test_front_matter_that_cannot_be_edited(front):
    with pytest.raises(InputError, match=r"^README\.md: front matter is .*; mend or remove it$"):
        edit_readme(f"---\n{front}\n---\n", "o/n", 6, 4, "README.md")


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command_says_what_changes(six, tmp_path, dsv4tools):
    out = tmp_path / "out"
    ended = dsv4tools("reroute", six, out, "--experts-per-token", 4, "--base-model", "o/n")
    assert (ended.code, ended.err) == (0, "")
    effect = dt.reroute_checkpoint(six, tmp_path / "again", 4, base_model="o/n").effect
    for words in (
        f"wrote {out}: 4 experts per token instead of 6", "layers 0: their tables keep the first 4 of 6 columns",
        "the other 2 layers choose their best-scored experts at run time: nothing to change in them",
        "4 instead of 6 of 12 routed experts in every layer",
        f"about {effect.active_after / 1e6:.1f} million active parameters per token",
        f"instead of {effect.active_before / 1e6:.1f} million",
        "1 shards: model-00001-of-00002.safetensors", "1 shards as hard links",
        f"next: dsv4tools convert {out} --dry-run",
    ):
        assert words in ended.out, words
    assert checksums(out) == checksums(tmp_path / "again")


def test_json_of_the_command(six, tmp_path, dsv4tools):
    out = tmp_path / "out"
    data = dsv4tools("reroute", six, out, "--experts-per-token", 4, "--link", "copy", "--json").data
    assert data["tables"] == [TABLE]
    assert data["effect"]["experts_after"] == 4
    assert set(data["files"]) == {p.name for p in out.iterdir()}
    assert data["written_bytes"] == sum(p.stat().st_size for p in out.iterdir())


def test_inspect_shows_the_new_routing(rerouted, dsv4tools):
    ended = dsv4tools("inspect", rerouted)
    assert "experts        12 routed, 4 active per token, 1 shared" in ended.out
    assert "hash-routed    layers 0-2; the others choose the best-scored experts" in ended.out


def test_options_that_do_not_fit(six, tmp_path, dsv4tools):
    line = dsv4tools("reroute", six, tmp_path / "out", "--experts-per-token", 4, "--overwrite").failed(2)
    assert "--overwrite: is for GGUF files" in line
    assert "checkpoint routes each token to 6" in dsv4tools("reroute", six, tmp_path / "out", "--experts-per-token",
                                                           8).failed(2)
    dsv4tools("reroute", six, tmp_path / "out").failed(2)
    dsv4tools("reroute", six, tmp_path / "out", "--experts-per-token", 0).failed(2)


def test_kills_leave_nothing_or_all(tmp_path):
    found = kill_often(RerouteDirectory(tmp_path), 15)
    assert found.total() == 15
    assert found["nothing"], "no kill fell into the work"
