"""What a verification found, as data: the command line prints it, scripts read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003  - dataclass fields are resolved by readers of this module

from dsv4tools.engines import Verdict  # noqa: TC001  - see above
from dsv4tools.gguf.reader import Finding  # noqa: TC001  - see above


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One tensor compared with its source.

    `n_different` counts bytes; `difference` describes the first one, and is empty where there is none.
    """

    name: str
    format: str
    n_bytes: int
    n_different: int = 0
    difference: str = ""

    @property
    def ok(self) -> bool:
        """Whether every byte is what the source gives."""
        return not self.difference


@dataclass
class Report:
    """The result of `verify`.

    Attributes
    ----------
    path:
        The file under test.
    n_tensors, n_file_bytes:
        What it holds.
    template:
        ``"header"`` for a header-only template, ``"sparse"`` for one extended to full size, else None.
    findings:
        Of the structure, and of comparing metadata and tensor sets with the source.
    tensors:
        The tensors that were compared, in file order.
    engines:
        What each engine would do with the file.
    deciding:
        The engines that were asked for: the file is right only if they take it.
    """

    path: Path
    n_tensors: int = 0
    n_file_bytes: int = 0
    template: str | None = None
    findings: list[Finding] = field(default_factory=list)
    tensors: list[TensorCheck] = field(default_factory=list)
    engines: list[Verdict] = field(default_factory=list)
    deciding: tuple[str, ...] = ()

    @property
    def errors(self) -> list[Finding]:
        """The findings that make the file wrong."""
        return [f for f in self.findings if f.severity == "error"]

    @property
    def ok(self) -> bool:
        """No error, every compared tensor is what its source gives, and the engines asked for load and compute it."""
        return not self.errors and all(t.ok for t in self.tensors) and not self.objecting

    @property
    def objecting(self) -> list[Verdict]:
        """Verdicts of the engines asked for that refuse the file, or would compute wrongly with it."""
        return [v for v in self.engines if v.engine in self.deciding and not v.ok]
