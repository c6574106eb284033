"""`verify`: says whether a GGUF is right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4tools.engines import choose_engines, judge_file
from dsv4tools.errors import UsageError
from dsv4tools.gguf.reader import Finding, scan_gguf
from dsv4tools.gguf.splits import SplitFile, scan_whole
from dsv4tools.imatrix import ImatrixFile, open_imatrix
from dsv4tools.plan import TEMPLATE_KEY, tensor_units
from dsv4tools.sources import open_source
from dsv4tools.template.tables import load_tables
from dsv4tools.verify.behaviour import compare_behaviour
from dsv4tools.verify.depth import look_deep
from dsv4tools.verify.hashes import check_manifest, check_set, read_manifest
from dsv4tools.verify.report import Report
from dsv4tools.verify.sample import sample_units
from dsv4tools.verify.source import compare_tensors, plan_comparison, select_tensors, view_as_in
from dsv4tools.workers import choose_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.engines import Engines
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.plan import PlannedTensor, Unit


def verify(
    path: str | Path, *, source: str | Path | Checkpoint | None = None, tensors: Sequence[str] = (),
    engines: Sequence[str] = (), deep: bool = False, sample: float | None = None, seed: int = 0,
    manifest: str | Path | None = None, forward: bool = False, max_kl: float | None = None,
    imatrix: str | Path | ImatrixFile | None = None, threads: int | None = None,
    progress: Callable[[int], None] | None = None, announce: Callable[[int], None] | None = None,
) -> Report:
    """Check the structure of a GGUF, and with `source` that every tensor is what its source gives.

    A fault of the file is a finding of the report, never an exception.

    Parameters
    ----------
    path:
        The file, or any part of a split set: the set is checked.
    source:
        What the file was made from: a checkpoint (directory or ``hf://owner/name``) or a GGUF, or either opened.
    tensors:
        Globs: compare and look deep into only these.
    engines:
        Engines that must load the file and compute what it says (`dsv4tools.engines.choose_engines`). Without any, the
        verdicts of the known ones are reported for a DeepSeek-V4 file, and decide nothing; ``["none"]`` asks none.
    deep:
        Scan the scales and values of every block.
    sample, seed:
        Compare only so many per cent of each tensor, chosen by the seed.
    manifest:
        Hashes that the file must have, as `convert` or llama-gguf-hash wrote them.
    forward, max_kl:
        Compare predictions with those of the source; a mean divergence above `max_kl` is wrong.
    imatrix:
        The importance matrix that the file was made with: bytes can only be derived again with it.
    threads:
        How many units are derived at once; all usable cores by default.
    progress, announce:
        `announce` is called once with the number of bytes to look at, `progress` with those done since the last call.

    Raises
    ------
    UsageError
        An unknown engine, options that need `source` without it, a glob that matches nothing, or a number out of range.
    InputError, ResourceError, VerifyError
        There is no file, or the checkpoint, the manifest or the importance matrix cannot be used.
    """
    path = Path(path)
    _check_options(source=source, tensors=tensors, deep=deep, sample=sample, forward=forward, max_kl=max_kl,
                   imatrix=imatrix)
    chosen = choose_engines(engines)
    expected = read_manifest(Path(manifest), path.name) if manifest is not None else None
    work = _Work(choose_threads(threads), progress or _ignore, announce or _ignore)
    with _open(path) as file:
        report = _look_at_header(path, file, chosen)
        report.sample = sample
        if not file.ok or (source is None and not deep and expected is None):
            return report
        names = select_tensors(file, tensors)
        checkpoint = None if source is None else open_source(source)
        if report.template:
            what = "is a template: no weights to compare"
            report.findings.append(Finding("error", "template", str(path), what, None))
            return report
        comparison = _Comparison()
        if checkpoint is not None:
            checkpoint = view_as_in(file, checkpoint)
            weights = imatrix if imatrix is None or isinstance(imatrix, ImatrixFile) else open_imatrix(imatrix)
            comparison = _Comparison.of(file, checkpoint, names, (sample, seed), weights)
            report.findings += comparison.findings
        deep_names = names if deep else []
        work.announce(comparison.n_bytes + sum(file.tensors[name].n_bytes for name in deep_names)
                      + (sum(t.n_bytes for t in file.tensors.values()) if expected is not None else 0))
        if expected is not None:
            report.manifest, findings = (
                check_set(file, expected, work.progress) if isinstance(file, SplitFile)
                else check_manifest(file, expected, work.progress))
            report.findings += findings
        if deep:
            report.depth, findings = look_deep(file, names, threads=work.threads, progress=work.progress)
            report.findings += findings
        if checkpoint is not None:
            report.tensors = compare_tensors(file, checkpoint, comparison.planned, comparison.units,
                                             threads=work.threads, progress=work.progress)
        if checkpoint is not None and forward:
            report.behaviour, findings = compare_behaviour(path, checkpoint, allowed_kl=max_kl, threads=threads)
            report.findings += findings
    return report


def _check_options(
    *, source: object, tensors: Sequence[str], deep: bool, sample: float | None, forward: bool, max_kl: float | None,
    imatrix: object,
) -> None:
    needing = {"--sample": sample is not None, "--forward": forward, "--tensor": bool(tensors) and not deep,
               "--imatrix": imatrix is not None}
    option = next((option for option, given in needing.items() if given), None)
    if source is None and option is not None:
        raise UsageError(option, "needs --source: it compares with the checkpoint")
    if max_kl is not None and not forward:
        raise UsageError("--max-kl", "needs --forward")
    if sample is not None and not 0 < sample <= 100:
        raise UsageError("--sample", f"is {sample}, expected more than 0 and up to 100 per cent")


def _look_at_header(path: Path, file: GgufFile, chosen: Engines) -> Report:
    report = Report(path, len(file.tensors), file.n_file_bytes, findings=list(file.findings),
                    contents=dict(file.tensors))
    if file.value(TEMPLATE_KEY) is True:
        report.template = "header" if file.template else "sparse"
    if file.ok and (chosen.deciding or _is_deepseek4(file)):
        report.engines, report.deciding = judge_file(file, chosen), chosen.deciding
    return report


@dataclass(frozen=True, slots=True)
class _Comparison:
    """What will be derived and compared, and what cannot be."""

    planned: Sequence[PlannedTensor] = ()
    units: Iterable[Unit] = ()
    n_bytes: int = 0
    findings: Sequence[Finding] = ()

    @classmethod
    def of(
        cls, file: GgufFile, checkpoint: Checkpoint, names: Sequence[str], sampling: tuple[float | None, int],
        imatrix: ImatrixFile | None,
    ) -> _Comparison:
        """All of the tensors `names`, or a sample of them: `sampling` is the per cent and the seed."""
        planned, findings = plan_comparison(file, checkpoint, names, imatrix)
        sample, seed = sampling
        if sample is None:
            units = (unit for t in planned for unit in tensor_units(t))
            return cls(planned, units, sum(t.n_bytes for t in planned), findings)
        sampled = [unit for t in planned for unit in sample_units(t, sample, seed)]
        return cls(planned, sampled, sum(unit.n_bytes for unit in sampled), findings)


@dataclass(frozen=True, slots=True)
class _Work:
    """How the work is done, and who hears of it."""

    threads: int
    progress: Callable[[int], None]
    announce: Callable[[int], None]


def _ignore(_: int) -> None:
    """Nobody listens."""


def _open(path: Path) -> GgufFile:
    file = scan_whole(path)
    if not file.ok and file.value(TEMPLATE_KEY) is True:
        file.close()
        return scan_gguf(path, template=True)
    return file


def _is_deepseek4(file: GgufFile) -> bool:
    architecture = file.value("general.architecture")
    return isinstance(architecture, str) and architecture == load_tables().architecture
