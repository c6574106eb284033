"""Killing a command at random moments, again and again, and looking at what is left each time.

A subject says what is run, and what may be found after a kill. Modules are loaded before the clock starts, so that the
kills fall into the work.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from conftest import TINY_6E, checksums
from nursery import Nursery

import dsv4tools as dt
from dsv4tools.synthetic import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

class Subject(Protocol):
    """A command to be killed.

    Attributes
    ----------
    arguments:
        Of the command line, the command's name first.
    """

    arguments: list[str]

    def look(self) -> str:
        """What is there, in a word; AssertionError if it must not be so."""

    def clean(self) -> None:
        """Remove a whole result, so that there is work again. What kills left behind stays."""


class RerouteDirectory:
    """Re-routing a checkpoint: after a kill there is nothing under the result's name, or all of it."""

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


SUBJECTS: dict[str, Callable[[Path], Subject]] = {"reroute": RerouteDirectory, "reroute-gguf": RerouteGguf}


def kill_often(subject: Subject, kills: int, seed: int = 0) -> Counter[str]:
    """Kill `subject` at `kills` random moments of its work; how often what was found. In the end it must run through.

    AssertionError if something is found that must not be, or if a run that nobody kills fails.
    """
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory, \
            Nursery(Path(directory), f"dsv4tools.cli.{subject.arguments[0]}") as nursery:
        seconds = min(_run_through(subject, nursery) for _ in range(2))   # the first one loads what is loaded late
        for _ in range(kills):
            child = nursery.begin(*subject.arguments)
            time.sleep(rng.uniform(0, 1.1 * seconds))
            os.kill(child, signal.SIGKILL)   # at worst a zombie: it is asked for only now
            assert nursery.end().code in {0, -signal.SIGKILL}
            state = subject.look()
            found[state] += 1
            if state == "whole":
                subject.clean()
        _run_through(subject, nursery)
    return found


def _run_through(subject: Subject, nursery: Nursery) -> float:
    """Seconds of a run that nobody kills; its result is looked at and removed."""
    began = time.monotonic()
    ended = nursery.run(*subject.arguments)
    assert ended.code == 0, ended
    seconds = time.monotonic() - began
    assert subject.look() == "whole"
    subject.clean()
    return seconds
