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
from dsv4tools.gguf.rules import ALIGNMENT_KEY
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
        With the first fault that `scan_split` finds.
    """
    parts, findings = scan_split(path)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        _close(parts)
        name, _, place = errors[0].where.partition(": ")
        where = Path(path).with_name(name)
        at = "" if errors[0].offset is None else f" (byte {errors[0].offset})"
        hint = f"{len(errors) - 1} more errors in this set" if errors[1:] else ""
        raise InputError(f"{where}: {place}" if place else where, errors[0].message + at, hint=hint)
    return parts


def scan_split(path: str | os.PathLike[str]) -> tuple[list[GgufFile], list[Finding]]:
    """The parts of the set that `path` is a part of, as many as there are, and all that is wrong with them.

    Each finding names the part's file before the place in it. Errors beyond those of the parts themselves: a part is
    missing, its name and its metadata disagree, the parts disagree with each other, or a later part has metadata of its
    own. Raises ResourceError where reading fails.
    """
    path = Path(path)
    match = _NAME.fullmatch(path.name)
    if match is None:
        return _scan_single(path)
    prefix, number, count = match["prefix"], int(match["number"]), int(match["count"])
    if not 1 <= number <= count <= MAX_SPLITS:
        message = f"is named part {number} of {count}, expected 1 to count, count up to {MAX_SPLITS}"
        return [], [_error(path.name, message)]
    # The name decides where to look before any file is believed: a count in metadata cannot send us astray.
    paths = [path.with_name(split_name(prefix, index, count)) for index in range(count)]
    there = [p.exists() for p in paths]
    missing = [p.name for p, exists in zip(paths, there, strict=True) if not exists]
    findings = []
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        findings.append(_error(path.name, f"parts are missing: {', '.join(missing[:3])}{more}"))
    parts: list[GgufFile] = []
    try:
        for index, part_path in enumerate(paths):
            if not there[index]:
                continue
            part, faults = _scan_part(part_path, index, count)
            findings += faults
            if part is not None:
                parts.append(part)
        if len(parts) == count and all(part.ok for part in parts):
            findings += _check_set(parts)
    except BaseException:
        _close(parts)
        raise
    return parts, findings


def _scan_part(path: Path, index: int, count: int) -> tuple[GgufFile | None, list[Finding]]:
    try:
        part = scan_gguf(path)
    except InputError as e:   # no regular file
        return None, [_error(path.name, e.what)]
    findings = [replace(f, where=f"{path.name}: {f.where}") for f in part.findings]
    return part, findings + (_check_part(part, index, count) if part.ok else [])


def _close(parts: Sequence[GgufFile]) -> None:
    for part in parts:
        part.close()


def _error(where: str, message: str) -> Finding:
    return Finding("error", "split", where, message, None)


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
    """`scan_gguf`; where the file is a part of a set the whole set as one file, with all that is wrong in any part."""
    file = scan_gguf(path, template=template)
    if not _is_part(file):
        return file
    parts, findings = scan_split(path)
    if any(finding.severity == "error" for finding in findings):
        _close(parts)
        file.findings = findings
        return file
    file.close()
    return join_parts(file.path, parts)


def _is_part(file: GgufFile) -> bool:
    """Whether loaders look for other parts: by the metadata; by the name where these cannot be read to their end."""
    count = file.value(_COUNT)
    if count is None:
        return not file.ok and not file.data_offset and _NAME.fullmatch(file.path.name) is not None
    return type(count) is not int or count > 1


def _scan_single(path: Path) -> tuple[list[GgufFile], list[Finding]]:
    file = scan_gguf(path)
    findings = list(file.findings)
    count = file.value(_COUNT, 0)
    if count != 0:
        message = (f"says it is one of {count} parts, expected a name like {split_name('NAME', 0, 3)}: give it back "
                   f"the name it was published under")
        findings.append(_error(path.name, message))
    return [file], findings


def _check_part(part: GgufFile, index: int, count: int) -> list[Finding]:
    findings = []
    for key, value_type in SPLIT_KEYS.items():
        kv = part.kvs.get(key)
        if kv is None or kv.type != value_type:
            message = f"is {kv.type if kv else 'missing'}, expected a {value_type}"
            findings.append(_error(f"{part.path.name}: {key}", message))
    for key, expected in ((_NO, index), (_COUNT, count)):
        kv = part.kvs.get(key)
        if kv is not None and kv.type == SPLIT_KEYS[key] and kv.value != expected:
            message = f"is {kv.value}, the file's name says {expected}"
            findings.append(_error(f"{part.path.name}: {key}", message))
    if index:
        extra = [key for key in part.kvs if key not in SPLIT_KEYS and key != ALIGNMENT_KEY]
        if extra:
            more = f"; so do {len(extra) - 1} more" if extra[1:] else ""
            message = f"stands in a later part, expected in the first only{more}"
            findings.append(_error(f"{part.path.name}: {extra[0]}", message))
    return findings


def _check_set(parts: Sequence[GgufFile]) -> list[Finding]:
    n_tensors = sum(len(part.tensors) for part in parts)
    owner: dict[str, GgufFile] = {}
    findings = []
    for part in parts:
        stated = part.value(_N_TENSORS)
        if type(stated) is int and stated != n_tensors:
            message = f"is {stated}, the {len(parts)} parts hold {n_tensors}"
            findings.append(_error(f"{part.path.name}: {_N_TENSORS}", message))
        for name in part.tensors:
            other = owner.setdefault(name, part)
            if other is not part:
                message = f"is also in {other.path.name}, expected in one part"
                findings.append(_error(f"{part.path.name}: {name}", message))
    return findings
