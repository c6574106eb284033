"""Running units on threads: reading, computing and writing overlap, and the first error stops all.

Kernels and file calls release the GIL, so threads are enough. There are two more of them than may compute at once:
while some wait for the disk the others keep the cores busy. Memory is one set of buffers per thread.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

EXTRA_THREADS = 2

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Failed(Generic[Item]):
    def __init__(self, error: BaseException) -> None:
        self.error = error


def run_units(
    items: Iterable[Item], make_worker: Callable[[threading.Semaphore], Callable[[Item], Result]], threads: int
) -> Iterator[tuple[Item, Result]]:
    """Run ``worker(item)`` for all `items`; yields results as they come, in no particular order.

    Parameters
    ----------
    items:
        Consumed as workers become free.
    make_worker:
        Called once per thread with a semaphore that must be held while computing (not while reading or writing).
    threads:
        How many may compute at the same time.

    The first exception of a worker is raised here, after all others finished the item that they had in hand. Closing
    the iterator stops the workers likewise.
    """
    computing = threading.Semaphore(threads)
    source, lock = iter(items), threading.Lock()
    done: SimpleQueue[tuple[Item, Result] | _Failed[Item] | None] = SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            worker = make_worker(computing)
            while not stop.is_set():
                with lock:
                    item = next(source, None)
                if item is None:
                    break
                done.put((item, worker(item)))
        except BaseException as e:  # noqa: BLE001  - whatever it is, it is raised in the caller's thread
            stop.set()
            done.put(_Failed(e))
        finally:
            done.put(None)

    pool = [threading.Thread(target=work, name=f"unit-{i}", daemon=True) for i in range(threads + EXTRA_THREADS)]
    for thread in pool:
        thread.start()
    failed: _Failed[Item] | None = None
    running = len(pool)
    try:
        while running:
            outcome = done.get()
            if outcome is None:
                running -= 1
            elif isinstance(outcome, _Failed):
                failed = failed or outcome
            elif failed is None:
                yield outcome
    finally:
        stop.set()
        for thread in pool:
            thread.join()
    if failed is not None:
        raise failed.error
