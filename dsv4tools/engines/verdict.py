"""What an engine would do with a file, as data: the command line prints it, scripts read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["refuse", "wrong-numbers", "note"]
SEVERITIES: tuple[Severity, ...] = ("refuse", "wrong-numbers", "note")


@dataclass(frozen=True, slots=True)
class EngineFinding:
    """One thing that an engine objects to, or that is worth knowing.

    Attributes
    ----------
    severity:
        ``refuse``: it does not load the file. ``wrong-numbers``: it loads the file and then computes wrongly or not at
        all. ``note``: it loads and computes, with a limit.
    where:
        Tensor or metadata key.
    found, expected:
        What the file says, and what the engine takes.
    message:
        The engine's own words, as its source has them; empty where it says nothing.
    effect:
        What happens, where the message does not say it.
    remedy:
        What the user can do.
    n:
        How many tensors or keys it is about; `where` is the first.
    """

    severity: Severity
    where: str
    found: str
    expected: str
    message: str = ""
    effect: str = ""
    remedy: str = ""
    n: int = 1

    @property
    def text(self) -> str:
        """Everything but the remedy, in one line."""
        more = f" (and {self.n - 1} more like it)" if self.n > 1 else ""
        line = f"{self.where}{more}: {self.found}, expected {self.expected}"
        if self.effect:
            line += f": {self.effect}"
        return line + (f': "{self.message}"' if self.message else "")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one engine would do with a file, the gravest findings first."""

    engine: str
    commit: str
    evidence: str
    findings: tuple[EngineFinding, ...] = ()

    def of(self, severity: Severity) -> list[EngineFinding]:
        """The findings of one severity."""
        return [f for f in self.findings if f.severity == severity]

    @property
    def loads(self) -> bool:
        """Whether the engine would load the file."""
        return not self.of("refuse")

    @property
    def ok(self) -> bool:
        """Whether it would load the file and compute what the file says."""
        return self.loads and not self.of("wrong-numbers")

    @property
    def headline(self) -> str:
        """The engine, its commit, and what it would do."""
        read = ", read, not run" if self.evidence == "read" else ""
        does = "would load" if self.ok else "would load, and not compute what the file says" if self.loads else \
            "would refuse"
        return f"{self.engine} (commit {self.commit[:7]}{read}): {does}"

    @property
    def summary(self) -> str:
        """The headline, and the first reason if it is not well."""
        grave = [f for f in self.findings if f.severity != "note"]
        if not grave:
            return self.headline
        return f"{self.headline}: {grave[0].text}" + (f"; and {len(grave) - 1} more" if len(grave) > 1 else "")

    def as_data(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "engine": self.engine, "commit": self.commit, "evidence": self.evidence, "loads": self.loads,
            "ok": self.ok, "summary": self.summary, "findings": [asdict(f) for f in self.findings],
        }
