"""Commands in a process of their own, where that is the point of a test."""

from __future__ import annotations

import os
import subprocess
import sys

COMMAND = (sys.executable, "-m", "dsv4tools")
ROOM_SECONDS = 600   # kernels may have to be compiled first, by a machine that has much else to do


def start(*arguments: object, **options) -> subprocess.Popen[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([*COMMAND, *map(str, arguments)], **options)


def run(*arguments: object, environment: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **(environment or {})}
    options = {"capture_output": True, "text": True, "timeout": ROOM_SECONDS, "env": env} | options
    return subprocess.run([*COMMAND, *map(str, arguments)], check=False, **options)


def messages(stderr: str) -> list[str]:
    """The lines of stderr that are no notes."""
    return [line for line in stderr.splitlines() if not line.startswith("note: ")]


def error_line(stderr: str) -> str:
    """The one line that an error is, the last that is said; checked for its form."""
    assert stderr.endswith("\n"), stderr
    lines = stderr.splitlines()
    assert lines[-1].startswith("error: "), stderr
    assert lines[-1].isprintable(), stderr
    assert messages(stderr) == lines[-1:], stderr
    return lines[-1]


def failed(ended: subprocess.CompletedProcess[str], code: int) -> str:
    """The error line of a command that ended with `code`."""
    assert ended.returncode == code, ended
    return error_line(ended.stderr)
