"""What a plan could do better: experts that are FP4 in the source and would become larger and less exact than MXFP4."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dsv4tools.engines import header_of_plan, judge
from dsv4tools.formats.source import SourceKind
from dsv4tools.formats.table import FORMATS
from dsv4tools.sizes import format_bytes
from dsv4tools.verify.roles import family_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4tools.engines import Engines, Verdict
    from dsv4tools.plan import Plan, PlannedTensor

_MXFP4 = FORMATS["MXFP4"]
_EXACT = frozenset({"F32", "F16", "BF16", "MXFP4"})   # what rounds no FP4 value (F16 within its range)


@dataclass(frozen=True, slots=True)
class Mxfp4Hint:
    """Experts that MXFP4 would hold exactly, in fewer bytes.

    Attributes
    ----------
    tensors, types:
        Their names, and the types that they are to get.
    n_bytes, mxfp4_bytes:
        What they take so, and as MXFP4.
    engines, other_engines:
        Which of the engines asked would load the file then, and which not.
    """

    tensors: tuple[str, ...]
    types: tuple[str, ...]
    n_bytes: int
    mxfp4_bytes: int
    engines: tuple[str, ...]
    other_engines: tuple[str, ...]

    @property
    def text(self) -> str:
        """One line."""
        but = f", not in {', '.join(self.other_engines)}" if self.other_engines else ""
        return (f"{len(self.tensors)} expert tensors as {', '.join(self.types)} are larger and less exact than as "
                f"MXFP4, which holds the source's FP4 values as they are: {format_bytes(self.n_bytes)}, not "
                f"{format_bytes(self.mxfp4_bytes)}; it loads in {', '.join(self.engines)}{but} (--experts mxfp4)")

    def as_data(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"hint": "mxfp4-experts", "text": self.text, "tensors": list(self.tensors), "types": list(self.types),
                "n_bytes": self.n_bytes, "mxfp4_bytes": self.mxfp4_bytes, "engines": list(self.engines),
                "other_engines": list(self.other_engines)}


def find_hints(plan: Plan, verdicts: Sequence[Verdict], engines: Engines) -> list[Mxfp4Hint]:
    """Hints on `plan`, which the profiles of `engines` judged as `verdicts`; none where no engine is asked.

    A hint needs every engine that decides to take MXFP4 experts; where none does, one of those that load the plan.
    """
    larger = [t for t in plan.tensors if family_of(t.name) == "routed experts" and t.format.name not in _EXACT
              and _holds_fp4(t) and t.n_bytes > _MXFP4.n_bytes(t.tensor.ne)]
    asked = set(engines.deciding) or {v.engine for v in verdicts if v.loads}
    if not larger or not asked:
        return []
    header = header_of_plan(plan)
    changed = {t.name: replace(header.tensors[t.name], format=_MXFP4) for t in larger}
    header = replace(header, tensors={**header.tensors, **changed})
    takes = {p.name: judge(p, header).ok for p in engines.profiles if p.name in asked}
    if not (all(takes.values()) if engines.deciding else any(takes.values())):
        return []
    return [Mxfp4Hint(
        tuple(t.name for t in larger), tuple(dict.fromkeys(t.format.name for t in larger)),
        sum(t.n_bytes for t in larger), sum(_MXFP4.n_bytes(t.tensor.ne) for t in larger),
        tuple(name for name, ok in takes.items() if ok), tuple(name for name, ok in takes.items() if not ok),
    )]


def _holds_fp4(planned: PlannedTensor) -> bool:
    return planned.tensor.stored_format == _MXFP4 or all(m.kind is SourceKind.FP4 for m in planned.tensor.sources)
