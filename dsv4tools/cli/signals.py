"""Stopping by signal: the first one lets the unit in hand finish, the second one leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from dsv4tools.workers import StopRequest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


@contextlib.contextmanager
def graceful_stop(after: str = "the units in hand") -> Iterator[StopRequest]:
    """A stop request that SIGINT and SIGTERM set, while the context lasts; `after` says what is finished before."""
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  - signal's signature
        if stop.is_set():
            os._exit(128 + number)   # what is journaled survives; nothing else must delay the user
        stop.request(number)
        with contextlib.suppress(OSError):
            # Not print: the signal may have come in the middle of one, and streams do not allow a second within it.
            os.write(2, f"stopping after {after}; once more leaves at once\n".encode())

    kept = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
