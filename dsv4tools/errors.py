"""The exception family. Every error is one line: where, what was found, what was expected, what to do.

Each class carries the exit code that the command line returns for it (`EXIT_CODES` lists them for `--help`).
"""

from __future__ import annotations

EXIT_CODES = {
    0: "fine",
    1: "a bug in dsv4tools",
    2: "wrong usage",
    3: "bad input",
    4: "input/output or resources",
    5: "verification failed",
    130: "interrupted (SIGINT)",
    143: "terminated (SIGTERM)",
}


def printable(text: str, *, keep: str = "") -> str:
    """`text` with all but printable characters and those of `keep` escaped.

    A hostile file may put control characters into names and texts: a terminal must never see them.
    """
    return "".join(c if c.isprintable() or c in keep else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"
                   for c in text)


class Dsv4Error(Exception):
    """Base of every error that is not a bug of ours.

    Parameters
    ----------
    where:
        File, tensor or key that the message is about.
    what:
        What was found and what was expected.
    hint:
        What the user can do about it; may be empty.
    """

    exit_code = 1

    def __init__(self, where: object, what: str, *, hint: str = "") -> None:
        self.where = str(where)
        self.what = what
        self.hint = hint
        # Pickling calls the class with these and then sets the attributes: `hint` cannot be among them.
        super().__init__(self.where, what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.hint:
            text += f"; {self.hint}"
        return printable(text)


class UsageError(Dsv4Error):
    """The call itself is wrong: an unknown type name, an output that exists."""

    exit_code = 2


class InputError(Dsv4Error):
    """A checkpoint, GGUF, policy, template or importance matrix is not what it must be."""

    exit_code = 3


class ResourceError(Dsv4Error):
    """Disk, memory, permission, network: the inputs may be fine."""

    exit_code = 4


class VerifyError(Dsv4Error):
    """The file under test is not right, or a source changed under the reader."""

    exit_code = 5


class Interrupted(Dsv4Error):  # noqa: N818  - an interruption is not an error of anybody's
    """SIGINT or SIGTERM stopped the work; `exit_code` is 128 + the signal's number."""

    def __init__(self, signal_number: int, what: str, *, hint: str = "") -> None:
        super().__init__("", what, hint=hint)
        self.args = (signal_number, what)
        self.exit_code = 128 + signal_number
