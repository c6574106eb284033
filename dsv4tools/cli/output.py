"""What commands share to print: messages, tables, JSON, progress. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from dsv4tools.errors import EXIT_CODES, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

EPILOG = "Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + "."


def say(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    with contextlib.suppress(OSError):   # nobody listens: the exit code still says it
        if is_interactive() and (bars := sys.modules.get("tqdm")) is not None:
            bars.tqdm.write(printable(text), file=sys.stderr)   # it takes a bar aside that the line would run into
        else:
            click.echo(printable(text), err=True)


def show(text: str = "") -> None:
    """A line of the result, on stdout; control characters of hostile files never reach the terminal."""
    click.echo(printable(text, keep="\t"))


def show_json(value: dict[str, Any]) -> None:
    """The result as JSON, on stdout: ASCII, so that no locale and no hostile name can break it."""
    click.echo(json.dumps(value, indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def shell_words(*words: object) -> str:
    """A command that a person can copy into a shell, whatever the paths in it hold."""
    return shlex.join(str(word) for word in words)


def show_table(rows: Sequence[Sequence[object]], *, right: str = "") -> None:
    """Columns aligned by spaces; `right` has an ``r`` for each column that is aligned to the right."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        cells = [str(c).rjust(w) if right[i:i + 1] == "r" else str(c).ljust(w)
                 for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        show("  ".join(cells).rstrip())


def layer_list(layers: Sequence[int]) -> str:
    """``0-2`` or ``0, 3, 7``."""
    if not layers:
        return "none"
    consecutive = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if consecutive and len(layers) > 1 else ", ".join(map(str, layers))


def is_interactive() -> bool:
    """Whether a person watches stderr."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def progress_bar(total: int, what: str, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """A bar with rate and remaining time on a terminal, nothing elsewhere; yields the function that advances it."""
    if not is_interactive():
        yield lambda n: None
        return
    from tqdm import tqdm  # noqa: PLC0415  - pipes need none

    # A terminal may not know its width; tqdm would take the 0 at its word and show nothing.
    width = {"dynamic_ncols": True} if os.get_terminal_size(sys.stderr.fileno()).columns else {"ncols": 80}
    with tqdm(total=total, desc=printable(what), unit=unit, unit_scale=True, file=sys.stderr, **width) as bar:
        yield bar.update


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
threads_option = click.option("--threads", type=click.IntRange(1, 1024), default=None, metavar="N",
                              help="How many threads compute; all usable cores by default.")
