"""Writing a re-routed checkpoint: only shards with routing tables are rewritten, the others share their bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4tools.checkpoint import Checkpoint, open_checkpoint
from dsv4tools.checkpoint.checkpoint import ROUTING_TABLE
from dsv4tools.errors import Dsv4Error, InputError, UsageError
from dsv4tools.outdir import complete_directory
from dsv4tools.outfile import check_space
from dsv4tools.reroute.effect import Effect, count_checkpoint, measure_effect
from dsv4tools.reroute.place import copy_file, copy_shard, link_shard, new_file, side_files, write_file
from dsv4tools.reroute.shards import CHUNK_BYTES, TABLE_DTYPES, narrow_shard, read_chunks, write_narrow_shard
from dsv4tools.reroute.tables import TableCutter, check_layers, describe_repeats
from dsv4tools.reroute.texts import edit_texts
from dsv4tools.reroute.view import reroute

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dsv4tools.checkpoint import SourceTensor
    from dsv4tools.reroute.place import Link
    from dsv4tools.reroute.shards import NarrowShard

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Rerouted:
    """What re-routing wrote.

    Attributes
    ----------
    path:
        The new checkpoint or GGUF.
    effect:
        What it changes in compute.
    tables:
        The routing tables that were cut.
    files:
        File name -> ``rewritten``, ``edited``, ``linked`` (a second name of the same bytes), ``cloned`` (the file
        system shares the blocks until one of the two is changed) or ``copied``.
    n_bytes_written:
        Bytes that took disk space.
    warnings:
        What is odd about the tables, one sentence each.
    """

    path: Path
    effect: Effect
    tables: tuple[str, ...]
    files: Mapping[str, str]
    n_bytes_written: int
    warnings: tuple[str, ...] = ()


def reroute_checkpoint(
    source: str | Path | Checkpoint, out: str | Path, experts_per_token: int, *, link: Link = "auto",
    base_model: str | None = None, progress: Callable[[int], None] | None = None,
    announce: Callable[[int], None] | None = None,
) -> Rerouted:
    """Write the checkpoint `source` with `experts_per_token` to the new directory `out`.

    Only shards that hold a routing table are rewritten. All others, by `link`: ``auto`` gives them a second name (hard
    link), else clones, else copies them; ``hard`` refuses where that cannot be; ``copy`` clones or copies. Everything
    else in the directory comes along, hidden directories excepted. `out` has its name only when it is complete, checked
    and on disk. The source is never opened for writing; hard-linked shards are the same bytes under two names, so
    whoever writes into one of them later changes both.

    Parameters
    ----------
    base_model:
        The Hub's name of the source (``owner/name``) for the README; taken from the source where it is known.
    progress, announce:
        `announce` is called once with the number of bytes to write, `progress` with those written since the last call.

    Raises
    ------
    UsageError
        More experts than there are, or as many; `out` exists or lies in the source; `link` is ``hard`` and cannot be.
    InputError
        The checkpoint is wrong: tables and config disagree, an id is no expert.
    ResourceError
        No space, no permission, a read or write failed.
    VerifyError
        A shard changed while it was being read.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    out = Path(out)
    view = narrow_view(checkpoint, experts_per_token)
    if out.resolve().is_relative_to(checkpoint.directory.resolve()):
        raise UsageError(out, f"lies in the source directory {checkpoint.directory}",
                         hint="write elsewhere: inputs are never touched")
    tables = _find_tables(checkpoint)
    narrow = _narrow_shards(checkpoint, tables, experts_per_token)
    edited = edit_texts(checkpoint, view, {name: plan.n_cut_bytes for name, plan in narrow.items()}, base_model)
    others = {name: path for name, path in side_files(checkpoint).items() if name not in edited}
    cutters = {name: _make_cutter(t, view) for name, t in tables.items()}
    with complete_directory(out) as stage:
        how = dict.fromkeys(narrow, "rewritten") | dict.fromkeys(edited, "edited")
        how |= {name: link_shard(shard, stage / name, link) for name, shard in checkpoint.shards.items()
                if name not in narrow}
        copied = [checkpoint.shards[name] for name in how if how[name] == "copied"]
        n_bytes = sum(p.n_bytes for p in narrow.values()) + sum(s.n_file_bytes for s in copied)
        n_bytes += sum(map(len, edited.values())) + sum(path.stat().st_size for path in others.values())
        check_space(out, n_bytes)
        if announce is not None:
            announce(n_bytes)
        advance = progress or (lambda _: None)
        for name, plan in narrow.items():
            with new_file(stage / name, plan.n_bytes) as fd:
                write_narrow_shard(plan, cutters, fd, advance)
        for shard in copied:
            copy_shard(shard, stage / shard.path.name, advance)
        for name, path in others.items():
            copy_file(path, stage / name, advance)
            how[name] = "copied"
        for name, raw in edited.items():
            write_file(stage / name, raw, advance)
        _check_written(stage, view, cutters)
    effect = _measure(view, checkpoint.config.num_experts_per_tok, tables)
    return Rerouted(out, effect, tuple(tables), how, n_bytes, tuple(describe_repeats(cutters.values())))


def narrow_view(checkpoint: Checkpoint, experts_per_token: int) -> Checkpoint:
    """`reroute`, but there must be something to change, and it must be a stored checkpoint."""
    have = checkpoint.config.num_experts_per_tok
    if checkpoint.stored_experts_per_token != have:
        raise UsageError(checkpoint.directory, f"is a view with {have} experts per token, stored are "
                         f"{checkpoint.stored_experts_per_token}", hint="give the checkpoint as it was opened")
    if experts_per_token == have:
        raise UsageError("--experts-per-token", f"is {have}, which the checkpoint has already: nothing to change",
                         hint=f"choose 1 to {have - 1}" if have > 1 else "")
    return reroute(checkpoint, experts_per_token)


def _find_tables(checkpoint: Checkpoint) -> dict[str, SourceTensor]:
    """The routing tables, checked against config.json, in file order."""
    config = checkpoint.config
    tables = {name: t for name, t in checkpoint.tensors.items() if ROUTING_TABLE.fullmatch(name)}
    layers = [int(match[1]) for name in tables if (match := _LAYER.match(name))]
    check_layers(layers, config.num_hash_layers, config.num_hidden_layers, "num_hash_layers in config.json",
                 checkpoint.directory)
    for t in tables.values():
        if t.dtype not in TABLE_DTYPES:
            raise InputError(t.where, f"is {t.dtype}, expected integers ({' or '.join(TABLE_DTYPES)})")
        if t.shape[0] != config.vocab_size:
            raise InputError(t.where, f"has {t.shape[0]} rows, config.json says vocab_size = {config.vocab_size}")
    return tables


def _narrow_shards(checkpoint: Checkpoint, tables: Mapping[str, SourceTensor], n: int) -> dict[str, NarrowShard]:
    narrow = {}
    for name, shard in checkpoint.shards.items():
        columns = dict.fromkeys((t for t in shard.tensors if t in tables), n)
        if columns:
            narrow[name] = narrow_shard(shard, columns)
    return narrow


def _make_cutter(table: SourceTensor, view: Checkpoint) -> TableCutter:
    return TableCutter(table.where, table.shape[1], view.config.num_experts_per_tok, view.config.n_routed_experts)


def _measure(view: Checkpoint, before: int, tables: Mapping[str, SourceTensor]) -> Effect:
    config = view.config
    layers = [int(match[1]) for name in tables if (match := _LAYER.match(name))]
    experts = (before, config.num_experts_per_tok, config.n_routed_experts)
    return measure_effect(count_checkpoint(view), experts, layers, config.num_hidden_layers)


def _check_written(stage: Path, view: Checkpoint, cutters: Mapping[str, TableCutter]) -> None:
    """Open what was written as any checkpoint is opened and compare it with the view; a difference is a bug of ours."""
    written = open_checkpoint(stage)
    found = [(t.name, t.dtype, t.shape) for t in written.tensors.values()]
    if written.config != view.config or found != [(t.name, t.dtype, t.shape) for t in view.tensors.values()]:
        raise Dsv4Error(stage, "was written wrongly: it does not match its plan", hint="please report this")
    old, new = (memoryview(bytearray(CHUNK_BYTES)) for _ in range(2))
    for name, cutter in cutters.items():
        source, target = view.tensors[name].shard, written.tensors[name].shard
        again = TableCutter(cutter.where, cutter.n_columns, cutter.n_kept, cutter.n_experts)
        at = target.tensors[name].begin
        for rows in read_chunks(source, source.tensors[name], old, again):
            target.read_into(at, new[: len(rows)])
            if new[: len(rows)] != rows:
                raise Dsv4Error(stage / target.path.name, f"was written wrongly: tensor {name!r} differs",
                                hint="please report this")
            at += len(rows)
