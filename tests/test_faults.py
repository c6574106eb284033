"""Real faults: full disks, signals, kills, competing runs, sources that change, little memory.

After each: no file under the final name unless it is complete, inputs as they were, and the same command again gives
the bytes of an undisturbed run, with nothing left beside them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SMALL, checksums
from process import ROOM_SECONDS, error_line, failed, messages, run
from tamper import find_tensor, shards

import dsv4tools as dt
from dsv4tools.derive import UnitDeriver
from dsv4tools.errors import ResourceError, UsageError, VerifyError
from dsv4tools.outfile import complete_file
from dsv4tools.synthetic import TINY, write_sparse


@pytest.fixture
def source(make_checkpoint):
    """A checkpoint of its own for each test, looked at when the test is over."""
    path = make_checkpoint()
    before = checksums(path)
    yield path
    assert checksums(path) == before


@pytest.fixture(scope="module")
def expected(_written, tmp_path_factory) -> bytes:
    """The bytes of an undisturbed conversion of `source`."""
    path = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    # The name of the directory becomes general.name.
    path = Path(shutil.copytree(path, tmp_path_factory.mktemp("undisturbed") / "checkpoint"))
    return dt.convert(dt.plan(dt.open_checkpoint(path)), path.parent / "out.gguf").path.read_bytes()


@pytest.fixture
def small_units(monkeypatch):
    """Hundreds of units, so that there is a middle to be disturbed in."""
    monkeypatch.setattr(sys.modules["dsv4tools.plan"], "MAX_UNIT_VALUES", 20_000)


def plan_of(source):
    return dt.plan(dt.open_checkpoint(source))


def finish(source, out, expected, *, overwrite=False) -> None:
    """The same conversion again, undisturbed."""
    dt.convert(plan_of(source), out, overwrite=overwrite)
    assert out.read_bytes() == expected
    assert sorted(p.name for p in out.parent.glob(out.name + "*")) == [out.name]


# The real command, only slower: small units; behind the first 20, reads wait for a file to appear.
SLOW = """
import os, sys, time
import dsv4tools.plan, dsv4tools.output, dsv4tools.derive
sys.modules["dsv4tools.plan"].MAX_UNIT_VALUES = 20_000
sys.modules["dsv4tools.output"].BATCH_SECONDS = 0.02
deriver = sys.modules["dsv4tools.derive"].UnitDeriver
read, gate, n_read = deriver.read, os.environ["GATE"], 0
def slowly(self, unit):
    global n_read
    n_read += 1
    if n_read == 20:
        open(gate + ".reached", "w").close()
    while n_read > 20 and not os.path.exists(gate):
        time.sleep(0.01)
    time.sleep(float(os.environ["DELAY"]))
    return read(self, unit)
deriver.read = slowly
from dsv4tools.cli import main
main()
"""


STOPPING = "stopping after the units in hand; once more leaves at once\n"


@pytest.fixture
def gate(tmp_path):
    return tmp_path / "gate"


@pytest.fixture
def slowly(gate):
    """Start a command that waits until `gate` exists; whatever is left of it when the test is over is killed."""
    started = []

    def start(*arguments, delay=0) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, arguments)], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "GATE": str(gate), "DELAY": str(delay)})  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


LIMIT = """
import resource, sys
from dsv4tools.cli import main
name, limit = sys.argv[1:3]
del sys.argv[1:3]
resource.setrlimit(getattr(resource, name), (int(limit),) * 2)
main()
"""


def run_within(name, limit, *arguments) -> subprocess.CompletedProcess[str]:
    """A command that sets a limit for itself: between fork and exec of a process with threads nothing should run."""
    command = [sys.executable, "-c", LIMIT, name, str(limit), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=ROOM_SECONDS, check=False)


def wait_for(happened, process, seconds=ROOM_SECONDS):
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def is_writing(out):
    """Whether some units have been written."""
    partial = out.with_name(out.name + ".partial")
    return lambda: partial.exists() and partial.stat().st_size > 0 and any(partial.read_bytes()[100_000:])


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_conversion_that_can_go_on(number, code, source, expected, tmp_path, slowly, gate):
    out = tmp_path / "out.gguf"
    process = slowly("convert", source, out, "--threads", 1)
    wait_for(is_writing(out), process)
    process.send_signal(number)
    assert process.stderr.readline() == STOPPING
    gate.touch()                    # what is in hand is finished
    _, said = process.communicate(timeout=ROOM_SECONDS)
    assert process.returncode == code
    assert error_line(said) == "error: stopped; run the same command again to continue"
    assert not out.exists()
    again = slowly("convert", source, out)      # with units of the same size: others would be none of its own
    _, said = again.communicate(timeout=ROOM_SECONDS)
    assert (again.returncode, messages(said)) == (0, [])
    assert said.startswith("note: continuing ")
    finish(source, out, expected, overwrite=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_leaves_at_once(number, code, source, expected, tmp_path, slowly):
    out = tmp_path / "out.gguf"
    process = slowly("convert", source, out, "--threads", 1)
    wait_for(is_writing(out), process)
    process.send_signal(number)
    assert process.stderr.readline() == STOPPING
    process.send_signal(number)     # its readers hang: nobody opens the gate
    process.communicate(timeout=ROOM_SECONDS)
    assert process.returncode == code
    assert not out.exists()
    finish(source, out, expected)


@pytest.mark.parametrize(("number", "code", "word"), [
    (signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"),
])  # fmt: skip
def test_a_signal_stops_a_verification(number, code, word, source, tmp_path, slowly, gate):
    out = tmp_path / "out.gguf"
    dt.convert(plan_of(source), out)
    process = slowly("verify", out, "--source", source, "--threads", "1")
    wait_for(gate.with_name("gate.reached").exists, process)
    process.send_signal(number)
    gate.touch()
    _, error = process.communicate(timeout=ROOM_SECONDS)
    assert process.returncode == code
    assert error_line(error).startswith(f"error: {word}")


def test_kills_at_any_moment(source, expected, tmp_path, slowly):
    """Three times SIGKILL, sooner and later; then the same command finishes the work."""
    out = tmp_path / "out.gguf"
    for seconds in (0, 0.1, 0.4):
        process = slowly("convert", source, out, "--threads", 1, delay=0.01)
        wait_for(is_writing(out), process)
        time.sleep(seconds)
        process.kill()
        process.communicate(timeout=ROOM_SECONDS)
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
        assert not dt.verify(out.with_name("out.gguf.partial")).ok      # no reader takes it for a model
    finish(source, out, expected)


def test_what_is_left_of_something_else_is_written_anew(source, expected, tmp_path):
    out = tmp_path / "out.gguf"
    for stale in (b"", b"x" * 1000, expected[:-1], expected + b"more"):
        out.with_name("out.gguf.partial").write_bytes(stale)
        dt.convert(plan_of(source), out, overwrite=True)
        assert out.read_bytes() == expected
        assert [p.name for p in tmp_path.glob("out*")] == ["out.gguf"]


# ----------------------------------------------------------------------------------------------------- competing runs


def test_two_conversions_of_one_output(source, expected, tmp_path, slowly, gate):
    out = tmp_path / "out.gguf"
    first = slowly("convert", source, out, "--threads", 1)
    wait_for(is_writing(out), first)
    for options in ((), ("--restart",), ("--overwrite",)):
        message = failed(run("convert", source, out, *options), 4)
        assert "out.gguf" in message
        assert f"process {first.pid}" in message
        assert "another run writes this output" in message
    assert is_writing(out)()
    gate.touch()
    _, said = first.communicate(timeout=ROOM_SECONDS)
    assert (first.returncode, messages(said)) == (0, [])
    assert out.read_bytes() == expected
    assert [p.name for p in tmp_path.glob("out*")] == ["out.gguf"]


def test_two_conversions_in_one_process(source, expected, tmp_path, small_units):
    """One thread's conversion keeps the other out, as two processes do."""
    out, inside = tmp_path / "out.gguf", []

    def progress(n_bytes):
        if not inside:
            with pytest.raises(ResourceError, match="another run writes this output") as caught:
                dt.convert(plan_of(source), out)
            inside.append(caught)

    dt.convert(plan_of(source), out, progress=progress, threads=1)
    assert inside
    assert out.read_bytes() == expected


def test_two_manifests_and_templates_of_one_name(source, tmp_path):
    """`complete_file` keeps the second writer out, and does not take the first one's file away."""
    path = tmp_path / "m"
    with complete_file(path) as fd:
        with pytest.raises(ResourceError, match="being written by another conversion"), complete_file(path):
            pytest.fail("there are two writers")
        os.write(fd, b"first")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.glob("m*")] == ["m"]


# --------------------------------------------------------------------------------------------------------- full disks

WITH_DISK = 'mount -t tmpfs -o "size=$SIZE" tmpfs "$DISK" || exit 99\n'


def namespace() -> list[str]:
    """A command that gives its child mounts of its own, as root or not; empty where the system has no such thing."""
    for unshare in (["unshare", "-m"], ["unshare", "-U", "-r", "-m"]):
        probe = [*unshare, "sh", "-c", 'mount -t tmpfs tmpfs "$0"', "/mnt"]
        if shutil.which("unshare") and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return unshare
    return []


NAMESPACE = namespace()


def on_disk(disk, size, script, **variables) -> subprocess.CompletedProcess[str]:
    """Run a shell script with a tmpfs of `size` mounted on the directory `disk`; `$CONVERT` is the command."""
    disk.mkdir(exist_ok=True)
    env = {**os.environ, "DISK": str(disk), "SIZE": str(size), "PYTHON": sys.executable,
           **{k: str(v) for k, v in variables.items()}}  # fmt: skip
    return subprocess.run([*NAMESPACE, "sh", "-c", WITH_DISK + textwrap.dedent(script)], capture_output=True, text=True,
                          timeout=ROOM_SECONDS, env=env, check=False)  # fmt: skip


# Where no disk can be mounted (macOS, locked containers) the same refusals are asked for by a limit of the process and
# by what the system is made to say of the free space: no test is skipped.


def test_a_disk_that_is_too_small_is_said_at_once(source, tmp_path, monkeypatch, dsv4tools):
    if NAMESPACE:
        ended = on_disk(tmp_path / "disk", "4m", """
            "$PYTHON" -m dsv4tools convert "$SOURCE" "$DISK/out.gguf" --manifest "$DISK/m"
            code=$?
            ls -A "$DISK"
            exit $code
        """, SOURCE=source)  # fmt: skip
        assert (ended.returncode, ended.stdout) == (4, "")
        message = error_line(ended.stderr)
    else:
        monkeypatch.setattr(sys.modules["dsv4tools.outfile"], "free_bytes", lambda directory: 4 << 20)
        message = dsv4tools("convert", source, tmp_path / "out.gguf").failed(4)
        assert not list(tmp_path.glob("out*"))
    assert "4.19 MB (4.00 MiB) free, the output needs 7." in message
    assert "free some space or write elsewhere" in message


# A file system that cannot reserve space, and another writer that eats what there is when a few units are written.
EATEN = """
import os, sys
import dsv4tools as dt
import dsv4tools.output, dsv4tools.plan, dsv4tools.working
source, out = sys.argv[1:]
sys.modules["dsv4tools.plan"].MAX_UNIT_VALUES = 20_000
sys.modules["dsv4tools.working"].preallocate = os.ftruncate
def eat(n_bytes):
    try:
        with open(os.path.join(os.path.dirname(out), "filler"), "ab", 0) as f:
            while True:
                f.write(bytes(4096))
    except OSError:
        pass
try:
    dt.convert(dt.plan(dt.open_checkpoint(source)), out, threads=1, progress=eat)
except dt.ResourceError as error:
    print(error)
    sys.exit(error.exit_code)
"""
LIMITED = """
import resource, sys
import dsv4tools as dt
import dsv4tools.output, dsv4tools.plan, dsv4tools.working
source, out = sys.argv[1:]
sys.modules["dsv4tools.working"].preallocate = lambda fd, n_bytes: None
plan = dt.plan(dt.open_checkpoint(source))
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, resource.RLIM_INFINITY))
try:
    dt.convert(plan, out, threads=1)
except dt.ResourceError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_disk_that_fills_up_midway(source, expected, tmp_path):
    out = tmp_path / "disk" / "out.gguf"
    if not NAMESPACE:
        out.parent.mkdir()
        ended = subprocess.run([sys.executable, "-c", LIMITED, str(source), str(out)], capture_output=True, text=True,
                               check=False)  # fmt: skip
        assert "out.gguf.partial: cannot be written: the file system, or a limit" in ended.stdout
        assert not out.exists()
        finish(source, out, expected)
        return
    ended = on_disk(out.parent, "9m", """
        "$PYTHON" -c "$EATEN" "$SOURCE" "$OUT"
        echo "code $?"
        test -e "$OUT" && echo "there is an output"
        rm "$DISK/filler"
        "$PYTHON" -m dsv4tools convert "$SOURCE" "$OUT" --json > /dev/null && sha256sum < "$OUT"
        ls -A "$DISK"
    """, SOURCE=source, OUT=out, EATEN=EATEN)  # fmt: skip
    said, code, digest, *left = ended.stdout.splitlines()
    assert "cannot be written: the disk is full" in said
    assert code == "code 4"
    assert digest.split()[0] == hashlib.sha256(expected).hexdigest()
    assert left == ["out.gguf"]


def test_what_a_killed_run_holds_counts_as_free(source, expected, tmp_path, monkeypatch):
    """The disk has room for one output. A run killed after it had reserved its room must not bar the next one."""
    size = (len(expected) + (2 << 20)) // 4096 * 4096
    if not NAMESPACE:
        out = tmp_path / "out.gguf"
        out.with_name("out.gguf.partial").write_bytes(bytes(len(expected)))
        monkeypatch.setattr(sys.modules["dsv4tools.outfile"], "free_bytes", lambda directory: 2 << 20)
        dt.convert(plan_of(source), out)
        assert out.read_bytes() == expected
        return
    ended = on_disk(tmp_path / "disk", size, """
        head -c "$HELD" /dev/zero > "$DISK/out.gguf.partial"
        "$PYTHON" -m dsv4tools convert "$SOURCE" "$DISK/out.gguf" --json > /dev/null && cmp "$DISK/out.gguf" "$EXPECTED"
    """, SOURCE=source, HELD=len(expected), EXPECTED=save(tmp_path / "expected", expected))  # fmt: skip
    assert (ended.returncode, messages(ended.stderr)) == (0, [])


def save(path, data) -> Path:
    path.write_bytes(data)
    return path


def test_a_disk_that_only_reads(source, tmp_path, monkeypatch, dsv4tools):
    if NAMESPACE:
        ended = on_disk(tmp_path / "disk", "9m", """
            mount -o remount,ro "$DISK" || exit 99
            "$PYTHON" -m dsv4tools convert "$SOURCE" "$DISK/out.gguf"
        """, SOURCE=source)  # fmt: skip
        assert (ended.returncode, ended.stdout) == (4, "")
        message = error_line(ended.stderr)
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
        message = dsv4tools("convert", source, tmp_path / "out.gguf").failed(4)
    assert "cannot be written to" in message


@pytest.mark.parametrize("limit", [1 << 12, 3 << 20])
def test_a_limit_on_file_sizes(limit, source, expected, tmp_path):
    """What a file system for small files says, or `ulimit -f`: a refusal, not the death that SIGXFSZ could be."""
    out = tmp_path / "out.gguf"
    message = failed(run_within("RLIMIT_FSIZE", limit, "convert", source, out), 4)
    assert "out.gguf" in message
    assert "allows no file of this size" in message
    assert not out.exists()
    finish(source, out, expected)


# ------------------------------------------------------------------------------------- what the system's calls may do


def test_short_reads_and_writes_lose_nothing(source, expected, tmp_path, monkeypatch):
    write, read = os.pwrite, os.preadv
    rng = random.Random(1)
    n_short = 0

    def short_write(fd, data, position):
        nonlocal n_short
        n_short += 1
        return write(fd, memoryview(data)[: rng.randint(1, 5000)], position)

    monkeypatch.setattr(os, "pwrite", short_write)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, position: read(fd, [buffers[0][:7001]], position))
    out = tmp_path / "out.gguf"
    dt.convert(plan_of(source), out)
    assert n_short > 1000
    assert out.read_bytes() == expected
    assert dt.verify(out, source=source).ok


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ESTALE])
def test_a_write_that_fails(number, source, expected, tmp_path, monkeypatch, small_units):
    """Refused from the 40th write on, whatever the reason."""
    write, n_calls = os.pwrite, 0
    lock = threading.Lock()

    def failing(fd, data, position):
        nonlocal n_calls
        with lock:
            n_calls += 1
        if n_calls > 40:
            raise OSError(number, os.strerror(number))
        return write(fd, data, position)

    out = tmp_path / "out.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(ResourceError, match=r"out\.gguf.*: cannot be written: ") as caught:
            dt.convert(plan_of(source), out)
    assert caught.value.exit_code == 4
    assert not out.exists()
    dt.convert(plan_of(source), out)
    assert out.read_bytes() == expected
    assert [p.name for p in tmp_path.glob("out*")] == ["out.gguf"]


def test_a_write_that_does_nothing_is_no_endless_loop(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(ResourceError, match="cannot be"):
        dt.convert(plan_of(source), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_read_that_fails(source, expected, tmp_path, monkeypatch, small_units):
    read = os.preadv

    def failing(fd, buffers, position):
        if position > 1_000_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, position)

    out = tmp_path / "out.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        said = r"model-0000\d-of-00002\.safetensors: read failed at byte [\d,]+: Input/output"
        with pytest.raises(ResourceError, match=said):
            dt.convert(plan_of(source), out)
    assert not out.exists()
    finish(source, out, expected)


@pytest.mark.parametrize("missing", ["preadv", "posix_fallocate", "fdatasync", "sched_getaffinity"])
def test_systems_without_a_call(missing, source, expected, tmp_path, monkeypatch):
    """Each call that macOS or an old system lacks has its fallback."""
    monkeypatch.delattr(os, missing, raising=False)
    out = tmp_path / "out.gguf"
    dt.convert(plan_of(source), out, manifest=tmp_path / "m")
    assert out.read_bytes() == expected
    assert dt.verify(out, source=source).ok


def test_systems_without_locks(source, expected, tmp_path, monkeypatch):
    import fcntl  # noqa: PLC0415  - not on every platform

    def unknown(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    out = tmp_path / "out.gguf"
    dt.convert(plan_of(source), out, manifest=tmp_path / "m")
    assert out.read_bytes() == expected


def test_an_exception_of_a_worker_comes_out(source, expected, tmp_path, monkeypatch, small_units, dsv4tools):
    out, n_calls = tmp_path / "out.gguf", 0
    encode = UnitDeriver.encode

    def broken(self, unit, rows):
        nonlocal n_calls
        n_calls += 1
        if n_calls > 30:
            raise ZeroDivisionError("in the middle")
        return encode(self, unit, rows)

    with monkeypatch.context() as patch:
        patch.setattr(UnitDeriver, "encode", broken)
        with pytest.raises(ZeroDivisionError, match="in the middle"):
            dt.convert(plan_of(source), out)
        assert not out.exists()
        message = dsv4tools("convert", source, out).failed(1)
        assert "a bug in dsv4tools: ZeroDivisionError: in the middle; please report it" in message
    assert not [t for t in threading.enumerate() if t.name.startswith("unit-")]
    assert not out.exists()
    dt.convert(plan_of(source), out)
    assert out.read_bytes() == expected


# ------------------------------------------------------------------------------------------------ sources that change


def cut(shard):
    os.truncate(shard, shard.stat().st_size // 2)


def touch(shard):
    os.utime(shard, ns=(1, 1))


def exchange(shard):
    copy = shard.with_name("copy")
    shutil.copy2(shard, copy)
    copy.replace(shard)


def grow(shard):
    with shard.open("ab") as f:
        f.write(b"x")


def remove(shard):
    shard.unlink()


def pipe(shard):
    fifo = shard.with_name("pipe")
    os.mkfifo(fifo)
    fifo.replace(shard)   # in one step: a reader must not find the name missing


@pytest.mark.parametrize(("change", "errors", "said"), [
    (cut, (VerifyError, ResourceError), "source changed|ends at byte"),
    (grow, VerifyError, "source changed since the plan was made: size"),
    (touch, VerifyError, "source changed since the plan was made: modification time"),
    (exchange, VerifyError, "source changed since the plan was made: inode"),
    (remove, ResourceError, "cannot be opened: No such file"),
    (pipe, VerifyError, "source changed: no longer a regular file"),
])  # fmt: skip
def test_a_source_that_changes_while_it_is_read(
    change, errors, said, make_checkpoint, expected, tmp_path, small_units
):
    source, out = make_checkpoint(), tmp_path / "out.gguf"
    kept = shutil.copytree(source, tmp_path / "kept")
    seen = []

    def progress(n_bytes):
        if not seen:
            change(shards(source)[1])
        seen.append(n_bytes)

    with pytest.raises(errors, match=said) as caught:
        dt.convert(plan_of(source), out, threads=1, progress=progress)
    assert caught.value.exit_code in {4, 5}
    assert "model-00002-of-00002.safetensors" in str(caught.value)
    assert not out.exists()
    shutil.rmtree(source)
    shutil.copytree(kept, source)
    finish(source, out, expected)


def test_a_source_cut_between_looking_and_reading(make_checkpoint, tmp_path, monkeypatch):
    """`pread` sees the end of the file where a mapping would kill the process."""
    source = make_checkpoint()
    shard, position, _ = find_tensor(source, "head.weight")
    module = sys.modules["dsv4tools.checkpoint.shard"]
    read = module.pread_into

    def late(fd, out, begin):
        if os.fstat(fd).st_ino == shard.stat().st_ino:
            os.truncate(shard, position + 100)
        return read(fd, out, begin)

    plan = plan_of(source)
    monkeypatch.setattr(module, "pread_into", late)
    with pytest.raises((ResourceError, VerifyError), match=r"ends at byte .* while it was being read|source changed"):
        dt.convert(plan, tmp_path / "out.gguf", threads=1)
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_that_changes_while_it_is_verified(source, tmp_path, small_units):
    out = tmp_path / "out.gguf"
    dt.convert(plan_of(source), out)
    seen = []

    def progress(n_bytes):
        if not seen:
            cut(out)
        seen.append(n_bytes)

    with pytest.raises(ResourceError, match=r"out\.gguf: ends at byte \d+"):
        dt.verify(out, source=source, threads=1, progress=progress)


# ------------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import json, resource, sys
from pathlib import Path
import dsv4tools as dt
from dsv4tools.formats.codecs import prepare, self_test

def peak():
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

source, out = sys.argv[1:]
prepare()
self_test()
plan = dt.plan(dt.open_checkpoint(source))
before = peak()
dt.convert(plan, out, threads=2)
converted = peak()
ok = dt.verify(out, source=source, threads=2).ok
print(json.dumps([plan.total_bytes, plan.memory_bytes(2), converted - before, peak() - converted, ok]))
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Few or many experts and layers: the same buffers. The data are holes, the way through is the same."""
    shape = replace(TINY, hidden=1024, expert_hidden=1024, hash_layers=1, draft_blocks=0, experts_per_token=2)
    grown, sizes = {}, {}
    for layers, experts in ((1, 4), (3, 16)):
        directory = tmp_path / f"{layers}-{experts}"
        source = write_sparse(directory, replace(shape, layers=layers, experts=experts), shards=2)
        command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out.gguf")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=ROOM_SECONDS, check=True)
        size, planned, converting, verifying, ok = json.loads(ended.stdout)
        assert ok
        (tmp_path / "out.gguf").unlink()
        grown[layers, experts], sizes[layers, experts] = converting, size
        assert converting < planned + (24 << 20)        # what --dry-run says, and some room for threads
        assert verifying < planned + (24 << 20)
    assert sizes[3, 16] > sizes[1, 4] + (60 << 20)
    assert max(grown.values()) < min(grown.values()) + (8 << 20)


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import dsv4tools as dt
from dsv4tools.formats.codecs import prepare, self_test

source, out, room = sys.argv[1:]
prepare()
self_test()
plan = dt.plan(dt.open_checkpoint(source))
# Where /proc does not say how much is in use (macOS) the limit is too small in any case, and without effect there.
status = Path("/proc/self/status")
used = int(status.read_text().split("VmSize:")[1].split()[0]) * 1024 if status.exists() else 0
resource.setrlimit(resource.RLIMIT_AS, (used + int(room), resource.RLIM_INFINITY))
try:
    dt.convert(plan, out, threads=32)
except dt.ResourceError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_little_memory(source, expected, tmp_path):
    """Too little for the threads' stacks or for their buffers: said, and nothing half done is left under the name."""
    out = tmp_path / "out.gguf"
    codes = set()
    for room in (4 << 20, 1 << 40):
        command = [sys.executable, "-c", LITTLE_MEMORY, str(source), str(out), str(room)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=ROOM_SECONDS, check=False)
        codes.add(ended.returncode)
        if ended.returncode:
            assert ended.returncode == 4, ended
            assert "use fewer" in ended.stdout
            assert not out.exists()
    assert codes == ({0, 4} if sys.platform == "linux" else {0})
    assert out.read_bytes() == expected


def test_few_file_handles(make_checkpoint, tmp_path):
    """Many shards on many threads, and hardly more handles than an interpreter has open."""
    source = make_checkpoint(shards=20)
    ended = run_within("RLIMIT_NOFILE", 24, "convert", source, tmp_path / "out.gguf", "--threads", 4)
    assert (ended.returncode, messages(ended.stderr)) == (0, [])
    assert dt.verify(tmp_path / "out.gguf", source=source).ok


# ----------------------------------------------------------------------------------------------------- other refusals


def test_an_output_that_is_a_device_or_pipe(source, tmp_path):
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is no regular file"):
            dt.convert(plan_of(source), pipe, overwrite=overwrite)
        with pytest.raises(UsageError, match="is no regular file"):
            dt.convert(plan_of(source), tmp_path / "out.gguf", manifest=pipe, overwrite=overwrite)
        assert pipe.is_fifo()
    with pytest.raises(UsageError, match="is no regular file"):
        dt.convert(plan_of(source), "/dev/null")
    assert not (tmp_path / "out.gguf").exists()
