"""Writing made-up checkpoints to disk: small ones, full-width ones for benchmarks, full-size ones without data."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import ResourceError, UsageError
from dsv4tools.synthetic.layout import DTYPE_BYTES, Draw, TensorRow, tensor_rows
from dsv4tools.synthetic.shapes import FLASH, TINY, Shape, make_config
from dsv4tools.synthetic.tokenizer import MergesForm, make_generation_config, make_tokenizer, make_tokenizer_config
from dsv4tools.synthetic.values import cheap_values, quantized_values

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

INDEX = "model.safetensors.index.json"
_PROBE_BYTES = 1 << 24


def write_checkpoint(
    directory: str | os.PathLike[str],
    shape: Shape = TINY,
    seed: int = 0,
    shards: int = 3,
    *,
    merges_form: MergesForm = "strings",
    extra: Mapping[str, tuple[str, NDArray[Any]]] | None = None,
) -> Path:
    """Write a checkpoint of random weights and return its directory.

    The bytes depend on the arguments alone. Matrices are normal numbers quantized to FP8 and FP4 as the publisher
    does, at magnitudes that keep the forward pass finite and every part of the model felt in the logits.

    Parameters
    ----------
    directory:
        Made if missing; UsageError if it holds anything.
    shape:
        The model's numbers, `dsv4tools.synthetic.TINY` with ``dataclasses.replace`` for a variant.
    seed:
        Of the random numbers.
    shards:
        Number of safetensors files. One shard is called ``model.safetensors`` and comes without an index.
    merges_form:
        How tokenizer.json writes its merges.
    extra:
        Name -> (safetensors dtype, array of its item size) of tensors that no model has, written behind the others.
    """
    surplus = extra or {}
    model_rows = list(tensor_rows(shape))
    surplus_rows = _surplus_rows(surplus, {row.name for row in model_rows})
    files = plan_shards(model_rows + surplus_rows, shards)
    values = chain(
        quantized_values(shape, model_rows, seed), (np.ascontiguousarray(array) for _, array in surplus.values())
    )
    return _write(directory, files, values, _side_files(files, shape, merges_form))


def write_full_width(
    directory: str | os.PathLike[str],
    layers: int = 3,
    experts: int = 24,
    seed: int = 0,
    shards: int = 3,
    *,
    vocab: int = 1024,
    hash_layers: int = 1,
) -> Path:
    """Write a few layers at the widths of Flash, for benchmarks, and return the directory.

    Layers 0, 1 and 2 have ratios 0, 4 and 128. FP4 and FP8 codes are drawn directly and look like normally distributed
    weights; there are no NaN codes. About 1.4 GB with the defaults; memory is bounded by the largest tensor.
    """
    shape = replace(
        FLASH, layers=layers, experts=experts, experts_per_token=min(experts, FLASH.experts_per_token), vocab=vocab,
        hash_layers=hash_layers, lead_ratios=(0, 4, 128), draft_blocks=0, expert_dtype="fp4", merges=None,
    )  # fmt: skip
    files = plan_shards(list(tensor_rows(shape)), shards)
    return _write(directory, files, cheap_values(tensor_rows(shape), seed), _side_files(files, shape, "strings"))


def write_sparse(
    directory: str | os.PathLike[str], shape: Shape = FLASH, shards: int = 46, *, merges_form: MergesForm = "strings"
) -> Path:
    """Write a checkpoint of real headers whose data is a hole (zeros), for planning at full size.

    Flash takes 160 GB in name and some 30 MB on disk. Raises ResourceError where the file system has no holes and
    too little space.
    """
    files = plan_shards(list(tensor_rows(shape)), shards)
    return _write(directory, files, None, _side_files(files, shape, merges_form))


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One safetensors file: its name, header (length word included), tensors in order, bytes of data."""

    name: str
    header: bytes
    rows: tuple[TensorRow, ...]
    n_bytes: int


def plan_shards(rows: Sequence[TensorRow], shards: int) -> list[ShardPlan]:
    """Cut `rows` into `shards` files: runs of equal count, the last one shorter."""
    per_shard = -(-len(rows) // max(shards, 1))
    if shards < 1 or (shards - 1) * per_shard >= len(rows):
        raise UsageError("shards", f"found {shards}, expected 1 to about the number of tensors, {len(rows)}")
    plans = []
    for number in range(shards):
        part = tuple(rows[number * per_shard : (number + 1) * per_shard])
        name = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        plans.append(ShardPlan(name, _header(part), part, sum(row.n_bytes for row in part)))
    return plans


def _header(rows: Iterable[TensorRow]) -> bytes:
    """The length word and the JSON of a safetensors file, padded with spaces to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for row in rows:
        start, end = end, end + row.n_bytes
        entries[row.name] = {"dtype": row.dtype, "shape": list(row.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _surplus_rows(surplus: Mapping[str, tuple[str, NDArray[Any]]], known: Collection[str]) -> list[TensorRow]:
    for name, (dtype, array) in surplus.items():
        if name in known:
            raise UsageError(name, "is a tensor of the model, expected another name")
        if dtype not in DTYPE_BYTES:
            raise UsageError(name, f"found dtype {dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")
        if array.itemsize != DTYPE_BYTES[dtype]:
            raise UsageError(name, f"found values of {array.itemsize} bytes, expected {DTYPE_BYTES[dtype]} for {dtype}")
    return [TensorRow(name, dtype, array.shape, Draw.NORMAL) for name, (dtype, array) in surplus.items()]


def _side_files(files: Sequence[ShardPlan], shape: Shape, merges_form: MergesForm) -> dict[str, str]:
    """File name -> JSON text of everything beside the shards; config.json is the last."""
    contents: dict[str, Any] = {}
    if len(files) > 1:
        shard_of = {row.name: shard.name for shard in files for row in shard.rows}
        total = sum(shard.n_bytes for shard in files)
        contents[INDEX] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
    contents["tokenizer.json"] = make_tokenizer(shape.vocab, merges=shape.merges, merges_form=merges_form)
    contents["tokenizer_config.json"] = make_tokenizer_config()
    contents["generation_config.json"] = make_generation_config()
    contents["config.json"] = make_config(shape)
    return {name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in contents.items()}


def _write(
    directory: str | os.PathLike[str],
    files: Sequence[ShardPlan],
    values: Iterator[NDArray[Any]] | None,
    side_files: Mapping[str, str],
) -> Path:
    """Write all files; without `values` the data are holes. An interrupted writer leaves no config.json."""
    with _new_directory(directory) as path:
        if values is None:
            _require_room(path, sum(shard.n_bytes for shard in files))
        for shard in files:
            with (path / shard.name).open("xb") as file:
                file.write(shard.header)
                if values is None:
                    file.truncate(len(shard.header) + shard.n_bytes)
                else:
                    for array in islice(values, len(shard.rows)):
                        file.write(array.data)
        for name, text in side_files.items():
            (path / name).write_text(text, encoding="utf-8", newline="\n")
    return path


@contextmanager
def _new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty directory to write to; errors of the operating system become ResourceError."""
    path = Path(directory)
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(path, "exists and is not an empty directory", hint="choose another directory")
        path.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise ResourceError(error.filename or path, f"cannot write: {error.strerror or error}") from error


def _require_room(path: Path, n_bytes: int) -> None:
    """ResourceError unless `path` is on a file system with holes or has `n_bytes` free."""
    free = shutil.disk_usage(path).free
    if free < n_bytes and not _has_holes(path):
        raise ResourceError(
            path, f"the file system keeps no holes and has {free} bytes free, expected {n_bytes}",
            hint="choose a directory on another disk",
        )  # fmt: skip


def _has_holes(path: Path) -> bool:
    probe = path / ".probe"
    try:
        with probe.open("xb") as file:
            file.truncate(_PROBE_BYTES)
            file.flush()
            return os.fstat(file.fileno()).st_blocks * 512 < _PROBE_BYTES // 2
    finally:
        probe.unlink(missing_ok=True)
