"""Downloads, from a Hub on the loopback interface: what comes, what is checked, and what goes wrong in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from conftest import SMALL
from hub_server import COMMIT, SIGNATURE, TOKEN, HubServer, is_lfs
from kills import Download, kill_often
from nursery import Ended, Nursery
from process import COMMAND, ROOM_SECONDS

import dsv4tools as dt
from dsv4tools.errors import Dsv4Error, InputError, ResourceError, UsageError, VerifyError
from dsv4tools.hub import DownloadPlan, RemoteFile, Snapshot, download, faults, local, snapshot
from dsv4tools.synthetic import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

REPO = "org/tiny"
SHARD = "model-00001-of-00002.safetensors"
BIG = "extra/big.bin"
BIG_BYTES = 25_000_000   # more than two of the library's chunks: what it resumes within one process


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """What the Hub has: a checkpoint, a folder, a README. Not to be changed."""
    path = write_checkpoint(tmp_path_factory.mktemp("hub") / "tiny", SMALL, seed=5, shards=2)
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (path / "inference").mkdir()
    (path / "inference" / "model.py").write_text("x = 1\n")
    return path


@pytest.fixture(scope="module")
def with_big(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "big"
    (path / "extra").mkdir(parents=True)
    (path / BIG).write_bytes(hashlib.shake_128(b"big").digest(BIG_BYTES))
    return path


@pytest.fixture(scope="module")
def server(repository, with_big):
    with HubServer({REPO: repository, "org/big": with_big}) as hub:
        yield hub


@pytest.fixture(scope="module")
def nursery(server, tmp_path_factory):
    """Where commands are born that know no other Hub than `server`."""
    directory = tmp_path_factory.mktemp("nursery")
    modules = ("dsv4tools.cli.download", "huggingface_hub.file_download", "huggingface_hub.hf_api")
    with Nursery(directory, *modules, environment=server.environment(directory / "home")) as nursery:
        yield nursery


@pytest.fixture
def hub(server, nursery, tmp_path):
    """The server without faults, and `hub.run(...)`, a command in the test's directory. No secret is ever printed."""
    server.clear()
    for name, repository in server.repositories.items():
        server.add(name, repository.directory)

    def run(*arguments: object, fresh: bool = False, **variables: str) -> Ended:
        if fresh:   # for variables that the library reads when it is imported
            environment = server.environment(tmp_path / "home", **variables)
            old = subprocess.run([*COMMAND, *map(str, arguments)], env=environment, cwd=tmp_path, text=True,
                                 capture_output=True, timeout=ROOM_SECONDS, check=False)
            ended = Ended(old.returncode, old.stdout, old.stderr)
        else:
            ended = nursery.run(*arguments, cwd=tmp_path, **variables)
        for secret in (TOKEN, SIGNATURE, variables.get("HF_TOKEN") or TOKEN):
            assert secret not in ended.out + ended.err
        return ended

    server.run = run
    server.begin = lambda *arguments: nursery.begin(*arguments, cwd=tmp_path)
    server.kill, server.end = nursery.kill, nursery.end
    return server


def failed(ended, code: int) -> str:
    """The one line that an error is, behind the line that says what is to be fetched."""
    assert ended.code == code, ended
    lines = [line for line in ended.err.splitlines() if not line.startswith((REPO + " at", "org/big at", "warning: "))]
    assert len(lines) == 1, ended
    assert lines[0].startswith("error: "), ended
    return lines[0]


def content(directory: Path) -> dict[str, str]:
    return {p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in directory.rglob("*") if p.is_file() and ".cache" not in p.parts}


def incomplete(directory: Path) -> list[Path]:
    return list(directory.rglob("*.incomplete"))


# ------------------------------------------------------------------------------------------------------------- fetching


def test_a_download_is_the_repository(hub, repository, tmp_path):
    ended = hub.run("download", REPO)
    assert ended.code == 0, ended
    assert content(tmp_path / "tiny") == content(repository)
    n_lfs = sum(map(is_lfs, content(repository)))
    n_small = len(content(repository)) - n_lfs
    assert f"sha256 of {n_lfs} files, git hash of {n_small}: all as the Hub states them" in ended.out
    assert dt.open_checkpoint(tmp_path / "tiny").config.num_experts_per_tok == SMALL.experts_per_token
    assert not incomplete(tmp_path)
    assert all("authorization" not in r.headers for r in hub.requests)


def test_a_second_run_fetches_nothing_and_looks_at_every_byte(hub, tmp_path):
    hub.run("download", REPO, "here")
    hub.clear()
    ended = hub.run("download", REPO, "here", "--json")
    assert hub.count("info") == len(hub.requests) == 1
    data = json.loads(ended.out)
    assert (data["fetched"], data["replaced"], data["n_bytes_to_fetch"]) == ([], [], 0)
    assert data["verified"] == len(data["files"]) == len(content(tmp_path / "here"))


def test_what_is_missing_or_damaged_on_disk_is_fetched_again(hub, repository, tmp_path):
    hub.run("download", REPO, "here")
    here = tmp_path / "here"
    (here / "config.json").unlink()
    (here / "tokenizer_config.json").write_bytes((here / "tokenizer_config.json").read_bytes() + b" ")
    raw, times = bytearray((here / SHARD).read_bytes()), (here / SHARD).stat()
    raw[-1] ^= 1
    (here / SHARD).write_bytes(raw)
    os.utime(here / SHARD, ns=(times.st_atime_ns, times.st_mtime_ns))   # as a disk's fault would
    data = json.loads(hub.run("download", REPO, "here", "--json").out)
    assert data["fetched"] == ["config.json", SHARD, "tokenizer_config.json"]
    assert data["replaced"] == [SHARD]
    assert content(here) == content(repository)


@pytest.mark.parametrize("same_size", [False, True])
def test_files_of_ones_own_are_not_replaced(hub, repository, tmp_path, same_size):
    here = tmp_path / "here"
    here.mkdir()
    n_bytes = (repository / "README.md").stat().st_size
    (here / "README.md").write_text("m" * (n_bytes if same_size else n_bytes + 1))
    (here / "config.json").write_bytes((repository / "config.json").read_bytes())
    before = (here / "README.md").read_bytes()
    for _ in range(2):
        assert failed(hub.run("download", REPO, "here"), 2) == (
            "error: here/README.md: is there already, differs from the file on the Hub and was not fetched from it; "
            "move it away, or choose another directory")
        assert (here / "README.md").read_bytes() == before
    (here / "README.md").unlink()
    assert hub.run("download", REPO, "here").code == 0
    assert content(here) == content(repository)


def test_dry_run_changes_nothing(hub, repository, tmp_path):
    ended = hub.run("download", REPO, "here", "--dry-run")
    assert ended.code == 0, ended
    assert not (tmp_path / "here").exists()
    total = sum(p.stat().st_size for p in repository.rglob("*") if p.is_file())
    assert f"{len(content(repository))} files, {dt.sizes.format_bytes(total)}" in ended.out
    assert f"at commit {COMMIT}" in ended.out
    assert "free space" in ended.out
    (tmp_path / "here").mkdir()
    shutil.copy(repository / SHARD, tmp_path / "here")
    data = json.loads(hub.run("download", REPO, "here", "--dry-run", "--json").out)
    assert [f["name"] for f in data["files"] if f["present"]] == [SHARD]
    assert data["n_bytes_to_fetch"] == total - (repository / SHARD).stat().st_size
    assert data["fits"] is True
    by_name = {f["name"]: f for f in data["files"]}
    assert by_name[SHARD]["sha256"] == content(repository)[SHARD]
    assert by_name["README.md"]["sha256"] is None
    assert [p.name for p in (tmp_path / "here").iterdir()] == [SHARD]


@pytest.mark.parametrize(("options", "expected"), [
    (("--include", "*.json", "--exclude", "tok*"), {"config.json", "generation_config.json",
                                                    "model.safetensors.index.json"}),
    (("--include", "inference/"), {"inference/model.py"}),
    (("--include", "config.json", "--include", "README.md"), {"config.json", "README.md"}),
])
def test_globs_choose_files(hub, tmp_path, options, expected):
    assert hub.run("download", REPO, "here", *options).code == 0
    assert set(content(tmp_path / "here")) == expected


def test_revisions(hub, tmp_path):
    for revision in ("v1.0", COMMIT):
        assert hub.run("download", REPO, revision, "--revision", revision, "--include", "config.json").code == 0
    assert all(f"/resolve/{COMMIT}/" in r.path for r in hub.requests if r.kind == "resolve"), "not pinned to the commit"


def test_the_receipt_names_the_origin(hub, repository, tmp_path):
    hub.run("download", REPO, "here")
    receipt = json.loads((tmp_path / "here" / ".cache" / "dsv4tools" / "download.json").read_text())
    assert (receipt["repository"], receipt["revision"]) == (REPO, COMMIT)
    assert receipt["files"][SHARD]["sha256"] == content(repository)[SHARD]
    checkpoint = dt.open_checkpoint(tmp_path / "here")
    kvs = {kv.key: kv.value for kv in dt.plan(checkpoint).kvs}
    assert kvs["general.source.repo_url"] == f"https://huggingface.co/{REPO}"
    assert kvs["general.source.revision"] == COMMIT
    assert kvs["general.name"] == "tiny"


# --------------------------------------------------------------------------------------------------------------- damage


def test_a_corrupted_body_is_caught_and_fetched_again(hub, repository, tmp_path):
    hub.fault("lfs", SHARD, corrupt=1000, times=1)
    hub.fault("resolve", "config.json", corrupt=10, times=2)   # HEAD and GET
    data = json.loads(hub.run("download", REPO, "here", "--json").out)
    assert data["replaced"] == ["config.json", SHARD]
    assert content(tmp_path / "here") == content(repository)


def test_what_is_corrupted_again_and_again_is_removed(hub, repository, tmp_path):
    hub.fault("lfs", SHARD, corrupt=1000)
    line = failed(hub.run("download", REPO, "here"), 5)
    assert f"{SHARD}: came twice with another sha256 than the Hub states, {content(repository)[SHARD]}" in line
    assert "it was removed; " in line
    assert not (tmp_path / "here" / SHARD).exists()
    assert not (tmp_path / "here" / ".cache" / "dsv4tools" / "download.json").exists()
    hub.clear()
    assert hub.run("download", REPO, "here").code == 0
    assert content(tmp_path / "here") == content(repository)


def test_a_dropped_connection_goes_on_where_it_was(hub, with_big, tmp_path):
    hub.fault("lfs", BIG, drop=12_000_000, times=1)
    assert hub.run("download", "org/big", "here").code == 0
    assert content(tmp_path / "here") == content(with_big)
    ranges = [r.headers.get("range") for r in hub.requests if r.kind == "lfs"]
    assert ranges == [None, "bytes=10485760-"]


def test_a_server_that_ignores_ranges(hub, with_big, tmp_path):
    hub.fault("lfs", BIG, ignore_range=True)
    hub.fault("lfs", BIG, drop=12_000_000, times=1)
    assert hub.run("download", "org/big", "here").code == 0
    assert content(tmp_path / "here") == content(with_big)
    assert hub.count("lfs") == 2


def test_a_connection_that_is_reset(hub, with_big, tmp_path):
    hub.fault("lfs", BIG, drop=12_000_000, reset=True, times=1)
    assert hub.run("download", "org/big", "here").code == 0
    assert content(tmp_path / "here") == content(with_big)
    assert hub.count("lfs") == 2


def test_a_body_that_is_too_short(hub, monkeypatch, repository, tmp_path):
    hub.fault("lfs", SHARD, short=10, times=1)
    assert hub.run("download", REPO, "here").code == 0
    assert content(tmp_path / "here") == content(repository)


def test_a_fault_of_the_server_passes(hub, repository, tmp_path):
    hub.fault("info", status=503, times=1)
    hub.fault("lfs", SHARD, status=500, times=1)
    assert hub.run("download", REPO, "here").code == 0
    assert content(tmp_path / "here") == content(repository)


def test_orphans_of_killed_runs_are_removed(hub, with_big, tmp_path):
    hub.fault("lfs", BIG, stall=600, times=1)
    hub.begin("download", "org/big", "here")
    wait_for(lambda: incomplete(tmp_path))
    hub.kill(signal.SIGKILL)
    assert hub.end().code == -signal.SIGKILL
    assert incomplete(tmp_path), "SIGKILL leaves what the library was writing"
    hub.clear()
    ended = hub.run("download", "org/big", "here")
    assert "removed        1 incomplete files of killed downloads" in ended.out
    assert not incomplete(tmp_path)
    assert content(tmp_path / "here") == content(with_big)


def test_kills_leave_whole_files_or_none(server, repository, tmp_path):
    """`scripts/kill-test` does it at length. Folders are left out: they are of no use to what is counted there."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in repository.iterdir():
        if path.is_file():
            (flat / path.name).hardlink_to(path)
    server.clear()
    kept = dict(server.repositories)
    try:
        found = kill_often(Download(tmp_path, flat, server), 10, seed=2)
    finally:
        server.repositories = kept
    assert found["whole"] < 10, "no kill fell into the work"


def wait_for(condition) -> None:
    deadline = time.monotonic() + ROOM_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"),
                                                      (signal.SIGTERM, 143, "terminated")])
def test_signals_stop_it_soon(hub, tmp_path, number, code, word):
    hub.fault("lfs", BIG, stall=600)     # far longer than anybody waits here
    hub.begin("download", "org/big", "here")
    wait_for(lambda: incomplete(tmp_path))
    hub.kill(number)
    assert failed(hub.end(), code).startswith(f"error: {word}")


# ------------------------------------------------------------------------------------------------------------ explained


def test_repositories_and_revisions_that_are_not_there(hub):
    line = failed(hub.run("download", "org/none"), 4)
    assert "org/none: does not exist on the Hub, or is private; check the name" in line
    line = failed(hub.run("download", REPO, "--revision", "v9"), 4)
    assert f"{REPO}: has no revision 'v9'; {hub.url}/{REPO} lists its branches and commits" in line


def test_private_repositories(hub, tmp_path):
    hub.repositories[REPO].private = True
    line = failed(hub.run("download", REPO, "here"), 4)
    assert "is private" in line
    assert "`hf auth login` or set HF_TOKEN" in line
    assert hub.run("download", REPO, "here", HF_TOKEN=TOKEN).code == 0
    to_store = [r for r in hub.requests if r.kind == "lfs"]
    assert to_store
    assert not any("authorization" in r.headers for r in to_store), "the token went to another host"


def test_gated_repositories(hub):
    hub.repositories[REPO].gated = True
    line = failed(hub.run("download", REPO, "here"), 4)
    assert f"{REPO}: is gated: access must be granted to you; ask for it at {hub.url}/{REPO}" in line
    assert hub.run("download", REPO, "here", HF_TOKEN=TOKEN).code == 0


def test_a_token_that_is_not_valid(hub):
    line = failed(hub.run("download", REPO, "here", HF_TOKEN="hf_wrongButSecretAllTheSame"), 4)
    assert "access denied (401); is the token valid" in line


def test_too_many_requests(hub):
    hub.fault("info", status=429, retry_after=3600)
    line = failed(hub.run("download", REPO, "here"), 4)
    assert f"{hub.url}: answers too many requests (429), and asks to wait 3600 s; " in line
    hub.clear()
    hub.fault("info", status=429, retry_after=1, times=1)
    assert hub.run("download", REPO, "here", "--include", "config.json").code == 0
    assert hub.count("info") == 2


def test_no_network(hub):
    line = failed(hub.run("download", REPO, fresh=True, HF_ENDPOINT="http://127.0.0.1:9"), 4)
    assert "http://127.0.0.1:9: no connection, or it broke" in line
    assert "check the network (and HF_ENDPOINT)" in line
    line = failed(hub.run("download", REPO, fresh=True, HF_HUB_OFFLINE="1"), 4)
    assert "switched off by HF_HUB_OFFLINE; unset it" in line


def test_files_that_vanish_and_statuses_without_a_name(hub):
    hub.fault("resolve", "config.json", status=404, code="EntryNotFound")
    assert "a file that it lists is not there" in failed(hub.run("download", REPO, "here"), 4)
    hub.clear()
    hub.fault("resolve", "config.json", status=403)
    assert "access denied (403)" in failed(hub.run("download", REPO, "here2"), 4)
    hub.clear()
    hub.fault("info", status=418)
    assert "the Hub answers with status 418" in failed(hub.run("download", REPO, "here"), 4)


def test_wrong_calls(hub, tmp_path):
    assert "tiny: is no name of a repository; expected OWNER/NAME" in failed(hub.run("download", "tiny"), 2)
    assert "is no name of a repository" in failed(hub.run("download", "a/b--c.git"), 2)
    assert "leave none of the" in failed(hub.run("download", REPO, "--include", "*.none"), 2)
    (tmp_path / "file").touch()
    assert "file: is no directory" in failed(hub.run("download", REPO, "file"), 2)


def test_debug_shows_no_secrets(hub, tmp_path):
    """What `hub.run` looks for on stdout and stderr must not be there even then."""
    hub.repositories[REPO].private = True
    hub.fault("lfs", SHARD, drop=1000, times=1)
    ended = hub.run("--debug", "download", REPO, "here", HF_TOKEN=TOKEN)
    assert ended.code == 0
    assert "Trying to resume" in ended.err
    wrong = {"HF_TOKEN": "hf_wrongButSecretAllTheSame", "HF_DEBUG": "1"}
    ended = hub.run("--debug", "download", REPO, "there", fresh=True, **wrong)
    assert "Traceback" in ended.err


def test_warnings_of_the_library_have_our_form(hub, tmp_path):
    """In a process that loads the library while it runs: it brings a way of its own to say things, with addresses."""
    hub.fault("lfs", SHARD, drop=1000, times=1)
    ended = hub.run("download", REPO, "here", fresh=True)
    assert ended.code == 0, ended
    (line,) = [line for line in ended.err.splitlines() if "Trying to resume" in line]
    assert line.startswith("warning: Error while downloading from ")


# --------------------------------------------------------------------------------------------- without a Hub of its own


def test_a_disk_that_is_too_small(tmp_path):
    file = RemoteFile("x", 10**12, "0" * 64, None)
    plan = DownloadPlan(Snapshot(REPO, COMMIT, {"x": file}), tmp_path / "here", (file,), frozenset(), 10**9)
    assert not plan.fits
    with pytest.raises(ResourceError, match=r"here: 1\.00 GB .* free, the files to fetch need 1\.00 TB .*; free some"):
        download(plan)
    assert not (tmp_path / "here").exists()
    assert replace(plan, present=frozenset({"x"})).fits
    with pytest.raises(UsageError):
        download(replace(plan, free_bytes=10**13), workers=0)


def test_one_download_at_a_time(tmp_path):
    def enter() -> None:
        with local.held(tmp_path / "here"):
            pass

    with local.held(tmp_path / "here"), pytest.raises(ResourceError, match="another download into it is running"):
        enter()
    enter()


@contextmanager
def flocked(path: Path):
    """Held as by another process that uses huggingface_hub."""
    from huggingface_hub.utils import WeakFileLock  # noqa: PLC0415

    with WeakFileLock(path):
        yield


def test_files_that_others_are_writing_are_no_orphans(tmp_path):
    folder = tmp_path / ".cache" / "huggingface" / "download" / "sub"
    folder.mkdir(parents=True)
    (folder.parent / "x.incomplete").touch()
    (folder / "y.incomplete").touch()
    with flocked(folder / "model.lock"):
        assert local.remove_orphans(tmp_path) == 1
    assert (folder / "y.incomplete").exists()
    assert local.remove_orphans(tmp_path) == 1
    assert local.remove_orphans(tmp_path / "none") == 0


@pytest.mark.parametrize("name", [
    "../x", "a/../../x", "/etc/passwd", "C:/x", "C:x", "a\\b", "a//b", "./x", "", "x\n", ".git/config",
    ".cache/dsv4tools/download.json", "//server/share/x",
])
def test_names_that_must_not_become_paths(name):
    with pytest.raises(InputError, match="must not become a path"):
        snapshot.check_file_name(name, REPO)


@pytest.mark.parametrize("name", ["a", "a/b.c", ".gitattributes", "größe", "a b", "..."])
def test_names_that_may(name):
    assert snapshot.check_file_name(name, REPO) == name


def test_hashes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"hello\n")
    # git hash-object gives this blob id for the six bytes of "hello" and a line end.
    blob, sha256 = "ce013625030ba8dba906f756967f9e9ca394464a", hashlib.sha256(b"hello\n").hexdigest()
    seen = []
    assert local.matches(path, RemoteFile("x", 6, None, blob), seen.append)
    assert local.matches(path, RemoteFile("x", 6, sha256, None), seen.append)
    assert local.matches(path, RemoteFile("x", 6, None, None), seen.append)
    assert seen == [6, 6, 6]
    assert not local.matches(path, RemoteFile("x", 5, None, None), seen.append)
    assert not local.matches(path, RemoteFile("x", 7, None, None), seen.append)
    assert not local.matches(path, RemoteFile("x", 6, "0" * 64, None), seen.append)
    with pytest.raises(ResourceError, match="cannot be read"):
        local.matches(tmp_path / "none", RemoteFile("x", 6, None, None), seen.append)


class Response:
    def __init__(self, status: int, **headers: str) -> None:
        self.status_code, self.headers = status, headers


class Refusal(Exception):  # noqa: N818
    def __init__(self, status: int, **headers: str) -> None:
        super().__init__("no")
        self.response = Response(status, **headers)


class TransportError(Exception):
    """Of the name that httpx gives the base of its errors."""


@pytest.mark.parametrize(("error", "attempt", "seconds"), [
    (TransportError(), 0, 1), (TransportError(), 3, 8), (Refusal(503), 1, 2), (Refusal(404), 0, None),
    (Refusal(429), 2, 4), (Refusal(429, **{"retry-after": "17"}), 0, 17),
    (Refusal(429, **{"retry-after": "61"}), 0, None),
    (Refusal(429, ratelimit='"api";r=0;t=33'), 0, 33), (OSError("consistency"), 0, 1), (OSError(28, "full"), 0, None),
    (ValueError(), 0, None),
])
def test_what_is_worth_another_try(error, attempt, seconds):
    assert faults.seconds_to_wait(error, attempt) == seconds


def test_persistence_ends(monkeypatch):
    monkeypatch.setattr(faults, "seconds_to_wait", lambda error, attempt: 0.01)
    calls = []

    def call() -> None:
        calls.append(1)
        raise OSError("another size")

    stop = threading.Event()
    with pytest.raises(ResourceError, match="another size than it announced"):
        faults.persist(call, REPO, None, attempts=2, stop=stop)
    assert len(calls) == 2
    stop.set()
    with pytest.raises(faults.Cancelled):
        faults.persist(call, REPO, None, attempts=2, stop=stop)
    with pytest.raises(UsageError):
        faults.persist(call, REPO, None, attempts=0)


@pytest.mark.parametrize(("error", "kind", "words"), [
    (OSError(28, "No space left on device", "/x/y"), ResourceError, "/x/y: cannot be written: the disk is full"),
    (ValueError("Install `hf_xet`"), ResourceError, "pip install hf_xet"),
    (ValueError("Invalid filename"), InputError, "Invalid filename"),
    (RuntimeError("odd"), Dsv4Error, "RuntimeError: odd; please report this"),
    (VerifyError("a", "b"), VerifyError, "a: b"),
    (TransportError(f"https://x/y?{SIGNATURE} {TOKEN}"), ResourceError, "https://x/y?*** ***"),
])
def test_other_faults_in_one_line(error, kind, words):
    explained = faults.explain(error, REPO)
    assert type(explained) is kind
    assert words in str(explained)


def test_masking(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-odd-token")
    text = faults.mask(f"GET https://h/x?a=b&c=d\n Authorization: Bearer abc {TOKEN} an-odd-token\t.")
    assert text == "GET https://h/x?*** Authorization: Bearer *** *** *** ."


def test_importing_the_command_does_not_import_the_library():
    code = "import sys, dsv4tools.cli.download; print('huggingface_hub' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
