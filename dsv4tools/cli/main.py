"""The entry point: commands by name, loaded when asked for, and errors turned into one line and an exit code."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

import click

from dsv4tools import __version__
from dsv4tools.cli.output import EPILOG, say
from dsv4tools.errors import Dsv4Error, Interrupted, ResourceError, UsageError

if TYPE_CHECKING:
    from types import FrameType

# Command -> one line for the list of commands; the command is the object of that name in dsv4tools/cli/NAME.py.
COMMANDS = {
    "download": "Fetch a checkpoint from the Hub and check it.",
    "convert": "Write a GGUF from a checkpoint.",
    "assemble": "Join the parts of a conversion.",
    "verify": "Say whether a GGUF is right.",
    "diff": "Show in what two GGUF files differ.",
    "reroute": "Write a checkpoint or GGUF with fewer experts per token.",
    "inspect": "Show what a checkpoint or GGUF holds.",
    "template": "Write a GGUF's header without its weights.",
    "policy": "List, show and explain policies.",
    "encode": "Write a conversation as the prompt that the model reads.",
    "logits": "Write what a model predicts at each position.",
    "generate": "Continue a text with a model.",
    "imatrix": "Measure which columns of a model matter, on a text.",
    "compare": "Compare what two models predict.",
    "quickstart": "Try everything on a small checkpoint made here.",
}


class _Commands(click.Group):
    """A group that imports a command's module when it is asked for: `--help` must not wait for numba."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  - click's signature
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"dsv4tools.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  - click's signature
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="dsv4tools")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def group(debug: bool) -> None:
    """DeepSeek-V4 checkpoints to GGUF files that ds4 and llama.cpp load.

    \b
    Examples:
      dsv4tools quickstart
      dsv4tools convert DeepSeek-V4-Flash flash.gguf --dry-run
      dsv4tools convert DeepSeek-V4-Flash flash.gguf
      dsv4tools verify flash.gguf --source DeepSeek-V4-Flash
    """
    # main() has taken --debug from the arguments already, so that it works behind any command too.
    del debug


class _LogLines(logging.Handler):
    """What libraries log, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        say(f"{kind}: {' '.join(record.getMessage().split())}")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as something that no `except Exception` between here and there swallows."""


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:]
    head = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in head
    arguments = [a for a in head if a != "--debug"] + arguments[len(head):]
    _open_standard_streams()
    logging.basicConfig(handlers=[_LogLines()], level=logging.DEBUG if debug else logging.WARNING)
    logging.getLogger("numba").setLevel(logging.WARNING)
    logging.getLogger("dsv4tools").setLevel(logging.DEBUG if debug else logging.INFO)
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:   # until here, loading modules, it ended the process
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "_DSV4TOOLS_COMPLETE" in os.environ:   # a shell asks for completions, in click's own way
        group.main(arguments, prog_name="dsv4tools")
    sys.exit(_run(arguments, debug=debug))


def _open_standard_streams() -> None:
    """Occupy the descriptors 0 to 2 where the caller closed them, so that no output file gets the number of stderr.

    A stdout that cannot show every character shows its number instead.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _terminate(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001  - signal's signature
    raise _Terminated


def _run(arguments: list[str], *, debug: bool) -> int:
    try:
        # Not group.main(): it has its own idea of what interruptions and closed pipes should look like.
        with group.make_context("dsv4tools", arguments) as ctx:
            group.invoke(ctx)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        return e.exit_code
    except (Exception, KeyboardInterrupt) as e:  # noqa: BLE001  - the last resort: even a bug of ours ends in one line
        if debug:
            traceback.print_exception(e)
        ours = _as_ours(e)
        if not isinstance(e, BrokenPipeError):   # `dsv4tools inspect X | head`: the reader has what it wanted
            say(f"error: {ours}")
        _drop_output()
        return ours.exit_code
    return 0


def _as_ours(error: BaseException) -> Dsv4Error:
    """`error` as a Dsv4Error: its line and its exit code."""
    match error:
        case Dsv4Error():
            return error
        case click.ClickException():
            ctx = getattr(error, "ctx", None)
            command = ctx.command_path if ctx is not None else "dsv4tools"
            text = " ".join(error.format_message().split()).removesuffix(".")
            return UsageError(command, text, hint=f"see {command} --help")
        case click.Abort() | KeyboardInterrupt():
            terminated = isinstance(error, _Terminated)
            return Interrupted(signal.SIGTERM if terminated else signal.SIGINT,
                               "terminated" if terminated else "interrupted",
                               hint="no unfinished file has its final name")
        case MemoryError():
            return ResourceError("", "not enough memory", hint="use fewer --threads")
        case OSError():
            return ResourceError(error.filename or "input/output", error.strerror or str(error))
    what = f"{type(error).__name__}: {error}"
    return Dsv4Error("a bug in dsv4tools", what, hint="please report it with the output of --debug")


def _drop_output() -> None:
    """Leave nothing that Python would try to write at its end, where it cannot be written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
