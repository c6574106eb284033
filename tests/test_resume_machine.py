"""Convert, kill, damage what is left, change a shard, go on, verify: in any order, and one thing always holds.

What carries the final name is the whole conversion of the sources that were there when its run began; inputs are never
touched. A reference conversion in one run says which bytes these are.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from conftest import SMALL, checksums
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from kills import difference
from nursery import Nursery
from tamper import shards, write_tensor

import dsv4tools as dt
from dsv4tools.journal import read_journal
from dsv4tools.synthetic import write_checkpoint

_TESTS = Path(__file__).parent
CHANGED = ("embed.weight", "layers.0.attn.wkv.weight", "layers.1.ffn.experts.2.w1.weight", "norm.weight")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint to copy, a process to run commands in, and the bytes of conversions that were made already."""
    directory = tmp_path_factory.mktemp("machine")
    source = write_checkpoint(directory / "checkpoint", SMALL, seed=9, shards=2)
    environment = {**os.environ, "PYTHONPATH": str(_TESTS)}
    with Nursery(directory, "dsv4tools.cli.convert", "doomed", environment=environment) as nursery:
        yield source, nursery, {}


class Conversions(RuleBasedStateMachine):
    """One output, one checkpoint, and what happens to them."""

    source_to_copy: Path
    nursery: Nursery
    known: dict[tuple[str, ...], Path]

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(dir=self.source_to_copy.parent))
        self.source = Path(shutil.copytree(self.source_to_copy, self.directory / "in" / "checkpoint"))
        self.out = self.directory / "out.gguf"
        self.policy = "q4k"
        self.note_source()

    def note_source(self):
        """The checkpoint is what we say now, and the bytes of the output are those that one run gives."""
        self.before = checksums(self.source)
        key = (self.policy, *self.before.values())
        if key not in self.known:
            path = self.source_to_copy.parent / f"reference-{len(self.known)}.gguf"
            dt.convert(dt.plan(dt.open_checkpoint(self.source), policy=self.policy), path)
            self.known[key] = path
        self.expected = self.known[key]

    def run(self, *options, **variables):
        return self.nursery.run("convert", self.source, self.out, "--policy", self.policy, *options, **variables)

    def beside(self, suffix) -> Path:
        return self.out.with_name(self.out.name + suffix)

    def leave_something(self) -> None:
        """There is a partial file, if not from a run that the machine has chosen."""
        if not self.beside(".partial").exists():
            self.convert_until_step(300, signal.SIGKILL, 2)

    @rule(step=st.integers(1, 420), number=st.sampled_from([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]),
          threads=st.integers(1, 3))  # fmt: skip
    def convert_until(self, step, number, threads):
        """A run that is killed or stopped at one of its steps, or ends before it comes to that."""
        self.convert_until_step(step, number, threads)

    def convert_until_step(self, step, number, threads) -> None:
        self.out.unlink(missing_ok=True)
        ended = self.run("--threads", threads, DIE_AT=f"{step}:{int(number)}")
        if ended.code in {2, 4}:      # another policy's partial file, a damaged lock: `finish` looks at that
            assert ended.err.count("error: ") == 1
        else:
            assert ended.code in {0, -signal.SIGKILL, 143}, ended

    @rule(seed=st.integers(0, 2**16), kind=st.sampled_from(["flip", "cut", "zeros", "noise"]),
          which=st.sampled_from([".partial", ".partial", ".journal", ".lock"]))  # fmt: skip
    def damage(self, seed, kind, which):
        """Of what a killed run left, anything: all of it is small enough to be looked at again."""
        self.leave_something()
        path = self.beside(which)
        size = path.stat().st_size if path.exists() else 0
        if not size:
            return
        rng = random.Random(seed)
        raw = bytearray(path.read_bytes())
        finished = [u.position for u in read_journal(self.beside(".journal")).units.values()]
        at = rng.choice(finished) if which == ".partial" and finished else rng.randrange(size)
        at = min(at, size - 1)
        if kind == "cut":
            del raw[at:]
        elif kind == "flip":
            raw[at] ^= 1 << rng.randrange(8)
        else:
            raw[at:at + 3000] = (bytes if kind == "zeros" else rng.randbytes)(len(raw[at:at + 3000]))
        with path.open("r+b") as file:       # in place: another inode would be another story
            file.write(raw)
            file.truncate()

    @rule(which=st.sampled_from([".partial", ".journal", ".lock"]), copy=st.booleans())
    def remove_or_replace(self, which, copy):
        self.leave_something()
        path = self.beside(which)
        if copy and path.exists():
            shutil.copy(path, self.directory / "copy")
            (self.directory / "copy").replace(path)
        else:
            path.unlink(missing_ok=True)

    @rule(value=st.integers(0, 3), name=st.sampled_from(CHANGED))
    def change_a_shard(self, value, name):
        """Other bytes under the same header."""
        self.leave_something()
        write_tensor(self.source, name, bytes([17 * value + 3]), at=40)
        self.note_source()

    @rule(second=st.booleans())
    def copy_a_shard(self, second):
        self.leave_something()
        shard = shards(self.source)[second]
        copy = shutil.copy(shard, self.directory / "shard")
        Path(copy).replace(shard)

    @rule()
    def choose_another_policy(self):
        self.leave_something()
        self.policy = "q8" if self.policy == "q4k" else "q4k"
        self.note_source()

    @rule(threads=st.integers(1, 4))
    def finish(self, threads):
        ended = self.run("--threads", threads)
        if ended.code == 2 and "exists; --overwrite" in ended.err:      # and is right: the invariant
            self.out.unlink()
            ended = self.run("--threads", threads)
        if ended.code == 4 and "is no lock of dsv4tools" in ended.err:      # we have made it so
            self.beside(".lock").unlink()
            ended = self.run("--threads", threads)
        if ended.code == 4 and "cannot be asked from here" in ended.err:
            ended = self.run("--steal-lock")
        if ended.code == 2 and "belongs to another conversion" in ended.err:
            ended = self.run("--restart")
        assert ended.code == 0, ended
        assert self.out.exists()
        assert sorted(p.name for p in self.directory.iterdir()) == ["in", "out.gguf"]

    @invariant()
    def the_final_name_means_all_of_it(self):
        if self.out.exists():
            assert difference(self.out, self.expected, 0) is None

    @invariant()
    def inputs_are_untouched(self):
        assert checksums(self.source) == self.before

    def teardown(self):
        self.out.unlink(missing_ok=True)
        self.finish(threads=2)
        self.the_final_name_means_all_of_it()
        shutil.rmtree(self.directory)


def test_any_order_of_events_ends_with_the_right_bytes(world):
    source, nursery, known = world

    class Here(Conversions):
        pass

    Here.source_to_copy, Here.nursery, Here.known = source, nursery, known
    run_state_machine_as_test(Here, settings=settings(
        max_examples=6, stateful_step_count=10, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck)))
