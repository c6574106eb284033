"""A file under construction: what a later run goes on with, what it does again, and what nobody else may touch."""

from __future__ import annotations

import errno
import os
import shutil
import threading

import numpy as np
import pytest
import xxhash
from small_output import HEADER, SmallOutput

from dsv4tools import output as module
from dsv4tools import working
from dsv4tools.checksum import PIECE_BYTES, checksum
from dsv4tools.errors import Dsv4Error, InputError, Interrupted, ResourceError, UsageError, VerifyError
from dsv4tools.journal import JournalWriter, read_journal
from dsv4tools.output import discard_leftovers, was_completed, working_paths
from dsv4tools.workers import StopRequest


@pytest.fixture
def small(tmp_path):
    return SmallOutput(tmp_path / "out.gguf")


def flip(path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def fail_after(small, error, *units) -> None:
    """A run that fails once `units` are recorded."""
    with small.open() as output:
        small.put(output, *units)
        raise error


def whole(small) -> bool:
    return small.files() == ["out.gguf"] and small.path.read_bytes() == small.expected()


def test_one_run(small):
    small.convert()
    assert whole(small)
    assert (small.notes, small.progress) == ([], 0)


@pytest.mark.parametrize("units", range(1, 8))
def test_a_stopped_run_is_gone_on_with(small, units):
    small.leave(units)
    assert small.files() == ["out.gguf.journal", "out.gguf.partial"]
    assert small.partial.stat().st_size == small.n_bytes
    assert small.partial.read_bytes()[:8] == bytes(8)
    small.convert()
    assert whole(small)
    assert small.written == list(range(units, 8))
    percent = round(100 * units * 100 / small.n_bytes)
    assert small.notes == [f"continuing {small.partial}: {units} units done, {percent}%"]
    assert small.progress == 100 * units


def test_stopped_again_and_again_in_any_order(small):
    for i in (5, 0, 7, 2, 1, 6, 4):
        small.leave(1, order=[i, *range(8)])
        assert small.written == [i]
    small.convert()
    assert small.written == [3]
    assert whole(small)


def test_nothing_finished_leaves_nothing(small):
    small.leave(0)
    assert small.files() == []
    with pytest.raises(InputError):
        fail_after(small, InputError("x", "is wrong"))
    assert small.files() == []


def test_an_error_keeps_what_was_finished(small):
    with pytest.raises(InputError, match="is wrong"):
        fail_after(small, InputError("x", "is wrong"), 2)
    small.convert()
    assert small.written == [0, 1, 3, 4, 5, 6, 7]
    assert whole(small)


def test_what_was_written_but_not_recorded_is_done_again(small):
    def work():
        with small.open() as output:
            small.put(output, 0)
            output.write(small.position(1), small.data(1), small.source(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    small.convert()
    assert small.written == [1, 2, 3, 4, 5, 6, 7]
    assert whole(small)


# ------------------------------------------------------------------------------------------------- data before its line


class Trace:
    """What happens to the disk, in order; the calls go through."""

    def __init__(self, monkeypatch) -> None:
        self.events: list[tuple[str, object]] = []
        for name in ("pwrite_all", "sync_data"):
            self.spy(monkeypatch, working, name)
        self.spy(monkeypatch, JournalWriter, "append")
        self.spy(monkeypatch, JournalWriter, "mark_complete")

    def spy(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def call(first, *rest):
            arguments = [list(rest[0])] if name == "append" else list(rest)
            self.events.append((name, arguments))
            return real(first, *arguments)

        monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("batch_bytes", [1, 250, 10**9])
def test_data_is_synced_before_its_line(small, monkeypatch, batch_bytes):
    monkeypatch.setattr(module, "BATCH_BYTES", batch_bytes)
    trace = Trace(monkeypatch)
    small.convert()
    written, synced, listed, header = set(), set(), [], None
    for name, arguments in trace.events:
        if name == "pwrite_all":
            written.add(arguments[1])
            if arguments[1] == 0:
                header = len(listed)
        elif name == "sync_data":
            synced |= written
        elif name == "append":
            listed += [unit.position for unit in arguments[0]]
            assert set(listed) <= synced
    assert listed == [p for p, _ in small.extents()]
    assert header == 8, "the header is the last thing written"
    assert trace.events[-1][0] == "mark_complete"
    assert sum(name == "append" for name, _ in trace.events) == {1: 8, 250: 3, 10**9: 1}[batch_bytes]


def test_a_batch_ends_after_its_time(small, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    trace = Trace(monkeypatch)
    with small.open() as output:
        for i in range(8):
            small.put(output, i)
            now[0] += 0.7
        assert [len(a[0]) for name, a in trace.events if name == "append"] == [4, 3]
        output.flush()
        output.complete(HEADER, lambda path: None)
    assert whole(small)


def test_what_could_not_be_synced_is_never_listed(small, monkeypatch):
    """The system tells once that it has lost what it could not write; a second sync would find nothing wrong."""
    failures = [OSError(errno.EIO, "Input/output error")]
    real = working.sync_data

    def sync(fd):
        if failures:
            raise failures.pop()
        real(fd)

    monkeypatch.setattr(working, "sync_data", sync)
    with pytest.raises(ResourceError, match="Input/output error; run the same command again to continue"):
        small.convert()
    assert small.files() == []           # nothing was finished
    small.leave(3)
    failures.append(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(ResourceError):
        small.convert()
    assert len(read_journal(small.journal).units) == 3
    small.convert()
    assert small.written == [3, 4, 5, 6, 7]
    assert whole(small)


def test_a_full_disk_for_the_journal_costs_its_batch(small, monkeypatch):
    small.leave(2)
    real = JournalWriter._append

    def fail(self, data):
        self._file.write(data[: len(data) * 5 // 12])    # torn
        raise ResourceError(self._path, "cannot be written: the disk is full")

    monkeypatch.setattr(JournalWriter, "_append", fail)
    with pytest.raises(ResourceError, match=r"journal: cannot be written: the disk is full"):
        small.convert()
    monkeypatch.setattr(JournalWriter, "_append", real)
    state = read_journal(small.journal)
    assert state.n_damaged == 1
    small.convert()
    assert {3, 4, 5, 6, 7} <= set(small.written) | {u for u in range(8) if small.position(u) in state.units}
    assert small.notes[0] == "1 damaged journal lines: their units are done again"
    assert whole(small)


def test_writing_goes_on_after_a_passing_fault(small, monkeypatch):
    real, failures = os.pwrite, [errno.EIO, errno.ESTALE]

    def pwrite(fd, data, position):
        if position == small.position(3) and failures:
            raise OSError(failures.pop(), "passing")
        return real(fd, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    small.convert()
    assert whole(small)
    failures[:] = [errno.EIO] * 3
    small.path.unlink()
    with pytest.raises(ResourceError, match=r"out\.gguf\.partial: cannot be written: passing"):
        small.convert()
    assert read_journal(small.journal).units.keys() == {small.position(i) for i in range(3)}


# ------------------------------------------------------------------------------------------- damage between two runs


def test_a_damaged_unit_is_found_and_done_again(small):
    small.leave(6)
    flip(small.partial, small.position(2) + 50)
    small.convert()
    assert small.written == [2, 6, 7]
    assert small.notes[0] == "the last finished units are damaged: checking all"
    assert whole(small)


def test_only_the_last_units_are_looked_at_again(small, monkeypatch):
    """A partial file of 150 GB is not read through; bits that rot in it are not what a stop does."""
    monkeypatch.setattr(module, "RECHECKED_BYTES", 250)
    small.leave(6)
    flip(small.partial, small.position(1) + 50)
    looked, real = [], module.OutputFile._is_intact
    monkeypatch.setattr(module.OutputFile, "_is_intact", lambda self, u: looked.append(u.position) or real(self, u))
    small.leave(1)
    assert looked[:3] == [small.position(i) for i in (5, 4, 3)]
    assert small.written == [6]
    flip(small.partial, small.position(5) + 50)      # now one of the last
    small.convert()
    assert small.written == [1, 5, 7]
    assert whole(small)


def test_a_file_that_was_cut_and_extended_is_noticed(small, monkeypatch):
    monkeypatch.setattr(module, "RECHECKED_BYTES", 1)
    small.leave(5, order=[7, 6, 5, 4, 3, 2, 1, 0])      # the one finished last lies first
    os.truncate(small.partial, small.position(5))
    os.truncate(small.partial, small.n_bytes)
    small.convert()
    assert small.written == [0, 1, 2, 5, 6, 7]
    assert whole(small)


def test_a_replaced_file_is_checked_all_through(small, monkeypatch):
    monkeypatch.setattr(module, "RECHECKED_BYTES", 1)
    small.leave(6)
    copy = small.partial.with_name("copy")
    shutil.copyfile(small.partial, copy)
    flip(copy, small.position(1))
    copy.replace(small.partial)
    small.convert()
    assert small.notes[0] == "out.gguf.partial was replaced: checking all finished units"
    assert small.written == [1, 6, 7]
    assert whole(small)


@pytest.mark.parametrize("n_bytes", [0, 1, 500, 10_000])
def test_a_file_of_another_size_is_begun_anew(small, n_bytes):
    small.leave(6)
    os.truncate(small.partial, n_bytes)
    small.convert()
    assert small.notes == ["out.gguf.partial does not have its size: beginning anew"]
    assert small.written == list(range(8))
    assert whole(small)


def test_a_missing_partial_file_is_begun_anew(small):
    small.leave(6)
    small.partial.unlink()
    small.convert()
    assert small.written == list(range(8))
    assert whole(small)


def test_a_missing_journal_is_said(small):
    small.leave(6)
    small.journal.unlink()
    small.convert()
    assert small.notes == ["out.gguf.journal is missing or damaged: beginning anew"]
    assert whole(small)


def test_padding_and_header_are_cleared_whatever_stood_there(small):
    """No checksum covers what lies between the units."""
    small.leave(7)
    with small.partial.open("r+b") as file:
        for position, n_bytes in small.extents():
            file.seek(position + n_bytes)
            file.write(b"junk!")
        file.seek(0)
        file.write(b"junk" * 16)
    small.leave(0)
    assert small.partial.read_bytes()[:8] == bytes(8), "looks complete"
    small.convert()
    assert whole(small)


def test_units_of_another_length_are_done_again(small):
    small.leave(6)
    state = read_journal(small.journal)
    units = [u if i != 2 else type(u)(u.position, 40, u.output, u.source) for i, u in enumerate(state.units.values())]
    stray = type(units[0])(17, 100, units[0].output, units[0].source)
    JournalWriter(small.journal, small.identity, small.states, state.inode, units=[*units, stray]).close()
    small.convert()
    assert small.notes[0] == "2 finished units are none of this version's: done again"
    assert small.written == [2, 6, 7]
    assert whole(small)


@pytest.mark.parametrize("at", [10, 300, 500])
def test_a_damaged_journal_costs_units_not_bytes(small, at):
    small.leave(6)
    flip(small.journal, at)
    small.convert()
    assert whole(small)


# ------------------------------------------------------------------------------------------------- shards that changed


def test_a_touched_shard_is_asked_and_kept(small):
    small.leave(6)
    small.states["a"] = [11, 1]
    small.convert()
    assert small.notes[0] == "modification time or inode changed: a; checking their units"
    assert small.written == [6, 7]
    assert whole(small)
    assert small.files() == ["out.gguf"]


def test_the_units_of_a_changed_shard_are_done_again(small):
    small.leave(6)
    small.states["a"], small.contents["a"] = [11, 1], 9
    small.leave(1)
    assert small.written == [0]
    small.convert()           # the journal knows the new state: nothing is asked again
    assert small.notes[0].startswith("continuing")
    assert small.written == [1, 2, 3, 6, 7]
    assert whole(small)


@pytest.mark.parametrize("error", [ResourceError("a", "no"), VerifyError("a", "changed"), KeyboardInterrupt()])
def test_an_error_while_shards_are_asked_loses_nothing(small, monkeypatch, error):
    small.leave(6)
    small.states["a"] = [11, 1]

    def fail(self, unit, changed):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(SmallOutput, "recheck", fail)
        with pytest.raises(type(error)):
            small.convert()
    assert small.files() == ["out.gguf.journal", "out.gguf.partial"]
    small.convert()
    assert small.written == [6, 7]
    assert whole(small)


def test_an_error_while_units_are_looked_at_loses_nothing(small, monkeypatch):
    small.leave(6)

    def fail(*_):
        raise OSError(errno.EBADF, "no more")

    with monkeypatch.context() as patched:
        patched.setattr(working, "pread_all", fail)
        with pytest.raises(ResourceError, match="no more"):
            small.convert()
    small.convert()
    assert small.written == [6, 7]


def test_a_stop_while_units_are_looked_at_loses_nothing(small):
    small.leave(6)
    stop = StopRequest()
    stop.request(15)
    with pytest.raises(Interrupted) as caught:
        small.convert(stop=stop)
    assert caught.value.exit_code == 143
    small.convert()
    assert small.written == [6, 7]


# -------------------------------------------------------------------------------------------------------- other plans


def test_another_plan_is_refused_and_harms_nothing(small):
    small.leave(6)
    before = small.partial.read_bytes()
    mine, small.identity = small.identity, small.identity | {"policy": "q8"}
    with pytest.raises(UsageError, match=r"partial: belongs to another conversion: policy is q8, was q4k; give the"):
        small.convert()
    assert small.partial.read_bytes() == before
    small.identity = mine
    small.convert()
    assert small.written == [6, 7]


def test_restart_takes_another_plans_place(small):
    small.leave(6)
    small.identity |= {"policy": "q8"}
    small.contents["a"] = 5
    small.convert(restart=True)
    assert (small.notes, small.written) == ([], list(range(8)))
    assert whole(small)


def vanish(output) -> None:
    """Close what a kill closes, and clean nothing up."""
    output._writer.close()
    output._files.close()
    output._lock.release()


def test_restart_after_a_kill_at_its_worst_moment(small, monkeypatch):
    """Killed between the new journal and the first unit: the old units are not taken for those of the new plan."""
    small.leave(6)
    small.identity |= {"policy": "q8"}
    small.contents["a"] = small.contents["b"] = 5

    def die(*_):
        raise SystemExit

    for name in ("preallocate", "pwrite_all"):
        with monkeypatch.context() as patched:
            patched.setattr(working, name, die)
            patched.setattr(module.OutputFile, "_leave", vanish)
            with pytest.raises(SystemExit):
                small.convert(restart=True)
        assert len(read_journal(small.journal).units) == 0
    small.convert()
    assert small.written == list(range(8))
    assert whole(small)


# ------------------------------------------------------------------------------------------------------ two at a time


def test_a_second_run_is_refused_and_harms_nothing(small):
    with small.open() as output:
        small.put(output, 0)
        output.flush()
        with pytest.raises(ResourceError, match=rf"held by process {os.getpid()} on"):
            SmallOutput(small.path).convert(restart=True)
        small.put(output, *range(1, 8))
        output.complete(HEADER, lambda path: None)
    assert whole(small)


def lose(small, what) -> None:
    path = small.lock if what.startswith("lock") else small.partial
    path.unlink()
    if what.endswith("replaced"):
        path.write_text("{}")


@pytest.mark.parametrize(("what", "said"), [
    ("lock removed", "was taken or removed by another run"), ("lock replaced", "was taken or removed by another run"),
    ("partial removed", "was replaced or removed while it was being written"),
    ("partial replaced", "was replaced or removed while it was being written"),
])  # fmt: skip
def test_a_run_that_lost_its_place_stops_and_harms_nothing(small, what, said):
    held = []

    def work():
        with small.open() as output:
            small.put(output, 0)
            output.flush()
            lose(small, what)
            held[:] = small.files()
            small.put(output, 1)
            output.flush()

    with pytest.raises(ResourceError, match=said):
        work()
    assert set(held) - {"out.gguf.lock"} == set(small.files()) - {"out.gguf.lock"}
    assert small.lock.exists() is (what == "lock replaced")
    assert len(read_journal(small.journal).units) == 1


@pytest.mark.parametrize("what", ["lock removed", "lock replaced", "partial replaced"])
def test_a_run_that_lost_its_place_gives_no_final_name(small, what):
    def work():
        with small.open() as output:
            small.put(output, *range(8))
            output.flush()
            lose(small, what)
            output.complete(HEADER, lambda path: None)

    with pytest.raises(ResourceError, match=r"was taken or removed|was replaced or removed"):
        work()
    assert not small.path.exists()
    small.lock.unlink(missing_ok=True)
    small.convert()
    assert small.written == ([] if "lock" in what else list(range(8)))
    assert whole(small)


def test_many_threads_write_at_once(small):
    with small.open() as output:
        units = {}

        def work(i):
            units[i] = output.write(small.position(i), small.data(i), small.source(i))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for unit in units.values():
            output.record(unit)
        output.complete(HEADER, lambda path: None)
    assert whole(small)


# ------------------------------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize(("units", "header", "position"), [
    ((0, 1, 3, 4, 5, 6, 7), HEADER, 274), ((), HEADER, 64), (range(8), HEADER + b"x", 64),
])  # fmt: skip
def test_no_name_before_all_units_are_there(small, units, header, position):
    def work():
        with small.open() as output:
            small.put(output, *units)
            output.complete(header, lambda path: None)

    with pytest.raises(Dsv4Error, match=rf"unit at byte {position} is missing or overlaps"):
        work()
    assert not small.path.exists()


def test_what_was_written_wrongly_is_not_gone_on_with(small):
    def judge(path):
        raise Dsv4Error(path, "was written wrongly")

    with pytest.raises(Dsv4Error, match="was written wrongly"):
        small.convert(check=judge)
    assert small.files() == []


@pytest.mark.parametrize("error", [ResourceError("x", "read failed"), KeyboardInterrupt(), MemoryError()])
def test_a_check_that_could_not_be_made_loses_nothing(small, error):
    def judge(path):
        raise error

    with pytest.raises(type(error)):
        small.convert(check=judge)
    assert small.files() == ["out.gguf.journal", "out.gguf.partial"]
    small.convert()
    assert small.written == []
    assert whole(small)


def test_the_check_sees_the_whole_file_under_its_working_name(small):
    seen = []
    small.convert(check=lambda path: seen.append((path, path.read_bytes(), small.path.exists())))
    assert seen == [(small.partial, small.expected(), False)]


def test_an_old_output_is_replaced_at_the_end_only(small):
    small.path.write_bytes(b"old")
    small.leave(5)
    assert small.path.read_bytes() == b"old"
    small.convert(check=lambda path: small.path.read_bytes() == b"old" or pytest.fail("replaced too early"))
    assert whole(small)


def test_a_run_killed_behind_the_rename_is_known_to_be_complete(small, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(working, "sync_directory", die)     # what follows the rename
        with pytest.raises(KeyboardInterrupt):
            small.convert()
    assert small.files() == ["out.gguf", "out.gguf.journal"]
    assert was_completed(small.path, small.identity)
    assert not was_completed(small.path, small.identity | {"policy": "q8"})
    small.convert()
    assert small.written == []
    assert small.notes == [f"{small.path} was complete already"]
    assert whole(small)
    assert not was_completed(small.path, small.identity)     # nothing to clear away


@pytest.mark.parametrize("what", ["replaced", "removed", "partial", "renamed by hand", "restart"])
def test_another_file_is_not_taken_for_the_complete_one(small, monkeypatch, what):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(working, "sync_directory" if what != "renamed by hand" else "pwrite_all", die)
        if what == "renamed by hand":
            patched.undo()
            small.leave(6)
            small.partial.rename(small.path)      # no line says that it is complete
        else:
            with pytest.raises(KeyboardInterrupt):
                small.convert()
    if what == "replaced":
        small.path.rename(small.path.with_name("kept"))
        small.path.write_bytes(b"mine")
        small.path.with_name("kept").unlink()
    elif what == "removed":
        small.path.unlink()
    elif what == "partial":
        small.partial.write_bytes(bytes(small.n_bytes))
    assert was_completed(small.path, small.identity) is (what == "restart")
    small.convert(restart=what == "restart")
    assert whole(small)
    assert small.written == list(range(8)) if what != "partial" else whole(small)


def test_a_header_of_a_run_that_was_killed_before_its_check_is_hidden_again(small, monkeypatch):
    def die(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.convert(check=die)
    assert small.partial.read_bytes()[:5] == b"MAGIC"
    flip(small.partial, small.position(4))
    small.leave(0)
    assert small.partial.read_bytes()[:8] == bytes(8)
    small.convert()
    assert small.written == [4]
    assert whole(small)


def test_leftovers_are_removed_unless_they_are_in_use(small):
    small.leave(3)
    with small.open():
        discard_leftovers(small.path)
        assert small.files() == ["out.gguf.journal", "out.gguf.lock", "out.gguf.partial"]
        small.partial.touch()
    discard_leftovers(small.path)
    assert small.files() == []
    discard_leftovers(small.path)
    small.lock.write_text("not ours")
    small.partial.write_text("x")
    discard_leftovers(small.path)
    assert small.files() == ["out.gguf.lock", "out.gguf.partial"]


def test_names(tmp_path):
    assert [p.name for p in working_paths(tmp_path / "x.gguf")] == [
        "x.gguf", "x.gguf.partial", "x.gguf.journal", "x.gguf.lock"]
    assert [p.name for p in working_paths(tmp_path / "x.gguf", "y")] == ["x.gguf", "y.partial", "y.journal", "y.lock"]


def test_a_partial_file_that_is_no_file_of_ours(small, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for make in (small.partial.symlink_to, small.partial.hardlink_to):
        make(precious)
        with pytest.raises(ResourceError, match=r"symbolic link|second name"):
            small.convert()
        assert precious.read_text() == "mine"
        assert small.files() == ["out.gguf.partial", "precious"]
        small.partial.unlink()
    os.mkfifo(small.partial)
    with pytest.raises(ResourceError, match="is no regular file"):
        small.convert()


def test_no_room_leaves_nothing_of_a_new_run_and_all_of_an_old_one(small, monkeypatch):
    def full(fd, n):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(working, "preallocate", full)
        with pytest.raises(ResourceError, match=r"partial: cannot be written: the disk is full; run the same command"):
            small.convert()
        assert small.files() == []
        patched.undo()
        small.leave(4)
        patched.setattr(working, "preallocate", full)
        with pytest.raises(ResourceError):
            small.convert()
    small.convert()
    assert small.written == [4, 5, 6, 7]


def test_a_file_system_that_reserves_nothing(small, monkeypatch):
    def sparse(fd, n):
        os.ftruncate(fd, n)
        return False

    monkeypatch.setattr(working, "preallocate", sparse)
    small.leave(4)
    small.convert()
    assert whole(small)


def test_checksums_are_of_the_content():
    data = np.arange(100, dtype=np.uint8)
    assert checksum(data) == checksum(data.copy()) != checksum(data[::-1].copy())
    assert checksum(data) == xxhash.xxh3_128_hexdigest(data.tobytes())
    assert checksum(data, data) == xxhash.xxh3_128_hexdigest(data.tobytes() * 2)
    assert checksum(data[:0]) == xxhash.xxh3_128_hexdigest(b"")


@pytest.mark.parametrize("n_bytes", [PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, 800_000])
def test_checksums_of_large_units_are_taken_piece_by_piece_from_their_end(n_bytes):
    data = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, np.uint8)
    raw = data.tobytes()
    pieces = [raw[i:i + PIECE_BYTES] for i in range(0, n_bytes, PIECE_BYTES)]
    assert checksum(data) == xxhash.xxh3_128_hexdigest(b"".join(pieces[::-1]))
