"""`verify`: says whether a GGUF is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dsv4tools.checkpoint import Checkpoint, open_checkpoint
from dsv4tools.engines import choose_engines, judge_file
from dsv4tools.errors import UsageError
from dsv4tools.gguf.reader import Finding, scan_gguf
from dsv4tools.plan import TEMPLATE_KEY
from dsv4tools.template.tables import load_tables
from dsv4tools.verify.report import Report
from dsv4tools.verify.source import compare_tensors, plan_comparison, select_tensors, view_as_in
from dsv4tools.workers import choose_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dsv4tools.gguf.reader import GgufFile


def verify(
    path: str | Path, *, source: str | Path | Checkpoint | None = None, tensors: Sequence[str] = (),
    threads: int | None = None, progress: Callable[[int], None] | None = None,
    announce: Callable[[int], None] | None = None, engines: Sequence[str] = (),
) -> Report:
    """Check the structure of a GGUF, and with `source` that every tensor is what the checkpoint gives.

    A fault of the file is a finding of the report, never an exception.

    Parameters
    ----------
    source:
        The checkpoint (directory or opened) that the file was made from.
    tensors:
        Globs: compare only these.
    threads:
        How many units are derived at once; all usable cores by default.
    progress, announce:
        `announce` is called once with the number of bytes to compare, `progress` with those done since the last call.
    engines:
        Engines that must load the file and compute what it says (`dsv4tools.engines.choose_engines`). Without any, the
        verdicts of the known ones are reported for a DeepSeek-V4 file, and decide nothing; ``["none"]`` asks none.

    Raises
    ------
    UsageError
        An unknown engine, `tensors` without `source`, a glob that matches nothing, or `threads` out of range.
    InputError, ResourceError, VerifyError
        There is no file, or the checkpoint cannot be used.
    """
    path = Path(path)
    if tensors and source is None:
        raise UsageError("--tensor", "needs --source: it compares a tensor with the checkpoint")
    n_threads = choose_threads(threads)
    chosen = choose_engines(engines)
    file = scan_gguf(path)
    if not file.ok and file.value(TEMPLATE_KEY) is True:
        file.close()
        file = scan_gguf(path, template=True)
    with file:
        report = Report(path, len(file.tensors), file.n_file_bytes, findings=list(file.findings))
        if file.value(TEMPLATE_KEY) is True:
            report.template = "header" if file.template else "sparse"
        if file.ok and (chosen.deciding or _is_deepseek4(file)):
            report.engines, report.deciding = judge_file(file, chosen), chosen.deciding
        if source is None or not file.ok:
            return report
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
        checkpoint = view_as_in(file, checkpoint)
        names = select_tensors(file, tensors)
        if report.template:
            what = "is a template: no weights to compare"
            report.findings.append(Finding("error", "template", str(path), what, None))
            return report
        planned, findings = plan_comparison(file, checkpoint, names)
        report.findings += findings
        if announce is not None:
            announce(sum(t.n_bytes for t in planned))
        report.tensors = compare_tensors(file, checkpoint, planned, n_threads, progress)
        return report


def _is_deepseek4(file: GgufFile) -> bool:
    architecture = file.value("general.architecture")
    return isinstance(architecture, str) and architecture == load_tables().architecture
