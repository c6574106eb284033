"""``dsv4tools policy list|show|explain``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dsv4tools.cli.output import EPILOG, json_option, show, show_json, show_table, threads_option
from dsv4tools.cli.planning import plan_from_options, plan_options, plans_from_options
from dsv4tools.cli.sources import source_argument
from dsv4tools.errors import UsageError
from dsv4tools.policy import Policy, list_policies, load_policy
from dsv4tools.policy_costs import compare_policies
from dsv4tools.sizes import format_bytes
from dsv4tools.workers import choose_threads

if TYPE_CHECKING:
    from pathlib import Path

    from dsv4tools.hub import HubReference
    from dsv4tools.policy_costs import PolicyCost


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
@click.option("--compare", metavar="NAME,NAME...",
              help="Instead: what these policies cost, side by side, with errors measured on a sample of SRC.")
@threads_option
@json_option
def explain_command(source: Path | HubReference, compare: str | None, threads: int | None, as_json: bool,
                    **options: Any) -> None:
    """Show which type each tensor of SRC (a checkpoint or a GGUF) gets, by which rule, and how many bytes that takes.

    With --compare: bytes, bits per weight and relative error of each role, for several policies.

    \b
    Examples:
      dsv4tools policy explain DeepSeek-V4-Flash
      dsv4tools policy explain DeepSeek-V4-Flash --policy mine.toml --json
      dsv4tools policy explain DeepSeek-V4-Flash --compare q4k,mxfp4,mine.toml
    """
    if compare is not None:
        if click.get_current_context().get_parameter_source("policy") is not ParameterSource.DEFAULT:
            raise UsageError("--compare", "was given together with --policy", hint="give either")
        names = list(dict.fromkeys(name.strip() for name in compare.split(",") if name.strip()))
        if not names:
            raise UsageError("--compare", f"is {compare!r}, expected names of policies, with commas between them")
        del options["policy"]
        plans = plans_from_options(source, [load_policy(name, "--compare") for name in names], **options)
        _show_costs(compare_policies(plans, threads=choose_threads(threads)), as_json=as_json)
        return
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


def _show_costs(costs: list[PolicyCost], *, as_json: bool) -> None:
    """Roles down, policies across."""
    if as_json:
        show_json({"policies": [cost.as_data() for cost in costs]})
        return
    rows: list[list[object]] = [["", *(cell for cost in costs for cell in (cost.plan.policy.name, "", "", ""))],
                                ["role", *("type", "bytes", "bits", "error") * len(costs)]]
    for each in zip(*(cost.roles for cost in costs), strict=True):
        row: list[object] = [each[0].role]
        for role in each:
            error = f"{role.errors.relative_rmse:.3g}" if role.errors.n else "-"
            row += ["+".join(role.types), role.n_bytes, f"{role.bits_per_weight:.2f}", error]
        rows.append(row)
    show_table(rows, right="l" + "lrrr" * len(costs))
    show()
    show_table([(cost.plan.policy.name, format_bytes(cost.plan.total_bytes),
                 f"{cost.bits_per_weight:.2f} bits per weight") for cost in costs])
    n_sampled = max(sum(role.errors.n for role in cost.roles) for cost in costs)
    show(f"error: relative RMSE against the source, measured on {n_sampled} values, the same for all policies")
