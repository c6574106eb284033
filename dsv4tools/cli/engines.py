"""The option that names engines, and their verdicts in text: shared by convert and verify."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dsv4tools.cli.output import show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4tools.engines import Verdict

engine_option = click.option(
    "--engine", "engines", multiple=True, metavar="NAME|FILE|none",
    help="An engine that must take the file: ds4, ds4-may2026, ds4-4expert, llama.cpp, or a profile file; repeatable. "
         "none asks no engine.",
)


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """One line per engine, and below it every finding with what to do."""
    for verdict in verdicts:
        show(verdict.headline + (":" if verdict.findings else ""))
        for finding in verdict.findings:
            show(f"    {finding.severity}: {finding.text}; {finding.remedy}")


def show_summaries(verdicts: Sequence[Verdict]) -> None:
    """One line per engine."""
    for verdict in verdicts:
        show(f"engine         {verdict.summary}")
