"""`convert --split-max-size`: sets as gguf-split makes them, complete or not there, whatever interrupts the work."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import SMALL
from gguf_edit import Edit
from test_output import vanish
from test_reroute_gguf import rewrite
from test_resume import interrupt, resume

import dsv4tools as dt
from dsv4tools import working
from dsv4tools.errors import Dsv4Error, InputError, UsageError
from dsv4tools.gguf.splits import open_split
from dsv4tools.gguf.values import KV
from dsv4tools.options import RunOptions
from dsv4tools.sizes import parse_bytes
from dsv4tools.split_plan import output_paths, split_plan
from dsv4tools.template_file import write_template

MAX = 2_500_000
NAMES = ["out-00001-of-00003.gguf", "out-00002-of-00003.gguf", "out-00003-of-00003.gguf"]


@pytest.fixture(scope="module")
def made(_written, tmp_path_factory):
    """A small checkpoint, its GGUF, and the same as a set of three. Not to be changed."""
    source = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    directory = tmp_path_factory.mktemp("whole")
    dt.convert(dt.plan(dt.open_source(source)), directory / "whole.gguf")
    done = dt.convert(plan(source), directory / "out.gguf")
    assert [path.name for path in done.paths] == NAMES
    return source, directory


def plan(source, size=MAX, **options):
    return split_plan(dt.plan(dt.open_source(source), **options), size)


def read(path):
    """Tensors and entries of a file as gguf-py sees them."""
    reader = gguf.GGUFReader(path)
    entries = {k: (f.types, f.contents()) for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return {t.name: (t.tensor_type.name, list(t.shape), t.data.tobytes()) for t in reader.tensors}, entries


def contents(directory, names=NAMES):
    return [(directory / name).read_bytes() for name in names]


# ------------------------------------------------------------------------------------------------------ what is written


def test_a_set_is_what_gguf_split_makes(made):
    """Each part read by gguf-py: tensors whole and in order, metadata in the first part, three keys in each."""
    _, directory = made
    tensors, entries = read(directory / "whole.gguf")
    found = {}
    for i, name in enumerate(NAMES):
        mine, said = read(directory / name)
        assert (directory / name).stat().st_size <= MAX
        assert said.pop("split.no") == ([gguf.GGUFValueType.UINT16], i)
        assert said.pop("split.count") == ([gguf.GGUFValueType.UINT16], 3)
        assert said.pop("split.tensors.count") == ([gguf.GGUFValueType.INT32], len(tensors))
        assert said == (entries if i == 0 else {})
        assert not set(mine) & set(found)
        found |= mine
    assert list(found) == list(tensors)
    assert found == tensors


def test_a_part_is_as_full_as_the_order_allows(made):
    """The first tensor of the next part would not have fitted."""
    source, directory = made
    cut = plan(source)
    for file, following in zip(cut.files, cut.files[1:], strict=False):
        assert file.n_bytes + following.tensors[0].n_bytes > MAX
    assert [file.n_bytes for file in cut.files] == [(directory / name).stat().st_size for name in NAMES]
    assert cut.total_bytes == sum(file.n_bytes for file in cut.files)


def test_splitting_and_merging_give_the_same_file(made, tmp_path):
    _, directory = made
    dt.convert(dt.plan(dt.open_source(directory / NAMES[1]), policy="keep"), tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == (directory / "whole.gguf").read_bytes()
    dt.convert(plan(tmp_path / "merged.gguf", policy="keep"), tmp_path / "out.gguf")
    assert contents(tmp_path) == contents(directory)
    # Cut in another way: the new set has other names, its prefix is that of the old one.
    again = dt.convert(plan(directory / NAMES[0], 4_000_000, policy="keep"), tmp_path / NAMES[2])
    assert [p.name for p in again.paths] == ["out-00001-of-00002.gguf", "out-00002-of-00002.gguf"]
    assert dt.diff(again.path, directory / "whole.gguf").same


def test_threads_do_not_matter(made, tmp_path):
    source, directory = made
    dt.convert(plan(source), tmp_path / "out.gguf", threads=1)
    assert contents(tmp_path) == contents(directory)


def test_another_alignment(made, tmp_path):
    """It is stated in the first part only, so it can hold there only."""
    _, directory = made
    path = tmp_path / "in.gguf"
    path.write_bytes((directory / "whole.gguf").read_bytes())
    rewrite(path, alignment=256, kvs=lambda kvs: kvs | {"general.alignment": KV("general.alignment", "u32", 256)})
    cut = plan(path, policy="keep")
    dt.convert(cut, tmp_path / "out.gguf")
    parts = open_split(tmp_path / NAMES[0])
    assert [part.alignment for part in parts] == [256, 32, 32]
    tensors, _ = read(path)
    found = {name: t for part in NAMES for name, t in read(tmp_path / part)[0].items()}
    assert found == tensors
    assert dt.verify(tmp_path / NAMES[0], source=path).ok
    dt.convert(dt.plan(dt.open_source(tmp_path / NAMES[0]), policy="keep"), tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == path.read_bytes()


def test_what_fits_one_file_stays_one_file(made, tmp_path):
    source, directory = made
    done = dt.convert(plan(source, 1 << 40), tmp_path / "out.gguf")
    assert done.paths == (tmp_path / "out.gguf",)
    assert (tmp_path / "out.gguf").read_bytes() == (directory / "whole.gguf").read_bytes()


def test_the_command_line(made, tmp_path, dsv4tools):
    source, directory = made
    out, manifest = tmp_path / "out.gguf", tmp_path / "m.sha256"
    ended = dsv4tools("convert", source, out, "--split-max-size", "2.5M", "--dry-run", "--json")
    assert [Path(f["path"]).name for f in ended.data["files"]] == NAMES
    assert [f["n_bytes"] for f in ended.data["files"]] == [len(raw) for raw in contents(directory)]
    assert {t["part"] for t in ended.data["tensors"]} == {0, 1, 2}
    text = dsv4tools("convert", source, out, "--split-max-size", "2.5M", "--dry-run").out
    assert f"  {NAMES[2]} " in text
    assert list(tmp_path.iterdir()) == []
    ended = dsv4tools("convert", source, out, "--split-max-size", "2500k", "--manifest", manifest)
    assert ended.code == 0, ended
    assert f"wrote {tmp_path / NAMES[0]} and 2 more parts: 92 tensors, " in ended.out
    assert contents(tmp_path) == contents(directory)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.sha256", *NAMES]
    for part in NAMES:
        ended = dsv4tools("verify", tmp_path / part, "--source", source, "--manifest", manifest, "--engine", "none")
        assert ended.succeeded, ended
        assert f"manifest {manifest}: {92 + 2 * 3} of {92 + 2 * 3} hashes agree (sha256)" in ended.out
    ended = dsv4tools("convert", source, out, "--split-max-size", "2.5M")
    assert f"{out.with_name(NAMES[0])}: exists" in ended.failed(2)


@pytest.mark.parametrize(("text", "message"), [
    ("0", "is 0 bytes, expected 1 to 9223372036854775807"),
    ("1", "is 1 bytes, the metadata and tensor 'token_embd.weight' alone take "),
    ("300k", "tensor 'blk.1.indexer.attn_q_b.weight' alone takes 1.05 MB "),
    ("99999999999999999999G", "expected 1 to 9223372036854775807"),
    ("-1", "is '-1', expected a size such as 40G"), ("40X", "is '40X', expected a size"), ("", "expected a size"),
    ("1.5", "is '1.5', expected a size"), ("9" * 30, "expected a size"), ("٤G", "expected a size"),
])
def test_sizes_that_are_none(made, tmp_path, dsv4tools, text, message):
    source, _ = made
    said = dsv4tools("convert", source, tmp_path / "out.gguf", f"--split-max-size={text}").failed(2)
    assert said.startswith("error: --split-max-size: ")
    assert message in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "n"), [("40G", 40_000_000_000), ("500m", 500_000_000), ("7", 7), ("7B", 7),
                                         ("2K", 2000), ("1.5T", 1_500_000_000_000), ("32GiB", 32 << 30),
                                         ("3 MB", 3_000_000), ("0.5Ki", 512), ("1.9999k", 1999)])
def test_sizes(text, n):
    assert parse_bytes(text, "x") == n


def test_what_does_not_go_together(made, tmp_path, dsv4tools):
    source, directory = made
    out = tmp_path / "out.gguf"
    said = dsv4tools("convert", source, out, "--split-max-size", "2.5M", "--part", "1/2").failed(2)
    assert "--part: is for an output of one file; assemble it, then split it: dsv4tools convert OUT.gguf" in said
    with pytest.raises(UsageError, match="would be the template of 3 files"):
        write_template(plan(source), out)
    with pytest.raises(UsageError, match="is one of the inputs"):
        dt.convert(plan(directory / NAMES[0], policy="keep"), directory / "out.gguf", overwrite=True)
    with pytest.raises(UsageError, match="is the output itself"):
        dt.convert(plan(source), out, manifest=tmp_path / f"{NAMES[1]}.partial")
    assert list(tmp_path.iterdir()) == []


def test_ds4_is_asked_before(flash_plan):
    cut = split_plan(flash_plan, 40_000_000_000)
    assert len(cut.files) == 5
    assert max(file.n_bytes for file in cut.files) <= 40_000_000_000
    with pytest.raises(InputError, match=r"split.count: ds4 would refuse the file: 5, expected a single file"):
        dt.engines.check_plan(cut, ["ds4"])
    assert next(v for v in dt.engines.check_plan(cut) if v.engine == "llama.cpp").ok
    assert [p.name for p in output_paths(cut, Path("flash.gguf"))][4] == "flash-00005-of-00005.gguf"


# -------------------------------------------------------------------------------------------------------- interruptions


def test_a_set_goes_on_where_it_was(made, tmp_path):
    source, directory = made
    done = interrupt(plan(source), tmp_path / "out.gguf", journal=f"{NAMES[0]}.journal")
    assert {p.name for p in tmp_path.iterdir()} == {f"{NAMES[0]}.journal", *(f"{name}.partial" for name in NAMES)}
    assert all(not (tmp_path / f"{name}.partial").read_bytes()[:8].strip(b"\0") for name in NAMES)
    n, notes = resume(plan(source), tmp_path / "out.gguf")
    assert n == plan(source).n_units - done
    assert any(note.startswith("continuing ") for note in notes)
    assert contents(tmp_path) == contents(directory)
    assert sorted(p.name for p in tmp_path.iterdir()) == NAMES


@pytest.mark.parametrize("damage", ["data", "cut", "gone", "exchanged"])
def test_a_damaged_partial_file_costs_its_units_only(made, tmp_path, damage):
    source, directory = made
    done = interrupt(plan(source), tmp_path / "out.gguf", units=110, journal=f"{NAMES[0]}.journal")
    path = tmp_path / f"{NAMES[1]}.partial"
    if damage == "data":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2 :] = bytes(len(raw) - len(raw) // 2)
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gone":
        path.unlink()
    else:
        raw = path.read_bytes()
        path.unlink()
        path.write_bytes(raw)
    n, notes = resume(plan(source), tmp_path / "out.gguf")
    assert contents(tmp_path) == contents(directory)
    rest = plan(source).n_units - done
    expected = {"data": range(rest + 1, rest + done), "exchanged": [rest]}.get(damage, [rest + done])
    assert n in expected, notes
    assert any("damaged" in note or "begin" in note or "replaced" in note for note in notes)


def test_another_size_is_another_conversion(made, tmp_path):
    """Of as many files: they would have the same names."""
    source, _ = made
    interrupt(plan(source), tmp_path / "out.gguf", journal=f"{NAMES[0]}.journal")
    with pytest.raises(UsageError, match=r"belongs to another conversion: files is \d+ \+ \d+ \+ \d+ bytes, was "):
        dt.convert(plan(source, 2_900_000), tmp_path / "out.gguf")
    assert len(plan(source, 2_900_000).files) == 3


class Killed(BaseException):
    """Nobody catches it."""


def die_at(monkeypatch, n):
    """Let the n-th change of names be the last thing that this process does; how many there were."""
    calls = []

    def counted(real):
        def call(path, *rest, **options):
            if path.suffix == ".partial" or path.name in NAMES:
                calls.append(path.name)
                if len(calls) == n:
                    raise Killed
            return real(path, *rest, **options)

        return call

    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(sys.modules["dsv4tools.output"].OutputFile, "_leave", vanish)
    return calls


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("old", [False, True])
def test_killed_while_files_get_their_names(made, tmp_path, monkeypatch, n, old):
    """Until the last of them has its name there is no first part, so nobody takes the set for whole."""
    source, directory = made
    out = tmp_path / "out.gguf"
    for name in NAMES if old else ():
        (tmp_path / name).write_bytes(b"what was there before")
    with monkeypatch.context() as patched:
        calls = die_at(patched, n)
        try:
            dt.convert(plan(source), out, overwrite=old)
        except Killed:
            assert len(calls) == n
        else:
            assert n == 5, calls   # one look that there is no first part, and a name for each
    held = {name: (tmp_path / name).read_bytes() for name in NAMES if (tmp_path / name).exists()}
    new = [name for name, raw in held.items() if raw in contents(directory)]
    if new and new != NAMES:
        assert NAMES[0] not in held, "a reader would find a first part"
        with pytest.raises(InputError, match=r"parts are missing|no such file"):
            open_split(tmp_path / new[0])
    notes = []
    dt.convert(plan(source), out, overwrite=old or new == NAMES, run=RunOptions(notify=notes.append))
    assert contents(tmp_path) == contents(directory)
    assert sorted(p.name for p in tmp_path.iterdir()) == NAMES


def test_killed_between_names_needs_no_overwrite(made, tmp_path, monkeypatch, dsv4tools):
    source, directory = made
    with monkeypatch.context() as patched:
        die_at(patched, 3)
        with pytest.raises(Killed):
            dt.convert(plan(source), tmp_path / "out.gguf")
    assert (tmp_path / NAMES[1]).exists()
    assert not (tmp_path / NAMES[0]).exists()
    ended = dsv4tools("convert", source, tmp_path / "out.gguf", "--split-max-size", MAX)
    assert ended.code == 0, ended
    assert "was complete already" in ended.err
    assert contents(tmp_path) == contents(directory)


def test_a_part_that_was_written_wrongly_gets_no_name(made, tmp_path, monkeypatch):
    source, _ = made
    real = working.WorkingFiles.write

    def corrupt(self, position, data):
        if len(self.finals) == 3 and position == plan(source).files[1].start:
            data = memoryview(bytes(data).replace(b"blk", b"bLk", 1))
        real(self, position, data)

    monkeypatch.setattr(working.WorkingFiles, "write", corrupt)
    with pytest.raises(Dsv4Error, match=rf"{NAMES[1]}\.partial: was written wrongly: it does not match its plan"):
        dt.convert(plan(source), tmp_path / "out.gguf")
    assert not any((tmp_path / name).exists() for name in NAMES)


# ------------------------------------------------------------------------------------------------------ reading of sets


def test_every_command_reads_a_set(made, tmp_path, dsv4tools):
    source, directory = made
    part, whole = directory / NAMES[1], directory / "whole.gguf"
    ended = dsv4tools("inspect", part, "--json")
    assert [Path(path).name for path in ended.data["files"]] == NAMES
    assert ended.data["n_tensors"] == 92
    assert "92 tensors, in 3 files" in dsv4tools("inspect", part).out
    assert dsv4tools("diff", part, whole).code == 0
    for path in (part, whole):
        assert dsv4tools("logits", path, "--tokens", "1,2,3", "--out", tmp_path / f"{path.stem}.npy").code == 0
        assert dsv4tools("reroute", path, tmp_path / f"{path.stem}.gguf", "--experts-per-token", "1").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / f"{part.stem}.npy"), np.load(tmp_path / "whole.npy"))
    assert (tmp_path / f"{part.stem}.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    ended = dsv4tools("compare", part, whole, "--text", "a b", "--json")
    assert ended.code == 0, ended
    assert dsv4tools("generate", part, "-p", "a", "-n", "2", "--temp", "0").code == 0
    ended = dsv4tools("convert", source, tmp_path / "t.gguf", "--template", part, "--policy", "template")
    assert ended.code == 0, ended
    assert read(tmp_path / "t.gguf")[0] == read(whole)[0]


def test_a_manifest_of_a_set_finds_damage(made, tmp_path, dsv4tools):
    source, directory = made
    manifest = tmp_path / "m"
    dt.convert(plan(source), tmp_path / "out.gguf", manifest=manifest)
    name = next(iter(read(tmp_path / NAMES[2])[0]))
    Edit(tmp_path / NAMES[2]).flip(name, 5, 1).write(tmp_path / NAMES[2])
    ended = dsv4tools("verify", tmp_path / NAMES[0], "--manifest", manifest, "--engine", "none")
    assert ended.code == 5
    assert f"error: {NAMES[2]}: {name}: has sha256 " in ended.out
    assert f"error: {NAMES[2]}: whole file: has sha256 " in ended.out
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(line for line in lines if NAMES[1] not in line))
    assert f"has no hashes of {NAMES[1]}, a part of the set" in dsv4tools(
        "verify", tmp_path / NAMES[0], "--manifest", manifest).failed(3)
    # The manifest of the model before it was split: its tensors are these.
    dt.convert(dt.plan(dt.open_source(directory / "whole.gguf"), policy="keep"), tmp_path / "w.gguf",
               manifest=tmp_path / "w.m")
    ended = dsv4tools("verify", directory / NAMES[0], "--manifest", tmp_path / "w.m", "--engine", "none")
    assert ended.code == 0, ended
