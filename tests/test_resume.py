"""Going on with an interrupted conversion: the same bytes whatever happened meanwhile, or a refusal that says why."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, checksums
from kills import Assemble, Convert, Parts, Split, kill_often
from tamper import find_tensor, shards, write_tensor

import dsv4tools as dt
from dsv4tools import identity, spot_check
from dsv4tools.errors import Dsv4Error, Interrupted, ResourceError, UsageError, VerifyError
from dsv4tools.journal import read_journal
from dsv4tools.options import RunOptions
from dsv4tools.workers import StopRequest

convert_module, output_module = sys.modules["dsv4tools.convert"], sys.modules["dsv4tools.output"]


@pytest.fixture
def source(make_checkpoint):
    """A checkpoint of 119 units that the test may change."""
    return make_checkpoint()


@pytest.fixture(scope="module")
def expected(_written, tmp_path_factory):
    """The bytes of a conversion in one run."""
    source = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    return dt.convert(dt.plan(dt.open_checkpoint(source)), tmp_path_factory.mktemp("expected") / "x.gguf").path


def plan(source, **options):
    return dt.plan(dt.open_checkpoint(source), **options)


def interrupt(a_plan, out, units=40, journal="", **options) -> int:
    """Convert and stop once so many units are written; how many are finished then: these, and those in hand."""
    stop, positions = StopRequest(), []
    real = output_module.OutputFile.write

    def write(self, position, *rest):
        positions.append(position)
        if len(positions) == units:
            stop.request(signal.SIGINT)
        return real(self, position, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(output_module.OutputFile, "write", write)
        with pytest.raises(Interrupted, match="run the same command again to continue"):
            dt.convert(a_plan, out, run=RunOptions(threads=2, stop=stop), **options)
    finished = read_journal(out.with_name(journal or out.name + ".journal")).units
    assert set(positions) <= set(finished)
    return len(finished)


def resume(a_plan, out, manifest=None, **options) -> tuple[int, list[str]]:
    """Go on; how many units were done in this run, and what was said."""
    written, notes = [], []
    real = output_module.OutputFile.write

    def write(self, position, *rest):
        written.append(position)
        return real(self, position, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(output_module.OutputFile, "write", write)
        dt.convert(a_plan, out, manifest=manifest, run=RunOptions(notify=notes.append, **options))
    return len(written), notes


def names(directory) -> set[str]:
    return {p.name for p in directory.iterdir() if p.name.startswith("out")}


@pytest.mark.parametrize("threads", [1, 3])
def test_only_what_is_missing_is_done(source, tmp_path, expected, threads):
    out = tmp_path / "out.gguf"
    before = checksums(source)
    finished = interrupt(plan(source), out)
    assert names(tmp_path) == {"out.gguf.partial", "out.gguf.journal"}
    n_units = plan(source).n_units
    assert 0 < finished < n_units
    written, notes = resume(plan(source), out, threads=threads)
    assert written == n_units - finished
    assert notes[0].startswith(f"continuing {out}.partial: {finished} units done, ")
    assert out.read_bytes() == expected.read_bytes()
    assert names(tmp_path) == {"out.gguf"}
    assert checksums(source) == before


def test_the_command_goes_on_by_itself(source, tmp_path, expected, dsv4tools):
    out = tmp_path / "out.gguf"
    interrupt(plan(source), out)
    ended = dsv4tools("convert", source, out, "--threads", 1)
    assert ended.code == 0
    assert "note: continuing " in ended.err
    assert out.read_bytes() == expected.read_bytes()


# -------------------------------------------------------------------------------------------------------- another plan


OTHERS = {
    "policy": (["--policy", "q8"], "policy is q8 (", "was q4k ("),
    "type": (["--tensor-type", "blk.0=bf16"], "template is ", "was "),
    "experts": (["--experts-per-token", "1"], "experts per token is 1, was 2", "template is "),
    "nan": (["--nan", "zero"], "nan is zero, was refuse", "output bytes is "),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_plan_is_refused_with_both_values(case, source, tmp_path, expected, dsv4tools):
    options, *said = OTHERS[case]
    out = tmp_path / "out.gguf"
    interrupt(plan(source), out)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    message = dsv4tools("convert", source, out, *options).failed(2)
    for text in (*said, "out.gguf.partial: belongs to another conversion", "or --restart to begin anew"):
        assert text in message
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    assert dsv4tools("convert", source, out).code == 0
    assert out.read_bytes() == expected.read_bytes()


def test_a_partial_file_of_a_rerouted_view_is_another_plan(source, tmp_path, dsv4tools):
    out, other = tmp_path / "out.gguf", tmp_path / "other.gguf"
    view = dt.reroute(dt.open_checkpoint(source), 1)
    interrupt(dt.plan(view), out)
    assert "experts per token is 2, was 1" in dsv4tools("convert", source, out).failed(2)
    assert dsv4tools("convert", source, out, "--experts-per-token", 1).code == 0
    dt.convert(dt.plan(view), other)
    assert out.read_bytes() == other.read_bytes()


def test_overwrite_is_no_restart(source, tmp_path, expected, dsv4tools):
    """An output that exists and a partial file of another plan: neither is lost without being named."""
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    interrupt(plan(source, policy="q8"), out, overwrite=True)
    assert "exists; --overwrite replaces it" in dsv4tools("convert", source, out).failed(2)
    assert "policy is q4k (" in dsv4tools("convert", source, out, "--overwrite").failed(2)
    assert out.read_text() == "mine"
    assert dsv4tools("convert", source, out, "--overwrite", "--restart").code == 0
    assert out.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(("what", "said"), [
    ("tool", "tool is 99.0, was 0.1.0"), ("kernels", "kernels is ffff, was "), ("size", "shard model-00001-of-00002"),
    ("header", "shard model-00002-of-00002.safetensors is "),
])  # fmt: skip
def test_another_tool_or_source_is_refused(what, said, source, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    interrupt(plan(source), out)
    if what == "tool":
        monkeypatch.setattr(identity, "__version__", "99.0")
    elif what == "kernels":
        monkeypatch.setattr(identity, "kernel_version", lambda: "ffff")
    elif what == "size":
        respace(shards(source)[0], 8)
    else:
        respace(shards(source)[1], 0)
    with pytest.raises(UsageError, match=r"belongs to another conversion") as caught:
        dt.convert(plan(source), out)
    assert said in str(caught.value)


def respace(shard, n: int) -> None:
    """Give a shard's header other bytes of the same meaning, `n` more of them."""
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8:8 + length].rstrip()
    header = header[:-1] + b" " + header[-1:]
    header += b" " * (length + n - len(header))
    shard.write_bytes((length + n).to_bytes(8, "little") + header + raw[8 + length:])


def test_the_place_of_the_checkpoint_is_not_part_of_its_identity(source, tmp_path, expected):
    out = tmp_path / "out.gguf"
    finished = interrupt(plan(source), out)
    (tmp_path / "elsewhere").mkdir()
    moved = source.rename(tmp_path / "elsewhere" / source.name)     # its own name is the model's, for want of a better
    written, notes = resume(plan(moved), out)
    assert written + finished == plan(moved).n_units
    assert out.read_bytes() == expected.read_bytes()
    assert len(notes) == 1      # renamed, not copied: times and inodes are what they were


# ------------------------------------------------------------------------------------------------- shards that changed


def test_a_touched_or_copied_shard_warns_and_is_asked(source, tmp_path, expected):
    out = tmp_path / "out.gguf"
    finished = interrupt(plan(source), out)
    first, second = shards(source)
    os.utime(first, (1, 1))
    copy = shutil.copy2(second, second.with_suffix(".copy"))
    Path(copy).replace(second)
    written, notes = resume(plan(source), out)
    assert written + finished == plan(source).n_units
    assert notes[0] == f"modification time or inode changed: {first.name}, {second.name}; checking their units"
    assert out.read_bytes() == expected.read_bytes()


def test_units_of_changed_data_are_done_again(source, tmp_path):
    """The header of the shard is the same: only its data says that it is another one."""
    out, fresh = tmp_path / "out.gguf", tmp_path / "fresh.gguf"
    finished = interrupt(plan(source), out, units=60)
    names_of = {t.offset + plan(source).data_offset: t for t in plan(source).tensors}
    done = sorted(read_journal(out.with_name("out.gguf.journal")).units)
    tensor = next(names_of[p] for p in done if p in names_of and names_of[p].tensor.sources[0].kind is not None)
    write_tensor(source, tensor.tensor.sources[0].weight.name, b"\x11\x12", at=4)
    written, notes = resume(plan(source), out)
    assert written == plan(source).n_units - finished + 1
    assert "checking their units" in notes[0]
    dt.convert(plan(source), fresh)
    assert out.read_bytes() == fresh.read_bytes()


def test_a_shard_that_goes_missing_while_units_are_asked_loses_nothing(source, tmp_path, expected):
    out = tmp_path / "out.gguf"
    finished = interrupt(plan(source), out)
    for shard in shards(source):
        os.utime(shard, (1, 1))
    a_plan = plan(source)
    hidden = [shard.rename(shard.with_suffix(".hidden")) for shard in shards(source)]
    with pytest.raises(ResourceError, match="cannot be opened"):
        dt.convert(a_plan, out)
    for shard in hidden:
        shard.rename(shard.with_suffix(".safetensors"))
    written, _ = resume(plan(source), out)
    assert written + finished == a_plan.n_units
    assert out.read_bytes() == expected.read_bytes()


# --------------------------------------------------------------------------------------------------- faults on the way


def test_kernels_that_fail_their_test_leave_the_work_alone(source, tmp_path, expected, monkeypatch):
    out = tmp_path / "out.gguf"
    finished = interrupt(plan(source), out)

    def fail():
        raise Dsv4Error("encoder of Q4_K", "kernel self-test failed")

    with monkeypatch.context() as patched:
        patched.setattr(convert_module, "self_test", fail)
        with pytest.raises(Dsv4Error, match="self-test failed"):
            dt.convert(plan(source), out)
    assert names(tmp_path) == {"out.gguf.partial", "out.gguf.journal"}
    written, _ = resume(plan(source), out)
    assert written + finished == plan(source).n_units
    assert out.read_bytes() == expected.read_bytes()


def test_a_bad_value_late_in_the_model_costs_only_its_repair(source, tmp_path, dsv4tools):
    """Fix the file, or choose what to do with the value: what was done before counts in the first case."""
    out = tmp_path / "out.gguf"
    name = "layers.2.ffn.experts.3.w2.scale"
    shard, position, _ = find_tensor(source, name)
    good = shard.read_bytes()[position:position + 1]
    write_tensor(source, name, b"\xff")
    message = dsv4tools("convert", source, out, "--threads", 1).failed(3)
    assert name in message
    done = len(read_journal(out.with_name("out.gguf.journal")).units)
    assert done > 10
    write_tensor(source, name, good)
    written, notes = resume(plan(source), out)
    assert written == plan(source).n_units - done
    assert shard.name in notes[0]
    fresh = tmp_path / "fresh.gguf"
    dt.convert(plan(source), fresh)
    assert out.read_bytes() == fresh.read_bytes()


def test_memory_that_ends_names_the_tensor_and_keeps_the_rest(source, tmp_path, expected, monkeypatch):
    out = tmp_path / "out.gguf"
    real, calls = convert_module.UnitDeriver.encode, []

    def encode(self, unit, rows):
        calls.append(unit)
        if len(calls) == 40:
            raise MemoryError
        return real(self, unit, rows)

    with monkeypatch.context() as patched:
        patched.setattr(convert_module.UnitDeriver, "encode", encode)
        with pytest.raises(ResourceError, match=r"not enough memory; use fewer --threads") as caught:
            dt.convert(plan(source), out, threads=1)
    assert caught.value.where == calls[39].planned.name
    written, _ = resume(plan(source), out)
    assert written < plan(source).n_units - 20
    assert out.read_bytes() == expected.read_bytes()


def test_threads_that_are_made_while_the_conversion_runs_change_nothing(source, tmp_path, expected):
    for threads in (1, 2, 7, 16):
        dt.convert(plan(source), tmp_path / f"out-{threads}.gguf", threads=threads)
        assert (tmp_path / f"out-{threads}.gguf").read_bytes() == expected.read_bytes()


def test_journals_of_runs_that_fetch_their_shards_need_no_times(source, tmp_path, expected, monkeypatch):
    """Whoever gets a shard anew for each run states its hash instead of time and inode; the journal is the same."""
    out = tmp_path / "out.gguf"
    monkeypatch.setattr(convert_module, "shard_states", lambda plan: dict.fromkeys(plan.checkpoint.shards, "sha256 x"))
    finished = interrupt(plan(source), out)
    fetched = shutil.copytree(source, tmp_path / "again" / source.name)
    written, notes = resume(plan(fetched), out)
    assert written + finished == plan(source).n_units
    assert len(notes) == 1
    assert out.read_bytes() == expected.read_bytes()


# ----------------------------------------------------------------------------------------------------------- manifests


def test_a_stop_while_the_file_is_hashed_costs_the_hashing_only(source, tmp_path, expected, monkeypatch):
    out, manifest = tmp_path / "out.gguf", tmp_path / "m"
    manifest_module = sys.modules["dsv4tools.manifest"]
    stop, real = StopRequest(), manifest_module._chunks

    def chunks(*arguments):
        yield from real(*arguments)
        stop.request(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(manifest_module, "_chunks", chunks)
        with pytest.raises(Interrupted, match="stopped while the file was being hashed") as caught:
            dt.convert(plan(source), out, manifest=manifest, run=RunOptions(stop=stop))
    assert caught.value.exit_code == 143
    assert out.read_bytes() == expected.read_bytes()       # it is complete, and has its name
    assert not manifest.exists()
    written, notes = resume(plan(source), out, manifest=manifest)
    assert (written, notes) == (0, [f"{out} was complete already"])
    assert names(tmp_path) == {"out.gguf"}
    (tmp_path / "again").mkdir()
    dt.convert(plan(source), tmp_path / "again" / "out.gguf", manifest=tmp_path / "other")
    assert manifest.read_text() == (tmp_path / "other").read_text()


def test_zeroed_values_are_counted_over_all_runs(source, tmp_path):
    write_tensor(source, "layers.1.ffn.experts.1.w1.scale", b"\xff", at=42)
    write_tensor(source, "head.weight", b"\xc0\x7f", at=2)
    a_plan = plan(source, nan="zero")
    whole = dt.convert(a_plan, tmp_path / "whole.gguf").zeroed
    assert whole == {"blk.1.ffn_gate_exps.weight": 32, "output.weight": 1}
    out = tmp_path / "out.gguf"
    interrupt(a_plan, out, units=1)
    interrupt(a_plan, out, units=50)
    assert dt.convert(a_plan, out).zeroed == whole


# ---------------------------------------------------------------------------------------------- the look at the result


def corrupt_rows(monkeypatch, name, change):
    real = convert_module.UnitDeriver.encode

    def encode(self, unit, rows):
        data, n = real(self, unit, rows)
        return (change(data), n) if unit.planned.name == name else (data, n)

    monkeypatch.setattr(convert_module.UnitDeriver, "encode", encode)


@pytest.mark.parametrize("name", ["blk.1.ffn_down_exps.weight", "blk.2.attn_q_b.weight", "token_embd.weight",
                                  "output_norm.weight", "blk.0.ffn_gate_tid2eid.weight"])
@pytest.mark.parametrize("change", ["zero", "shift", "noise"])
def test_wrong_bytes_are_noticed_before_the_file_has_its_name(name, change, source, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    changes = {"zero": np.zeros_like, "shift": lambda d: np.roll(d, 7),
               "noise": lambda d: rng.integers(0, 256, d.shape, np.uint8)}
    corrupt_rows(monkeypatch, name, changes[change])
    with pytest.raises(Dsv4Error, match=rf"tensor '{name}': was written wrongly: its last row is not that of"):
        dt.convert(plan(source), tmp_path / "out.gguf")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("policy", ["q4k", "q8", "bf16", "f32"])
def test_errors_of_good_files_stay_below_the_tolerance(policy, tiny_6e, tmp_path, monkeypatch):
    """Two thirds of what is allowed would do for every tensor of these checkpoints."""
    monkeypatch.setattr(spot_check, "TOLERANCES", {name: share / 1.5 for name, share in spot_check.TOLERANCES.items()})
    dt.convert(plan(tiny_6e, policy=policy), tmp_path / "out.gguf")


def test_a_source_that_changes_before_the_last_look_is_told(source, tmp_path, monkeypatch):
    real = convert_module.check_samples

    def touch(*arguments):
        os.utime(shards(source)[0], (1, 1))
        real(*arguments)

    monkeypatch.setattr(convert_module, "check_samples", touch)
    with pytest.raises(VerifyError, match="source changed"):
        dt.convert(plan(source), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("subject", [Convert, Parts, Assemble, Split])
def test_kills_cost_no_byte(subject, source, tmp_path):
    """`scripts/kill-test` does it at length."""
    found = kill_often(subject(tmp_path, source), 12, seed=1)
    assert found["whole"] < 12, "no kill fell into the work"
