"""``dsv4tools quickstart``."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import click

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.cli.output import EPILOG, show
from dsv4tools.convert import convert
from dsv4tools.errors import UsageError, VerifyError
from dsv4tools.plan import make_plan
from dsv4tools.sizes import format_bytes
from dsv4tools.synthetic import TINY, write_checkpoint
from dsv4tools.verify import verify


@click.command(epilog=EPILOG)
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR",
              help="Work in DIR (new or empty) and keep the files.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the random weights.")
@click.option("--layers", type=click.IntRange(3, 64), default=5, show_default=True, help="Layers of the checkpoint.")
@click.option("--experts", type=click.IntRange(6, 512), default=12, show_default=True, help="Experts per layer.")
def quickstart(keep: Path | None, seed: int, layers: int, experts: int) -> None:
    """Make a small random checkpoint, convert it, verify the result, and say what to do with a real one.

    \b
    Examples:
      dsv4tools quickstart
      dsv4tools quickstart --keep demo
    """
    if keep is not None:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise UsageError(keep, "exists and is no empty directory", hint="choose another directory for --keep")
        _run(keep, seed, layers, experts)
        return
    with tempfile.TemporaryDirectory(prefix="dsv4tools-") as directory:
        _run(Path(directory), seed, layers, experts)


def _run(directory: Path, seed: int, layers: int, experts: int) -> None:
    source, out = directory / "tiny-checkpoint", directory / "tiny.gguf"
    shape = replace(TINY, layers=layers, experts=experts, experts_per_token=6)
    show(f"1. a small checkpoint in DeepSeek's published layout, random weights (seed {seed}): {source}")
    write_checkpoint(source, shape, seed=seed)
    checkpoint = open_checkpoint(source)
    size = format_bytes(checkpoint.n_source_bytes)
    show(f"   {len(checkpoint.tensors)} tensors in {len(checkpoint.shards)} shards, {size}")
    plan = make_plan(checkpoint)
    show(f"2. converted with policy {plan.policy.name}: {plan.policy.description}")
    done = convert(plan, out)
    show(f"   {out}: {len(plan.tensors)} tensors, {format_bytes(done.n_bytes)}")
    show("3. verified: structure, and every tensor derived again from the checkpoint")
    report = verify(out, source=checkpoint)
    if not report.ok:
        raise VerifyError(out, "the converted file is not right", hint="please report this")
    show(f"   {len(report.tensors)} of {len(report.tensors)} tensors are what the source gives, byte for byte")
    show()
    show("With a real checkpoint (DeepSeek-V4-Flash: 160 GB to read, 165 GB to write):")
    show("   dsv4tools convert DeepSeek-V4-Flash flash.gguf --dry-run     the plan, in seconds")
    show("   dsv4tools convert DeepSeek-V4-Flash flash.gguf")
    show("   dsv4tools verify flash.gguf --source DeepSeek-V4-Flash")
