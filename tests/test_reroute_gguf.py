"""Re-routing from GGUF to GGUF: which bytes change, what is refused, and what a kill leaves."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from conftest import SMALL
from kills import RerouteGguf, kill_often

import dsv4tools as dt
from dsv4tools import outfile
from dsv4tools.errors import InputError, ResourceError, UsageError, VerifyError
from dsv4tools.gguf.header import TensorInfo, encode_header, lay_out
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.gguf.values import KV
from dsv4tools.reroute import gguf as reroute_gguf_module
from dsv4tools.synthetic import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

USED = "deepseek4.expert_used_count"
TABLE = "blk.0.ffn_gate_tid2eid.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A GGUF with two hash layers and six experts per token. Not to be changed."""
    directory = tmp_path_factory.mktemp("six")
    shape = replace(SMALL, experts=12, experts_per_token=6, hash_layers=2)
    checkpoint = write_checkpoint(directory / "checkpoint", shape, seed=3)
    dt.convert(dt.plan(dt.open_checkpoint(checkpoint), policy="q8"), directory / "six.gguf")
    return directory / "six.gguf"


@pytest.fixture
def six(made, tmp_path) -> Path:
    """A copy of it that a test may change."""
    path = tmp_path / "six.gguf"
    path.write_bytes(made.read_bytes())
    return path


def rewrite(path: Path, *, kvs=lambda kvs: kvs, tensors=lambda tensors: tensors, alignment=32) -> None:
    """Write `path` anew with its entries and its tensors (name -> format, ne, bytes) changed by the functions given."""
    with open_gguf(path) as file:
        held = {n: (t.format, t.ne, file.read_tensor_bytes(n).tobytes()) for n, t in file.tensors.items()}
        entries = kvs(dict(file.kvs))
    held = tensors(held)
    offsets, n_bytes = lay_out([len(data) for *_, data in held.values()], alignment)
    infos = [TensorInfo(n, ne, form, o) for (n, (form, ne, _)), o in zip(held.items(), offsets, strict=True)]
    raw = bytearray(encode_header(list(entries.values()), infos, alignment))
    start = len(raw)
    raw += bytes(n_bytes)
    for offset, (*_, data) in zip(offsets, held.values(), strict=True):
        raw[start + offset : start + offset + len(data)] = data
    path.write_bytes(raw)


def set_value(key: str, value: object):
    return lambda kvs: kvs | {key: replace(kvs[key], value=value)}


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("n", [1, 4, 5])
def test_only_the_tables_and_the_number_change(six, tmp_path, n):
    """Read back by the gguf package, which shares no code with ours."""
    done = dt.reroute_gguf(six, tmp_path / "out.gguf", n)
    old, new = gguf.GGUFReader(six), gguf.GGUFReader(tmp_path / "out.gguf")
    assert [t.name for t in new.tensors] == [t.name for t in old.tensors]
    tables = [f"blk.{layer}.ffn_gate_tid2eid.weight" for layer in (0, 1)]
    assert list(done.tables) == tables
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert after.tensor_type == before.tensor_type
        if before.name in tables:
            assert np.array_equal(after.data, before.data[:, :n])
        else:
            assert after.data.tobytes() == before.data.tobytes()
            assert np.array_equal(after.shape, before.shape)
    names = [f for f in old.fields if not f.startswith("GGUF.")]
    assert names == [f for f in new.fields if not f.startswith("GGUF.")]
    changed = [f for f in names if old.fields[f].contents() != new.fields[f].contents()]
    assert changed == [USED]
    assert new.fields[USED].contents() == n
    assert new.fields[USED].types == old.fields[USED].types


def test_the_result_verifies_against_the_checkpoint(made, tmp_path):
    dt.reroute_gguf(made, tmp_path / "out.gguf", 4)
    assert dt.verify(tmp_path / "out.gguf", source=made.with_name("checkpoint")).ok


@pytest.mark.parametrize("alignment", [8, 256])
def test_other_alignments(six, tmp_path, alignment):
    rewrite(six, alignment=alignment,
            kvs=lambda kvs: kvs | {"general.alignment": KV("general.alignment", "u32", alignment)})
    dt.reroute_gguf(six, tmp_path / "out.gguf", 3)
    with open_gguf(six) as old, open_gguf(tmp_path / "out.gguf") as new:
        assert new.alignment == alignment
        assert all(t.offset % alignment == 0 for t in new.tensors.values())
        for name in old.tensors:
            held = old.read_tensor_bytes(name)
            if "tid2eid" in name:
                held = held.view("<i4").reshape(-1, 6)[:, :3].ravel().view(np.uint8)
            assert np.array_equal(new.read_tensor_bytes(name), held)


def test_foreign_metadata_of_every_type_survive(six, tmp_path):
    foreign = [KV("x.f64", "f64", -0.0), KV("x.u64", "u64", 2**64 - 1), KV("x.bool", "bool", value=True),
               KV("x.empty", "str", ""), KV("x.none", "arr", [], "str"), KV("x.text", "arr", ["", "größe"], "str"),
               KV("x.f32", "f32", float("nan")), KV("x.i8", "arr", np.array([-128, 127], np.int8), "i8")]
    rewrite(six, kvs=lambda kvs: {k.key: k for k in foreign} | kvs)
    dt.reroute_gguf(six, tmp_path / "out.gguf", 4)
    with open_gguf(six) as old, open_gguf(tmp_path / "out.gguf") as new:
        assert list(new.kvs) == list(old.kvs)
        assert all(new.kvs[key] == kv for key, kv in old.kvs.items() if key != USED)


def test_small_chunks_give_the_same_file(six, tmp_path, monkeypatch):
    dt.reroute_gguf(six, tmp_path / "large.gguf", 4)
    monkeypatch.setattr(reroute_gguf_module, "_CHUNK_BYTES", 1000)
    dt.reroute_gguf(six, tmp_path / "small.gguf", 4)
    assert (tmp_path / "small.gguf").read_bytes() == (tmp_path / "large.gguf").read_bytes()


def test_without_hash_layers(six, tmp_path):
    rewrite(six, kvs=set_value("deepseek4.hash_layer_count", 0),
            tensors=lambda held: {n: t for n, t in held.items() if "tid2eid" not in n})
    done = dt.reroute_gguf(six, tmp_path / "out.gguf", 4)
    assert (done.tables, done.effect.scored_layers) == ((), 3)


def test_a_file_that_does_not_count_its_hash_layers(six, tmp_path):
    rewrite(six, kvs=lambda kvs: {k: v for k, v in kvs.items() if k != "deepseek4.hash_layer_count"})
    assert dt.reroute_gguf(six, tmp_path / "out.gguf", 4).effect.hash_layers == (0, 1)


def test_overwriting_and_what_earlier_runs_left(six, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    (tmp_path / "out.gguf.partial").write_bytes(bytes(100_000_000))
    with pytest.raises(UsageError, match="exists; --overwrite replaces it"):
        dt.reroute_gguf(six, out, 4)
    assert out.read_bytes() == b"old"
    dt.reroute_gguf(six, out, 4, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "six.gguf"]
    assert open_gguf(out).value(USED) == 4


def test_progress_adds_up_to_the_tensors(six, tmp_path):
    totals, steps = [], []
    done = dt.reroute_gguf(six, tmp_path / "out.gguf", 4, announce=totals.append, progress=steps.append)
    assert totals == [done.n_bytes_written] == [(tmp_path / "out.gguf").stat().st_size]
    with open_gguf(tmp_path / "out.gguf") as file:
        assert sum(steps) == sum(t.n_bytes for t in file.tensors.values())


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(error, source, n=4, out=None, **options) -> str:
    out = out or source.with_name("out.gguf")
    before = out.read_bytes() if out.exists() else None
    with pytest.raises(error) as caught:
        dt.reroute_gguf(source, out, n, **options)
    assert (out.read_bytes() if out.exists() else None) == before
    assert not out.with_name(out.name + ".partial").exists()
    assert not out.with_name(out.name + ".lock").exists()
    return str(caught.value)


@pytest.mark.parametrize(("n", "words"), [
    (7, "is 7, the file routes each token to 6: its tid2eid tables have no further columns; choose 1 to 5"),
    (6, "is 6, which the file has already: nothing to change; choose 1 to 5"), (0, "choose 1 to 5"),
])
def test_more_or_as_many_experts(six, n, words):
    assert words in refused(UsageError, six, n)


@pytest.mark.parametrize(("row", "column", "expert"), [(0, 0, -1), (511, 5, 12)])
def test_an_id_that_is_no_expert(six, row, column, expert):
    def change(held):
        form, ne, data = held[TABLE]
        ids = np.frombuffer(data, "<i4").reshape(-1, 6).copy()
        ids[row, column] = expert
        return held | {TABLE: (form, ne, ids.tobytes())}

    rewrite(six, tensors=change)
    message = refused(InputError, six)
    assert f"tensor '{TABLE}': row {row} column {column} routes to expert {expert}, expected 0 to 11" in message


@pytest.mark.parametrize(("key", "value", "words"), [
    (USED, 5, "has dimensions [6, 512], the metadata say expert_used_count = 5"),
    (USED, 0, "is 0, expected a number of at least 1"),
    ("deepseek4.hash_layer_count", 1, "has a tid2eid table for layers 1, deepseek4.hash_layer_count is 1"),
    ("deepseek4.hash_layer_count", 3, "has no tid2eid table for layers 2, deepseek4.hash_layer_count is 3"),
    ("deepseek4.block_count", 1, "'blk.1.ffn_gate_tid2eid.weight': belongs to none of the 1 layers"),
    ("general.architecture", "llama", "is 'llama', expected 'deepseek4'"),
])
def test_metadata_that_disagree(six, key, value, words):
    rewrite(six, kvs=set_value(key, value))
    assert words in refused(InputError, six)


@pytest.mark.parametrize("key", [USED, "deepseek4.expert_count", "deepseek4.block_count", "general.architecture"])
def test_metadata_that_are_missing(six, key):
    rewrite(six, kvs=lambda kvs: {k: v for k, v in kvs.items() if k != key})
    message = refused(InputError, six)
    assert key in message
    assert "missing" in message or "None" in message


def test_tables_of_other_types_and_sizes(six):
    def widen(held):
        ids = np.frombuffer(held[TABLE][2], "<i4").astype("<i8")
        return held | {TABLE: (dt.formats.table.FORMATS["I64"], (6, 512), ids.tobytes())}

    rewrite(six, tensors=widen)
    assert "is I64, expected I32" in refused(InputError, six)


def test_tables_of_another_vocabulary(six):
    rewrite(six, tensors=lambda held: held | {TABLE: (held[TABLE][0], (6, 511), held[TABLE][2][: 6 * 511 * 4])})
    assert "has 511 rows, token_embd.weight has 512" in refused(InputError, six)


def test_templates_and_parts(six):
    rewrite(six, kvs=lambda kvs: kvs | {"dsv4tools.template": KV("dsv4tools.template", "bool", value=True)})
    assert "is a template without weights; dsv4tools template SRC" in refused(UsageError, six)
    rewrite(six, kvs=lambda kvs: {k: v for k, v in kvs.items() if k != "dsv4tools.template"}
            | {"split.count": KV("split.count", "u16", 3)})
    assert "says it is one of 3 parts, expected a name like NAME-00001-of-00003.gguf" in refused(InputError, six)


def test_no_gguf_and_no_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGML")
    assert "x.gguf" in refused(InputError, tmp_path / "x.gguf")
    assert "no such file" in refused(InputError, tmp_path / "none.gguf")


def test_a_truncated_file(six):
    six.write_bytes(six.read_bytes()[:-5000])
    assert "the file has" in refused(InputError, six)


def test_the_input_is_no_output(six, tmp_path):
    before = six.read_bytes()
    os.link(six, tmp_path / "other.gguf")
    os.link(six, tmp_path / "out.gguf.partial")
    (tmp_path / "link.gguf").symlink_to(six)
    for out in (six, tmp_path / "other.gguf", tmp_path / "link.gguf", tmp_path / "out.gguf"):
        with pytest.raises(UsageError, match="is one of the inputs"):
            dt.reroute_gguf(six, out, 4, overwrite=True)
    with pytest.raises(UsageError, match="is a directory"):
        dt.reroute_gguf(six, tmp_path, 4)
    with pytest.raises(ResourceError, match="is no directory; create it first"):
        dt.reroute_gguf(six, tmp_path / "none" / "out.gguf", 4)
    assert six.read_bytes() == before


def test_an_interrupted_conversion_to_the_same_output_is_left_alone(six, tmp_path):
    (tmp_path / "out.gguf.partial").write_bytes(b"half")
    (tmp_path / "out.gguf.journal").write_bytes(b"{}")
    with pytest.raises(UsageError, match=r"out\.gguf\.journal: is of an interrupted conversion to the same output"):
        dt.reroute_gguf(six, tmp_path / "out.gguf", 4)
    assert (tmp_path / "out.gguf.partial").read_bytes() == b"half"


def test_a_second_writer_waits_for_nobody(six, tmp_path):
    messages = []

    def intrude(_: int) -> None:
        if not messages:
            with pytest.raises(ResourceError) as caught:
                dt.reroute_gguf(six, tmp_path / "out.gguf", 3)
            messages.append(str(caught.value))

    dt.reroute_gguf(six, tmp_path / "out.gguf", 4, progress=intrude)
    assert "out.gguf.lock" in messages[0]
    assert open_gguf(tmp_path / "out.gguf").value(USED) == 4


def test_no_space_and_a_disk_that_fills_up(six, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(reroute_gguf_module, "pwrite_all", full)
        assert "the disk is full" in refused(ResourceError, six)
    monkeypatch.setattr(outfile, "free_bytes", lambda _: 1000)
    assert "1.00 kB" in refused(ResourceError, six)


def test_a_source_that_changes_meanwhile(six):
    def touch(_: int) -> None:
        os.utime(six, ns=(1, 1))

    assert "source changed while it was being read" in refused(VerifyError, six, progress=touch)


def test_a_source_that_shrinks_meanwhile(six):
    def cut(_: int) -> None:
        os.truncate(six, 100_000)

    assert "ends at byte" in refused(ResourceError, six, progress=cut)


def test_an_interruption_leaves_nothing(six, tmp_path):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dt.reroute_gguf(six, tmp_path / "out.gguf", 4, progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["six.gguf"]


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command(six, tmp_path, dsv4tools):
    out = tmp_path / "out.gguf"
    ended = dsv4tools("reroute", six, out, "--experts-per-token", 4)
    assert (ended.code, ended.err) == (0, "")
    for words in (f"wrote {out}: 4 experts per token instead of 6", "layers 0-1: their tables keep the first 4 of 6",
                  "the other 1 layers", "million active parameters per token", f"next: dsv4tools verify {out}"):
        assert words in ended.out, words
    shown = dsv4tools("inspect", out).out
    assert "experts        12 routed, 4 active per token, 1 shared" in shown
    assert "hash-routed    layers 0-1" in shown
    data = dsv4tools("reroute", six, out, "--experts-per-token", 2, "--overwrite", "--json").data
    assert data["tables"] == [TABLE, "blk.1.ffn_gate_tid2eid.weight"]
    assert json.loads(json.dumps(data)) == data
    line = dsv4tools("reroute", six, out, "--experts-per-token", 2, "--link", "copy").failed(2)
    assert "are for checkpoint directories" in line


def test_warnings_go_to_stderr(six, tmp_path, dsv4tools):
    def change(held):
        form, ne, data = held[TABLE]
        ids = np.frombuffer(data, "<i4").reshape(-1, 6).copy()
        ids[3, 1] = ids[3, 0]
        return held | {TABLE: (form, ne, ids.tobytes())}

    rewrite(six, tensors=change)
    ended = dsv4tools("reroute", six, tmp_path / "out.gguf", "--experts-per-token", 4)
    assert ended.code == 0
    assert ended.err.startswith(f"warning: six.gguf: tensor '{TABLE}': 1 of 512 tokens have an expert twice")
    assert "first token 3 (" in ended.err


def test_kills_leave_nothing_or_all(tmp_path):
    found = kill_often(RerouteGguf(tmp_path), 15)
    assert found.total() == 15
    assert found["nothing"], "no kill fell into the work"
