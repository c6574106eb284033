"""What an importance matrix has for a plan, in lines: shown by convert before and after the work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4tools.cli.output import show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4tools.plan import Plan

SHOWN = 8   # names in a line; --json has all


def show_coverage(plan: Plan, label: str) -> None:
    """Lines behind `label`: how many tensors have importance, and what lacks it; nothing without a matrix."""
    coverage, file = plan.coverage, plan.imatrix
    if coverage is None:
        return
    if file is None:
        why = "has nothing for the tensors whose types use one" if coverage.n_tensors else \
            "is of no use here: no tensor has a type that uses one"
        show(f"{label}the importance matrix {why}")
        return
    made = f" ({file.n_chunks} chunks of {', '.join(file.datasets) or 'an unnamed text'})" if file.n_chunks else ""
    show(f"{label}{file.path.name}{made}, for {len(coverage.covered)} of the {coverage.n_tensors} tensors whose types "
         "use it")
    indent = " " * len(label) + "  "
    if coverage.missing:
        show(f"{indent}none for {_some(coverage.missing)}")
    for gaps, kind, effect in ((coverage.without_data, "data", "whose columns all weigh the same"),
                               (coverage.without_entry, "entry", "which are encoded as without a matrix")):
        if gaps:
            experts = [f"{name} {', '.join(map(str, numbers))}" for name, numbers in gaps.items()]
            show(f"{indent}no {kind} of {sum(map(len, gaps.values()))} experts, {effect}: {_some(experts, '; ')}")
    if coverage.unknown:
        show(f"{indent}{len(coverage.unknown)} entries are of no tensor: {_some(coverage.unknown)}")


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more
