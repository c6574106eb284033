"""``dsv4tools inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dsv4tools.cli.output import EPILOG, json_option, layer_list, shell_words, show, show_json, show_table
from dsv4tools.cli.sources import open_argument, source_argument
from dsv4tools.describe import describe_checkpoint, describe_gguf, describe_imatrix
from dsv4tools.errors import InputError
from dsv4tools.gguf.splits import scan_whole
from dsv4tools.hub.reference import HubReference
from dsv4tools.imatrix import open_imatrix
from dsv4tools.sizes import format_bytes
from dsv4tools.sources import check_no_repository

if TYPE_CHECKING:
    from pathlib import Path


@click.command(epilog=EPILOG)
@click.argument("path", metavar="FILE|DIR|hf://...", type=source_argument)
@click.option("--tensors", is_flag=True, help="List every tensor of a GGUF, every entry of a matrix.")
@json_option
def inspect(path: Path | HubReference, tensors: bool, as_json: bool) -> None:
    """Show what a checkpoint directory or a GGUF file holds, from its headers alone; or an importance matrix.

    \b
    Examples:
      dsv4tools inspect DeepSeek-V4-Flash
      dsv4tools inspect flash.gguf --tensors
      dsv4tools inspect flash.gguf --json
      dsv4tools inspect flash.imatrix.gguf --tensors
    """
    if isinstance(path, HubReference) or path.is_dir():
        data = describe_checkpoint(open_argument(path))
        show_json(data) if as_json else _show_checkpoint(data)
        return
    check_no_repository(path)
    with scan_whole(path, template=True) as file:
        if file.value("general.type") == "imatrix" or path.suffix == ".dat":
            data = describe_imatrix(open_imatrix(path))
            show_json(data) if as_json else _show_imatrix(data, entries=tensors)
            return
        data = describe_gguf(file)
        errors = [f for f in file.findings if f.severity == "error"]
    if not data["tensors"] and errors:
        raise InputError(path, f"{errors[0].where}: {errors[0].message}", hint="is it a GGUF file?")
    show_json(data) if as_json else _show_gguf(data, tensors=tensors)
    if errors:
        raise InputError(path, f"{errors[0].where}: {errors[0].message}",
                         hint=f"{shell_words('dsv4tools', 'verify', path)} lists all {len(errors)} errors")


def _show_types(types: dict[str, dict[str, int]]) -> None:
    ordered = sorted(types.items(), key=lambda item: -item[1]["n_bytes"])
    show_table([("  " + name, e["n_tensors"], format_bytes(e["n_bytes"])) for name, e in ordered], right="lr")


def _show_experts(experts: dict[str, Any]) -> None:
    show(f"experts        {experts['routed']} routed, {experts['per_token']} active per token, "
         f"{experts['shared']} shared")


def _show_checkpoint(data: dict[str, Any]) -> None:
    layers, experts, tokenizer = data["layers"], data["experts"], data["tokenizer"]
    ratios = ", ".join(f"{n} of ratio {r}" for r, n in layers["by_compress_ratio"].items())
    show(f"checkpoint     {data['path']} ({data['name']})")
    show(f"size           {format_bytes(data['n_bytes'])} in {data['n_shards']} shards, {data['n_tensors']} tensors")
    _show_types(data["dtypes"])
    show(f"layers         {layers['n']}: {ratios}")
    _show_experts(experts)
    show(f"hash-routed    layers {layer_list(layers['hash_routed'])}; the others choose the best-scored experts")
    show(f"width          hidden {data['config']['hidden_size']}, experts {data['config']['moe_intermediate_size']}, "
         f"vocabulary {data['config']['vocab_size']}")
    if "error" in tokenizer:
        show(f"tokenizer      WRONG: {tokenizer['error']}")
    else:
        ids = ", ".join(f"{name} {i}" for name, i in tokenizer["special_ids"].items())
        show(f"tokenizer      {tokenizer['n_tokens']} tokens, {tokenizer['n_merges']} merges, {ids}")
    show(f"next: {shell_words('dsv4tools', 'convert', data['path'], '--dry-run')}")


def _show_imatrix(data: dict[str, Any], *, entries: bool) -> None:
    size = f" of {data['chunk_size']} tokens" if data["chunk_size"] else ""
    show(f"importance     {data['path']} (in llama.cpp's form {data['form']})")
    show(f"measured on    {data['n_chunks']} chunks{size} of {', '.join(data['datasets']) or 'an unnamed text'}")
    n_values, n_empty = (sum(each) for each in zip(*((e["n_values"], len(e["without_data"])) for e in data["entries"]),
                                                   strict=True))
    show(f"entries        {data['n_entries']}, {n_values} values; {n_empty} experts without data")
    show(f"sha256         {data['sha256']}")
    if entries:
        rows: list[tuple[object, ...]] = [("entry", "values", "counts", "largest")]
        rows += [(e["name"], e["n_values"], e["n_counts"], e["largest_count"]) for e in data["entries"]]
        show_table(rows, right="lrrr")


def _show_gguf(data: dict[str, Any], *, tensors: bool) -> None:
    experts = data["experts"]
    show(f"GGUF           {data['path']}{' (header only)' if data['header_only'] else ''}")
    where = f"in {len(data['files'])} files" if len(data["files"]) > 1 else f"data at byte {data['data_offset']}"
    show(f"size           {format_bytes(data['n_bytes'])}, {data['n_tensors']} tensors, {where}")
    _show_types(data["types"])
    if experts["routed"]:
        _show_experts(experts)
        show(f"hash-routed    layers {layer_list(data['hash_routed'])}")
    for key, value in data["metadata"].items():
        text = f"[{value['n']} items] {value['first']}" if isinstance(value, dict) else str(value)
        show(f"{key} = {text if len(text) <= 100 else text[:97] + '...'}")
    if tensors:
        rows = [(t["name"], "x".join(map(str, t["ne"])), t["type"], t["offset"], t["n_bytes"]) for t in data["tensors"]]
        show_table(rows, right="lllrr")
    show(f"next: {shell_words('dsv4tools', 'verify', data['path'])}")
