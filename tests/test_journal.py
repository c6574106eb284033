"""The journal: what is read back, what damage costs, and what it never gives."""

from __future__ import annotations

import errno
import json
import os
import resource
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4tools import journal
from dsv4tools.errors import ResourceError, UsageError
from dsv4tools.journal import FinishedUnit, JournalState, JournalWriter, check_same_plan, read_journal

IDENTITY = {"tool": "1", "policy": "q4k (12)", "output bytes": 1000}
SHARDS = {"a.safetensors": [123456789, 7], "b.safetensors": [5, 8]}


def unit(i: int, *, n_zeroed: int = 0) -> FinishedUnit:
    return FinishedUnit(64 + 10 * i, 10, f"{i:032x}", f"{i + 1:032x}", n_zeroed)


def write(path, n: int, **options) -> None:
    writer = JournalWriter(path, IDENTITY, SHARDS, 42, **options)
    writer.append(unit(i) for i in range(n))
    writer.close()


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "j"
    assert read_journal(path) == JournalState()
    write(path, 3, units=[unit(7, n_zeroed=2)])
    state = read_journal(path)
    assert (state.version, state.identity, state.shards, state.inode) == (journal.VERSION, IDENTITY, SHARDS, 42)
    assert list(state.units.values()) == [unit(7, n_zeroed=2), unit(0), unit(1), unit(2)]   # in the order of finishing
    assert list(state.units) == [u.position for u in state.units.values()]
    assert (state.complete, state.n_damaged) == (False, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["j"]


def test_a_unit_finished_twice_counts_once_and_as_last(tmp_path):
    writer = JournalWriter(tmp_path / "j", IDENTITY, SHARDS, 1, units=[unit(0), unit(1)])
    again = FinishedUnit(unit(0).position, 10, "f" * 32, "e" * 32)
    writer.append([again])
    writer.close()
    assert list(read_journal(tmp_path / "j").units.values()) == [unit(1), again]


def test_completion_is_read(tmp_path):
    writer = JournalWriter(tmp_path / "j", IDENTITY, SHARDS, 1)
    writer.mark_complete()
    writer.close()
    assert read_journal(tmp_path / "j").complete


def test_a_new_journal_replaces_the_old_one_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "j"
    write(path, 2)
    before = path.read_bytes()

    def fail(fd):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match=r"j: cannot be written: the disk is full; try harder"):
        JournalWriter(path, {}, {}, 1, hint="try harder")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["j"]


def test_every_torn_end_costs_the_torn_line_only(tmp_path):
    path = tmp_path / "j"
    write(path, 3)
    raw = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(raw) if byte == 10]
    for n in range(len(raw)):
        path.write_bytes(raw[:n])
        state = read_journal(path)
        whole = sum(end <= n for end in ends)
        assert list(state.units) == [unit(i).position for i in range(max(whole - 2, 0))]
        assert (state.identity is None) is (whole < 1)
        assert (state.shards == {}) is (whole < 2)
        assert state.n_damaged == (n not in {0, *ends})


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damage_never_gives_another_unit(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "j"
    write(path, 4)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
        if kind == "flip":
            raw[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del raw[at:at + data.draw(st.integers(1, 30))]
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=30))
        else:
            raw[at:at + 40] = bytes(len(raw[at:at + 40]))
        if not raw:
            break
    path.write_bytes(raw)
    state = read_journal(path)
    assert set(state.units.values()) <= {unit(i) for i in range(4)}
    assert state.identity in (None, IDENTITY)
    assert state.shards in ({}, SHARDS)


def signed(body: bytes) -> bytes:
    """A line with its right checksum, as only somebody who means it writes it."""
    return body + b" %08x\n" % zlib.crc32(body)


FORGED = {
    "empty": b"", "no JSON": b"{", "a list": b"[]", "a number": b"7", "null": b"null", "no entry": b"{}",
    "short unit": b'{"unit":[1,2]}', "long unit": b'{"unit":[1,2,"","",0,0]}', "unit of text": b'{"unit":"abcde"}',
    "negative": b'{"unit":[-1,2,"%s","%s",0]}' % (b"0" * 32, b"0" * 32),
    "float": b'{"unit":[1.0,2,"%s","%s",0]}' % (b"0" * 32, b"0" * 32),
    "bool": b'{"unit":[true,2,"%s","%s",0]}' % (b"0" * 32, b"0" * 32),
    "short checksum": b'{"unit":[1,2,"00","%s",0]}' % (b"0" * 32),
    "no hex": b'{"unit":[1,2,"%s","%s",0]}' % (b"x" * 32, b"0" * 32),
    "checksum of another kind": b'{"unit":[1,2,3,4,0]}',
    "identity of another kind": b'{"identity":7,"version":1}', "no version": b'{"identity":{}}',
    "version of another kind": b'{"identity":{},"version":{}}', "shards": b'{"shards":[],"inode":[]}',
    "deep": b'{"unit":' + b"[" * 100_000, "no text": b"\xff\xfe",
    "huge number": b'{"unit":[' + b"9" * 5000 + b',1,"","",0]}',
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_line_is_a_damaged_line(case, tmp_path):
    path = tmp_path / "j"
    write(path, 1)
    path.write_bytes(path.read_bytes() + signed(FORGED[case]) + journal._encode_unit(unit(1)))
    state = read_journal(path)
    assert list(state.units.values()) == [unit(0), unit(1)]
    assert (state.identity, state.shards, state.n_damaged) == (IDENTITY, SHARDS, 1)


def test_what_is_no_journal_at_all(tmp_path):
    (tmp_path / "zeros").write_bytes(bytes(30_000_000))    # no line end for 30 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_journal(tmp_path / "zeros").units == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000   # KiB
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "zeros")
    for name, said in (("directory", "Is a directory"), ("pipe", "is no regular file; remove it"), ("link", "cannot")):
        with pytest.raises(ResourceError, match=rf"{name}: .*{said}"):
            read_journal(tmp_path / name)


def test_a_new_journal_is_never_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "j.new").symlink_to(tmp_path / "precious")
    with pytest.raises(ResourceError, match=r"j\.new: cannot be written: it is a symbolic link"):
        write(tmp_path / "j", 1)
    (tmp_path / "j.new").unlink()
    (tmp_path / "j.new").hardlink_to(tmp_path / "precious")
    with pytest.raises(ResourceError, match=r"j\.new: has a second name as a hard link"):
        write(tmp_path / "j", 1)
    (tmp_path / "j.new").unlink()
    (tmp_path / "j").symlink_to(tmp_path / "precious")
    write(tmp_path / "j", 1)      # the link gives way, the file does not
    assert not (tmp_path / "j").is_symlink()
    assert (tmp_path / "precious").read_text() == "mine"


def test_short_writes_are_gone_on_with(tmp_path):
    writer = JournalWriter(tmp_path / "j", IDENTITY, SHARDS, 1)

    class Slow:
        def __init__(self, file):
            self.file, self.fileno, self.close = file, file.fileno, file.close

        def write(self, data):
            return self.file.write(data[:7])

    writer._file = Slow(writer._file)
    writer.append([unit(0), unit(1)])
    writer.close()
    assert len(read_journal(tmp_path / "j").units) == 2


def test_other_plans_are_refused_field_by_field(tmp_path):
    state = JournalState(journal.VERSION, dict(IDENTITY))
    check_same_plan(tmp_path, IDENTITY, state)
    now = {"tool": "2", "policy": "q4k (12)", "output bytes": 900, "nan": "zero"}
    with pytest.raises(UsageError) as caught:
        check_same_plan(tmp_path / "x.partial", now, state)
    assert str(caught.value).endswith(
        "x.partial: belongs to another conversion: nan is zero, was absent; output bytes is 900, was 1000; tool is 2, "
        "was 1; give the options of that one to continue it, or --restart to begin anew")
    check_same_plan(tmp_path, now, JournalState())      # nothing known: nothing will be used


def test_a_journal_of_another_version_is_refused(tmp_path):
    body = json.dumps({"version": 9, "identity": IDENTITY}).encode()
    (tmp_path / "j").write_bytes(signed(body) + signed(b'{"chapter":[1,2]}'))
    state = read_journal(tmp_path / "j")
    with pytest.raises(UsageError, match=r"journal version is 1, was 9; give"):
        check_same_plan(tmp_path, IDENTITY, state)


def test_the_journal_of_a_large_model_takes_a_second(tmp_path):
    """DeepSeek-V4-Pro has some 420,000 units, four times as many."""
    n = 105_000
    units = [unit(i) for i in range(n)]
    began = time.process_time()
    JournalWriter(tmp_path / "j", IDENTITY, SHARDS, 1, units=units).close()
    written = time.process_time()
    state = read_journal(tmp_path / "j")
    read = time.process_time()
    assert len(state.units) == n
    assert (tmp_path / "j").stat().st_size < n * journal.BYTES_PER_UNIT / 2
    assert written - began < 2
    assert read - written < 5
