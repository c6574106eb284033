"""Which shard holds which tensor: model.safetensors.index.json checked against what the shards really hold."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dsv4tools.checkpoint.shard import Shard, read_shard
from dsv4tools.checkpoint.strict_json import listed, read_json_object, shown
from dsv4tools.errors import InputError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"
# One plain file name. An index is data from a stranger: "../x", "/etc/x", "a/b", "C:x" and URLs must never be opened.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")


def check_shard_name(name: object, where: object) -> str:
    """`name` if it is a plain file name ending in .safetensors, else InputError."""
    if not isinstance(name, str) or len(name) > 255 or not _SHARD_NAME.fullmatch(name):
        raise InputError(where, f"shard name {shown(name)} is not a plain file name ending in .safetensors")
    return name


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> shard name of an index file, names checked before anything is opened."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: key 'weight_map'", "is missing, empty or no object")
    for shard in weight_map.values():
        check_shard_name(shard, path)
    return weight_map


def locate_shard(directory: Path, name: str) -> Path:
    """The path of shard `name`, refused where a link leads out of the checkpoint.

    The Hub's cache keeps the bytes in ``models--*/blobs`` and links to them from ``models--*/snapshots/REVISION``:
    such links are followed, others must stay inside the directory.
    """
    path = directory / name
    try:
        target, home = path.resolve(), directory.resolve()
    except (OSError, RuntimeError):   # later Pythons do not raise: then opening it fails
        raise InputError(path, "is a link to itself") from None
    roots = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        roots.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise InputError(path, f"links to {target}, outside the checkpoint",
                         hint="put the file itself there, or link to a whole checkpoint directory")
    return path


def open_shards(directory: Path) -> dict[str, Shard]:
    """All shards of a checkpoint directory, by name, consistent with its index (or a single file without one).

    Raises
    ------
    InputError
        No shards; an index that names missing shards, tensors that a shard does not hold, or omits some; a tensor in
        two shards. The message lists all of them.
    """
    try:
        present = sorted(p.name for p in directory.iterdir() if p.name.endswith(".safetensors") and p.name[0] != ".")
    except NotADirectoryError:
        raise InputError(directory, "is no directory", hint="give the checkpoint's directory") from None
    except FileNotFoundError:
        raise InputError(directory, "is missing") from None
    except OSError as e:
        raise ResourceError(directory, f"cannot be listed: {e.strerror}") from None
    return gather_shards(directory, present, lambda name: read_shard(locate_shard(directory, name)))


def gather_shards(directory: Path, present: Sequence[str], read: Callable[[str], Shard]) -> dict[str, Shard]:
    """`open_shards` for shards that `read` opens, wherever they are; `directory` has the index.

    `present` are the names of all safetensors files there are.
    """
    index = directory / INDEX_NAME
    if index.exists() or index.is_symlink():
        weight_map = read_weight_map(index)
    elif len(present) == 1:
        name = check_shard_name(present[0], directory)
        return {name: read(name)}
    else:
        raise InputError(index, f"is missing, and the directory holds {len(present)} .safetensors files",
                         hint="expected an index, or one file with all tensors")
    names = sorted(set(weight_map.values()))
    problems = [f"{n} is named by the index but missing" for n in names if n not in present]
    problems += [f"{n} is not named by the index" for n in present if n not in names]
    if problems:
        raise InputError(index, listed(problems), hint="fetch the missing files, remove what does not belong")
    shards = {n: read(n) for n in names}
    problems = list(_contradictions(weight_map, shards))
    if problems:
        raise InputError(index, listed(problems))
    return shards


def _contradictions(weight_map: dict[str, str], shards: dict[str, Shard]) -> Iterable[str]:
    holder: dict[str, str] = {}
    for shard_name, shard in shards.items():
        for tensor in shard.tensors:
            if tensor in holder:
                yield f"tensor {tensor!r} is in {holder[tensor]} and in {shard_name}"
            elif tensor not in weight_map:
                yield f"tensor {tensor!r} of {shard_name} is not in the index"
            holder[tensor] = shard_name
    for tensor, shard_name in weight_map.items():
        if tensor not in holder:
            yield f"tensor {tensor!r} is missing from {shard_name}"
        elif holder[tensor] != shard_name and tensor not in shards[shard_name].tensors:
            yield f"tensor {tensor!r} is in {holder[tensor]}, not in {shard_name}"
