"""``dsv4tools policy list|show|explain``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dsv4tools.cli.output import EPILOG, json_option, show, show_json, show_table
from dsv4tools.cli.planning import plan_from_options, plan_options
from dsv4tools.cli.sources import source_argument
from dsv4tools.policy import Policy, list_policies, load_policy
from dsv4tools.sizes import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from dsv4tools.hub import HubReference


@click.group(epilog=EPILOG)
def policy() -> None:
    """List, show and explain policies: the rules that give each tensor its type.

    \b
    Examples:
      dsv4tools policy list
      dsv4tools policy show q4k > mine.toml
      dsv4tools policy explain DeepSeek-V4-Flash --policy mine.toml
    """


def _as_data(p: Policy) -> dict[str, object]:
    return {
        "name": p.name, "description": p.description, "file_type": p.file_type, "sha256": p.sha256,
        "rules": [{"tensors": list(r.tensors), "type": r.format.name if r.format else "template",
                   "layers": sorted(r.layers) if r.layers is not None else None, "optional": r.optional}
                  for r in p.rules],
    }


@policy.command("list", epilog=EPILOG)
@json_option
def list_command(as_json: bool) -> None:
    """List the policies that come with dsv4tools.

    \b
    Example:
      dsv4tools policy list
    """
    policies = list_policies()
    if as_json:
        show_json({"policies": [_as_data(p) for p in policies]})
        return
    show_table([(p.name, p.description) for p in policies])


@policy.command("show", epilog=EPILOG)
@click.argument("name", metavar="NAME|FILE")
@json_option
def show_command(name: str, as_json: bool) -> None:
    """Show a policy: its file, ready to be edited.

    \b
    Example:
      dsv4tools policy show q4k > mine.toml
    """
    chosen = load_policy(name)
    if as_json:
        show_json(_as_data(chosen))
    elif chosen.path is None:
        show(chosen.description)
    else:
        for line in chosen.path.read_text("utf-8-sig").splitlines():
            show(line)


@policy.command("explain", epilog=EPILOG)
@click.argument("source", metavar="SRC", type=source_argument)
@plan_options
@json_option
def explain_command(source: Path | HubReference, as_json: bool, **options: Any) -> None:
    """Show which type each tensor of the checkpoint SRC gets, by which rule, and how many bytes that takes.

    \b
    Examples:
      dsv4tools policy explain DeepSeek-V4-Flash
      dsv4tools policy explain DeepSeek-V4-Flash --policy mine.toml --json
    """
    plan = plan_from_options(source, **options)
    rows = [(t.name, t.format.name, t.n_bytes, t.rule) for t in plan.tensors]
    if as_json:
        keys = ("tensor", "type", "n_bytes", "rule")
        show_json({"policy": plan.policy.name, "total_bytes": plan.total_bytes,
                   "tensors": [dict(zip(keys, row, strict=True)) for row in rows]})
        return
    show_table([("tensor", "type", "bytes", "rule"), *rows], right="llr")
    show()
    by_rule: dict[tuple[str, str], list[int]] = {}
    for t in plan.tensors:
        by_rule.setdefault((t.rule, t.format.name), []).append(t.n_bytes)
    show_table([(len(sizes), kind, format_bytes(sum(sizes)), rule) for (rule, kind), sizes in by_rule.items()],
               right="r")
    show(f"{len(plan.tensors)} tensors, {format_bytes(plan.total_bytes)}")
