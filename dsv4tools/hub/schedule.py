"""In which order a streamed conversion needs its shards, and how many of them are on disk at once. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Schedule:
    """The shards of a conversion as steps: step i has all work that needs shard i and none behind it.

    Attributes
    ----------
    shards:
        Names, in the order in which they are needed.
    n_bytes:
        Their sizes.
    last_use:
        For each shard the last step that needs it: later than its own where a scale lies apart from its weight.
    ahead:
        How many shards may be fetched beyond that of the step in hand.
    """

    shards: tuple[str, ...]
    n_bytes: tuple[int, ...]
    last_use: tuple[int, ...]
    ahead: int

    def step(self, names: Iterable[str]) -> int:
        """The step of work that needs the shards `names`."""
        return max(map(self.shards.index, names))

    def on_disk(self, step: int) -> list[int]:
        """The shards that may be on disk during `step` if each is removed after its last use."""
        held = [i for i in range(step + 1) if self.last_use[i] >= step]
        return held + list(range(step + 1, min(step + 1 + self.ahead, len(self.shards))))

    @property
    def peak_shards(self) -> int:
        """The largest number of shards on disk at once, if each is removed after its last use."""
        return max((len(self.on_disk(step)) for step in range(len(self.shards))), default=0)

    @property
    def peak_bytes(self) -> int:
        """The most bytes that they take."""
        return max((sum(self.n_bytes[i] for i in self.on_disk(step)) for step in range(len(self.shards))), default=0)


def make_schedule(needs: Iterable[set[str]], sizes: Mapping[str, int], ahead: int) -> Schedule:
    """The schedule of work of which each piece needs one of the sets of shards `needs`.

    `sizes` has the bytes of every shard of the checkpoint, in the order of their names.
    """
    kinds = {frozenset(names) for names in needs}
    shards = tuple(name for name in sizes if any(name in names for names in kinds))
    place = {name: i for i, name in enumerate(shards)}
    last_use = list(range(len(shards)))
    for names in kinds:
        step = max(place[name] for name in names)
        for name in names:
            last_use[place[name]] = max(last_use[place[name]], step)
    return Schedule(shards, tuple(sizes[name] for name in shards), tuple(last_use), ahead)
