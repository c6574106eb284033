"""``dsv4tools verify``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsv4tools.cli.engines import engine_option, show_verdicts
from dsv4tools.cli.output import EPILOG, json_option, progress_bar, show, show_json, show_table, threads_option
from dsv4tools.cli.planning import imatrix_option
from dsv4tools.cli.sources import NEEDS_WEIGHTS, file_argument, open_argument, require_local, source_argument
from dsv4tools.errors import UsageError, VerifyError
from dsv4tools.hub import HubReference
from dsv4tools.outfile import check_not_input, check_place
from dsv4tools.sizes import format_bytes
from dsv4tools.verify import report_data
from dsv4tools.verify import verify as run_verification
from dsv4tools.verify.page import write_page

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4tools.formats.measure import ErrorSums
    from dsv4tools.verify import DepthCheck, Report, TensorCheck

SHOWN = 12   # tensors in the table; --json and --report have all


@click.command(epilog=EPILOG)
@click.argument("path", metavar="OUT.gguf", type=file_argument)
@click.option("--source", type=source_argument, metavar="SRC",
              help="Derive every tensor again from SRC, a checkpoint or a GGUF, and compare.")
@click.option("--tensor", "tensors", multiple=True, metavar="GLOB",
              help="Look at the data of only these tensors; repeatable.")
@engine_option
@click.option("--deep", is_flag=True, help="Scan the scales and values of every block.")
@click.option("--sample", type=click.FloatRange(0, 100, min_open=True), metavar="P",
              help="Compare only P per cent of each tensor with SRC: a quick look.")
@click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Chooses what --sample looks at.")
@click.option("--manifest", type=click.Path(path_type=Path), metavar="M",
              help="Check the hashes that convert --manifest or llama-gguf-hash wrote to M.")
@imatrix_option
@click.option("--forward", is_flag=True, help="Compare predictions with those of SRC on a fixed set of prompts.")
@click.option("--max-kl", type=click.FloatRange(min=0), metavar="X",
              help="With --forward: wrong if the mean divergence is above X nats.")
@click.option("--report", "page", type=click.Path(path_type=Path), metavar="R.html", help="Also write a page.")
@click.option("--overwrite", is_flag=True, help="Replace an existing page.")
@threads_option
@json_option
@click.pass_context
def verify(ctx: click.Context, path: Path, source: Path | HubReference | None, tensors: tuple[str, ...],
           engines: tuple[str, ...], deep: bool, sample: float | None, seed: int, manifest: Path | None,
           imatrix: Path | None, forward: bool,
           max_kl: float | None, page: Path | None, overwrite: bool, threads: int | None, as_json: bool) -> None:
    """Say whether a GGUF is right: its structure, and with --source every byte of its tensors.

    A file that another tool encoded is compared by value, one that was made with an importance matrix by bytes if
    --imatrix gives it. With --engine also whether that engine loads the file and
    computes what it says, from the header alone. Without, the verdicts of all known engines are shown for a
    DeepSeek-V4 file, and do not decide. Of a split set, name any part.

    Exit code 0: right; 5: any fault in the file; 3: a fault in the source or the manifest.

    \b
    Examples:
      dsv4tools verify flash.gguf
      dsv4tools verify flash.gguf --source DeepSeek-V4-Flash --report flash.html
      dsv4tools verify flash.gguf --source DeepSeek-V4-Flash --tensor 'blk.3.*'
      dsv4tools verify flash.gguf --source DeepSeek-V4-Flash --sample 1
      dsv4tools verify flash.gguf --source DeepSeek-V4-Flash --imatrix flash.imatrix.gguf
      dsv4tools verify flash.gguf --deep --manifest flash.sha256
      dsv4tools verify flash.gguf --engine ds4 --engine llama.cpp
    """
    if page is not None:
        _check_page(page, [path, *filter(None, (manifest, imatrix))], source, overwrite=overwrite)
    if isinstance(source, HubReference) and forward:
        require_local(source, f"--forward: {NEEDS_WEIGHTS}")
    checkpoint = None if source is None else open_argument(source)
    with contextlib.ExitStack() as stack:
        advance: Callable[[int], None] = lambda n_bytes: None  # noqa: E731  - replaced when the size is known

        def announce(total_bytes: int) -> None:
            nonlocal advance
            advance = stack.enter_context(progress_bar(total_bytes, path.name))

        report = run_verification(
            path, source=checkpoint, tensors=tensors, engines=engines, deep=deep, sample=sample, seed=seed,
            manifest=manifest, imatrix=imatrix, forward=forward, max_kl=max_kl, threads=threads,
            progress=lambda n: advance(n), announce=announce,  # noqa: PLW0108  - advance changes
        )
    if page is not None:
        write_page(report, page)
    if as_json:
        show_json(report_data(report))
    else:
        _show(report)
        if page is not None:
            show(f"wrote {page}")
    if not report.ok:
        ctx.exit(VerifyError.exit_code)


def _check_page(page: Path, inputs: list[Path], source: Path | HubReference | None, *, overwrite: bool) -> None:
    """Before hours of work: whether the page can be written, and is nothing that is read."""
    check_not_input(page, (each for each in inputs if each.exists()))
    if isinstance(source, Path) and page.resolve().is_relative_to(source.resolve()):
        raise UsageError(page, f"lies in the source directory {source}",
                         hint="write elsewhere: inputs are never touched")
    check_place(page, overwrite=overwrite)


def _show(report: Report) -> None:
    for finding in report.findings:
        at = "" if finding.offset is None else f" (byte {finding.offset:,})"
        show(f"{finding.severity}: {finding.where}: {finding.message}{at}")
    for t in report.wrong:
        differ = f"{t.n_different:,} of {t.n_compared:,} bytes differ, first {t.difference}" if t.n_blocks else t.reason
        show(f"error: tensor {t.name} ({t.format}): {differ}")
        if t.n_blocks:
            show(f"    {t.reason}")
        for fault in t.faults:
            show(f"    {fault}")
    if report.template:
        extent = {"header": "header only, no weights", "sparse": "extended to full size, its data is a hole"}
        show(f"{report.path} is a template: {extent[report.template]}; it is not a model to load")
    _show_tensors(report)
    _show_depth(report)
    if report.manifest is not None:
        m = report.manifest
        show(f"manifest {m.path}: {m.n_right:,} of {m.n_hashes:,} hashes agree ({', '.join(m.algorithms)})")
    _show_behaviour(report)
    _show_engines(report)
    verdict = "right" if report.ok else "NOT right"
    detail = f"{report.n_errors} error{'s' if report.n_errors > 1 else ''}" if report.n_errors else \
        f"{report.n_tensors} tensors, {format_bytes(report.n_file_bytes)}"
    show(f"{report.path}: {verdict}: {detail}")


def _show_engines(report: Report) -> None:
    asked = [v for v in report.engines if v.engine in report.deciding]
    others = [v for v in report.engines if v.engine not in report.deciding]
    show_verdicts(asked)
    if others:
        show(f"{'other ' if asked else ''}engines, of which none decides unless --engine names it:")
        show_verdicts(others)


def _show_tensors(report: Report) -> None:
    if not report.tensors:
        return
    measured = [t for t in report.worst_first() if t.error is not None]
    if measured:
        more = f", of {len(measured)} (--json and --report have all)" if len(measured) > SHOWN else ""
        show(f"largest errors against the source{more}:")
        table: list[tuple[object, ...]] = [
            ("tensor", "type", "bits", "relative RMSE", "our own", "max error", "cosine", "")]
        table += [_row(t) for t in measured[:SHOWN]]
        show_table(table, right="llrrrrrl")
    n = len(report.tensors)
    within = sum(t.judgement == "within" for t in report.tensors)
    part = "" if report.sample is None else f", in a sample of {report.sample:g} %"
    show(f"{n - within - len(report.wrong)} of {n} tensors are what the source gives, byte for byte{part}")
    if within:
        show(f"{within} more are encoded otherwise than we do, and as close to the source")


def _row(t: TensorCheck) -> tuple[object, ...]:
    return (t.name, t.format, f"{t.bits_per_weight:.3g}", _number(t.error, "relative_rmse"),
            _number(t.own, "relative_rmse"), _number(t.error, "largest_error"), _number(t.error, "cosine", ".6f"),
            t.judgement)


def _number(errors: ErrorSums | None, name: str, form: str = ".3g") -> str:
    return "" if errors is None else format(getattr(errors, name), form)


def _show_depth(report: Report) -> None:
    if not report.depth:
        return
    by_type: dict[str, list[DepthCheck]] = {}
    for d in report.depth:
        by_type.setdefault(d.format, []).append(d)
    table: list[tuple[object, ...]] = [("type", "tensors", "blocks", "all zero", "subnormal scale", "largest value")]
    for name, checks in sorted(by_type.items()):
        scales, values = [d.scales for d in checks if d.scales.n_blocks], [d.values for d in checks if d.values]
        counts = [sum(s.n_blocks for s in scales), sum(s.n_zero for s in scales), sum(s.n_subnormal for s in scales)]
        largest = max((max(v.highest, -v.lowest) for v in values), default=None)
        table.append((name, f"{len(checks):,}", *(f"{n:,}" if scales else "" for n in counts),
                      "" if largest is None else f"{largest:.4g}"))
    show("blocks and values, looked at one by one (--json has every tensor):")
    show_table(table, right="lrrrrr")


def _show_behaviour(report: Report) -> None:
    b = report.behaviour
    if b is None:
        return
    show(f"predictions on {b.n_prompts} prompts, {b.n_positions} positions: mean KL {b.mean_kl:.4g}, largest "
         f"{b.largest_kl:.4g} nats; same top token {b.same_top:.1%}")
    if b.perplexity_source is not None and b.perplexity_file is not None:
        show(f"    perplexity {b.perplexity_source:.4f} of the source, {b.perplexity_file:.4f} of the file")
    if b.parting_layer is not None:
        show(f"    layer {b.parting_layer} is the first whose residual streams differ by more than rounding")
    if b.allowed_kl is not None:
        show(f"    {'within' if b.ok else 'error: above'} --max-kl {b.allowed_kl:g}")
