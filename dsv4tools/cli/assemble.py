"""``dsv4tools assemble``."""

from __future__ import annotations

from pathlib import Path

import click

from dsv4tools.cli.output import EPILOG, json_option, progress_bar, say, shell_words, show, show_json, threads_option
from dsv4tools.cli.signals import graceful_stop
from dsv4tools.cli.sources import output_argument
from dsv4tools.options import RunOptions
from dsv4tools.parts import assemble as run_assembly
from dsv4tools.parts import find_parts
from dsv4tools.sizes import format_bytes


@click.command(epilog=EPILOG)
@click.argument("out", metavar="OUT.gguf", type=output_argument)
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--manifest", type=click.Path(path_type=Path), metavar="M",
              help="Also write the sha256 of every tensor, of all and of the file to M.")
@click.option("--restart", is_flag=True, help="Do not continue an interrupted assembly, begin anew.")
@click.option("--steal-lock", is_flag=True, help="Take the lock of a run that cannot be asked whether it still lives.")
@json_option
def assemble(out: Path, threads: int | None, overwrite: bool, manifest: Path | None, restart: bool, steal_lock: bool,
             as_json: bool) -> None:
    """Join the parts that `convert --part I/N` wrote, checking every unit: the same bytes as one run.

    \b
    Example, as a job array and a job that waits for it:
      dsv4tools convert DeepSeek-V4-Flash flash.gguf --part $SLURM_ARRAY_TASK_ID/8
      dsv4tools assemble flash.gguf
    """
    total = sum(u.n_bytes for part in find_parts(out) for u in part.units)
    with graceful_stop() as stop, progress_bar(total, out.name) as advance:
        run = RunOptions(threads, restart, steal_lock, advance, lambda note: say(f"note: {note}"), stop)
        done = run_assembly(out, overwrite=overwrite, manifest=manifest, run=run)
    if as_json:
        show_json({"out": str(out), "n_bytes": done.n_bytes, "parts": [str(p) for p in done.parts],
                   "leftovers": [str(p) for p in done.leftovers], "zeroed": done.zeroed,
                   "manifest": str(manifest) if manifest else None})
        return
    show(f"wrote {out}: {len(done.parts)} parts joined, {format_bytes(done.n_bytes)}")
    for name, n in done.zeroed.items():
        show(f"{n} values that are not finite were converted to 0 in {name}")
    if manifest:
        show(f"wrote {manifest}")
    show(f"the parts are no longer needed: {shell_words('rm', *done.parts, *done.leftovers)}")
    show(f"next: {shell_words('dsv4tools', 'verify', out)}")
