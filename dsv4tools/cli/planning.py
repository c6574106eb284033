"""The options that say what a GGUF will hold: shared by convert, template and policy explain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsv4tools.cli.sources import file_argument, open_argument
from dsv4tools.flags import FAMILIES
from dsv4tools.plan import Plan, make_plan
from dsv4tools.reroute import reroute

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dsv4tools.hub import HubReference
    from dsv4tools.policy import Policy

_Command = TypeVar("_Command", bound="Callable[..., Any]")


imatrix_option = click.option("--imatrix", type=file_argument, metavar="FILE",
                              help="An importance matrix of the model: GGUF, or .dat.")


def plan_options(command: _Command) -> _Command:
    """Add the options of `plan_from_options` to a command."""
    options = [
        click.option("--policy", default="q4k", show_default=True, metavar="NAME|FILE",
                     help="Types by rule: a shipped policy, a TOML file, or 'template' (or 'keep')."),
        click.option("--experts-per-token", type=click.IntRange(1), metavar="N",
                     help="Re-route to N experts per token."),
        click.option("--template", "template_file", type=file_argument, metavar="FILE",
                     help="A GGUF that gives tensor order, metadata and tokenizer."),
        click.option("--nan", type=click.Choice(["refuse", "zero"]), default="refuse", show_default=True,
                     help="What to do with values that are not finite."),
        click.option("--allow-requantize", is_flag=True,
                     help="Of a GGUF as source: also round again what was rounded already."),
        click.option("--tensor-type", "tensor_types", multiple=True, metavar="NAME=TYPE",
                     help="Type of the tensors NAME (a glob, a name or its dotted beginning); repeatable."),
        imatrix_option,
        click.option("--imatrix-strict", is_flag=True, help="Refuse an importance matrix that lacks what a type uses."),
        *(click.option(f"--{family}", metavar="TYPE", help=f"Type of {_family_help(family)}.") for family in FAMILIES),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _family_help(family: str) -> str:
    return {
        "routed-w1": "the experts' gate matrices", "routed-w2": "the experts' down matrices",
        "routed-w3": "the experts' up matrices", "experts": "all expert matrices",
        "attention-proj": "the attention projections", "attention": "all attention matrices, the indexer's too",
        "shared": "the shared experts", "output": "output.weight", "embedding": "token_embd.weight",
        "dense": "all matrices outside the experts",
    }[family]


def plan_from_options(source: Path | HubReference, *, policy: str, **options: Any) -> Plan:
    """The plan that the options ask for."""
    return plans_from_options(source, [policy], **options)[0]


def plans_from_options(
    source: Path | HubReference, policies: Sequence[str | Policy], *, experts_per_token: int | None,
    template_file: Path | None, nan: str, tensor_types: tuple[str, ...], allow_requantize: bool, imatrix: Path | None,
    imatrix_strict: bool, **families: str | None,
) -> list[Plan]:
    """A plan for each of `policies`; the source is opened once."""
    checkpoint = open_argument(source)
    if experts_per_token is not None:
        checkpoint = reroute(checkpoint, experts_per_token)
    flags = {name.replace("_", "-"): value for name, value in families.items()}
    return [make_plan(checkpoint, policy=policy, template_file=template_file, families=flags, tensor_types=tensor_types,
                      nan="zero" if nan == "zero" else "refuse", allow_requantize=allow_requantize, imatrix=imatrix,
                      imatrix_strict=imatrix_strict)
            for policy in policies]
