"""Running units on threads: reading, computing and writing overlap, and the first error stops all.

Kernels and file calls release the GIL, so threads are enough. There are two more of them than may compute at once:
while some wait for the disk the others keep the cores busy. Memory is one set of buffers per thread.
"""

from __future__ import annotations

import signal
import threading
from contextlib import closing
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, TypeVar

from dsv4tools.errors import ResourceError, UsageError
from dsv4tools.files import usable_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

EXTRA_THREADS = 2
MAX_THREADS = 1024


class StopRequest(threading.Event):
    """Asks the workers to finish the item in hand and stop. `signal_number` says which signal asked."""

    signal_number = signal.SIGINT.value

    def request(self, signal_number: int) -> None:
        """Ask, because of a signal."""
        self.signal_number = signal_number
        self.set()


Item = TypeVar("Item")
Result = TypeVar("Result")


def choose_threads(threads: int | None) -> int:
    """`threads`, or all usable cores for None; UsageError unless it is 1 to MAX_THREADS."""
    if threads is None:
        return min(usable_cpus(), MAX_THREADS)
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError("--threads", f"is {threads}, expected 1 to {MAX_THREADS}")
    return threads


class _Crew(Generic[Item, Result]):
    """Threads that work on one list of items until it ends, something fails, or they are told to stop."""

    def __init__(
        self, items: Iterable[Item], make_worker: Callable[[threading.Semaphore], Callable[[Item], Result]],
        threads: int, stop: threading.Event, halt: threading.Event,
    ) -> None:
        self._items, self._lock = iter(items), threading.Lock()
        self._make_worker, self._computing = make_worker, threading.Semaphore(threads)
        self.done: SimpleQueue[tuple[Item, Result] | None] = SimpleQueue()   # None: one thread has ended
        self.stop, self.halt = stop, halt   # asked from outside; and from here
        self.error: BaseException | None = None
        self.threads = [threading.Thread(target=self._run, name=f"unit-{i}", daemon=True)
                        for i in range(threads + EXTRA_THREADS)]

    def start(self) -> int:
        """Start the threads; how many there are, which is fewer with an error where the system gives no more."""
        for n_started, thread in enumerate(self.threads):
            try:
                thread.start()
            except RuntimeError:
                self.error = self.error or ResourceError(
                    "--threads", f"the system allows {n_started} threads, not {len(self.threads)}", hint="use fewer")
                self.halt.set()
                return n_started
        return len(self.threads)

    def _run(self) -> None:
        try:
            worker = self._make_worker(self._computing)
            while not (self.stop.is_set() or self.halt.is_set()):
                with self._lock:
                    item = next(self._items, None)
                if item is None:
                    break
                self.done.put((item, worker(item)))
        except BaseException as e:  # noqa: BLE001  - whatever it is, it is raised in the caller's thread
            self.error = self.error or e
            self.halt.set()
        finally:
            self.done.put(None)


def run_units(
    items: Iterable[Item], make_worker: Callable[[threading.Semaphore], Callable[[Item], Result]], threads: int,
    stop: StopRequest | None = None, halt: threading.Event | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Run ``worker(item)`` for all `items`; yields results as they come, in no particular order.

    Parameters
    ----------
    items:
        Consumed as workers become free.
    make_worker:
        Called once per thread with a semaphore that must be held while computing (not while reading or writing).
    threads:
        How many may compute at the same time.
    stop:
        When it is set the workers finish what they have in hand, and the generator ends early.
    halt:
        Is set here when no further item will be taken: for `items` that may have to be waited for.

    The first exception of a worker is raised here, after all others finished the item that they had in hand and those
    results were yielded. Closing the generator stops the workers likewise. ResourceError if the system gives no more
    threads.
    """
    crew = _Crew(items, make_worker, threads, stop or StopRequest(), halt or threading.Event())
    try:
        running = crew.start()
        while running:
            outcome = crew.done.get()
            if outcome is None:
                running -= 1
            else:
                yield outcome
    finally:
        crew.halt.set()
        for thread in crew.threads:
            if thread.ident is not None:
                thread.join()
    if crew.error is not None:
        raise crew.error


def run_in_order(
    items: Iterable[Item], make_worker: Callable[[threading.Semaphore], Callable[[Item], Result]], threads: int
) -> Generator[tuple[Item, Result], None, None]:
    """`run_units`, but results come in the order of the items, so that sums of floats do not depend on threads.

    What is finished before its turn waits: seldom more than there are threads.
    """
    def make_numbered(computing: threading.Semaphore) -> Callable[[tuple[int, Item]], Result]:
        worker = make_worker(computing)
        return lambda numbered: worker(numbered[1])

    waiting: dict[int, tuple[Item, Result]] = {}
    turn = 0
    with closing(run_units(enumerate(items), make_numbered, threads)) as results:
        for (number, item), result in results:
            waiting[number] = item, result
            while turn in waiting:
                yield waiting.pop(turn)
                turn += 1
