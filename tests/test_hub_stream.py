"""Conversions that fetch their shards on the way: the same bytes, in a disk of a stated size, whatever goes wrong."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import pytest
from conftest import SMALL
from hub_server import COMMIT, SIGNATURE, TOKEN, HubServer
from hypothesis import given, settings
from hypothesis import strategies as st
from nursery import Ended, Nursery
from process import error_line, messages
from tamper import write_tensor

import dsv4tools as dt
from dsv4tools import describe
from dsv4tools.errors import Interrupted, ResourceError, UsageError
from dsv4tools.hub.local import held
from dsv4tools.hub.ranges import RangeReader
from dsv4tools.hub.remote import RemoteShard, RemoteSource
from dsv4tools.hub.schedule import make_schedule
from dsv4tools.hub.snapshot import RemoteFile, Snapshot
from dsv4tools.hub.stream import StreamPlan, plan_stream
from dsv4tools.options import RunOptions
from dsv4tools.synthetic import write_checkpoint
from dsv4tools.workers import StopRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REPO = "org/tiny"
SOURCE = f"hf://{REPO}"
N = 6
SHARDS = [f"model-{i:05d}-of-{N:05d}.safetensors" for i in range(1, N + 1)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """What the Hub has; the last shards hold a draft block, which no conversion needs. Not to be changed."""
    shape = replace(SMALL, draft_blocks=1)
    return write_checkpoint(tmp_path_factory.mktemp("stream") / "tiny", shape, seed=5, shards=N)


@pytest.fixture(scope="module")
def needed(repository) -> list[str]:
    """The shards that a conversion needs."""
    plan = dt.plan(dt.open_checkpoint(repository))
    names = {name for t in plan.tensors for m in t.tensor.sources for name in m.shard_names}
    assert set(SHARDS[:3]) <= names < set(SHARDS)
    return sorted(names)


@pytest.fixture(scope="module")
def server(repository):
    with HubServer({REPO: repository}) as hub:
        yield hub


@pytest.fixture(scope="module")
def nursery(server, tmp_path_factory):
    directory = tmp_path_factory.mktemp("nursery")
    modules = ("dsv4tools.cli.convert", "dsv4tools.cli.download", "dsv4tools.cli.assemble", "huggingface_hub.hf_api",
               "huggingface_hub.file_download")
    with Nursery(directory, *modules, environment=server.environment(directory / "home")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def local(server, nursery, tmp_path_factory) -> Path:
    """A download of the repository, and the GGUF that it gives: ``local / "tiny"`` and ``local / "tiny.gguf"``."""
    directory = tmp_path_factory.mktemp("local")
    server.clear()
    assert nursery.run("download", REPO, cwd=directory).code == 0
    dt.convert(dt.plan(dt.open_checkpoint(directory / "tiny")), directory / "tiny.gguf")
    return directory


class Streams:
    """Streamed conversions of one test, and what they leave."""

    def __init__(self, hub: HubServer, nursery: Nursery, directory: Path, expected: bytes) -> None:
        self.hub, self.directory, self._nursery, self._expected = hub, directory, nursery, expected
        self.cache = directory / "cache" / "org--tiny" / COMMIT

    def _arguments(self, options: tuple[object, ...]) -> list[object]:
        return ["convert", SOURCE, "out.gguf", *options]

    def run(self, *options: object, **variables: str) -> Ended:
        return self.command(*self._arguments(options), **variables)

    def command(self, *arguments: object, **variables: str) -> Ended:
        ended = self._nursery.run(*arguments, cwd=self.directory, DSV4TOOLS_CACHE=str(self.directory / "cache"),
                                  **variables)
        assert not any(secret in ended.out + ended.err for secret in (TOKEN, SIGNATURE))
        return ended

    def begin(self, *options: object) -> None:
        self._nursery.begin(*self._arguments(options), cwd=self.directory,
                                   DSV4TOOLS_CACHE=str(self.directory / "cache"))

    def kill(self, number: int) -> Ended:
        self._nursery.kill(number)
        return self._nursery.end()

    def converts(self, *options: object, **variables: str) -> Ended:
        """A conversion that ends well, with the right bytes."""
        ended = self.run(*options, **variables)
        assert ended.code == 0, ended
        assert messages(ended.err) == [], ended
        self.check()
        return ended

    def check(self) -> None:
        assert (self.directory / "out.gguf").read_bytes() == self._expected
        assert {p.name for p in self.directory.iterdir()} == {"out.gguf", "cache"}

    def cached(self) -> list[str]:
        return sorted(p.name for p in self.cache.glob("*.safetensors"))

    def fetched(self) -> list[str]:
        """The shards that were asked for as a whole, in order."""
        return [r.file for r in self.hub.requests
                if r.kind == "lfs" and r.file.endswith(".safetensors") and "range" not in r.headers]

    def n_bytes(self) -> int:
        """What lies in the cache now, besides small files."""
        total = 0
        for path in self.cache.rglob("*"):
            try:
                if path.name.endswith((".safetensors", ".incomplete")):
                    total += path.stat().st_size
            except FileNotFoundError:   # removed in between
                continue
        return total


@pytest.fixture
def streams(server, nursery, tmp_path, local) -> Streams:
    server.clear()
    server.watch = lambda _: None
    server.add(REPO, server.repositories[REPO].directory)
    return Streams(server, nursery, tmp_path, (local / "tiny.gguf").read_bytes())


def failed(ended: Ended, code: int) -> str:
    assert ended.code == code, ended
    return error_line(ended.err)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------- the plan


def simulated(needs: list[set[int]], sizes: list[int], ahead: int, present: set[int]) -> tuple[int, int]:
    """The most shards and bytes on disk, by doing it: fetch, work in order of the last shard, remove what is left."""
    used = sorted(set().union(*needs))
    disk = present & set(used)
    most, most_bytes = 0, 0
    for i, shard in enumerate(used):
        disk |= set(used[i: i + ahead + 1])
        most, most_bytes = max(most, len(disk)), max(most_bytes, sum(sizes[j] for j in disk))
        later = set().union(*(need for need in needs if max(need) > shard))
        disk = {j for j in disk if j > shard or j in later}
    return most, most_bytes


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=12), st.integers(0, 4),
       st.lists(st.integers(1, 100), min_size=8, max_size=8), st.sets(st.integers(0, 7), max_size=4))
def test_schedules_state_what_happens(needs, ahead, sizes, present):
    names = [f"s{i}" for i in range(8)]
    schedule = make_schedule([{names[i] for i in need} for need in needs], dict(zip(names, sizes, strict=True)), ahead)
    assert schedule.shards == tuple(n for i, n in enumerate(names) if any(i in need for need in needs))
    assert schedule.peak() == simulated(needs, sizes, ahead, set())
    assert schedule.peak({names[i] for i in present}) == simulated(needs, sizes, ahead, present)


@pytest.mark.parametrize(("needs", "ahead", "peak"), [
    ([{"a"}, {"b"}, {"c"}], 0, (1, 30)), ([{"a"}, {"b"}, {"c"}], 1, (2, 50)), ([{"a"}, {"b"}, {"c"}], 9, (3, 60)),
    ([{"a", "c"}, {"b"}], 0, (2, 40)), ([{"a", "b"}, {"c"}], 0, (2, 30)), ([{"c"}], 2, (1, 30)), ([], 2, (0, 0)),
])
def test_peaks(needs, ahead, peak):
    assert make_schedule(needs, {"a": 10, "b": 20, "c": 30}, ahead).peak() == peak


def test_the_plan_states_the_disk_it_takes(streams, repository, needed):
    sizes = {name: (repository / name).stat().st_size for name in needed}
    data = json.loads(streams.run("--dry-run", "--json", "--delete-shards", "--shards-ahead", 1).out)
    assert data["hash_verified"] is True
    stream = data["stream"]
    assert (stream["n_shards"], stream["n_bytes"], stream["n_present_bytes"]) == (len(needed), sum(sizes.values()), 0)
    assert stream["directory"] == str(streams.cache)
    assert 2 <= stream["peak_shards"] <= 3
    assert stream["peak_bytes"] < sum(sizes.values())
    data = json.loads(streams.run("--dry-run", "--json").out)
    assert (data["stream"]["peak_shards"], data["stream"]["peak_bytes"]) == (len(needed), sum(sizes.values()))
    out = streams.run("--dry-run", "--delete-shards").out
    assert "the sha256 of each shard is checked before it is used" in out
    assert f"shards         {len(needed)} from the Hub" in out
    assert f" shards at once, {dt.sizes.format_bytes(stream['peak_bytes'])}" in \
        streams.run("--dry-run", "--delete-shards", "--shards-ahead", 1).out
    assert streams.fetched() == []
    assert streams.cached() == []


def test_shards_that_lie_there_count(streams, repository, needed):
    """A run that kept its shards was stopped, and another one is to remove them: at first they are all there."""
    streams.cache.mkdir(parents=True)
    for name in needed[1:]:
        shutil.copy(repository / name, streams.cache)
    options = ("--delete-shards", "--shards-ahead", 0)
    stream = json.loads(streams.run("--dry-run", "--json", *options).out)["stream"]
    sizes = [(repository / name).stat().st_size for name in needed]
    assert (stream["peak_shards"], stream["peak_bytes"]) == (len(needed), sum(sizes))
    assert stream["n_present_bytes"] == sum(sizes[1:])
    streams.converts(*options)
    assert streams.fetched() == needed[:1]
    assert streams.cached() == []


def test_shards_are_not_deleted_where_no_parts_can_be_read(repository, monkeypatch, tmp_path):
    """At the end rows are looked at: of large shards that are gone a server of whole files cannot send them."""
    files = {name: RemoteFile(name, (repository / name).stat().st_size, "0" * 64, None) for name in SHARDS}
    snapshot = Snapshot(REPO, COMMIT, files)
    source = RemoteSource(snapshot, tmp_path, RangeReader(snapshot))
    checkpoint = dt.open_checkpoint(repository)
    shards = {}
    for name, shard in checkpoint.shards.items():
        values = {f.name: getattr(shard, f.name) for f in fields(shard)}
        shards[name] = RemoteShard(**values, file=files[name], source=source)
    plan = dt.plan(replace(checkpoint, shards=shards))
    source.ranges.sends_whole_files = True
    assert plan_stream(plan, RunOptions(delete_shards=True)) is not None, "small ones come as a whole"
    monkeypatch.setattr("dsv4tools.hub.stream.MAX_SKIPPED_BYTES", 1 << 16)
    assert plan_stream(plan, RunOptions()) is not None
    with pytest.raises(ResourceError, match=r"sends whole files where parts .*; leave out --delete-shards$"):
        plan_stream(plan, RunOptions(delete_shards=True))
    source.ranges.sends_whole_files = False
    assert plan_stream(plan, RunOptions(delete_shards=True)) is not None


# -------------------------------------------------------------------------------------------------------- the same file


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_disk_stays_within_what_the_plan_states(streams, repository, needed, ahead):
    options = ("--delete-shards", "--shards-ahead", ahead)
    stated = json.loads(streams.run("--dry-run", "--json", *options).out)["stream"]["peak_bytes"]
    seen: list[int] = []
    streams.hub.watch = lambda _: seen.append(streams.n_bytes())
    ended = streams.converts(*options)
    fetched = streams.fetched()
    assert sorted(fetched) == needed, "each shard once; none that is not needed"
    assert ahead > 1 or fetched == needed, "in order"   # two fetch at a time
    assert 0 < max(seen) <= stated <= sum((repository / name).stat().st_size for name in needed)
    assert ahead or stated < 3 * max((repository / name).stat().st_size for name in needed)
    assert streams.cached() == []
    assert f"dsv4tools verify out.gguf --source {SOURCE}@{COMMIT}" in ended.out


def test_shards_stay_and_are_used_again(streams, needed):
    streams.converts("--threads", 1)
    assert streams.cached() == needed
    (streams.directory / "out.gguf").unlink()
    streams.hub.clear()
    ended = streams.converts()
    assert streams.fetched() == []
    assert f"note: checking {needed[0]}" in ended.err
    raw = bytearray((streams.cache / needed[1]).read_bytes())
    raw[-1] ^= 1
    (streams.cache / needed[1]).write_bytes(raw)
    (streams.directory / "out.gguf").unlink()
    streams.converts("--delete-shards")
    assert streams.fetched() == [needed[1]], "what is damaged in the cache is fetched again"
    assert streams.cached() == []


def test_four_experts_on_the_way(streams, local, tmp_path):
    checkpoint = dt.reroute(dt.open_checkpoint(local / "tiny"), 1)
    dt.convert(dt.plan(checkpoint), local / "one.gguf")
    assert streams.run("--experts-per-token", 1).code == 0
    assert (tmp_path / "out.gguf").read_bytes() == (local / "one.gguf").read_bytes()


def test_parts(streams):
    for i in (2, 1):
        ended = streams.run("--part", f"{i}/2", "--delete-shards")
        assert ended.code == 0, ended
    assert streams.command("assemble", "out.gguf").code == 0
    for part in streams.directory.glob("*.part-*"):
        part.unlink()
    streams.check()


# ---------------------------------------------------------------------------------------------------------- interrupted


def stopped_at(streams: Streams, shard: str, number: int) -> Ended:
    """A conversion that gets a signal when it has done all that comes before `shard`, which does not come."""
    streams.hub.fault("lfs", shard, stall=20, times=1, after=1)   # the first request is for its header
    streams.begin("--shards-ahead", 1, "--delete-shards")
    before = SHARDS[SHARDS.index(shard) - 1]
    # A shard is removed when its units are recorded.
    wait_for(lambda: shard in streams.fetched() and before not in streams.cached())
    ended = streams.kill(number)
    assert ended.code == (130 if number == signal.SIGINT else -number)
    return ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_it_goes_on_where_it_was(streams, needed, number):
    stopped_at(streams, needed[3], number)
    assert not (streams.directory / "out.gguf").exists()
    streams.hub.clear()
    ended = streams.converts("--delete-shards")
    assert sorted(streams.fetched()) == needed[3:], "shards whose units are done came again"
    assert "note: continuing out.gguf.partial: " in ended.err
    assert streams.cached() == []
    assert not list(streams.cache.rglob("*.incomplete"))


def test_a_branch_that_moved_meanwhile(streams, needed):
    stopped_at(streams, needed[3], signal.SIGINT)
    streams.hub.clear()
    moved = "f" * 40
    repository = streams.hub.repositories[REPO]
    repository.commit, repository.revisions = moved, {"main", moved, COMMIT}
    assert f"source commit is {moved}, was {COMMIT}" in failed(streams.run("--delete-shards"), 2)
    ended = streams.command("convert", f"{SOURCE}@{COMMIT}", "out.gguf", "--delete-shards")
    assert ended.code == 0, ended
    assert sorted(streams.fetched()) == needed[3:]
    streams.check()


def test_streamed_then_from_a_download(streams, local, needed):
    stopped_at(streams, needed[3], signal.SIGINT)
    streams.hub.clear()
    ended = streams.command("convert", local / "tiny", "out.gguf")
    assert ended.code == 0, ended
    assert "; checking their units" in ended.err
    assert "note: continuing out.gguf.partial: " in ended.err
    assert streams.hub.requests == []
    streams.check()


def test_from_a_download_then_streamed(streams, local, needed):
    """To look at what was done would take the shards: their units are done again."""
    stop = StopRequest()
    with pytest.raises(Interrupted):
        dt.convert(dt.plan(dt.open_checkpoint(local / "tiny")), streams.directory / "out.gguf",
                   run=RunOptions(threads=1, stop=stop, progress=lambda _: stop.request(signal.SIGINT)))
    assert (streams.directory / "out.gguf.partial").exists()
    streams.converts("--delete-shards")
    assert sorted(streams.fetched()) == needed


def test_kills_at_any_moment(streams, needed):
    """Nothing under the name, or all of it; nothing that is done comes again for ever; no litter in the cache."""
    rng = random.Random(7)
    for i in range(8):
        streams.begin("--delete-shards", "--shards-ahead", i % 3)
        time.sleep(rng.uniform(0.2, 1.0))
        streams.kill(signal.SIGKILL)
        if (streams.directory / "out.gguf").exists():
            break
    streams.converts("--delete-shards")
    assert streams.cached() == []
    assert not list(streams.cache.rglob("*.incomplete"))


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_corrupted_shard_is_caught_and_fetched_again(streams, needed):
    streams.hub.fault("lfs", needed[1], corrupt=5000, times=1, after=1)
    streams.converts("--delete-shards")
    assert streams.fetched().count(needed[1]) == 2


def test_what_is_corrupted_again_and_again_is_not_converted(streams, repository, needed):
    streams.hub.fault("lfs", needed[1], corrupt=(repository / needed[1]).stat().st_size - 1)
    line = failed(streams.run("--delete-shards"), 5)
    assert f"{needed[1]}: came twice with another sha256 than the Hub states" in line
    assert not (streams.directory / "out.gguf").exists()
    assert needed[1] not in streams.cached()
    streams.hub.clear()
    streams.converts("--delete-shards")
    assert needed[0] not in streams.fetched(), "what came before was done"


def test_a_header_that_was_damaged_on_its_way(streams, repository, needed):
    """No hash covers what a range request brings: a wrong plan is noticed when the shard is there."""
    raw = (repository / needed[0]).read_bytes()
    at = raw.index(b'"format":"pt"') + len(b'"format":"')
    streams.hub.fault("lfs", needed[0], corrupt=at, times=1)
    line = failed(streams.run("--delete-shards"), 5)
    assert f"{needed[0]}: has another header than the one that came first, which no hash covers" in line
    streams.converts("--delete-shards")


def test_connections_that_break(streams, needed):
    streams.hub.fault("lfs", needed[0], drop=1000, times=1, after=1)
    streams.hub.fault("lfs", needed[1], drop=1000, reset=True, times=1, after=1)
    streams.hub.fault("lfs", needed[2], short=10, times=1, after=1)
    streams.hub.fault("lfs", needed[-1], status=503, times=1, after=1)
    ended = streams.run("--delete-shards")
    assert ended.code == 0, ended
    assert all(line.startswith("warning: ") for line in messages(ended.err)), ended
    assert "Trying to resume download" in ended.err
    streams.check()


def test_a_wait_that_is_asked_for(streams, needed):
    streams.hub.fault("resolve", needed[1], status=429, retry_after=1, times=2, after=1)
    ended = streams.run("--delete-shards")
    assert ended.code == 0, ended
    streams.check()


@pytest.mark.parametrize(("fault", "problem"), [
    ({"status": 401}, "access denied (401)"), ({"status": 404, "code": "EntryNotFound"}, "it lists is not there"),
])
def test_what_was_done_before_a_refusal_stays(streams, needed, fault, problem):
    streams.hub.fault("resolve", needed[2], after=1, **fault)   # the first request is for its header
    assert problem in failed(streams.run("--delete-shards", "--shards-ahead", 1), 4)
    streams.hub.clear()
    streams.converts("--delete-shards")
    assert needed[0] not in streams.fetched()


def test_a_fault_of_the_source_does_not_wait_for_shards(streams, repository, tmp_path):
    source = shutil.copytree(repository, tmp_path / "source")
    write_tensor(source, "layers.0.attn_norm.weight", b"\xff\xff")
    streams.hub.add("org/bad", source)
    streams.hub.fault("lfs", SHARDS[1], stall=30, times=1, after=1)
    began = time.monotonic()
    ended = streams.command("convert", "hf://org/bad", "bad.gguf", "--shards-ahead", 1)
    assert "layers.0.attn_norm.weight" in failed(ended, 3)
    assert time.monotonic() - began < 25


def test_one_at_a_time(streams, needed):
    streams.hub.fault("lfs", needed[0], stall=20, times=1, after=1)
    streams.begin()
    try:
        wait_for(streams.fetched)
        with pytest.raises(dt.ResourceError, match="another download into it is running"), held(streams.cache):
            pass
    finally:
        streams.kill(signal.SIGKILL)


def test_a_disk_that_is_too_small(streams, local, monkeypatch, tmp_path):
    """The plan says so, and the conversion does not begin."""
    checkpoint = dt.open_checkpoint(local / "tiny")
    size = sum(s.n_file_bytes for s in checkpoint.shards.values())
    data = describe.describe_plan(dt.plan(checkpoint), tmp_path / "out.gguf", 1, StreamPlan(
        tmp_path / "none" / "cache", 6, size, 0, 2, True, 3, 10**15))
    assert data["fits"] is False


def test_files_of_the_users_are_never_deleted(streams, local):
    before = sorted(p.name for p in (local / "tiny").iterdir())
    line = failed(streams.command("convert", local / "tiny", "x.gguf", "--delete-shards"), 2)
    assert "--delete-shards: is for hf://OWNER/NAME: files in a directory of yours are never removed" in line
    with pytest.raises(UsageError, match="are never removed"):
        dt.convert(dt.plan(dt.open_checkpoint(local / "tiny")), streams.directory / "x.gguf",
                   run=RunOptions(delete_shards=True))
    with pytest.raises(UsageError, match="--shards-ahead: is -1, expected 0 to 1000"):
        dt.convert(dt.plan(dt.open_checkpoint(local / "tiny")), streams.directory / "x.gguf",
                   run=RunOptions(shards_ahead=-1))
    assert sorted(p.name for p in (local / "tiny").iterdir()) == before
