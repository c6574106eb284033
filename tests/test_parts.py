"""Conversions by parts: any number, in any order, twice, by two at once, damaged, mixed up; and put together."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
import threading

import pytest
import xxhash
from conftest import SMALL, checksums
from process import ROOM_SECONDS
from tamper import write_tensor

import dsv4tools as dt
from dsv4tools import parts as module
from dsv4tools.errors import Interrupted, ResourceError, UsageError, VerifyError
from dsv4tools.journal import read_journal
from dsv4tools.options import RunOptions
from dsv4tools.parts import assemble, convert_part, find_parts, parse_part, part_path, part_units, read_part
from dsv4tools.workers import StopRequest

output_module = sys.modules["dsv4tools.output"]


@pytest.fixture(scope="module")
def source(_written):
    """A checkpoint of 119 units. Not to be changed."""
    path = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    before = checksums(path)
    yield path
    assert checksums(path) == before


@pytest.fixture(scope="module")
def plan(source):
    return dt.plan(dt.open_checkpoint(source))


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """The bytes of one run."""
    return dt.convert(plan, tmp_path_factory.mktemp("whole") / "x.gguf").path.read_bytes()


@pytest.fixture(scope="module")
def three(plan, tmp_path_factory):
    """A directory with three parts. Not to be changed."""
    directory = tmp_path_factory.mktemp("three")
    for i in (1, 2, 3):
        convert_part(plan, directory / "out.gguf", i, 3)
    before = checksums(directory)
    yield directory
    assert checksums(directory) == before


@pytest.fixture
def out(three, tmp_path):
    """An output whose three parts are there, and may be changed."""
    shutil.copytree(three, tmp_path / "parts")
    return tmp_path / "parts" / "out.gguf"


def files(out) -> set[str]:
    return {p.name for p in out.parent.iterdir()}


def flip(path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def seal(path) -> None:
    """Give the head of a part the checksum that it has now."""
    raw = bytearray(path.read_bytes())
    _, _, n_json, n_header, n_units, _ = module._LENGTHS.unpack(raw[:module._LENGTHS.size])
    end = module._LENGTHS.size + n_json + n_header + n_units * module._ENTRY.size
    raw[module._LENGTHS.size - 16:module._LENGTHS.size] = xxhash.xxh3_128_digest(raw[module._LENGTHS.size:end])
    path.write_bytes(raw)


# ------------------------------------------------------------------------------------------------------------ dividing


@pytest.mark.parametrize("n", [1, 2, 7, 118, 119, 120, 1000])
def test_every_unit_is_in_one_part(plan, n):
    runs = [part_units(plan, i, n) for i in range(1, n + 1)]
    assert [u for run in runs for u in run] == list(plan.units())
    if n <= 7:
        sizes = [sum(u.n_bytes for u in run) for run in runs]
        assert max(sizes) - min(sizes) <= 2 * max(u.n_bytes for u in plan.units())


@pytest.mark.parametrize(("text", "expected"), [("1/1", (1, 1)), ("3/8", (3, 8)), ("99999/99999", (99999, 99999))])
def test_numbers_of_parts(text, expected):
    assert parse_part(text) == expected


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "-1/3", "1/0", "1/100000", "1/3/5", "a/b", " 1/3", "1/3\n",
                                  "\u0661/\u0663"])
def test_numbers_that_are_none(text):
    with pytest.raises(UsageError, match=r"expected I/N with 1 <= I <= N <= 99999"):
        parse_part(text)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_parts_put_together_are_one_run(plan, whole, tmp_path, n):
    out = tmp_path / "out.gguf"
    for i in reversed(range(1, n + 1)):
        path, existed = convert_part(plan, out, i, n, run=RunOptions(threads=1 + i % 3))
        assert (path, existed) == (part_path(out, i, n), False)
    done = assemble(out, run=RunOptions(threads=2))
    assert out.read_bytes() == whole
    assert len(done.parts) == n
    assert (done.path, done.n_bytes, done.leftovers, done.zeroed) == (out, len(whole), (), {})
    assert files(out) == {"out.gguf"} | {p.name for p in done.parts}


def test_more_parts_than_units(make_checkpoint, tmp_path):
    """Some parts are empty then, and are needed all the same."""
    plan = dt.plan(dt.open_checkpoint(make_checkpoint(layers=1, experts=2)))
    out = tmp_path / "out.gguf"
    n = plan.n_units + 3
    for i in range(1, n + 1):
        convert_part(plan, out, i, n)
    assert min(len(read_part(part_path(out, i, n)).units) for i in range(1, n + 1)) == 0
    assemble(out)
    dt.convert(plan, tmp_path / "whole.gguf")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    part_path(out, n, n).unlink()
    out.unlink()
    with pytest.raises(UsageError, match=rf"lacks 1 of {n} parts"):
        assemble(out)


def test_the_commands(source, whole, tmp_path, dsv4tools):
    out = tmp_path / "out.gguf"
    for i in (2, 1):
        ended = dsv4tools("convert", source, out, "--part", f"{i}/2")
        assert ended.code == 0
        assert f"wrote {part_path(out, i, 2)}: " in ended.out
        assert f"next, when all parts are there: dsv4tools assemble {out}\n" in ended.out
    again = dsv4tools("convert", source, out, "--part", "1/2", "--json").data
    assert (again["part"], again["existed"]) == (str(part_path(out, 1, 2)), True)
    ended = dsv4tools("assemble", out, "--manifest", tmp_path / "m")
    assert (ended.code, ended.err) == (0, "")
    assert f"the parts are no longer needed: rm {part_path(out, 1, 2)} {part_path(out, 2, 2)}\n" in ended.out
    assert out.read_bytes() == whole
    assert "is for a whole file" in dsv4tools("convert", source, out, "--part", "1/2", "--manifest", "x").failed(2)
    assert "expected I/N" in dsv4tools("convert", source, out, "--part", "3/2").failed(2)
    assert "exists; --overwrite" in dsv4tools("assemble", out).failed(2)
    assert "exists; --overwrite" in dsv4tools("convert", source, out, "--part", "1/2").failed(2)
    assert dsv4tools("assemble", out, "--overwrite", "--json").data["parts"] == [
        str(part_path(out, i, 2)) for i in (1, 2)]
    assert dsv4tools("verify", out, "--source", source).code == 0


def test_the_manifest_is_that_of_one_run(plan, out, tmp_path):
    assemble(out, manifest=tmp_path / "one")
    other = tmp_path / "out.gguf"
    dt.convert(plan, other, manifest=tmp_path / "other")
    assert (tmp_path / "one").read_text() == (tmp_path / "other").read_text()
    out.unlink()
    with pytest.raises(UsageError, match="one: exists"):
        assemble(out, manifest=tmp_path / "one")


def test_zeroed_values_are_told_by_tensor(make_checkpoint, tmp_path):
    source = make_checkpoint()
    write_tensor(source, "layers.1.ffn.experts.1.w1.scale", b"\xff", at=42)
    write_tensor(source, "head.weight", b"\xc0\x7f", at=2)
    plan = dt.plan(dt.open_checkpoint(source), nan="zero")
    for i in (1, 2, 3, 4):
        convert_part(plan, tmp_path / "out.gguf", i, 4)
    done = assemble(tmp_path / "out.gguf")
    assert done.zeroed == {"blk.1.ffn_gate_exps.weight": 32, "output.weight": 1}


# -------------------------------------------------------------------------------------------------- twice, and at once


def test_a_part_run_twice_is_left_as_it_is(plan, out):
    path = part_path(out, 2, 3)
    before = path.stat()
    seen = []
    assert convert_part(plan, out, 2, 3, run=RunOptions(progress=seen.append)) == (path, True)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sum(seen) == sum(u.n_bytes for u in part_units(plan, 2, 3))
    assert convert_part(plan, out, 2, 3, overwrite=True) == (path, False)
    assert path.stat().st_ino != before.st_ino


def test_two_machines_write_one_part_at_once(plan, whole, tmp_path, monkeypatch):
    """Each has working files of its own; the last one gives its bytes the name, which are those of the first."""
    out, names, met = tmp_path / "out.gguf", threading.local(), threading.Barrier(2, timeout=ROOM_SECONDS)
    monkeypatch.setattr(socket, "gethostname", lambda: names.host)
    real = output_module.OutputFile.complete

    def complete(self, *arguments):
        met.wait()
        assert len(list(tmp_path.glob("*.partial"))) == 2
        met.wait()
        real(self, *arguments)

    monkeypatch.setattr(output_module.OutputFile, "complete", complete)
    ended = []

    def work(host):
        names.host = host
        ended.append(convert_part(plan, out, 1, 1, run=RunOptions(threads=1)))

    machines = [threading.Thread(target=work, args=(host,)) for host in ("node-1", "node-2")]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert ended == [(part_path(out, 1, 1), False)] * 2
    assert files(out) == {"out.gguf.part-00001-of-00001"}
    monkeypatch.undo()
    assemble(out)
    assert out.read_bytes() == whole


def stop_part(plan, out, part, parts, monkeypatch, units=5) -> None:
    stop, written = StopRequest(), []
    real = output_module.OutputFile.write

    def write(self, *arguments):
        written.append(arguments)
        if len(written) == units:
            stop.request(signal.SIGTERM)
        return real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(output_module.OutputFile, "write", write)
        with pytest.raises(Interrupted):
            convert_part(plan, out, part, parts, run=RunOptions(threads=1, stop=stop))


def test_a_stopped_part_is_gone_on_with_on_its_host_only(plan, whole, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    host = socket.gethostname()
    stop_part(plan, out, 1, 2, monkeypatch)
    assert files(out) == {f"out.gguf.part-00001-of-00002.{host}.{end}" for end in ("partial", "journal")}
    finished = len(read_journal(next(tmp_path.glob("*.journal"))).units)
    with monkeypatch.context() as patched:
        patched.setattr(socket, "gethostname", lambda: "another")
        notes = []
        convert_part(plan, out, 1, 2, run=RunOptions(notify=notes.append))
        assert notes == []
    assert f"out.gguf.part-00001-of-00002.{host}.partial" in files(out)
    convert_part(plan, out, 2, 2)
    done = assemble(out)
    assert {p.name for p in done.leftovers} == {
        f"out.gguf.part-00001-of-00002.{host}.{end}" for end in ("partial", "journal")}
    out.unlink()
    # The first host comes back: its part is there, so what it had is of no use.
    assert convert_part(plan, out, 1, 2)[1] is True
    assert files(out) == {part_path(out, i, 2).name for i in (1, 2)}
    part_path(out, 1, 2).unlink()
    stop_part(plan, out, 1, 2, monkeypatch)
    notes = []
    convert_part(plan, out, 1, 2, run=RunOptions(notify=notes.append))
    assert notes[0].startswith("continuing ")
    assert finished > 4
    assemble(out)
    assert out.read_bytes() == whole


def test_what_a_stopped_part_holds_counts_as_free_space(plan, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    stop_part(plan, out, 1, 1, monkeypatch)
    held = next(tmp_path.glob("*.partial")).stat().st_blocks * 512
    monkeypatch.setattr("dsv4tools.outfile.free_bytes", lambda path: 2 << 20)
    assert held > 2 << 20
    assert convert_part(plan, out, 1, 1)[1] is False


# --------------------------------------------------------------------------------------------------- missing and mixed


def test_missing_parts_are_all_named(out, dsv4tools):
    part_path(out, 1, 3).unlink()
    part_path(out, 3, 3).unlink()
    message = dsv4tools("assemble", out).failed(2)
    assert "lacks 2 of 3 parts: out.gguf.part-00001-of-00003, out.gguf.part-00003-of-00003; run dsv4tools" in message
    part_path(out, 2, 3).unlink()
    assert "has no parts here; write them with dsv4tools convert --part I/N" in dsv4tools("assemble", out).failed(2)


def test_parts_of_two_divisions_are_refused(plan, out, dsv4tools):
    convert_part(plan, out, 1, 2)
    assert "has parts of 2 and of 3; remove the wrong ones" in dsv4tools("assemble", out).failed(2)


def test_parts_of_two_plans_are_refused_field_by_field(source, out, dsv4tools):
    other = dt.plan(dt.open_checkpoint(source), policy="q8")
    with pytest.raises(UsageError, match=r"part-00002-of-00003: is a part of another conversion: .*policy is q8 \("):
        convert_part(other, out, 2, 3)
    convert_part(other, out, 2, 3, overwrite=True)
    message = dsv4tools("assemble", out).failed(2)
    assert "part-00002-of-00003: is a part of another conversion: " in message
    assert "policy is q8 (" in message
    assert "was q4k (" in message
    assert not out.exists()


def test_a_part_under_anothers_name_is_refused(out):
    first, second = part_path(out, 1, 3), part_path(out, 2, 3)
    shutil.copy(first, second)
    with pytest.raises(VerifyError, match=r"part-00002-of-00003: is part 1 of 3 by its content; give it back its name"):
        assemble(out)


def test_a_conversion_in_one_run_and_an_assembly_do_not_mix(plan, out, whole, monkeypatch):
    stop = StopRequest()
    real = output_module.OutputFile.write

    def write(self, *arguments):
        stop.request(signal.SIGINT)
        return real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(output_module.OutputFile, "write", write)
        with pytest.raises(Interrupted):
            dt.convert(plan, out, run=RunOptions(stop=stop))
    with pytest.raises(UsageError, match=r"assembled from is 3 parts, was absent; .*--restart to begin anew"):
        assemble(out)
    dt.convert(plan, out)
    assert out.read_bytes() == whole


# -------------------------------------------------------------------------------------------------------------- damage


def test_every_damaged_byte_of_a_part_is_noticed(out):
    path = part_path(out, 2, 3)
    raw = path.read_bytes()
    part = read_part(path)
    first = part.units[0].start
    n_head = module._LENGTHS.size + len(part.header) + len(part.units) * module._ENTRY.size
    places = [0, 9, 12, 17, 25, 33, 47, *range(48, n_head, 997), *range(first, len(raw), len(raw) // 20)]
    for at in places:
        flip(path, at)
        with pytest.raises(VerifyError, match=r"run dsv4tools convert --part 2/3 again"):
            assemble(out, run=RunOptions(restart=True))
        assert not out.exists()
        flip(path, at)
    assert path.read_bytes() == raw


@pytest.mark.parametrize("at", [20, 5000, -1])
def test_a_damaged_part_is_named_and_running_it_again_mends_it(plan, source, out, whole, at, dsv4tools):
    path = part_path(out, 2, 3)
    flip(path, at if at > 0 else path.stat().st_size + at)
    message = dsv4tools("assemble", out).failed(5)
    assert message.startswith(f"error: {path}: ")
    assert "run dsv4tools convert --part 2/3 again" in message
    ended = dsv4tools("convert", source, out, "--part", "2/3")
    assert ended.code == 0
    assert "it is written again" in ended.err
    assert dsv4tools("assemble", out).code == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize("n_bytes", [0, 10, 47, 48, 1000, 20_000, -1])
def test_a_truncated_or_extended_part_is_noticed(out, n_bytes):
    path = part_path(out, 3, 3)
    raw = path.read_bytes()
    path.write_bytes(raw + b"x" if n_bytes == -1 else raw[:n_bytes])
    with pytest.raises(VerifyError, match=r"run dsv4tools convert --part 3/3 again"):
        assemble(out)


def test_what_is_no_part(out):
    path = part_path(out, 1, 3)
    path.write_bytes(b"GGUF" + bytes(1000))
    with pytest.raises(VerifyError, match="is no part file of this version"):
        assemble(out)
    path.write_bytes(module._LENGTHS.pack(b"DSV4PART", 2, 2, 0, 0, xxhash.xxh3_128_digest(b"{}")) + b"{}" + bytes(5000))
    with pytest.raises(VerifyError, match="is no part file of this version"):
        assemble(out)
    path.unlink()
    path.mkdir()
    with pytest.raises(dt.InputError, match="is a directory, expected a file"):
        assemble(out)


@pytest.mark.parametrize("head", [b"", b"[]", b"7", b"{}", b'{"identity": 3, "part": 1}', b"{" * 50, b"\xff"])
def test_a_head_that_is_not_ours_is_refused_whatever_it_says(out, head):
    path = part_path(out, 1, 3)
    raw = module._LENGTHS.pack(b"DSV4PART", 1, len(head), 0, 0, xxhash.xxh3_128_digest(head)) + head
    path.write_bytes(raw + bytes(4096 - len(raw)))
    with pytest.raises(VerifyError, match="does not describe itself as a part does"):
        assemble(out)


def test_a_head_that_claims_more_than_the_file_has_takes_no_memory(out):
    path = part_path(out, 1, 3)
    for counts in ((2**32 - 1, 0, 0), (0, 2**63, 0), (0, 0, 2**59)):
        path.write_bytes(module._LENGTHS.pack(b"DSV4PART", 1, *counts, bytes(16)) + bytes(100))
        with pytest.raises(VerifyError, match="is no part file of this version"):
            assemble(out)


@pytest.mark.parametrize("position", [0, 100, 2**63])
def test_units_outside_their_place_are_refused(out, position):
    path = part_path(out, 2, 3)
    raw = bytearray(path.read_bytes())
    _, _, n_json, n_header, _, _ = module._LENGTHS.unpack(raw[:module._LENGTHS.size])
    at = module._LENGTHS.size + n_json + n_header
    raw[at:at + 8] = position.to_bytes(8, "little")
    path.write_bytes(raw)
    seal(path)
    with pytest.raises(VerifyError, match=r"where another one lies|parts reach to byte"):
        assemble(out)
    assert not out.exists()


def test_a_wrong_number_of_units_is_refused(out):
    for i in (1, 2, 3):
        path = part_path(out, i, 3)
        raw = path.read_bytes()
        n_json = module._LENGTHS.unpack(raw[:module._LENGTHS.size])[2]
        start = module._LENGTHS.size
        about = json.loads(raw[start:start + n_json]) | {"n_units": 200}
        text = json.dumps(about, sort_keys=True).encode()
        assert len(text) == n_json
        path.write_bytes(raw[:start] + text + raw[start + n_json:])
        seal(path)
    with pytest.raises(VerifyError, match="parts hold 119 units, expected 200"):
        assemble(out)


def test_a_part_that_shrinks_while_it_is_read(out, monkeypatch):
    path = part_path(out, 2, 3)
    real = module.read_unit

    def read(unit):
        if unit.path == path:
            with path.open("r+b") as file:
                file.truncate(unit.start + 10)
        return real(unit)

    monkeypatch.setattr(module, "read_unit", read)
    with pytest.raises(VerifyError, match=r"is damaged between bytes .*; run dsv4tools convert --part 2/3 again"):
        assemble(out, run=RunOptions(threads=1))
    assert not out.exists()


def test_a_part_that_vanishes_while_it_is_read(out, monkeypatch):
    real = module.read_unit

    def read(unit):
        unit.path.unlink(missing_ok=True)
        return real(unit)

    monkeypatch.setattr(module, "read_unit", read)
    with pytest.raises(ResourceError, match=r"read failed at byte .*No such file"):
        assemble(out)


# --------------------------------------------------------------------------------------------------------- interrupted


def test_an_assembly_goes_on_where_it_was(out, whole, monkeypatch):
    stop, written = StopRequest(), []
    real = output_module.OutputFile.write

    def write(self, *arguments):
        written.append(arguments)
        if len(written) == 50:
            stop.request(signal.SIGINT)
        return real(self, *arguments)

    monkeypatch.setattr(output_module.OutputFile, "write", write)
    with pytest.raises(Interrupted, match="run the same command again to continue"):
        assemble(out, run=RunOptions(threads=1, stop=stop))
    assert not out.exists()
    finished = len(read_journal(out.with_name("out.gguf.journal")).units)
    written.clear()
    notes, progress = [], []
    assemble(out, run=RunOptions(notify=notes.append, progress=progress.append))
    assert len(written) == 119 - finished
    assert notes == [f"continuing {out}.partial: {finished} units done, {notes[0].split()[-1]}"]
    assert sum(progress) == sum(u.n_bytes for part in find_parts(out) for u in part.units)
    assert out.read_bytes() == whole


def test_an_assembly_killed_behind_the_rename_is_known_to_be_complete(out, whole, tmp_path, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_manifest", die)
        with pytest.raises(KeyboardInterrupt):
            assemble(out, manifest=tmp_path / "m")
    assert {"out.gguf", "out.gguf.journal"} < files(out)
    notes = []
    assemble(out, manifest=tmp_path / "m", run=RunOptions(notify=notes.append))
    assert notes == [f"{out} was complete already"]
    assert out.read_bytes() == whole
    assert "out.gguf.journal" not in files(out)
    assert (tmp_path / "m").exists()


def test_inputs_are_never_written_over(plan, out):
    shard = next(iter(plan.checkpoint.shards.values())).path
    path = part_path(out, 1, 3)
    path.unlink()
    path.hardlink_to(shard)
    with pytest.raises(UsageError, match=r"part-00001-of-00003: is one of the inputs"):
        convert_part(plan, out, 1, 3, overwrite=True)
    with pytest.raises(VerifyError, match="is no part file"):
        assemble(out)


def test_an_assembly_over_one_of_its_parts_is_refused(out):
    out.hardlink_to(part_path(out, 2, 3))
    with pytest.raises(UsageError, match=r"out\.gguf: is one of the inputs"):
        assemble(out, overwrite=True)


def test_names_that_look_like_globs(plan, whole, tmp_path):
    out = tmp_path / "o[1]*?.gguf"
    for i in (1, 2):
        convert_part(plan, out, i, 2)
    (tmp_path / "o1xx.gguf.part-00001-of-00009").write_text("another")
    assemble(out)
    assert out.read_bytes() == whole
