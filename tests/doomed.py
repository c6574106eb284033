"""For processes that are to end at a certain step of their work: ``DIE_AT=57:9`` is signal 9 to itself at the 57th.

A step is whatever changes the disk: a unit written, data synced, a line of the journal, a new name.
"""

import itertools
import os
import threading
from pathlib import Path

import dsv4tools.journal
import dsv4tools.output
import dsv4tools.working
from dsv4tools.formats.codecs import prepare

dsv4tools.output.BATCH_BYTES = 200_000
_steps, _lock = itertools.count(1), threading.Lock()


def step() -> None:
    at, _, number = os.environ.get("DIE_AT", "0:9").partition(":")
    with _lock:
        if next(_steps) == int(at):
            os.kill(os.getpid(), int(number))


def count(owner: object, name: str) -> None:
    real = getattr(owner, name)

    def counted(*arguments, **options):
        step()
        result = real(*arguments, **options)
        step()
        return result

    setattr(owner, name, counted)


count(dsv4tools.working, "pwrite_all")
count(dsv4tools.working, "sync_data")
count(dsv4tools.working, "preallocate")
count(dsv4tools.journal.JournalWriter, "_append")
count(dsv4tools.journal.JournalWriter, "__init__")
count(Path, "replace")
count(Path, "unlink")
prepare()
