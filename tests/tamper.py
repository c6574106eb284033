"""Doing to a checkpoint what must not happen to it. Every function changes files in place."""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INDEX = "model.safetensors.index.json"
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I32": 4, "I64": 8}
REMOVED: Any = object()
"""As a value for `edit_config`: take the key away."""

Tensors = dict[str, tuple[str, list[int], bytes]]
"""Name -> dtype, shape, data, in file order."""


def shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


def read_header(shard: Path) -> tuple[dict[str, Any], int]:
    """The header's JSON and the position where the data begins."""
    with shard.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(n_bytes)), 8 + n_bytes


def edit_header(shard: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let `change` edit the header's JSON; the data stay as they are, whatever the header now says of them."""
    header, start = read_header(shard)
    data = shard.read_bytes()[start:]
    change(header)
    shard.write_bytes(_encode_header(header) + data)


def find_tensor(checkpoint: Path, name: str) -> tuple[Path, int, int]:
    """The shard that holds a tensor, the position of its first byte in that file, its bytes."""
    for shard in shards(checkpoint):
        header, start = read_header(shard)
        if name in header:
            begin, end = header[name]["data_offsets"]
            return shard, start + begin, end - begin
    raise KeyError(name)


def read_tensor(checkpoint: Path, name: str) -> bytes:
    shard, position, n_bytes = find_tensor(checkpoint, name)
    with shard.open("rb") as file:
        file.seek(position)
        return file.read(n_bytes)


def write_tensor(checkpoint: Path, name: str, data: bytes, at: int = 0) -> None:
    """Overwrite a tensor's bytes from its byte `at` on; `data` must fit."""
    shard, position, n_bytes = find_tensor(checkpoint, name)
    if at + len(data) > n_bytes:
        raise ValueError(f"{len(data)} bytes at {at} do not fit into the {n_bytes} of {name}")
    with shard.open("r+b") as file:
        file.seek(position + at)
        file.write(data)


def drop_tensor(checkpoint: Path, name: str) -> None:
    """Take a tensor out of its shard and out of the index."""
    shard = find_tensor(checkpoint, name)[0]
    tensors = load_shard(shard)
    del tensors[name]
    save_shard(shard, tensors)
    if (checkpoint / INDEX).exists():
        edit_json(checkpoint / INDEX, lambda index: index["weight_map"].pop(name))


def replace_tensor(checkpoint: Path, name: str, dtype: str, shape: list[int], data: bytes) -> None:
    """Give a tensor another dtype and shape; its shard stays valid, the index is right as it was."""
    shard = find_tensor(checkpoint, name)[0]
    tensors = load_shard(shard)
    tensors[name] = (dtype, shape, data)
    save_shard(shard, tensors)


def add_tensor(checkpoint: Path, name: str, dtype: str, shape: list[int], data: bytes) -> None:
    """Put a tensor behind the others of the last shard, and into the index."""
    shard = shards(checkpoint)[-1]
    save_shard(shard, load_shard(shard) | {name: (dtype, shape, data)})
    if (checkpoint / INDEX).exists():
        edit_json(checkpoint / INDEX, lambda index: index["weight_map"].update({name: shard.name}))


def load_shard(shard: Path) -> Tensors:
    header, start = read_header(shard)
    header.pop("__metadata__", None)
    data = shard.read_bytes()[start:]
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }


def save_shard(shard: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        if len(data) != DTYPE_BYTES[dtype] * prod(shape):
            raise ValueError(f"{name}: {len(data)} bytes are not {dtype} {shape}")
        start, end = end, end + len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    shard.write_bytes(_encode_header(header) + b"".join(data for _, _, data in tensors.values()))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), "utf-8")


def edit_config(checkpoint: Path, **changes: Any) -> None:
    """Set keys of config.json; the value `REMOVED` takes a key away."""

    def change(config: dict[str, Any]) -> None:
        config.update(changes)
        for key in [k for k, v in changes.items() if v is REMOVED]:
            del config[key]

    edit_json(checkpoint / "config.json", change)


def _encode_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
