"""The entry point: commands by name, loaded when asked for, and errors turned into one line and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from dsv4tools import __version__
from dsv4tools.cli.output import EPILOG, say
from dsv4tools.errors import Dsv4Error, Interrupted

if TYPE_CHECKING:
    from types import FrameType

# Command -> one line for the list of commands; the command is the object of that name in dsv4tools/cli/NAME.py.
COMMANDS = {
    "convert": "Write a GGUF from a checkpoint.",
    "verify": "Say whether a GGUF is right.",
    "inspect": "Show what a checkpoint or GGUF holds.",
    "template": "Write a GGUF's header without its weights.",
    "policy": "List, show and explain policies.",
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


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:]
    head = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in head
    arguments = [a for a in head if a != "--debug"] + arguments[len(head):]
    logging.basicConfig(format="warning: %(message)s", level=logging.DEBUG if debug else logging.WARNING)
    logging.getLogger("numba").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run(arguments, debug=debug))


def _terminate(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001  - signal's signature
    raise Interrupted(number, "terminated", hint="nothing was left under the output's name")


def _run(arguments: list[str], *, debug: bool) -> int:  # noqa: PLR0911  - one return per kind of ending
    try:
        code = group.main(arguments, prog_name="dsv4tools", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail(Interrupted(signal.SIGINT, "interrupted", hint="nothing was left under the output's name"), debug)
    except Dsv4Error as e:
        return _fail(e, debug)
    except BrokenPipeError:
        # `dsv4tools inspect X | head`: the reader has what it wanted.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 4
    except MemoryError as e:
        return _fail(e, debug, "out of memory; use fewer --threads", 4)
    except OSError as e:
        return _fail(e, debug, f"{e.filename or 'input/output'}: {e.strerror or e}", 4)
    except Exception as e:  # noqa: BLE001  - the last resort: a bug of ours still ends in one line
        text = f"a bug in dsv4tools: {type(e).__name__}: {e}; please report it with --debug's output"
        return _fail(e, debug, text, 1)


def _fail(error: BaseException, debug: bool, text: str | None = None, code: int = 1) -> int:
    if debug:
        import traceback  # noqa: PLC0415  - only when something went wrong

        traceback.print_exception(error)
    say(f"error: {text or error}".replace("\n", " "))
    return error.exit_code if isinstance(error, Dsv4Error) else code
