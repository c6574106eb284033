"""``dsv4tools diff``."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from dsv4tools.cli.output import EPILOG, json_option, progress_bar, show, show_json, show_table, threads_option
from dsv4tools.cli.sources import file_argument
from dsv4tools.diff import diff as run_diff
from dsv4tools.errors import VerifyError
from dsv4tools.verify.data import errors_data

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dsv4tools.diff import Difference, TensorDifference

SHOWN = 20   # of each kind; --json has all


@click.command(epilog=EPILOG)
@click.argument("a", metavar="A.gguf", type=file_argument)
@click.argument("b", metavar="B.gguf", type=file_argument)
@click.option("--tensor", "tensors", multiple=True, metavar="GLOB",
              help="Compare only these tensors, and no metadata; repeatable.")
@threads_option
@json_option
@click.pass_context
def diff(ctx: click.Context, a: Path, b: Path, tensors: tuple[str, ...], threads: int | None, as_json: bool) -> None:
    """Show in what two GGUF files differ: metadata, tensors that are missing or of another type or shape, values.

    Tensors of different types are compared by value. Of a split set, name any part.

    Exit code 0: they say and hold the same; 5: they differ.

    \b
    Examples:
      dsv4tools diff mine.gguf theirs.gguf
      dsv4tools diff q8.gguf q4k.gguf --tensor 'blk.*.ffn_*_exps.weight' --json
    """
    with contextlib.ExitStack() as stack:
        advance: Callable[[int], None] = lambda n_bytes: None  # noqa: E731  - replaced when the size is known

        def announce(total_bytes: int) -> None:
            nonlocal advance
            advance = stack.enter_context(progress_bar(total_bytes, "diff"))

        result = run_diff(a, b, tensors=tensors, threads=threads, announce=announce,
                          progress=lambda n: advance(n))  # noqa: PLW0108  - advance changes
    if as_json:
        show_json(_as_data(result))
    else:
        _show(result)
    if not result.same:
        ctx.exit(VerifyError.exit_code)


def _as_data(result: Difference) -> dict[str, Any]:
    return {
        "a": str(result.a), "b": str(result.b), "same": result.same, "n_entries_same": result.n_entries_same,
        "n_tensors_same": result.n_tensors_same, "notes": result.notes,
        "entries": [asdict(e) for e in result.entries],
        "tensors": [{
            "name": t.name, "kind": t.kind, "a": t.a, "b": t.b, "n_values": t.n_values,
            "n_bytes_different": t.n_bytes_different, "errors": errors_data(t.errors),
        } for t in result.tensors],
    }


def _show(result: Difference) -> None:
    for entry in result.entries[:SHOWN]:
        show(f"key {entry.key!r} ({entry.kind}): A {entry.a or 'lacks it'}; B {entry.b or 'lacks it'}")
    _show_more(len(result.entries))
    unmeasured = [t for t in result.tensors if t.errors is None]
    for t in unmeasured[:SHOWN]:
        detail = f"; bytes that differ: {t.n_bytes_different:,}" if t.kind == "bytes" else ""
        show(f"tensor {t.name} ({t.kind}): A {t.a or 'lacks it'}; B {t.b or 'lacks it'}{detail}")
    _show_more(len(unmeasured))
    measured = [t for t in result.tensors if t.errors is not None]
    if measured:
        table: list[tuple[object, ...]] = [
            ("tensor", "differs in", "A", "B", "bytes", "relative RMSE", "max error", "cosine")]
        show_table(table + [_row(t) for t in measured[:SHOWN]], right="llllrrrr")
        _show_more(len(measured))
    for note in result.notes:
        show(f"note: {note}")
    n = result.n_tensors_same
    if result.same:
        show(f"the same: {result.n_entries_same} metadata entries, {n} tensors")
        return
    show(f"metadata entries: {len(result.entries)} differ, {result.n_entries_same} do not; "
         f"tensors: {len(result.tensors)} differ, {n} do not")


def _show_more(n: int) -> None:
    if n > SHOWN:
        show(f"... and {n - SHOWN:,} more (--json has all)")


def _row(t: TensorDifference) -> tuple[object, ...]:
    if t.errors is None:
        return (t.name, t.kind, t.a, t.b, "", "", "", "")
    type_a, type_b = t.a.split(" ")[0], t.b.split(" ")[0]
    return (t.name, t.kind, type_a, type_b, f"{t.n_bytes_different:,}" if t.kind == "bytes" else "",
            f"{t.errors.relative_rmse:.3g}", f"{t.errors.largest_error:.3g}", f"{t.errors.cosine:.6f}")
