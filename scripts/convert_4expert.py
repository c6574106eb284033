"""What scripts/convert-4expert runs: each step is a command that is shown, and that goes on where it was stopped."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dsv4tools.errors import Dsv4Error, InputError, UsageError  # noqa: E402  - the path comes first
from dsv4tools.hub import HubReference, is_reference, parse_reference  # noqa: E402

ORIGINAL = "deepseek-ai/DeepSeek-V4-Flash"
EXPERTS = 4
PROMPT = "The weather is great today"
TOKENS = 8
# The package need not be installed.
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


class Failed(Exception):  # noqa: N818  - the command has said what is wrong
    """A step ended with this exit code."""


def command(*arguments: object) -> list[str]:
    """`dsv4tools ARGUMENTS` by the interpreter that runs this."""
    return [sys.executable, "-m", "dsv4tools", *map(str, arguments)]


def run(*arguments: object) -> None:
    """Show a command and run it; Failed if it does not end well."""
    print("\n$", shlex.join(["dsv4tools", *map(str, arguments)]), flush=True)
    with subprocess.Popen(command(*arguments), env=ENVIRONMENT) as process:
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:   # the command has got it too, and finishes what it has in hand
                continue
            if code:
                raise Failed(code if code > 0 else 128 - code)
            return


def ask(*arguments: object) -> dict[str, Any]:
    """What a command says with --json; Failed if it does not end well."""
    ended = subprocess.run(command(*arguments, "--json"), stdout=subprocess.PIPE, check=False, env=ENVIRONMENT)
    if ended.returncode:
        raise Failed(ended.returncode)
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer


def fetch(source: str) -> Path:
    """The directory `source`, or the one that a repository of that name is downloaded to: its name, here."""
    if not is_reference(source) and Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise UsageError(source, "is no checkpoint directory", hint="dsv4tools reroute takes a GGUF")
    try:
        reference = parse_reference(source if is_reference(source) else f"hf://{source}")
    except UsageError:
        raise UsageError(source, "is no directory and no repository",
                         hint="give OWNER/NAME or a checkpoint directory") from None
    directory = Path(reference.repository.partition("/")[2])
    run("download", HubReference(reference.repository, reference.revision), directory)
    return directory


def reduce_experts(directory: Path) -> Path:
    """A checkpoint with four experts per token: `directory` itself if it has four, else one beside it."""
    have = ask("inspect", directory)["experts"]["per_token"]
    if have == EXPERTS:
        print(f"{directory} has {EXPERTS} experts per token already: no re-routing")
        return directory
    if have < EXPERTS:
        raise InputError(directory, f"has {have} experts per token, expected {EXPERTS} or more",
                         hint="use dsv4tools convert")
    home = directory.resolve()
    target = home.with_name(f"{home.name}-{EXPERTS}Expert")
    if not target.exists():   # it appears when it is complete
        run("reroute", directory, target, "--experts-per-token", EXPERTS)
        return target
    found = ask("inspect", target)["experts"]["per_token"]
    if found != EXPERTS:
        raise InputError(target, f"has {found} experts per token, expected {EXPERTS}", hint="remove or rename it")
    print(f"{target} is there already")
    return target


def main() -> int:
    """All steps; the exit code is that of the first one that fails."""
    parser = argparse.ArgumentParser(prog="scripts/convert-4expert", description=__doc__)
    parser.add_argument("source", nargs="?", default=ORIGINAL, metavar="REPO_OR_DIR",
                        help=f"OWNER/NAME on the Hub, or a checkpoint directory (default: {ORIGINAL})")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT",
                        help="the GGUF (default: a name by convention, here)")
    options = parser.parse_args()
    try:
        directory = reduce_experts(fetch(options.source))
        out = options.out or Path(ask("convert", directory, "--dry-run")["out"])
        if out.exists():
            print(f"{out} is there already: it is verified below")
        else:
            run("convert", directory, out)
        run("verify", out, "--source", directory)
        run("generate", out, "-p", PROMPT, "-n", TOKENS)
    except Failed as e:
        return int(e.args[0])
    except Dsv4Error as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(f"\n{out} is right. llama.cpp loads it; ds4 needs its fork that knows four experts.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
