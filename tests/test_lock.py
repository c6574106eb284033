"""The lock: one owner at a time, named; stale ones told from living ones; nothing of anybody else harmed."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsv4tools import lock
from dsv4tools.errors import ResourceError
from dsv4tools.lock import OutputLock

HOLD = """
import sys, time
from pathlib import Path
from dsv4tools.lock import OutputLock
lock = OutputLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.gguf.lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def _no_kernel_locks(monkeypatch):
    monkeypatch.setattr(lock, "try_lock", lambda fd: None)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)


@pytest.fixture(params=["kernel locks", "no kernel locks"])
def _any_disk(request):
    if request.param == "no kernel locks":
        request.getfixturevalue("_no_kernel_locks")


def leave(path, **changes) -> dict[str, object]:
    """What a process that is gone left behind."""
    owner = {**lock._introduce_myself(), "pid": gone(), "started": "1", **changes}
    path.write_text(json.dumps({k: v for k, v in owner.items() if v is not None}))
    return owner


def gone() -> int:
    """A process id that nobody has."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def take(path, **options) -> OutputLock:
    ours = OutputLock(path)
    ours.acquire(**options)
    return ours


@pytest.mark.usefixtures("_any_disk")
def test_it_names_its_owner_and_goes_with_him(path):
    ours = take(path)
    ours.check()
    owner = json.loads(path.read_text())
    assert (owner["pid"], owner["host"], ours.inherited) == (os.getpid(), socket.gethostname(), "")
    ours.release()
    assert not path.exists()
    ours.release()


@pytest.mark.usefixtures("_any_disk")
def test_the_second_one_is_refused_and_told_of_the_first(path, holder):
    with pytest.raises(ResourceError) as caught:
        take(path)
    said = str(caught.value)
    assert f"is held by process {holder.pid} on {socket.gethostname()} since 20" in said
    assert said.endswith("another run writes this output; wait for it, or end it")
    assert json.loads(path.read_text())["pid"] == holder.pid


def test_what_the_kernel_knows_to_be_held_cannot_be_stolen(path, holder):
    with pytest.raises(ResourceError, match=rf"is held by process {holder.pid}"):
        take(path, steal=True)
    assert json.loads(path.read_text())["pid"] == holder.pid


def test_two_in_one_process_exclude_each_other(path):
    ours = take(path)
    with pytest.raises(ResourceError, match=rf"held by process {os.getpid()} on"):
        take(path)
    ours.check()
    ours.release()


@pytest.mark.usefixtures("_any_disk")
def test_the_lock_of_a_killed_process_is_taken_and_told(path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    ours = take(path)
    assert ours.inherited.startswith(f"process {holder.pid} on ")
    assert json.loads(path.read_text())["pid"] == os.getpid()
    ours.release()
    assert not path.exists()


@pytest.mark.usefixtures("_any_disk")
def test_a_process_id_that_was_given_away_again_is_no_owner(path):
    leave(path, pid=os.getpid(), started="1")     # we live, but did not start then
    take(path).release()


@pytest.mark.usefixtures("_no_kernel_locks")
def test_without_kernel_locks_a_living_owner_of_unknown_start_is_believed(path):
    leave(path, pid=os.getpid(), started=None)
    with pytest.raises(ResourceError, match="is held by"):
        take(path)
    take(path, steal=True).release()


@pytest.mark.usefixtures("_no_kernel_locks")
def test_without_kernel_locks_the_owner_of_another_user_is_alive(path, monkeypatch):
    leave(path, started=None)

    def refuse(pid, number):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(ResourceError, match="is held by"):
        take(path)


# ---------------------------------------------------------------------------------------- owners that cannot be asked


@pytest.mark.usefixtures("_any_disk")
def test_another_host_cannot_be_asked(path):
    leave(path, host="node-7", boot="of another kernel")
    with pytest.raises(ResourceError) as caught:
        take(path)
    assert "on node-7 since" in str(caught.value)
    assert str(caught.value).endswith("which cannot be asked from here; if you are sure that it is gone, --steal-lock")
    ours = take(path, steal=True)
    assert "on node-7" in ours.inherited
    ours.release()


def test_another_container_under_this_kernel_is_gone_if_the_kernel_says_so(path):
    leave(path, host="3f2a7c5be1d0", processes="pid:[1]")
    take(path).release()


@pytest.mark.usefixtures("_no_kernel_locks")
def test_without_kernel_locks_a_process_of_another_container_cannot_be_asked(path):
    leave(path, host="3f2a7c5be1d0", processes="pid:[1]")
    with pytest.raises(ResourceError, match="cannot be asked from here"):
        take(path)


def test_after_a_restart_of_the_machine_the_lock_is_free(path):
    leave(path, boot="the one before", pid=os.getpid())
    take(path).release()


@pytest.mark.usefixtures("_no_kernel_locks")
def test_without_kernel_locks_a_machine_of_the_same_name_may_be_another(path):
    leave(path, boot="of another kernel")
    with pytest.raises(ResourceError, match="cannot be asked from here"):
        take(path)


@pytest.mark.usefixtures("_any_disk")
def test_a_system_that_does_not_number_its_starts(path, monkeypatch):
    monkeypatch.setattr(lock, "_boot", lambda: None)
    monkeypatch.setattr(lock, "_process_space", lambda: None)
    monkeypatch.setattr(lock, "_process_start", lambda pid: None)
    leave(path)
    take(path).release()
    leave(path, host="node-7")
    with pytest.raises(ResourceError, match="cannot be asked from here"):
        take(path)


@pytest.mark.usefixtures("_any_disk")
@pytest.mark.parametrize("pid", [None, 0, -1, True, "1", 10**30, [1]])
def test_an_owner_without_a_process_id_is_not_taken_for_dead(pid, path, monkeypatch):
    leave(path, pid=pid, host="node-7", boot="x")
    with pytest.raises(ResourceError, match="cannot be asked"):
        take(path)


# --------------------------------------------------------------------------------------------------- races and thieves


@pytest.mark.usefixtures("_any_disk")
@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_gets_it(stale, path):
    if stale:
        leave(path)
    barrier, won, lost, lock_of = threading.Barrier(8), [], [], {}

    def race(i):
        lock_of[i] = OutputLock(path)
        barrier.wait()
        try:
            lock_of[i].acquire()
            won.append(i)
        except ResourceError as e:
            lost.append(str(e))

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == 7
    lock_of[won[0]].check()
    lock_of[won[0]].release()
    assert not path.exists()


def test_one_after_the_other_never_two(path):
    """Releasing unlinks the file that a rival may have opened already: the rival must not take the unlinked one."""
    inside, most, errors = 0, 0, []
    guard, until = threading.Lock(), time.monotonic() + 1

    def work():
        nonlocal inside, most
        while time.monotonic() < until:
            ours = OutputLock(path)
            try:
                ours.acquire()
            except ResourceError as e:
                if "is held by" not in str(e):
                    errors.append(e)
                continue
            with guard:
                inside += 1
                most = max(most, inside)
            with guard:
                inside -= 1
            ours.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, errors) == (1, [])


@pytest.mark.usefixtures("_no_kernel_locks")
def test_a_stolen_lock_stops_its_former_owner(path, monkeypatch):
    former = take(path)
    thief = take(path, steal=True)
    with pytest.raises(ResourceError, match="was taken or removed by another run, this one stops"):
        former.check()
    former.release()
    thief.check()          # the former owner's release has left it alone
    thief.release()
    assert not path.exists()


@pytest.mark.usefixtures("_any_disk")
def test_a_removed_or_replaced_lock_is_noticed(path):
    ours = take(path)
    path.unlink()
    with pytest.raises(ResourceError, match="was taken or removed"):
        ours.check()
    other = take(path)
    with pytest.raises(ResourceError, match="was taken or removed"):
        ours.check()
    ours.release()
    other.check()
    other.release()


def test_an_error_of_the_disk_is_told(path, monkeypatch):
    ours = take(path)

    def fail(self):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(type(path), "lstat", fail)
        with pytest.raises(ResourceError, match="Stale file handle"):
            ours.check()
        ours.release()
    assert path.exists()      # what cannot be looked at is not removed; its owner is dead to the next one
    take(path).release()


# ----------------------------------------------------------------------------------------- what the file may be instead


@pytest.mark.usefixtures("_any_disk")
@pytest.mark.parametrize("content", [b"", bytes(200), b'{"pid": 12, "ho'], ids=["empty", "zeros", "torn"])
def test_what_a_power_cut_makes_of_a_lock_is_no_owner(content, path):
    path.write_bytes(content)
    take(path).release()


@pytest.mark.parametrize("content", [b"my notes", b"[1, 2]", b"7", b"\xff" * 100, b"[" * 4000, b"null"], ids=str)
def test_somebody_elses_file_is_left_alone(content, path):
    path.write_bytes(content)
    with pytest.raises(ResourceError, match="is no lock of dsv4tools; rename it"):
        take(path, steal=True)
    assert path.read_bytes() == content


def test_links_pipes_and_directories_are_left_alone(path, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    path.symlink_to(precious)
    with pytest.raises(ResourceError, match="it is a symbolic link"):
        take(path)
    path.unlink()
    path.hardlink_to(precious)
    with pytest.raises(ResourceError, match="has a second name"):
        take(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ResourceError, match="is no regular file"):
        take(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ResourceError, match="Is a directory"):
        take(path)
    assert precious.read_text() == "mine"
    with pytest.raises(ResourceError, match="No such file or directory"):
        take(tmp_path / "none" / "lock")


def test_a_full_disk_leaves_no_lock(path, monkeypatch):
    def fail(fd, data, position):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(ResourceError, match=r"\.lock: cannot be written: the disk is full"):
        take(path)
    assert not path.exists()


def test_no_descriptor_is_left_open(path, holder):
    before = n_descriptors()
    with pytest.raises(ResourceError):
        take(path)
    assert n_descriptors() == before


def n_descriptors() -> int:
    return len(list(Path("/dev/fd").iterdir()))
