"""Killing a command at random moments, again and again, and looking at what is left each time.

A subject says what is run, and what may be found after a kill. Modules are loaded before the clock starts, so that the
kills fall into the work.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from conftest import TINY_6E, checksums
from hub_server import HubServer
from nursery import Nursery

import dsv4tools as dt
from dsv4tools.checkpoint.card import RECEIPT
from dsv4tools.parts import convert_part, part_path, read_part
from dsv4tools.split_plan import split_plan
from dsv4tools.synthetic import write_checkpoint, write_full_width

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_TESTS = Path(__file__).parent
_MOST_RUNS = 10


class Subject(Protocol):
    """A command to be killed.

    Attributes
    ----------
    arguments:
        Of the command line, the command's name first. May be others for the next run: of another part.
    modules:
        Loaded before the clock starts.
    environment:
        Of the command.
    """

    arguments: list[str]
    modules: Sequence[str]
    environment: Mapping[str, str]

    def look(self) -> str:
        """What is there, in a word; AssertionError if it must not be so."""

    def clean(self) -> None:
        """Remove a whole result, so that there is work again. What kills left behind stays."""


class RerouteDirectory:
    """Re-routing a checkpoint: after a kill there is nothing under the result's name, or all of it."""

    modules = ("dsv4tools.cli.reroute",)
    environment = os.environ

    def __init__(self, directory: Path) -> None:
        self.source = write_checkpoint(directory / "source", TINY_6E, seed=7)
        self.before = checksums(self.source)
        self.out = directory / "result"
        self.arguments = ["reroute", str(self.source), str(self.out), "--experts-per-token", "4"]
        dt.reroute_checkpoint(self.source, directory / "expected", 4)
        self.expected = checksums(directory / "expected")

    def look(self) -> str:
        assert checksums(self.source) == self.before, "the source was changed"
        if not self.out.exists():
            return "nothing"
        assert checksums(self.out) == self.expected, "the result is not whole"
        return "whole"

    def clean(self) -> None:
        for path in self.out.iterdir():
            path.unlink()
        self.out.rmdir()


class RerouteGguf:
    """Re-routing a GGUF: the same."""

    modules = ("dsv4tools.cli.reroute",)
    environment = os.environ

    def __init__(self, directory: Path) -> None:
        checkpoint = write_checkpoint(directory / "checkpoint", TINY_6E, seed=7)
        self.source, self.out = directory / "source.gguf", directory / "result.gguf"
        dt.convert(dt.plan(dt.open_checkpoint(checkpoint), policy="q8"), self.source)
        self.before = self.source.read_bytes()
        self.arguments = ["reroute", str(self.source), str(self.out), "--experts-per-token", "4"]
        dt.reroute_gguf(self.source, directory / "expected.gguf", 4)
        self.expected = (directory / "expected.gguf").read_bytes()

    def look(self) -> str:
        assert self.source.read_bytes() == self.before, "the source was changed"
        if not self.out.exists():
            return "nothing"
        assert self.out.read_bytes() == self.expected, "the result is not whole"
        return "whole"

    def clean(self) -> None:
        self.out.unlink()


class Convert:
    """A conversion: nothing under the result's name, or all of it; what is finished is used by the next run.

    `source` is a checkpoint; by default one is made at the widths of Flash, of which a conversion takes seconds.
    """

    modules = ("dsv4tools.cli.convert", "dsv4tools.cli.assemble", "hasty")
    environment = os.environ

    def __init__(self, directory: Path, source: Path | None = None) -> None:
        self.source = source or write_full_width(directory / "source", layers=1, experts=4, seed=3)
        self.before = checksums(self.source)
        self.out, self.expected = directory / "out.gguf", directory / "expected.gguf"
        self.plan = dt.plan(dt.open_checkpoint(self.source))
        dt.convert(self.plan, self.expected)
        self._threads = itertools.cycle([2, 1, 3, 5])   # the next run has another number

    @property
    def arguments(self) -> list[str]:
        return ["convert", str(self.source), str(self.out), "--threads", str(next(self._threads))]

    def look(self) -> str:
        assert checksums(self.source) == self.before, "the source was changed"
        return look_at(self.out, self.expected, self.plan.data_offset)

    def clean(self) -> None:
        self.out.unlink()


class Split(Convert):
    """A conversion to a split set: no first part, or all parts."""

    def __init__(self, directory: Path, source: Path | None = None) -> None:
        super().__init__(directory, source)
        size = self.expected.stat().st_size * 2 // 5
        dt.convert(split_plan(self.plan, size), directory / "expected-set.gguf")
        self.pieces = sorted(directory.glob("expected-set-*-of-*.gguf"))
        assert len(self.pieces) >= 3
        self._size = size

    @property
    def arguments(self) -> list[str]:
        return [*super().arguments, "--split-max-size", str(self._size)]

    def _paths(self) -> list[Path]:
        return [self.out.with_name(piece.name.replace("expected-set", "out")) for piece in self.pieces]

    def look(self) -> str:
        assert checksums(self.source) == self.before, "the source was changed"
        paths = self._paths()
        for path, piece in zip(paths, self.pieces, strict=True):
            assert not path.exists() or path.read_bytes() == piece.read_bytes(), f"{path.name} is not whole"
        if paths[0].exists():
            assert all(path.exists() for path in paths), "a first part without the others"
            return "whole"
        return "resumable" if list(self.out.parent.glob("out-*")) else "nothing"

    def clean(self) -> None:
        for path in self._paths():
            path.unlink()


class Parts(Convert):
    """A conversion by parts, then put together: the same of each part, and of the whole."""

    N = 3

    def __init__(self, directory: Path, source: Path | None = None) -> None:
        super().__init__(directory, source)
        self.parts = {}
        for i in range(1, self.N + 1):
            expected, _ = convert_part(self.plan, directory / "expected-parts.gguf", i, self.N)
            path = part_path(self.out, i, self.N)
            self.parts[path] = (expected, min(unit.start for unit in read_part(expected).units))

    @property
    def arguments(self) -> list[str]:
        missing = [i for i, path in enumerate(self.parts, 1) if not path.exists()]
        if not missing:
            return ["assemble", str(self.out), "--threads", str(next(self._threads))]
        return [*super().arguments, "--part", f"{missing[0]}/{self.N}"]

    def look(self) -> str:
        states = [look_at(path, *expected) for path, expected in self.parts.items()]
        return super().look() if set(states) == {"whole"} else f"{states.count('whole')} parts"

    def clean(self) -> None:
        super().clean()
        for path in self.parts:
            path.unlink()


class Assemble(Parts):
    """Putting parts together that stay as they are."""

    def __init__(self, directory: Path, source: Path | None = None) -> None:
        super().__init__(directory, source)
        for path, (expected, _) in self.parts.items():
            path.hardlink_to(expected)

    def clean(self) -> None:
        self.out.unlink()


class Download:
    """A download: after a kill there are whole files, or nothing under their names.

    `hub` has the repository ``org/model`` to fetch, which is `source`; by default both are made.
    """

    modules = ("dsv4tools.cli.download", "huggingface_hub.file_download", "huggingface_hub.hf_api")

    def __init__(self, directory: Path, source: Path | None = None, hub: HubServer | None = None) -> None:
        self.source = source or write_checkpoint(directory / "source", TINY_6E, seed=7, shards=8)
        self.before, self.out = checksums(self.source), directory / "fetched"
        hub = hub or HubServer().__enter__()     # ends with the process
        hub.add("org/model", self.source)
        self.environment = hub.environment(directory / "home")
        self.arguments = ["download", "org/model", str(self.out)]

    def look(self) -> str:
        assert checksums(self.source) == self.before, "the source was changed"
        files = [p for p in self.out.iterdir() if p.is_file()] if self.out.exists() else []
        for path in files:
            assert difference(path, self.source / path.name, 0) is None, f"{path.name} is not whole"
        is_noted = (self.out / RECEIPT).exists()
        assert not is_noted or len(files) == len(self.before), "it says that all is there"
        return "whole" if is_noted else "some files" if files else "nothing"

    def clean(self) -> None:
        shutil.rmtree(self.out)


def look_at(path: Path, expected: Path, n_head_bytes: int) -> str:
    """What is there of a file that is to be as `expected`, where nothing of the head is written before all the rest."""
    if path.exists():
        assert difference(path, expected, 0) is None, f"{path.name} is not whole"
        return "whole"
    partials = sorted(path.parent.glob(f"{path.name}*.partial"))
    if not partials:
        return "nothing"
    for partial in partials:
        with partial.open("rb") as file:
            looks_complete = file.read(8).strip(b"\0")
        if looks_complete:
            assert difference(partial, expected, n_head_bytes) is None, f"{partial.name} looks complete"
    return "resumable"


def difference(path: Path, expected: Path, position: int) -> int | None:
    """About where two files differ behind `position`."""
    with path.open("rb") as a, expected.open("rb") as b:
        a.seek(position)
        b.seek(position)
        while True:
            at, one, other = a.tell(), a.read(1 << 22), b.read(1 << 22)
            if one != other:
                return at
            if not one:
                return None


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "convert": Convert, "split": Split, "parts": Parts, "assemble": Assemble, "reroute": RerouteDirectory,
    "reroute-gguf": RerouteGguf, "download": Download,
}  # fmt: skip


def kill_often(subject: Subject, kills: int, seed: int = 0) -> Counter[str]:
    """Kill `subject` at `kills` random moments of its work; how often what was found. In the end it must run through.

    AssertionError if something is found that must not be, or if a run that nobody kills fails.
    """
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    environment = {**subject.environment, "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)])}
    with tempfile.TemporaryDirectory() as directory, \
            Nursery(Path(directory), *subject.modules, environment=environment) as nursery:
        seconds = min(_run_through(subject, nursery) for _ in range(2))   # the first one loads what is loaded late
        for _ in range(kills):
            nursery.begin(*subject.arguments)
            time.sleep(rng.uniform(0, 1.1 * seconds))
            nursery.kill(signal.SIGKILL)
            assert nursery.end().code in {0, -signal.SIGKILL}
            state = subject.look()
            found[state] += 1
            # The machine's speed changes with what else it does; the end of the work must stay within reach.
            seconds *= 0.9 if state == "whole" else 1.02
            if state == "whole":
                subject.clean()
        _run_through(subject, nursery)
    return found


def _run_through(subject: Subject, nursery: Nursery) -> float:
    """Seconds of a run that nobody kills, on average if it takes several; its result is looked at and removed."""
    times: list[float] = []
    while not times or subject.look() != "whole":
        began = time.monotonic()
        ended = nursery.run(*subject.arguments)
        times.append(time.monotonic() - began)
        assert ended.code == 0, ended
        assert len(times) <= _MOST_RUNS, "the runs come to no end"
    subject.clean()
    return sum(times) / len(times)
