"""What a verification found, as data: the command line prints it, scripts read it, the page shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path  # noqa: TC003  - dataclass fields are resolved by readers of this module
from typing import Literal

from dsv4tools.engines import Verdict  # noqa: TC001  - see above
from dsv4tools.formats.measure import ErrorSums, ValueSums  # noqa: TC001  - see above
from dsv4tools.formats.scales import ScaleCounts  # noqa: TC001  - see above
from dsv4tools.gguf.header import TensorInfo  # noqa: TC001  - see above
from dsv4tools.gguf.reader import Finding  # noqa: TC001  - see above

Judgement = Literal["identical", "within", "wrong"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a tensor: the place in it (empty: all of it), and what was found there."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """One tensor compared with its source.

    Attributes
    ----------
    name, format, n_values, n_bytes:
        What it is.
    n_compared:
        Bytes that were derived again and compared; all of them without ``sample``.
    judgement:
        ``identical`` to our encoding; ``within`` the bounds, though encoded otherwise; ``wrong``.
    reason:
        Why it is not identical, or wrong; one sentence.
    n_different, n_blocks, n_blocks_different:
        Bytes that differ from our encoding; blocks compared, and those of them that differ.
    difference:
        The first byte that differs; empty where none does.
    error, own:
        Of the tensor and of our own encoding of the source in the same type. None for integers, and where the type
        cannot be decoded; `own` also where it cannot be encoded.
    n_measured:
        Values that `error` was measured on. A part suffices where the bytes are identical.
    by_matrix:
        Relative RMSE of each expert, or of the one matrix.
    faults:
        What is wrong where, as far as the evidence shows.
    """

    name: str
    format: str
    n_values: int
    n_bytes: int
    n_compared: int
    judgement: Judgement = "identical"
    reason: str = ""
    n_different: int = 0
    n_blocks: int = 0
    n_blocks_different: int = 0
    difference: str = ""
    error: ErrorSums | None = None
    own: ErrorSums | None = None
    n_measured: int = 0
    by_matrix: tuple[float, ...] = ()
    faults: tuple[Fault, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it is what the source gives, byte for byte or within the bounds."""
        return self.judgement != "wrong"

    @property
    def bits_per_weight(self) -> float:
        """Storage cost, block scales included; 0 for an empty tensor."""
        return 8 * self.n_bytes / self.n_values if self.n_values else 0.0


@dataclass(slots=True)
class DepthCheck:
    """What the data of one tensor are like.

    Attributes
    ----------
    name, format, n_bytes:
        What it is.
    scales:
        Of its blocks; counts of 0 blocks where the type has no scales that are known.
    values:
        None for integers and types that cannot be decoded.
    exponents:
        How many of a sample of its values have each exponent of float32 (127: 1 up to 2); empty without `values`.
    zero_matrices:
        Experts (or the one matrix, 0) whose values are all zero.
    """

    name: str
    format: str
    n_bytes: int
    scales: ScaleCounts
    values: ValueSums | None = None
    exponents: tuple[int, ...] = ()
    zero_matrices: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ManifestCheck:
    """What was compared with a manifest: its file, the algorithms, and how many hashes agree out of how many."""

    path: Path
    algorithms: tuple[str, ...]
    n_right: int
    n_hashes: int


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How predictions from the file differ from those of its source, on fixed prompts.

    Attributes
    ----------
    n_prompts, n_positions:
        What they were compared on.
    mean_kl, largest_kl:
        Divergence of the file's next-token distribution from the source's, in nats.
    same_top:
        Share of positions at which both find the same token most likely.
    perplexity_source, perplexity_file:
        On the prompts.
    parting_layer:
        The first layer behind which the residual streams differ by more than rounding.
    allowed_kl:
        The largest mean divergence that passes; None: numbers only.
    """

    n_prompts: int
    n_positions: int
    mean_kl: float
    largest_kl: float
    same_top: float
    perplexity_source: float | None
    perplexity_file: float | None
    parting_layer: int | None
    allowed_kl: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the divergence is no more than allowed."""
        return self.allowed_kl is None or self.mean_kl <= self.allowed_kl


@dataclass
class Report:
    """The result of `verify`.

    Attributes
    ----------
    path:
        The file under test; of a split set the part that was named.
    n_tensors, n_file_bytes:
        What it holds; of a split set all parts.
    contents:
        Its tensors by name, in file order.
    template:
        ``"header"`` for a header-only template, ``"sparse"`` for one extended to full size, else None.
    findings:
        Of the structure, of comparing metadata and tensor sets with the source, of ``deep`` and of a manifest.
    tensors:
        The tensors that were compared, in file order.
    sample:
        Per cent of each tensor that were compared; None: all.
    depth:
        What the data of each tensor are like, in file order; empty without ``deep``.
    manifest, behaviour:
        None where they were not asked for, or could not be had.
    engines:
        What each engine would do with the file.
    deciding:
        The engines that were asked for: the file is right only if they take it.
    """

    path: Path
    n_tensors: int = 0
    n_file_bytes: int = 0
    contents: dict[str, TensorInfo] = field(default_factory=dict)
    template: str | None = None
    findings: list[Finding] = field(default_factory=list)
    tensors: list[TensorCheck] = field(default_factory=list)
    sample: float | None = None
    depth: list[DepthCheck] = field(default_factory=list)
    manifest: ManifestCheck | None = None
    behaviour: Behaviour | None = None
    engines: list[Verdict] = field(default_factory=list)
    deciding: tuple[str, ...] = ()

    @property
    def errors(self) -> list[Finding]:
        """The findings that make the file wrong."""
        return [f for f in self.findings if f.severity == "error"]

    @property
    def wrong(self) -> list[TensorCheck]:
        """The compared tensors that are not what their source gives."""
        return [t for t in self.tensors if not t.ok]

    @property
    def ok(self) -> bool:
        """No error, every compared tensor is what its source gives, and the engines asked for load and compute it."""
        return not (self.errors or self.wrong or self.objecting or (self.behaviour and not self.behaviour.ok))

    @property
    def objecting(self) -> list[Verdict]:
        """Verdicts of the engines asked for that refuse the file, or would compute wrongly with it."""
        return [v for v in self.engines if v.engine in self.deciding and not v.ok]

    @property
    def n_errors(self) -> int:
        """Findings, tensors and engines that speak against the file, and its behaviour."""
        misbehaves = self.behaviour is not None and not self.behaviour.ok
        return len(self.errors) + len(self.wrong) + len(self.objecting) + misbehaves

    def worst_first(self) -> list[TensorCheck]:
        """The compared tensors: wrong ones first, then by how much their error exceeds our own, then by error."""
        def key(t: TensorCheck) -> tuple[int, float, float]:
            error = t.error.relative_rmse if t.error else 0.0
            own = t.own.relative_rmse if t.own else 0.0
            excess = error / own if own else (float("inf") if error else 0.0)
            return (("wrong", "within", "identical").index(t.judgement),
                    -excess if t.judgement != "identical" else 0.0, -error)

        return sorted(self.tensors, key=key)
