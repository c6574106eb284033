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


class _Crew(Generic[Item, Result]):
    """Threads that work on one list of items until it ends, something fails, or they are told to stop."""

    def __init__(
        self, items: Iterable[Item], make_worker: Callable[[threading.Semaphore], Callable[[Item], Result]], threads: int
    ) -> None:
        self._items, self._lock = iter(items), threading.Lock()
        self._make_worker, self._computing = make_worker, threading.Semaphore(threads)
        self.done: SimpleQueue[tuple[Item, Result] | None] = SimpleQueue()   # None: one thread has ended
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.threads = [threading.Thread(target=self._run, name=f"unit-{i}", daemon=True)
                        for i in range(threads + EXTRA_THREADS)]

    def _run(self) -> None:
        try:
            worker = self._make_worker(self._computing)
            while not self.stop.is_set():
                with self._lock:
                    item = next(self._items, None)
                if item is None:
                    break
                self.done.put((item, worker(item)))
        except BaseException as e:  # noqa: BLE001  - whatever it is, it is raised in the caller's thread
            self.error = self.error or e
            self.stop.set()
        finally:
            self.done.put(None)


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
    crew = _Crew(items, make_worker, threads)
    for thread in crew.threads:
        thread.start()
    running = len(crew.threads)
    try:
        while running:
            outcome = crew.done.get()
            if outcome is None:
                running -= 1
            elif crew.error is None:
                yield outcome
    finally:
        crew.stop.set()
        for thread in crew.threads:
            thread.join()
    if crew.error is not None:
        raise crew.error
