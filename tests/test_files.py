"""The system's file calls, and what happens where one of them is missing, short, or refuses."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

from dsv4tools import files

RAW = bytes(range(256)) * 8


@pytest.fixture
def fd(tmp_path):
    (tmp_path / "file").write_bytes(RAW)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd
    os.close(fd)


def content(fd):
    return os.pread(fd, 1 << 20, 0)


@pytest.fixture(params=["preadv", "no preadv"])
def _either(request, monkeypatch):
    if request.param == "no preadv":
        monkeypatch.delattr(os, "preadv", raising=False)


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize(("n", "position", "expected"), [
    (10, 0, RAW[:10]), (10, 5, RAW[5:15]), (0, 5, b""), (10, len(RAW) - 3, RAW[-3:]), (10, len(RAW), b""),
    (10, 10 * len(RAW), b""), (len(RAW), 0, RAW),
])
def test_pread_into(fd, n, position, expected):
    out = bytearray(b"\xee" * n)
    assert files.pread_into(fd, memoryview(out), position) == len(expected)
    assert out == expected + b"\xee" * (n - len(expected))


@pytest.mark.usefixtures("_either")
def test_pread_into_passes_errors_on():
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.pread_into(-1, memoryview(bytearray(1)), 0)


def test_pwrite_all(fd):
    files.pwrite_all(fd, memoryview(b"abc"), 5)
    files.pwrite_all(fd, memoryview(b""), 0)
    files.pwrite_all(fd, memoryview(b"end"), len(RAW) + 2)
    assert content(fd) == RAW[:5] + b"abc" + RAW[8:] + b"\0\0end"


def test_pwrite_all_goes_on_after_short_writes(fd, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    files.pwrite_all(fd, memoryview(b"0123456789"), 100)
    assert content(fd) == RAW[:100] + b"0123456789" + RAW[110:]


def test_pwrite_all_does_not_wait_forever(fd, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(OSError, match="write returned 0 bytes") as caught:
        files.pwrite_all(fd, memoryview(b"x"), 0)
    assert caught.value.errno == errno.EIO


def test_preallocate_reserves(fd):
    before = os.fstat(fd).st_blocks
    reserved = files.preallocate(fd, 1 << 20)
    assert os.fstat(fd).st_size == 1 << 20
    assert content(fd)[: len(RAW)] == RAW
    if reserved:
        assert os.fstat(fd).st_blocks * 512 >= 1 << 20 > before * 512


def test_preallocate_nothing(fd):
    assert files.preallocate(fd, 0) is True
    assert content(fd) == RAW


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_preallocate_where_the_file_system_cannot(fd, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "_reserve", refuse)
    assert files.preallocate(fd, 1 << 20) is False
    assert os.fstat(fd).st_size == 1 << 20


def test_preallocate_elsewhere_than_on_linux(fd, monkeypatch):
    asked = []
    monkeypatch.setattr(sys, "platform", "freebsd14")
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: asked.append(arguments), raising=False)
    assert files.preallocate(fd, 1 << 20) is True
    assert asked == [(fd, 0, 1 << 20)]


def test_preallocate_where_the_system_has_no_such_call(fd, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert files.preallocate(fd, 1 << 20) is False
    assert os.fstat(fd).st_size == 1 << 20


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO])
def test_preallocate_where_there_is_no_room(fd, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "_reserve", refuse)
    with pytest.raises(OSError, match=r".") as caught:
        files.preallocate(fd, 1 << 20)
    assert caught.value.errno == number


def test_clone_file_shares_or_leaves_the_target_empty(fd, tmp_path):
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    try:
        cloned = files.clone_file(fd, target)
        assert content(target) == (RAW if cloned else b"")
    finally:
        os.close(target)


def test_clone_file_elsewhere_than_on_linux(fd, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert files.clone_file(fd, fd) is False


def test_lock_file_keeps_others_out_until_it_is_closed(tmp_path):
    path = tmp_path / "lock"
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    try:
        assert files.lock_file(first) is True
        assert files.lock_file(second) is False
    finally:
        os.close(first)
    try:
        assert files.lock_file(second) is True
    finally:
        os.close(second)


def test_lock_file_where_there_are_no_locks(fd, monkeypatch):
    import fcntl  # noqa: PLC0415  - every platform of the suite has it

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert files.lock_file(fd) is True
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert files.lock_file(fd) is True


def test_sync_data(fd, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(os, "fdatasync", synced.append, raising=False)
    files.sync_data(fd)
    monkeypatch.delattr(os, "fdatasync")
    files.sync_data(fd)
    assert synced == [fd, fd]


def test_sync_directory(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    files.sync_directory(tmp_path)
    assert len(synced) == 1


def test_sync_directory_where_directories_cannot_be_opened_or_synced(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    files.sync_directory(tmp_path / "nowhere")
    before = len(list(Path("/dev/fd").iterdir()))
    monkeypatch.setattr(os, "fsync", refuse)
    files.sync_directory(tmp_path)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_free_bytes(tmp_path):
    assert 0 < files.free_bytes(tmp_path) <= shutil.disk_usage(tmp_path).total
    with pytest.raises(FileNotFoundError):
        files.free_bytes(tmp_path / "nowhere")


def test_usable_cpus(monkeypatch):
    assert 1 <= files.usable_cpus() <= (os.cpu_count() or 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert files.usable_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert files.usable_cpus() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert files.usable_cpus() == 1


def test_insist_tries_again_what_may_pass(monkeypatch):
    monkeypatch.setattr(files, "_PAUSES", (0, 0))
    for number in (errno.EIO, errno.ESTALE):
        answers = iter([OSError(number, "a"), OSError(number, "b"), 7])
        assert files.insist(lambda answers=answers: fail_or_give(next(answers))) == 7
        answers = iter([OSError(number, text) for text in "abcd"])
        with pytest.raises(OSError, match=r"\] c$"):
            files.insist(lambda answers=answers: fail_or_give(next(answers)))


def test_insist_does_not_try_again_what_stays():
    answers = iter([OSError(errno.ENOSPC, "full"), 7])
    with pytest.raises(OSError, match="full"):
        files.insist(lambda: fail_or_give(next(answers)))
    assert next(answers) == 7


def fail_or_give(answer):
    if isinstance(answer, OSError):
        raise answer
    return answer


def test_pread_all(fd, monkeypatch):
    real = files.pread_into
    monkeypatch.setattr(files, "pread_into", lambda fd, out, at: real(fd, out[:7], at))
    out = bytearray(100)
    assert files.pread_all(fd, memoryview(out), 3) == 100
    assert out == RAW[3:103]
    assert files.pread_all(fd, memoryview(out), len(RAW) - 30) == 30
    assert out[:30] == RAW[-30:]


def test_try_lock(fd, tmp_path, monkeypatch):
    other = os.open(tmp_path / "file", os.O_RDWR)
    try:
        assert (files.try_lock(fd), files.try_lock(other)) == (True, False)

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", refuse)
        assert files.try_lock(other) is None
        monkeypatch.setitem(sys.modules, "fcntl", None)
        assert files.try_lock(other) is None
    finally:
        os.close(other)
