"""``dsv4tools reroute``."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import click

from dsv4tools.cli.output import EPILOG, json_option, layer_list, progress_bar, say, shell_words, show, show_json
from dsv4tools.cli.sources import local_argument, output_argument
from dsv4tools.errors import UsageError
from dsv4tools.reroute import reroute_checkpoint, reroute_gguf
from dsv4tools.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dsv4tools.reroute import Rerouted

_NEEDS_FILES = "the result shares files with its source (convert re-routes on the way: --experts-per-token)"


@click.command(epilog=EPILOG)
@click.argument("source", metavar="SRC", type=local_argument(_NEEDS_FILES))
@click.argument("out", metavar="DST", type=output_argument)
@click.option("--experts-per-token", type=click.IntRange(1), required=True, metavar="N",
              help="Fewer than the source has: N columns of its routing tables are kept.")
@click.option("--link", type=click.Choice(["auto", "hard", "copy"]),
              help="Shards that stay as they are: hard links, else clones or copies (auto, the default); hard links or "
              "an error; clones or copies.")
@click.option("--base-model", metavar="OWNER/NAME",
              help="What the README of a checkpoint names as its base model; known for downloads of dsv4tools.")
@click.option("--overwrite", is_flag=True, help="Replace an existing GGUF.")
@json_option
def reroute(source: Path, out: Path, experts_per_token: int, link: Literal["auto", "hard", "copy"] | None,
            base_model: str | None, overwrite: bool, as_json: bool) -> None:
    """Write SRC with fewer experts per token to DST: a checkpoint directory, or a GGUF file.

    Only the routing tables of the hash layers and the number of experts change. Of a checkpoint only the shards with
    such tables are rewritten; the others become hard links where the file system allows: the same bytes under two
    names, so do not edit them. DST appears when it is complete.

    \b
    Examples:
      dsv4tools reroute DeepSeek-V4-Flash DeepSeek-V4-Flash-4Expert --experts-per-token 4
      dsv4tools reroute flash.gguf flash-4e.gguf --experts-per-token 4
    """
    is_directory = source.is_dir()
    if is_directory and overwrite:
        raise UsageError("--overwrite", "is for GGUF files: a directory cannot be replaced in one step",
                         hint=f"remove {out} first")
    if not is_directory and (link or base_model):
        raise UsageError("--link, --base-model", f"are for checkpoint directories, {source} is none")
    with contextlib.ExitStack() as stack:
        advance: Callable[[int], None] = lambda n_bytes: None  # noqa: E731  - replaced when the size is known

        def announce(total_bytes: int) -> None:
            nonlocal advance
            advance = stack.enter_context(progress_bar(total_bytes, out.name))

        def progress(n_bytes: int) -> None:
            advance(n_bytes)

        if is_directory:
            done = reroute_checkpoint(source, out, experts_per_token, link=link or "auto", base_model=base_model,
                                      progress=progress, announce=announce)
        else:
            done = reroute_gguf(source, out, experts_per_token, overwrite=overwrite, progress=progress,
                                announce=announce)
    for warning in done.warnings:
        say(f"warning: {warning}")
    if as_json:
        show_json({"out": str(out), "effect": asdict(done.effect), "tables": list(done.tables),
                   "files": dict(done.files), "written_bytes": done.n_bytes_written, "warnings": list(done.warnings)})
        return
    _show(done)
    if is_directory:
        _show_files(done)
    show(f"next: {shell_words('dsv4tools', *(('convert', out, '--dry-run') if is_directory else ('verify', out)))}")


def _show(done: Rerouted) -> None:
    effect = done.effect
    before, after = effect.experts_before, effect.experts_after
    show(f"wrote {done.path}: {after} experts per token instead of {before}")
    if effect.hash_layers:
        show(f"hash-routed    layers {layer_list(effect.hash_layers)}: their tables keep the first {after} of {before} "
             f"columns")
    if effect.scored_layers:
        which = "other " if effect.hash_layers else ""
        show(f"scored         the {which}{effect.scored_layers} layers choose their best-scored experts at run time: "
             f"nothing to change in them")
    show(f"compute        {after} instead of {before} of {effect.n_experts} routed experts in every layer; about "
         f"{_count(effect.active_after)} active parameters per token instead of {_count(effect.active_before)}")


def _show_files(done: Rerouted) -> None:
    kinds = Counter(done.files.values())
    rewritten = [name for name, kind in done.files.items() if kind == "rewritten"]
    show(f"rewritten      {len(rewritten)} shards: {', '.join(rewritten)}")
    for kind, what in (("linked", "shards as hard links: the same bytes as in the source, do not edit them"),
                       ("cloned", "shards as clones: they share space with the source until one of them is changed"),
                       ("copied", "files"), ("edited", "files: numbers of experts, sizes, README.md")):
        if kinds[kind]:
            show(f"{kind:<14} {kinds[kind]} {what}")
    show(f"new on disk    {format_bytes(done.n_bytes_written)}")


def _count(n: int) -> str:
    return f"{n / 1e9:.1f} billion" if n >= 10**9 else f"{n / 1e6:.1f} million"
