"""Asking the engines before a conversion, and about a file: which profiles, what they say, and whether to go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4tools.engines.header import SPLIT_COUNT, header_of_file, header_of_plan
from dsv4tools.engines.judge import judge
from dsv4tools.engines.profile import Profile, find_profile, list_profiles
from dsv4tools.engines.verdict import EngineFinding, Verdict
from dsv4tools.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.plan import Plan

NO_ENGINE = "none"
_ANYWAY = f"--engine {NO_ENGINE} skips this check"


@dataclass(frozen=True, slots=True)
class Engines:
    """The profiles to ask, and the names of those whose verdict decides."""

    profiles: tuple[Profile, ...]
    deciding: tuple[str, ...] = ()


def choose_engines(names: Sequence[str] = ()) -> Engines:
    """The shipped profiles and those that `names` ask for, which decide; ``none`` asks nobody.

    `names` are shipped profiles in any case, or profile files. Raises UsageError for an unknown one, InputError for a
    malformed file.
    """
    if any(name.lower() == NO_ENGINE for name in names):
        if len(names) > 1:
            raise UsageError("--engine", f"{NO_ENGINE!r} was given together with others", hint="give either")
        return Engines(())
    asked = {p.name: p for p in map(find_profile, names)}
    shipped = {p.name: p for p in list_profiles()}
    return Engines(tuple((shipped | asked).values()), tuple(asked))


def judge_plan(plan: Plan, engines: Engines) -> list[Verdict]:
    """What each engine would do with the file that `plan` describes."""
    header = header_of_plan(plan)
    return [judge(profile, header) for profile in engines.profiles]


def judge_file(file: GgufFile, engines: Engines) -> list[Verdict]:
    """What each engine would do with a file; for a part of a split set, with the whole set."""
    try:
        header = header_of_file(file)
    except InputError as e:
        finding = EngineFinding("refuse", SPLIT_COUNT, str(file.value(SPLIT_COUNT)), "a whole set of parts",
                                effect=str(e), remedy="put all parts of the set into one directory")
        return [Verdict(p.name, p.commit, p.evidence, (finding,)) for p in engines.profiles]
    return [judge(profile, header) for profile in engines.profiles]


def require_engines(plan: Plan, verdicts: Sequence[Verdict], engines: Engines) -> None:
    """InputError if a deciding engine would refuse the file, or if none would take it.

    It names the tensor or key, the policy rule that decided its type, the engine's message and what to do.
    """
    refusing = next((v for v in verdicts if v.engine in engines.deciding and not v.loads), None)
    if refusing is not None:
        raise _refusal(plan, refusing, f"{refusing.engine} would refuse the file: ")
    if verdicts and not any(v.loads for v in verdicts):
        closest = min(verdicts, key=lambda v: (v.of("refuse")[0].where == "model shape", len(v.of("refuse"))))
        names = ", ".join(v.engine for v in verdicts)
        raise _refusal(plan, closest, f"no engine ({names}) would load the file; {closest.engine} comes closest: ")


def check_plan(plan: Plan, names: Sequence[str] = ()) -> list[Verdict]:
    """`judge_plan` and `require_engines` for the engines called `names`; errors of `choose_engines` too."""
    engines = choose_engines(names)
    verdicts = judge_plan(plan, engines)
    require_engines(plan, verdicts, engines)
    return verdicts


def _refusal(plan: Plan, verdict: Verdict, what: str) -> InputError:
    finding = verdict.of("refuse")[0]
    rule = next((t.rule for t in plan.tensors if t.name == finding.where), "")
    by = f" (by {rule})" if rule else ""
    more = f" and {finding.n - 1} more like it" if finding.n > 1 else ""
    says = f': "{finding.message}"' if finding.message else ""
    return InputError(finding.where, f"{what}{finding.found}{by}{more}, expected {finding.expected}{says}",
                      hint=f"{finding.remedy}; {_ANYWAY}")
