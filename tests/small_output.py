"""A conversion without its kernels: units of known bytes, written through `OutputFile` as a conversion does it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import Interrupted
from dsv4tools.options import RunOptions
from dsv4tools.output import OutputFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HEADER = b"MAGIC" + bytes(range(1, 60))
PADDING = 5


@dataclass
class SmallOutput:
    """A file of a header and `n_units` units with padding between them, made from two shards.

    Attributes
    ----------
    contents:
        Shard name -> what is in it; every unit is made from one shard.
    states:
        Shard name -> [mtime_ns, inode].
    """

    path: Path
    n_units: int = 8
    unit_bytes: int = 100
    identity: dict[str, Any] = field(default_factory=lambda: {"tool": "1", "policy": "q4k"})
    contents: dict[str, int] = field(default_factory=lambda: {"a": 1, "b": 2})
    states: dict[str, list[int]] = field(default_factory=lambda: {"a": [10, 1], "b": [20, 2]})
    notes: list[str] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    progress: int = 0

    @property
    def n_bytes(self) -> int:
        return len(HEADER) + self.n_units * (self.unit_bytes + PADDING)

    def position(self, i: int) -> int:
        return len(HEADER) + i * (self.unit_bytes + PADDING)

    def shard(self, i: int) -> str:
        return "a" if i < self.n_units // 2 else "b"

    def data(self, i: int) -> np.ndarray:
        return np.random.default_rng([i, self.contents[self.shard(i)]]).integers(0, 256, self.unit_bytes, np.uint8)

    def source(self, i: int) -> str:
        return f"{self.contents[self.shard(i)]:032x}"

    def expected(self) -> bytes:
        raw = bytearray(self.n_bytes)
        raw[:len(HEADER)] = HEADER
        for i in range(self.n_units):
            raw[self.position(i): self.position(i) + self.unit_bytes] = self.data(i).tobytes()
        return bytes(raw)

    def extents(self) -> Iterator[tuple[int, int]]:
        return ((self.position(i), self.unit_bytes) for i in range(self.n_units))

    def recheck(self, unit, changed: set[str]) -> bool:
        i = (unit.position - len(HEADER)) // (self.unit_bytes + PADDING)
        return self.shard(i) not in changed or self.source(i) == unit.source

    def open(self, **options) -> OutputFile:
        def advance(n: int) -> None:
            self.progress += n

        run = RunOptions(notify=self.notes.append, progress=advance, **options)
        return OutputFile(self.path, self.n_bytes, self.identity, self.states, extents=self.extents,
                          recheck=self.recheck, run=run)

    def put(self, output: OutputFile, *units: int) -> None:
        """Write and record `units`."""
        for i in units:
            output.record(output.write(self.position(i), self.data(i), self.source(i)))

    def convert(
        self, *, units: int | None = None, order: list[int] | None = None,
        check: Callable[[Path], None] = lambda path: None, **options,
    ) -> None:
        """Write what is missing; `units`: stop as on a signal after so many. `notes` and `written` are of this call."""
        self.notes, self.written, self.progress = [], [], 0
        output = self.open(**options)
        with output:
            if output.completed:
                return
            todo = [i for i in order or range(self.n_units) if self.position(i) not in output.finished]
            for i in todo[:units]:
                self.put(output, i)
                self.written.append(i)
            output.flush()
            if units is not None and units < len(todo):
                raise Interrupted(2, "stopped", hint=output.hint)
            output.complete(HEADER, check)

    def leave(self, units: int, **options) -> None:
        """`convert` that is stopped after `units`."""
        try:
            self.convert(units=units, **options)
        except Interrupted:
            return
        raise AssertionError("was not stopped")

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")

    @property
    def journal(self) -> Path:
        return self.path.with_name(self.path.name + ".journal")

    @property
    def lock(self) -> Path:
        return self.path.with_name(self.path.name + ".lock")

    def files(self) -> list[str]:
        return sorted(p.name for p in self.path.parent.iterdir())
