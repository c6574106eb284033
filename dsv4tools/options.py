"""How a conversion runs: what a caller may choose without changing a byte of the output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsv4tools.workers import StopRequest

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a conversion runs; none of it changes a byte of the output.

    Attributes
    ----------
    threads:
        How many units are encoded at once; None: all usable cores.
    restart:
        Do not continue an interrupted conversion, begin anew.
    steal_lock:
        Take the output's lock from an owner that cannot be asked whether it is still there.
    progress:
        Called with the number of output bytes that were finished since the last call.
    notify:
        Called with a sentence that a user should see: what is continued, what was found damaged.
    stop:
        Set it to stop after the units in hand.
    shards_ahead:
        For a checkpoint on the Hub: how many shards are fetched beyond the one in hand.
    delete_shards:
        For a checkpoint on the Hub: remove each shard from our cache after its last use.
    """

    threads: int | None = None
    restart: bool = False
    steal_lock: bool = False
    progress: Callable[[int], None] | None = None
    notify: Callable[[str], None] | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    shards_ahead: int = 2
    delete_shards: bool = False

    def advance(self, n_bytes: int) -> None:
        """Report progress to whoever listens."""
        if self.progress is not None:
            self.progress(n_bytes)

    def tell(self, note: str) -> None:
        """Give a note to whoever listens."""
        if self.notify is not None:
            self.notify(note)
