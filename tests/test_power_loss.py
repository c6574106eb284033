"""Power cuts at every step of a run, with anything between nothing and all of what was not synced on disk."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
from power_cut import Recorder, state_after_cut
from small_output import HEADER, SmallOutput

from dsv4tools import output
from dsv4tools.errors import UsageError
from dsv4tools.journal import read_journal

CHANCES = 3      # different states for each moment


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(output, "BATCH_BYTES", 150)         # two units
    # The order in which things reach the disk must suffice: no second look at what the journal says is finished.
    monkeypatch.setattr(output.OutputFile, "_doubtful", lambda self, units: [])


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Events of a work done to a directory."""

    def record(work) -> tuple[SmallOutput, list]:
        directory = tmp_path / "recorded"
        directory.mkdir()
        small = SmallOutput(directory / "out.gguf")
        recorder = Recorder(directory)
        with monkeypatch.context() as patched:
            recorder.start(patched)
            work(small)
        assert small.path.read_bytes() == small.expected()
        return small, recorder.events

    return record


def stop_twice(small) -> None:
    small.leave(3)
    small.leave(2)
    small.convert()


def old_plan(small) -> SmallOutput:
    return SmallOutput(small.path, identity={"tool": "1", "policy": "old"}, contents={"a": 8, "b": 9})


def restart(small) -> None:
    old_plan(small).leave(7)
    small.convert(restart=True)


def change_a_shard(small) -> None:
    SmallOutput(small.path, contents={"a": 8, "b": 2}).leave(7)
    small.states["a"] = [99, 1]
    small.convert()


def test_the_record_is_complete(record):
    """With nothing lost, what is played back is what is there."""
    small, events = record(stop_twice)
    after = state_after_cut([*events, ("names",)], random.Random(0))
    assert {name: content for name, (_, content) in after.items()} == {"out.gguf": small.expected()}


@pytest.mark.parametrize("work", [stop_twice, restart, change_a_shard])
def test_a_power_cut_at_any_step_costs_no_byte(work, record, tmp_path, monkeypatch):
    """Whatever is left, the next run ends with the right bytes; units of another plan never get into the file."""
    small, events = record(work)
    kept = []
    for n in range(len(events) + 1):
        for chance in range(CHANCES):
            state = state_after_cut(events[:n], random.Random(f"{n} {chance}"))
            kept.append(go_on(small, state, tmp_path / f"cut-{n}-{chance}", monkeypatch))
            assert n < len(events) or "out.gguf" in state, "a run that has ended well lost its result"
    assert sum(kept) > len(kept), "nothing was ever gone on with"


def go_on(small, state, directory, monkeypatch) -> int:
    """Convert in a directory in such a state; how many units were there already."""
    directory.mkdir()
    for name, (_, content) in state.items():
        (directory / name).write_bytes(content)
    after = replace(small, path=directory / "out.gguf")
    if after.path.exists():
        assert after.path.read_bytes() == small.expected()
        after.path.unlink()
    if after.partial.exists() and (partial := after.partial.read_bytes()).startswith(HEADER[:8]):
        assert partial[len(HEADER):] == small.expected()[len(HEADER):], "looks complete"
    with monkeypatch.context() as patched:
        for name in ("fsync", "fdatasync"):
            patched.setattr(os, name, lambda fd: None)     # nothing is cut any more, and they take their time
        patched.setattr(output, "read_journal", lambda path: with_inodes_of(state, read_journal(path), directory))
        try:
            after.convert()
        except UsageError:
            if directory.name.endswith("0"):
                after.convert(restart=True)
            else:
                after = old_plan(after)
                after.convert()
    assert after.path.read_bytes() == after.expected()
    assert after.files() == ["out.gguf"]
    return 8 - len(after.written)


def with_inodes_of(state, journal, directory):
    """A journal that knows the file by its new inode, if it knew it by its old one."""
    for name, (inode, _) in state.items():
        if inode == journal.inode and (directory / name).exists():
            journal.inode = (directory / name).stat().st_ino
            break
    return journal
