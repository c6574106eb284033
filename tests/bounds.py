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
    """What happens inside must be quick and allocate little; None does not look, as counting slows some code down."""
    if n_bytes is not None:
        tracemalloc.start()
    begin = time.perf_counter()
    try:
        yield
        assert time.perf_counter() - begin < seconds
        assert n_bytes is None or tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        if n_bytes is not None:
            tracemalloc.stop()
