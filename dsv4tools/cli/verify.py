"""``dsv4tools verify``."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsv4tools.cli.engines import engine_option, show_verdicts
from dsv4tools.cli.output import EPILOG, json_option, progress_bar, show, show_json, threads_option
from dsv4tools.errors import VerifyError
from dsv4tools.sizes import format_bytes
from dsv4tools.verify import verify as run_verification

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4tools.verify import Report


@click.command(epilog=EPILOG)
@click.argument("path", metavar="OUT.gguf", type=click.Path(path_type=Path))
@click.option("--source", type=click.Path(path_type=Path), metavar="SRC",
              help="Derive every tensor again from SRC and compare.")
@click.option("--tensor", "tensors", multiple=True, metavar="GLOB", help="Compare only these tensors; repeatable.")
@engine_option
@threads_option
@json_option
@click.pass_context
def verify(ctx: click.Context, path: Path, source: Path | None, tensors: tuple[str, ...], engines: tuple[str, ...],
           threads: int | None, as_json: bool) -> None:
    """Say whether a GGUF is right: its structure, and with --source every byte of its tensors.

    With --engine also whether that engine loads it and computes what it says, from the header alone. Without, the
    verdicts of all known engines are shown for a DeepSeek-V4 file, and do not decide.

    Exit code 0: right; 5: any fault in the file; 3: a fault in the source.

    \b
    Examples:
      dsv4tools verify flash.gguf
      dsv4tools verify flash.gguf --source DeepSeek-V4-Flash
      dsv4tools verify flash.gguf --source DeepSeek-V4-Flash --tensor 'blk.3.*'
      dsv4tools verify flash.gguf --engine ds4 --engine llama.cpp
    """
    with contextlib.ExitStack() as stack:
        advance: Callable[[int], None] = lambda n_bytes: None  # noqa: E731  - replaced when the size is known

        def announce(total_bytes: int) -> None:
            nonlocal advance
            advance = stack.enter_context(progress_bar(total_bytes, path.name))

        report = run_verification(path, source=source, tensors=tensors, threads=threads, engines=engines,
                                  progress=lambda n: advance(n), announce=announce)  # noqa: PLW0108  - advance changes
    if as_json:
        show_json(_as_data(report))
    else:
        _show(report)
    if not report.ok:
        ctx.exit(VerifyError.exit_code)


def _as_data(report: Report) -> dict[str, object]:
    return {
        "path": str(report.path), "ok": report.ok, "template": report.template, "n_tensors": report.n_tensors,
        "n_bytes": report.n_file_bytes,
        "findings": [asdict(f) for f in report.findings],
        "tensors": [{"name": t.name, "type": t.format, "n_bytes": t.n_bytes, "ok": t.ok, "n_different": t.n_different,
                     "first_difference": t.difference} for t in report.tensors],
        "engines": [v.as_data() for v in report.engines],
    }


def _show(report: Report) -> None:
    for finding in report.findings:
        at = "" if finding.offset is None else f" (byte {finding.offset:,})"
        show(f"{finding.severity}: {finding.where}: {finding.message}{at}")
    wrong = [t for t in report.tensors if not t.ok]
    for t in wrong:
        show(f"error: tensor {t.name} ({t.format}): {t.n_different:,} of {t.n_bytes:,} bytes differ, "
             f"first {t.difference}")
    if report.template:
        extent = {"header": "header only, no weights", "sparse": "extended to full size, its data is a hole"}
        show(f"{report.path} is a template: {extent[report.template]}; it is not a model to load")
    if report.tensors:
        n = len(report.tensors)
        show(f"{n - len(wrong)} of {n} tensors are what the source gives, byte for byte")
    show_verdicts(report.engines)
    verdict = "right" if report.ok else "NOT right"
    n_errors = len(report.errors) + len(wrong) + len(report.objecting)
    detail = f"{n_errors} error{'s' if n_errors > 1 else ''}" if n_errors else \
        f"{report.n_tensors} tensors, {format_bytes(report.n_file_bytes)}"
    show(f"{report.path}: {verdict}: {detail}")
