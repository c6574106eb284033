"""Checkpoints on the Hub, read where they are: what is asked for, what comes, and what goes wrong in one line."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from conftest import SMALL
from hub_server import COMMIT, SIGNATURE, TOKEN, HubServer
from nursery import Ended, Nursery
from process import COMMAND, error_line
from tamper import read_header

import dsv4tools as dt
from dsv4tools.errors import UsageError
from dsv4tools.hub import HubReference, parse_reference, ranges
from dsv4tools.hub.remote import _FIRST_BYTES
from dsv4tools.synthetic import write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

REPO = "org/tiny"
SOURCE = f"hf://{REPO}"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """What the Hub has. Not to be changed."""
    path = write_checkpoint(tmp_path_factory.mktemp("remote") / "tiny", SMALL, seed=5, shards=3)
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (path / "big.pdf").write_bytes(bytes(1000))
    return path


@pytest.fixture(scope="module")
def server(repository):
    with HubServer({REPO: repository}) as hub:
        yield hub


@pytest.fixture(scope="module")
def nursery(server, tmp_path_factory):
    directory = tmp_path_factory.mktemp("nursery")
    modules = [f"dsv4tools.cli.{name}" for name in ("convert", "inspect", "template", "policy", "verify", "encode")]
    with Nursery(directory, *modules, "huggingface_hub.hf_api", "huggingface_hub.file_download",
                 environment=server.environment(directory / "home")) as nursery:
        yield nursery


@pytest.fixture
def hub(server, nursery, tmp_path):
    """The server without faults, and `hub.run(...)`, a command in the test's directory. No secret is ever printed."""
    server.clear()
    for name, repository in server.repositories.items():
        server.add(name, repository.directory)

    def run(*arguments: object, **variables: str) -> Ended:
        ended = nursery.run(*arguments, cwd=tmp_path, DSV4TOOLS_CACHE=str(tmp_path / "cache"), **variables)
        for secret in (TOKEN, SIGNATURE, variables.get("HF_TOKEN") or TOKEN):
            assert secret not in ended.out + ended.err
        return ended

    server.run = run
    return server


def failed(ended: Ended, code: int) -> str:
    assert ended.code == code, ended
    return error_line(ended.err)


def succeeded(ended: Ended) -> str:
    assert (ended.code, ended.err) == (0, ""), ended
    return ended.out


def home(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "org--tiny" / COMMIT


def sent(hub: HubServer, suffix: str) -> int:
    return sum(r.n_sent for r in hub.requests if r.file.endswith(suffix))


# ------------------------------------------------------------------------------------------ what is said and what comes


@pytest.mark.parametrize("arguments", [
    ("convert", "SRC", "out.gguf", "--dry-run", "--json"), ("policy", "explain", "SRC", "--json"),
    ("policy", "explain", "SRC", "--policy", "q8", "--experts-per-token", "1"), ("inspect", "SRC", "--json"),
])
def test_the_hub_says_what_a_download_says(hub, tmp_path, arguments):
    assert hub.run("download", REPO, "here").code == 0
    hub.clear()
    there = succeeded(hub.run(*(SOURCE if a == "SRC" else a for a in arguments)))
    here = succeeded(hub.run(*("here" if a == "SRC" else a for a in arguments)))
    if arguments[0] != "policy":
        there, here = (json.loads(text) for text in (there, here))
        for data in (there, here):
            data.pop("path", None)
            data.pop("free_bytes", None)
            data.pop("stream", None)
            data.pop("hash_verified", None)
    assert there == here


def test_only_headers_come(hub, repository, monkeypatch):
    succeeded(hub.run("inspect", SOURCE))
    for shard in SHARDS:
        n_bytes = (repository / shard).stat().st_size
        asked = [r.headers["range"] for r in hub.requests if r.file == shard and r.kind == "lfs"]
        assert asked == [f"bytes=0-{min(_FIRST_BYTES, n_bytes) - 1}"]
    assert not hub.count("resolve", "big.pdf")
    assert hub.count("info") == 1
    assert all(f"/resolve/{COMMIT}/" in r.path for r in hub.requests if r.kind == "resolve"), "not pinned to the commit"


def test_headers_longer_than_the_first_request(hub, repository, tmp_path):
    """Of a shard with a long header and much behind it: what comes is the header, and little more."""
    source = shutil.copytree(repository, tmp_path / "long")
    for name in SHARDS:
        raw = (source / name).read_bytes()
        n_header = int.from_bytes(raw[:8], "little")
        header = raw[8: 8 + n_header] + b" " * 600_000
        (source / name).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + n_header:])
    hub.add("org/long", source)
    there = json.loads(succeeded(hub.run("inspect", "hf://org/long", "--json")))
    here = json.loads(succeeded(hub.run("inspect", source, "--json")))
    assert {**there, "path": "", "name": ""} == {**here, "path": "", "name": ""}
    for name in SHARDS:
        _, data_start = read_header(source / name)
        assert sent(hub, name) == data_start


def test_a_template_is_the_same_file(hub, tmp_path):
    assert hub.run("download", REPO, "here").code == 0
    hub.run("template", "here", "local.gguf")
    assert "wrote remote.gguf" in succeeded(hub.run("template", SOURCE, "remote.gguf"))
    assert (tmp_path / "local.gguf").read_bytes() == (tmp_path / "remote.gguf").read_bytes()


def test_small_files_stay_and_are_looked_at(hub, tmp_path):
    succeeded(hub.run("inspect", SOURCE))
    assert not list(home(tmp_path).glob("*.safetensors"))
    hub.clear()
    succeeded(hub.run("inspect", SOURCE))
    assert {r.file for r in hub.requests if r.kind in {"resolve", "lfs"}} == set(SHARDS)
    (home(tmp_path) / "config.json").write_bytes(b"{}")
    succeeded(hub.run("inspect", SOURCE))
    assert hub.count("resolve", "config.json") == 1


def test_revisions(hub):
    out = succeeded(hub.run("inspect", f"{SOURCE}@v1.0"))
    assert f"checkpoint     hf://{REPO}@{COMMIT} (tiny)" in out
    assert f"dsv4tools convert hf://{REPO}@{COMMIT} --dry-run" in out
    assert "has no revision 'v9'" in failed(hub.run("inspect", f"{SOURCE}@v9"), 4)


def test_verify_reads_rows_where_they_are(hub, repository, tmp_path):
    checkpoint = dt.open_checkpoint(repository)
    dt.convert(dt.plan(checkpoint), tmp_path / "out.gguf")
    ended = hub.run("verify", "out.gguf", "--source", SOURCE, "--tensor", "blk.1.*")
    assert ended.code == 0, ended
    assert "are what the source gives, byte for byte" in ended.out
    layer = sum(t.n_bytes for name, t in checkpoint.tensors.items() if name.startswith("layers.1."))
    headers = sum(min(_FIRST_BYTES, (repository / s).stat().st_size) for s in SHARDS)
    assert sent(hub, ".safetensors") <= layer + headers
    # The Hub is asked where a shard is; after that its store is asked for rows.
    assert hub.count("resolve", SHARDS[0]) + hub.count("resolve", SHARDS[1]) + hub.count("resolve", SHARDS[2]) < 20
    assert hub.count("lfs") > 60
    hub.clear()
    ended = hub.run("verify", "out.gguf", "--source", SOURCE, "--sample", "1")
    assert ended.code == 0, ended
    with (tmp_path / "out.gguf").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"wrong")
    name = max(dt.plan(checkpoint).tensors, key=lambda t: t.offset).name
    assert hub.run("verify", "out.gguf", "--source", SOURCE, "--tensor", name).code == 5


def test_an_address_that_expires_is_asked_for_again(hub, repository, tmp_path):
    dt.convert(dt.plan(dt.open_checkpoint(repository)), tmp_path / "out.gguf")
    hub.fault("lfs", SHARDS[1], status=403, times=1, after=2)
    ended = hub.run("verify", "out.gguf", "--source", SOURCE, "--tensor", "blk.1.*", "--threads", "1")
    assert ended.code == 0, ended


def test_token_ids_need_only_the_tokenizer(hub, tmp_path):
    (tmp_path / "chat.json").write_text('[{"role": "user", "content": "Hello"}]')
    hub.run("download", REPO, "here")
    hub.clear()
    assert hub.run("encode", "chat.json", "--ids", "--model", SOURCE) == \
        hub.run("encode", "chat.json", "--ids", "--model", "here")
    assert not hub.count("lfs", SHARDS[0])


def test_a_download_takes_the_same_name(hub, tmp_path):
    assert hub.run("download", f"{SOURCE}@v1.0", "--include", "config.json").code == 0
    assert (tmp_path / "tiny" / "config.json").exists()
    assert "give one of them" in failed(hub.run("download", f"{SOURCE}@v1.0", "--revision", "main"), 2)


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("arguments", [
    ("logits", "SRC", "--tokens", "1", "--out", "x.npy"), ("generate", "SRC", "-p", "x"),
    ("compare", "SRC", "SRC", "--tokens", "1"), ("reroute", "SRC", "out", "--experts-per-token", "1"),
    ("verify", "x.gguf", "--source", "SRC", "--forward"),
])
def test_what_needs_the_weights_says_so(hub, arguments):
    line = failed(hub.run(*(f"{SOURCE}@v1.0" if a == "SRC" else a for a in arguments)), 2)
    assert line.startswith(f"error: {SOURCE}@v1.0: is on the Hub, and ")
    assert line.endswith(f"; dsv4tools download {REPO} --revision v1.0, then give the directory")
    assert not hub.requests


@pytest.mark.parametrize("arguments", [
    ("verify", "SRC"), ("diff", "SRC", "x.gguf"), ("diff", "x.gguf", "SRC"),
    ("convert", "x", "out.gguf", "--imatrix", "SRC"), ("convert", "x", "out.gguf", "--template", "SRC"),
])
def test_files_to_read_are_on_the_disk(dsv4tools, arguments):
    line = dsv4tools(*(SOURCE if a == "SRC" else a for a in arguments)).failed(2)
    assert line.endswith(f"; dsv4tools download {REPO}, then give the file")
    assert line.startswith(f"error: {SOURCE}: is on the Hub, and this file is read from the disk")


@pytest.mark.parametrize("arguments", [
    ("convert", "x", "OUT"), ("template", "x", "OUT"), ("reroute", "x", "OUT", "--experts-per-token", "4"),
    ("download", REPO, "OUT"), ("assemble", "OUT"),
])
def test_nothing_is_written_to_the_hub(dsv4tools, arguments):
    line = dsv4tools(*(SOURCE if a == "OUT" else a for a in arguments)).failed(2)
    assert line == f"error: {SOURCE}: is on the Hub, and nothing is written there; give a path on this machine"


@pytest.mark.parametrize("text", [REPO, f"hf:/{REPO}", f"HF://{REPO}", f"https://huggingface.co/{REPO}/"])
@pytest.mark.parametrize("command", [("convert", "SRC", "--dry-run"), ("policy", "explain", "SRC"), ("inspect", "SRC")])
def test_repositories_by_other_names(dsv4tools, monkeypatch, tmp_path, text, command):
    monkeypatch.chdir(tmp_path)
    line = dsv4tools(*(text if a == "SRC" else a for a in command)).failed(3)
    assert line.endswith(f": is missing; if a repository of the Hub is meant: {SOURCE}")


@pytest.mark.parametrize("text", ["tiny", "/org/tiny", "../tiny", "~/tiny", "a/b/c", "org/tiny/x.gguf"])
def test_paths_that_are_no_repositories(dsv4tools, monkeypatch, tmp_path, text):
    monkeypatch.chdir(tmp_path)
    assert dsv4tools("convert", text, "--dry-run").failed(3).endswith(": is missing")


@pytest.mark.parametrize("text", ["hf://", "hf://x", "hf://a/b/c", "hf://a/b@", "hf:///x", "hf://a/../b", "hf://-a/b",
                                  "hf://datasets/a/b", "hf://a/b#main"])
def test_names_that_are_none(dsv4tools, text):
    with pytest.raises(UsageError, match="names no repository of models; expected hf://OWNER/NAME"):
        parse_reference(text)
    assert "names no repository of models" in dsv4tools("inspect", text).failed(2)


def test_names():
    assert parse_reference("hf://a/b-c.d@refs/pr/1") == HubReference("a/b-c.d", "refs/pr/1")
    assert str(parse_reference("hf://a/b@x")) == "hf://a/b@x"
    assert str(parse_reference("hf://a/b")) == "hf://a/b"


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_broken_connection_goes_on_where_it_was(hub, repository):
    hub.fault("lfs", SHARDS[0], drop=1000, times=1)
    hub.fault("lfs", SHARDS[1], drop=1000, reset=True, times=1)
    hub.fault("lfs", "tokenizer.json", drop=1000, times=1)
    succeeded(hub.run("inspect", SOURCE))
    n_bytes = min(_FIRST_BYTES, (repository / SHARDS[0]).stat().st_size)
    asked = [r.headers["range"] for r in hub.requests if r.file == SHARDS[0] and r.kind == "lfs"]
    assert asked == [f"bytes=0-{n_bytes - 1}", f"bytes=1000-{n_bytes - 1}"]


def test_an_answer_that_is_too_short(hub):
    hub.fault("lfs", SHARDS[0], short=100, times=1)
    succeeded(hub.run("inspect", SOURCE))
    assert hub.count("lfs", SHARDS[0]) == 2


def test_a_server_that_sends_whole_files(hub, repository, tmp_path):
    """Of headers the beginning is taken and the rest left; rows from the middle of a large file are refused."""
    hub.fault("lfs", ignore_range=True)
    succeeded(hub.run("inspect", SOURCE))
    dt.convert(dt.plan(dt.open_checkpoint(repository)), tmp_path / "out.gguf")
    assert hub.run("verify", "out.gguf", "--source", SOURCE, "--tensor", "output_norm.weight").code == 0


def test_rows_far_behind_the_beginning_of_whole_files(monkeypatch):
    monkeypatch.setattr(ranges, "MAX_SKIPPED_BYTES", 10)
    file = dt.hub.RemoteFile("model.safetensors", 1000, "0" * 64, None)
    reader = ranges.RangeReader(dt.hub.Snapshot(REPO, COMMIT, {file.name: file}))
    assert reader._check_answer(Answer(200), file, 0, 1000) == 0
    assert not reader.sends_whole_files, "the whole was asked for"
    assert reader._check_answer(Answer(200), file, 10, 5) == 10
    assert reader.sends_whole_files
    with pytest.raises(dt.ResourceError, match=r"sends the whole file of 1\.00 kB .*; it serves no parts: use dsv4"):
        reader._check_answer(Answer(200), file, 11, 5)


class Answer:
    def __init__(self, status: int, content_range: str = "") -> None:
        self.status_code, self.headers = status, {"content-range": content_range}


@pytest.mark.parametrize(("status", "content_range", "problem"), [
    (206, "bytes 1-5/1000", r"bytes 0 to 4 were asked for, the answer is 'bytes 1-5/1000' with status 206"),
    (206, "", "the answer is '' with status 206"), (204, "bytes 0-4/1000", "with status 204"),
    (206, "bytes 0-4/999", "has 999 bytes, the Hub states 1,000"),
])
def test_answers_to_another_question(status, content_range, problem):
    file = dt.hub.RemoteFile("model.safetensors", 1000, "0" * 64, None)
    reader = ranges.RangeReader(dt.hub.Snapshot(REPO, COMMIT, {file.name: file}))
    with pytest.raises(dt.ResourceError, match=problem):
        reader._check_answer(Answer(status, content_range), file, 0, 5)
    assert reader._check_answer(Answer(206, "bytes 0-4/*"), file, 0, 5) == 0


def test_more_than_was_asked_for_is_left():
    assert list(ranges._cut(iter([b"abc", b"defg", b"hij"]), 0, 5)) == [b"abc", b"de"]
    assert list(ranges._cut(iter([b"abc", b"defg", b"hij"]), 4, 5)) == [b"", b"efg", b"hi"]
    assert list(ranges._cut(iter([b"abc"]), 0, 5)) == [b"abc"]


def test_a_small_file_that_is_damaged(hub, tmp_path):
    hub.fault("lfs", "tokenizer.json", corrupt=100, times=1)
    succeeded(hub.run("inspect", SOURCE))
    shutil.rmtree(tmp_path / "cache")
    hub.fault("resolve", "config.json", corrupt=100)
    line = failed(hub.run("inspect", SOURCE), 5)
    assert f"hf://{REPO}@{COMMIT}: file 'config.json': came twice with another hash than the Hub states" in line
    assert [p.name for p in home(tmp_path).iterdir()] == [".cache"]


def test_access(hub):
    hub.repositories[REPO].private = True
    assert "does not exist on the Hub, or is private" in failed(hub.run("inspect", SOURCE), 4)
    succeeded(hub.run("inspect", SOURCE, HF_TOKEN=TOKEN))
    to_store = [r for r in hub.requests if r.kind == "lfs"]
    assert to_store
    assert not any("authorization" in r.headers for r in to_store), "the token went to another host"
    hub.repositories[REPO].private, hub.repositories[REPO].gated = False, True
    line = failed(hub.run("policy", "explain", SOURCE), 4)
    assert f"{REPO}: is gated: access must be granted to you; ask for it at {hub.url}/{REPO}" in line
    assert "access denied (401)" in failed(hub.run("inspect", SOURCE, HF_TOKEN="hf_wrongButSecretAllTheSame"), 4)


@pytest.mark.parametrize(("fault", "problem"), [
    ({"status": 429, "retry_after": 3600}, "answers too many requests (429), and asks to wait 3600 s"),
    ({"status": 404, "code": "EntryNotFound"}, "a file that it lists is not there"),
    ({"status": 416}, "the Hub answers with status 416"),
    ({"status": 403}, "access denied (403)"),
])
@pytest.mark.parametrize("kind", ["resolve", "lfs"])
def test_refusals_of_hub_and_store(hub, fault, problem, kind):
    hub.fault(kind, SHARDS[1], **fault)
    assert problem in failed(hub.run("inspect", SOURCE), 4)


def test_a_wait_that_is_asked_for(hub):
    hub.fault("lfs", SHARDS[0], status=429, retry_after=1, times=1)
    hub.fault("lfs", SHARDS[1], status=503, times=1)
    succeeded(hub.run("inspect", SOURCE))


def test_headers_are_read_as_strictly_as_files(hub, repository, tmp_path):
    source = shutil.copytree(repository, tmp_path / "bad")
    hub.add("org/bad", source)
    raw = (source / SHARDS[1]).read_bytes()
    (source / SHARDS[1]).write_bytes(raw + b"x")
    line = failed(hub.run("inspect", "hf://org/bad"), 3)
    assert f"hf://org/bad: {SHARDS[1]}: has bytes behind its last tensor" in line
    (source / SHARDS[1]).unlink()
    hub.add("org/bad", source)
    assert f"{SHARDS[1]} is named by the index but missing" in failed(hub.run("inspect", "hf://org/bad"), 3)


def test_nothing_else_is_contacted(hub, tmp_path):
    """Every connection of the process goes to the loopback interface: any other would fail the command."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "connect = socket.socket.connect\n"
        "def guarded(self, address):\n"
        "    assert self.family == socket.AF_UNIX or address[0] in ('127.0.0.1', '::1', 'localhost'), address\n"
        "    return connect(self, address)\n"
        "socket.socket.connect = guarded\n")
    assert socket.gethostbyname("localhost") == "127.0.0.1"
    environment = hub.environment(tmp_path / "home", DSV4TOOLS_CACHE=str(tmp_path / "cache"),
                                  PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    ended = subprocess.run([*COMMAND, "inspect", SOURCE], env=environment, cwd=tmp_path, text=True, check=False,
                           capture_output=True, timeout=120)
    assert ended.returncode == 0, ended
    assert "hash-routed" in ended.stdout
