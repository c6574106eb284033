"""Commands in processes of their own that start at once: forked from one that has the modules loaded.

For tests that start many, that kill some, or whose variables a library reads when it is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple, Self

from process import ROOM_SECONDS

if TYPE_CHECKING:
    from pathlib import Path

_CODE = """
import importlib, json, os, sys, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)
from dsv4tools.cli.main import main
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(order["cwd"])
        os.environ.update(order["variables"])
        for number, path in ((1, order["out"]), (2, order["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
        sys.argv = ["dsv4tools", *order["arguments"]]
        code = 70
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)   # at once: what the interpreter does at its end is no part of the work
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Ended(NamedTuple):
    """How a command ended; a code below 0 is the signal that killed it."""

    code: int
    out: str
    err: str


class Nursery:
    """A process that runs commands in children, one at a time.

    Parameters
    ----------
    directory:
        Where the children's output goes, and where they run if not told otherwise.
    modules:
        Loaded before the first command.
    environment:
        Of the process and all its children.
    """

    def __init__(self, directory: Path, *modules: str, environment: dict[str, str] | None = None) -> None:
        self.directory = directory
        self._child: int | None = None   # not waited for yet: until then its number is its own
        self._out, self._err = directory / "nursery.out", directory / "nursery.err"
        self._process = subprocess.Popen([sys.executable, "-c", _CODE, *modules], stdin=subprocess.PIPE, text=True,
                                         stdout=subprocess.PIPE, env=environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._process.poll() is None:
                self._abandon()
            self._process.communicate(timeout=ROOM_SECONDS)      # the end of its orders is its own
        finally:
            self._process.kill()
            self._process.wait()

    def _abandon(self) -> None:
        """Kill a child that nobody has waited for: a test has failed between its beginning and its end."""
        if self._child is not None:
            self.kill(signal.SIGKILL)
            self.end()

    def begin(self, *arguments: object, cwd: Path | None = None, **variables: str) -> None:
        """Start a command in a child; `end` waits for it."""
        self._abandon()
        order = {"arguments": [str(a) for a in arguments], "cwd": str(cwd or self.directory), "variables": variables,
                 "out": os.fspath(self._out), "err": os.fspath(self._err)}
        self._child = int(self._ask(json.dumps(order)))

    def kill(self, number: int) -> None:
        """Send a signal to the child. It may have ended: at worst it is a zombie until `end` was called."""
        assert self._child is not None, "there is no child"
        os.kill(self._child, number)

    def end(self) -> Ended:
        """Wait for the child."""
        code = int(self._ask(""))
        self._child = None
        return Ended(code, self._out.read_text("utf-8"), self._err.read_text("utf-8"))

    def run(self, *arguments: object, cwd: Path | None = None, **variables: str) -> Ended:
        self.begin(*arguments, cwd=cwd, **variables)
        return self.end()

    def _ask(self, order: str) -> str:
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        if select.select([self._process.stdout], [], [], ROOM_SECONDS)[0]:      # an answer is one line
            return self._process.stdout.readline()
        with contextlib.suppress(ProcessLookupError):
            if self._child is not None:
                os.kill(self._child, signal.SIGKILL)
        self._child = None
        self._process.kill()
        said = self._err.read_text("utf-8") if self._err.exists() else ""
        raise TimeoutError(f"no answer in {ROOM_SECONDS} s; said so far: {said!r}")
