"""``dsv4tools assemble``."""

from __future__ import annotations

from pathlib import Path

import click

from dsv4tools.cli.output import EPILOG, json_option, progress_bar, say, shell_words, show, show_json, threads_option
from dsv4tools.cli.signals import graceful_stop
from dsv4tools.convert import RunOptions
from dsv4tools.errors import UsageError
from dsv4tools.manifest import write_manifest
from dsv4tools.parts import assemble as run_assembly
from dsv4tools.parts import find_parts
from dsv4tools.sizes import format_bytes


@click.command(epilog=EPILOG)
@click.argument("out", metavar="OUT.gguf", type=click.Path(path_type=Path))
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--manifest", type=click.Path(path_type=Path), metavar="M",
              help="Also write the sha256 of every tensor, of all and of the file to M.")
@click.option("--restart", is_flag=True, help="Do not continue an interrupted assembly, begin anew.")
@click.option("--steal-lock", is_flag=True, help="Take the output's lock, whoever holds it.")
@json_option
def assemble(out: Path, threads: int | None, overwrite: bool, manifest: Path | None, restart: bool, steal_lock: bool,
             as_json: bool) -> None:
    """Join the parts that `convert --part I/N` wrote, checking every unit: the same bytes as one run.

    \b
    Example, as a job array and a job that waits for it:
      dsv4tools convert DeepSeek-V4-Flash flash.gguf --part $SLURM_ARRAY_TASK_ID/8
      dsv4tools assemble flash.gguf
    """
    if manifest is not None and manifest.exists() and not overwrite:
        raise UsageError(manifest, "exists", hint="--overwrite replaces it")
    total = sum(u.n_bytes for part in find_parts(out) for u in part.units)
    with graceful_stop() as stop, progress_bar(total, out.name) as advance:
        run = RunOptions(threads, restart, steal_lock, advance, lambda note: say(f"note: {note}"), stop)
        parts, zeroed = run_assembly(out, overwrite=overwrite, run=run)
    if manifest is not None:
        write_manifest(out, manifest, zeroed)
    n_bytes = out.stat().st_size
    if as_json:
        show_json({"out": str(out), "n_bytes": n_bytes, "parts": [str(p) for p in parts],
                   "manifest": str(manifest) if manifest else None})
        return
    show(f"wrote {out}: {len(parts)} parts joined, {format_bytes(n_bytes)}")
    show(f"the parts are no longer needed: {shell_words('rm', *parts)}")
    show(f"next: {shell_words('dsv4tools', 'verify', out)}")
