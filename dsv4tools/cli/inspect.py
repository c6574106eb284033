"""``dsv4tools inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dsv4tools.cli.output import EPILOG, json_option, layer_list, shell_words, show, show_json, show_table
from dsv4tools.cli.sources import open_argument, source_argument
from dsv4tools.describe import describe_checkpoint, describe_gguf
from dsv4tools.errors import InputError
from dsv4tools.gguf.splits import scan_whole
from dsv4tools.hub.reference import HubReference
from dsv4tools.sizes import format_bytes

if TYPE_CHECKING:
    from pathlib import Path


@click.command(epilog=EPILOG)
@click.argument("path", metavar="FILE|DIR|hf://...", type=source_argument)
@click.option("--tensors", is_flag=True, help="List every tensor of a GGUF.")
@json_option
def inspect(path: Path | HubReference, tensors: bool, as_json: bool) -> None:
    """Show what a checkpoint directory or a GGUF file holds, from its headers alone.

    \b
    Examples:
      dsv4tools inspect DeepSeek-V4-Flash
      dsv4tools inspect flash.gguf --tensors
      dsv4tools inspect flash.gguf --json
    """
    if isinstance(path, HubReference) or path.is_dir():
        data = describe_checkpoint(open_argument(path))
        show_json(data) if as_json else _show_checkpoint(data)
        return
    with scan_whole(path, template=True) as file:
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
