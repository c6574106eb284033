"""Split sets: one model in several GGUF files, as llama.cpp names and marks them.

Facts (llama.cpp, gguf-split and llama-model-loader): parts are called ``NAME-00001-of-00003.gguf``; each carries
``split.no`` (u16, from 0), ``split.count`` (u16) and ``split.tensors.count`` (i32, of the whole set); all other
metadata stand in the first part. Merging leaves ``split.count`` 0 behind, which means: not split.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4tools.errors import InputError, UsageError
from dsv4tools.gguf.reader import Finding, GgufFile, open_gguf, scan_gguf
from dsv4tools.gguf.values import KV

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

_NO, _COUNT, _N_TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KEYS = {_NO: "u16", _COUNT: "u16", _N_TENSORS: "i32"}
MAX_SPLITS = 65_535
_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


def split_name(prefix: str, index: int, count: int) -> str:
    """File name of part `index` (from 0) of `count`: the names count from 1."""
    if not 0 <= index < count <= MAX_SPLITS:
        raise UsageError(prefix, f"part {index} of {count} splits, expected 0 to count - 1, count up to {MAX_SPLITS}")
    return f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf"


def split_prefix(name: str) -> str:
    """The NAME of a set that replaces a file called `name`: without ``.gguf``, and without the number of a part."""
    match = _NAME.fullmatch(name)
    return match["prefix"] if match else name.removesuffix(".gguf") or name


def split_kvs(index: int, count: int, n_tensors: int) -> list[KV]:
    """The metadata of part `index` (from 0) of `count`; `n_tensors` counts those of all parts."""
    values = {_NO: index, _COUNT: count, _N_TENSORS: n_tensors}
    return [KV(key, value_type, values[key]) for key, value_type in SPLIT_KEYS.items()]


def open_split(path: str | os.PathLike[str]) -> list[GgufFile]:
    """All parts of the set that `path` is a part of, in order, strictly read; a file that is no part comes alone.

    Raises
    ------
    InputError
        A part is missing or no good GGUF, its name and its metadata disagree, the parts disagree with each other,
        or a later part has metadata of its own.
    """
    path = Path(path)
    match = _NAME.fullmatch(path.name)
    if match is None:
        return [_open_single(path)]
    prefix, number, count = match["prefix"], int(match["number"]), int(match["count"])
    if not 1 <= number <= count <= MAX_SPLITS:
        raise InputError(path, f"is named part {number} of {count}, expected 1 to count, count up to {MAX_SPLITS}")
    # The name decides where to look before any file is believed: a count in metadata cannot send us astray.
    paths = [path.with_name(split_name(prefix, index, count)) for index in range(count)]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(path, f"parts are missing: {', '.join(missing[:3])}{more}")
    parts: list[GgufFile] = []
    try:
        for index, part_path in enumerate(paths):
            part = open_gguf(part_path)
            parts.append(part)
            _check_part(part, index, count)
        _check_set(parts)
    except BaseException:
        for part in parts:
            part.close()
        raise
    return parts


class SplitFile(GgufFile):
    """All parts of a set as one file: the metadata of the first part and the tensors of all.

    Offsets of tensors count within their own part.
    """

    parts: Sequence[GgufFile] = ()

    @property
    def paths(self) -> list[Path]:
        """The files of all parts."""
        return [part.path for part in self.parts]

    def close(self) -> None:
        """Give all handles back."""
        for part in self.parts:
            part.close()

    def read_tensor_into(self, name: str, out: NDArray[np.uint8], start: int = 0) -> None:
        """As `GgufFile.read_tensor_into`."""
        self._find(name)
        next(part for part in self.parts if name in part.tensors).read_tensor_into(name, out, start)


def join_parts(path: Path, parts: Sequence[GgufFile]) -> GgufFile:
    """The parts that `open_split` returned, as one file called `path`; a single part as it is."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    joined = SplitFile(
        path, first.version, first.alignment, first.kvs,
        {name: tensor for part in parts for name, tensor in part.tensors.items()},
        n_file_bytes=sum(part.n_file_bytes for part in parts),
        findings=[replace(f, where=f"{part.path.name}: {f.where}") for part in parts for f in part.findings],
    )
    joined.parts = tuple(parts)
    return joined


def open_whole(path: str | os.PathLike[str], *, template: bool = False) -> GgufFile:
    """`open_gguf`; where the file is a part of a set the whole set as one file, with the errors of `open_split`."""
    file = open_gguf(path, template=template)
    if not _is_part(file):
        return file
    file.close()
    return join_parts(file.path, open_split(path))


def scan_whole(path: str | os.PathLike[str], *, template: bool = False) -> GgufFile:
    """`scan_gguf`; where the file is a part of a set the whole set as one file, whose faults are findings too."""
    file = scan_gguf(path, template=template)
    if not file.ok or not _is_part(file):
        return file
    try:
        parts = open_split(path)
    except InputError as e:
        file.findings.append(Finding("error", "split", e.where, e.what, None))
        return file
    file.close()
    return join_parts(file.path, parts)


def _is_part(file: GgufFile) -> bool:
    """Whether loaders look for other parts: by the metadata, whatever the file is called."""
    count = file.value(_COUNT, 0)
    return type(count) is not int or count > 1


def _open_single(path: Path) -> GgufFile:
    gguf = open_gguf(path)
    count = gguf.value(_COUNT, 0)
    if count != 0:
        gguf.close()
        raise InputError(
            path, f"says it is one of {count} parts, expected a name like {split_name('NAME', 0, 3)}",
            hint="give it back the name it was published under",
        )
    return gguf


def _check_part(part: GgufFile, index: int, count: int) -> None:
    for key, value_type in SPLIT_KEYS.items():
        kv = part.kvs.get(key)
        if kv is None or kv.type != value_type:
            raise InputError(f"{part.path}: {key}", f"is {kv.type if kv else 'missing'}, expected a {value_type}")
    for key, expected in ((_NO, index), (_COUNT, count)):
        if part.value(key) != expected:
            raise InputError(f"{part.path}: {key}", f"is {part.value(key)}, the file's name says {expected}")
    if index:
        extra = [key for key in part.kvs if key not in SPLIT_KEYS]
        if extra:
            raise InputError(f"{part.path}: {extra[0]}", "stands in a later part, expected in the first only")


def _check_set(parts: Sequence[GgufFile]) -> None:
    n_tensors = sum(len(part.tensors) for part in parts)
    owner: dict[str, GgufFile] = {}
    for part in parts:
        if part.value(_N_TENSORS) != n_tensors:
            raise InputError(
                f"{part.path}: {_N_TENSORS}", f"is {part.value(_N_TENSORS)}, the {len(parts)} parts hold {n_tensors}"
            )
        for name in part.tensors:
            other = owner.setdefault(name, part)
            if other is not part:
                raise InputError(f"{part.path}: {name}", f"is also in {other.path.name}, expected in one part")
