"""The files beside the weights that name the number of experts or a size: config.json, index, README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4tools.checkpoint.index import INDEX_NAME, locate_shard
from dsv4tools.checkpoint.strict_json import parse_json, read_small_file
from dsv4tools.errors import InputError, UsageError
from dsv4tools.reroute.json_edit import replace_number
from dsv4tools.reroute.readme import REPOSITORY, edit_readme

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dsv4tools.checkpoint import Checkpoint

INFERENCE_CONFIG = "inference/config.json"   # of DeepSeek's own code, with names of its own
_MAX_TEXT_BYTES = 10_000_000
_MAX_INDEX_BYTES = 100_000_000


def edit_texts(
    checkpoint: Checkpoint, view: Checkpoint, n_cut_bytes: Mapping[str, int], base_model: str | None
) -> dict[str, bytes]:
    """File name -> new content. Only the numbers change in the JSON files; README.md is made where there is none.

    Parameters
    ----------
    view:
        `checkpoint`, re-routed.
    n_cut_bytes:
        By how much the data of each rewritten shard shrink.
    base_model:
        For the README; the repository that the checkpoint is a snapshot of where it is None.

    Raises
    ------
    UsageError
        `base_model` is not of the form ``owner/name``.
    InputError
        A file is malformed, or inference/config.json contradicts config.json.
    """
    directory = checkpoint.directory
    before, after = checkpoint.config.num_experts_per_tok, view.config.num_experts_per_tok
    if base_model is not None and not REPOSITORY.fullmatch(base_model):
        raise UsageError("--base-model", f"is {base_model!r}, expected OWNER/NAME")
    raw = _read(directory, "config.json", _MAX_TEXT_BYTES)
    edited = {"config.json": replace_number(raw, ["num_experts_per_tok"], after, directory / "config.json")}
    inference = _edit_inference_config(directory, before, after)
    if inference is not None:
        edited[INFERENCE_CONFIG] = inference
    index = _edit_index(directory, sum(n_cut_bytes.values()))
    if index is not None:
        edited[INDEX_NAME] = index
    edited["README.md"] = _edit_readme(directory, base_model or checkpoint.card.repository, before, after)
    return edited


def _read(directory: Path, name: str, max_bytes: int) -> bytes:
    """A text file of the checkpoint; InputError where a link leads out of it."""
    return read_small_file(locate_shard(directory, name), max_bytes=max_bytes)


def _edit_inference_config(directory: Path, before: int, after: int) -> bytes | None:
    path, key = directory / INFERENCE_CONFIG, "n_activated_experts"
    if not path.exists():
        return None
    raw = _read(directory, INFERENCE_CONFIG, _MAX_TEXT_BYTES)
    config = parse_json(raw, path)
    if not isinstance(config, dict) or key not in config:
        return None
    if type(config[key]) is not int or config[key] != before:
        raise InputError(f"{path}: key {key!r}", f"is {config[key]!r}, config.json says num_experts_per_tok = {before}",
                         hint="the two must agree")
    return replace_number(raw, [key], after, path)


def _edit_index(directory: Path, n_cut_bytes: int) -> bytes | None:
    """The index with its ``metadata.total_size``, where it states one; None without an index."""
    path = directory / INDEX_NAME
    if not path.exists():
        return None
    raw = _read(directory, INDEX_NAME, _MAX_INDEX_BYTES)
    metadata = parse_json(raw, path).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if type(total) is not int:
        return raw
    return replace_number(raw, ["metadata", "total_size"], total - n_cut_bytes, path)


def _edit_readme(directory: Path, base_model: str | None, before: int, after: int) -> bytes:
    path = directory / "README.md"
    raw = _read(directory, "README.md", _MAX_TEXT_BYTES) if path.exists() else b""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(path, f"is not valid UTF-8 at byte {e.start}", hint="mend or remove it") from None
    return edit_readme(text, base_model, before, after, path).encode()
