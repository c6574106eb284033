"""The crew of threads: all items once, one error for all, nothing left running."""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing

import pytest

from dsv4tools.errors import ResourceError, UsageError
from dsv4tools.workers import EXTRA_THREADS, MAX_THREADS, choose_threads, run_in_order, run_units


def running() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("unit-")]


def squares(computing):
    def work(n):
        with computing:
            return n * n

    return work


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_every_item_is_worked_on_once(threads):
    assert sorted(run_units(range(500), squares, threads)) == [(n, n * n) for n in range(500)]
    assert not running()


def test_no_items_and_fewer_items_than_threads():
    assert list(run_units([], squares, 4)) == []
    assert list(run_units([3], squares, 16)) == [(3, 9)]
    assert not running()


def test_no_more_than_the_threads_compute_while_the_others_read():
    computing_now, most, reading_now, most_readers = 0, 0, 0, 0
    lock = threading.Lock()

    def make_worker(computing):
        def work(n):
            nonlocal computing_now, most, reading_now, most_readers
            with lock:
                reading_now += 1
                most_readers = max(most_readers, reading_now)
            time.sleep(0.002)
            with lock:
                reading_now -= 1
            with computing:
                with lock:
                    computing_now += 1
                    most = max(most, computing_now)
                time.sleep(0.002)
                with lock:
                    computing_now -= 1

        return work

    list(run_units(range(60), make_worker, 2))
    assert most == 2
    assert 2 < most_readers <= 2 + EXTRA_THREADS


def test_each_thread_has_its_own_worker():
    owners = []

    def make_worker(computing):
        me = threading.get_ident()
        owners.append(me)

        def work(n):
            assert threading.get_ident() == me
            time.sleep(0.001)

        return work

    list(run_units(range(50), make_worker, 3))
    assert len(set(owners)) == len(owners) == 3 + EXTRA_THREADS


class Broken(Exception):  # noqa: N818  - what breaks is not an error of the code under test
    pass


@pytest.mark.parametrize("error", [Broken, MemoryError, KeyboardInterrupt, SystemExit])
def test_the_first_error_ends_all_work(error):
    done = []

    def make_worker(computing):
        def work(n):
            if n == 20:
                raise error("at 20")
            done.append(n)
            time.sleep(0.001)

        return work

    with pytest.raises(error, match="at 20"):
        list(run_units(range(10_000), make_worker, 2))
    assert len(done) < 100
    assert not running()


def test_an_error_while_a_worker_is_made_or_an_item_is_found():
    def make_worker(computing):
        raise Broken("no worker")

    with pytest.raises(Broken, match="no worker"):
        list(run_units(range(5), make_worker, 2))

    def items():
        yield 1
        raise Broken("no item")

    with pytest.raises(Broken, match="no item"):
        list(run_units(items(), squares, 2))
    assert not running()


def test_closing_early_stops_the_workers():
    with closing(run_units(iter(int, 1), squares, 2)) as endless:   # int() is 0, never 1
        assert next(endless) == (0, 0)
        assert running()
    assert not running()


def test_an_error_of_the_caller_stops_the_workers():
    def careless():
        with closing(run_units(iter(int, 1), squares, 2)) as endless:
            for _ in endless:
                raise Broken

    with pytest.raises(Broken):
        careless()
    assert not running()


def test_number_of_threads():
    assert choose_threads(None) == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert choose_threads(1) == 1
    assert choose_threads(MAX_THREADS) == MAX_THREADS
    for wrong in (0, -1, MAX_THREADS + 1, 10**6):
        with pytest.raises(UsageError, match=f"is {wrong}, expected 1 to {MAX_THREADS}"):
            choose_threads(wrong)


def test_a_system_without_threads_is_a_resource_error(monkeypatch):
    """What `Thread.start` raises under a limit of processes, from the third thread on; the started ones end."""
    start, started = threading.Thread.start, []

    def limited(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(ResourceError, match=r"allows 2 threads, not 10; use fewer"):
        list(run_units(range(1000), squares, 8))
    assert len(started) == 2
    assert not running()


def test_results_in_order_though_the_work_is_not():
    def make_worker(computing):
        def work(n):
            time.sleep(0.001 * (n % 7))
            return -n

        return work

    assert list(run_in_order(range(100), make_worker, 8)) == [(n, -n) for n in range(100)]
    assert not running()


def test_an_error_among_results_in_order_is_raised_and_ends_all():
    def make_worker(computing):
        def work(n):
            if n == 5:
                raise ResourceError("disk", "failed")
            return n

        return work

    with pytest.raises(ResourceError):
        list(run_in_order(range(1000), make_worker, 4))
    results = run_in_order(range(10**9), squares, 4)
    assert next(results) == (0, 0)
    results.close()
    assert not running()
