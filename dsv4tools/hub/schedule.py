"""In which order a streamed conversion needs its shards, and how many of them are on disk at once. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


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

    def on_disk(self, step: int, present: Collection[str] = ()) -> list[int]:
        """The shards that may be on disk during `step` if each is removed after its last use.

        Those that are `present` before the first step are there until then, however far ahead.
        """
        return [i for i, name in enumerate(self.shards)
                if self.last_use[i] >= step and (i <= step + self.ahead or name in present)]

    def peak(self, present: Collection[str] = ()) -> tuple[int, int]:
        """The largest number of shards on disk at once, and the most bytes, if each is removed after its last use."""
        moments = [self.on_disk(step, present) for step in range(len(self.shards))]
        return (max(map(len, moments), default=0),
                max((sum(self.n_bytes[i] for i in moment) for moment in moments), default=0))


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
