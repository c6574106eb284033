"""Bounds on what a refusal may cost."""

from __future__ import annotations

import time
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def cheap(seconds: float = 1.0, n_bytes: int | None = 100_000_000) -> Iterator[None]:
    """What happens inside must take little processor time and memory.

    Time of the processor, not of the clock: a busy machine is no fault. None does not count allocations, which slows
    some code down.
    """
    if n_bytes is not None:
        tracemalloc.start()
    begin = time.process_time()
    try:
        yield
        assert time.process_time() - begin < seconds
        assert n_bytes is None or tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        if n_bytes is not None:
            tracemalloc.stop()
