"""A GGUF as the source of a conversion: shown as the checkpoint that it could have been made from.

Its tensors get the names of a checkpoint by the tables in templates/, its metadata become a `Config`; from there on a
plan, a conversion and a verification see no difference. Only the template is not derived but taken over: order, general
and tokenizer entries stay, what the architecture's own keys lack or have in another type is mended.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4tools.checkpoint import Checkpoint, SourceTensor
from dsv4tools.checkpoint.card import ModelCard
from dsv4tools.checkpoint.shard import Shard
from dsv4tools.checkpoint.strict_json import listed
from dsv4tools.errors import InputError
from dsv4tools.gguf.regular import open_regular, read_bytes
from dsv4tools.gguf.splits import SplitFile, open_whole
from dsv4tools.template.gguf_config import read_gguf_config
from dsv4tools.template.tables import load_tables
from dsv4tools.template.tensors import expand_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsv4tools.gguf.header import TensorInfo
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.template.tables import TensorRow


@dataclass(frozen=True)
class GgufSource(Checkpoint):
    """A GGUF, or a split set, under a checkpoint's names.

    Attributes
    ----------
    file:
        Its header; closed, as data is read through `shards`.
    """

    file: GgufFile = field(kw_only=True)

    @cached_property
    def card(self) -> ModelCard:
        """What the file calls itself."""
        name = self.file.value("general.name")
        return ModelCard(name if isinstance(name, str) and name else self.directory.stem)


def open_gguf_source(path: str | Path) -> GgufSource:
    """Open a GGUF (or a split set, by any of its parts) as a source: its header is read and checked, no weights.

    Raises
    ------
    InputError
        No good GGUF of this architecture; metadata that are missing or contradict each other; tensors that are missing
        or that nothing uses (all are listed), or of another shape than the metadata imply.
    ResourceError
        A file cannot be read.
    """
    path = Path(path)
    with open_whole(path) as file:
        config = read_gguf_config(file)
        parts = file.parts if isinstance(file, SplitFile) else [file]
        shards = {part.path.name: _as_shard(part) for part in parts}
        owners = {name: shards[part.path.name] for part in parts for name in part.tensors}
        starts = {name: part.data_offset for part in parts for name in part.tensors}
        rows = list(expand_rows(config, load_tables()))
        _check_tensors(file, rows)
        tensors: dict[str, SourceTensor] = {}
        for row, layer, shape in rows:
            info = file.tensors[row.name.format(layer=layer)]
            shard, begin = owners[info.name], starts[info.name] + info.offset
            tensors.update(_as_tensors(row, layer, shape, info, shard, begin))
    return GgufSource(path, config, shards, tensors, config.num_experts_per_tok, file=file)


def _as_shard(part: GgufFile) -> Shard:
    """The file as it is now: every later read sees whether it is still the same."""
    fd, n_file_bytes = open_regular(part.path)
    try:
        state = os.fstat(fd)
        header = read_bytes(fd, 0, part.data_offset, part.path)
    finally:
        os.close(fd)
    if n_file_bytes != part.n_file_bytes:
        raise InputError(part.path, f"has {n_file_bytes:,} bytes, a moment ago it had {part.n_file_bytes:,}",
                         hint="wait until it is written")
    return Shard(part.path, n_file_bytes, hashlib.sha256(header).hexdigest(), state.st_mtime_ns, state.st_ino, {}, {})


def _check_tensors(file: GgufFile, rows: list[tuple[TensorRow, int | None, tuple[int, ...]]]) -> None:
    wanted = {row.name.format(layer=layer): shape for row, layer, shape in rows}
    problems = []
    missing = [name for name in wanted if name not in file.tensors]
    unknown = [name for name in file.tensors if name not in wanted]
    if missing:
        problems.append(f"lacks {len(missing)} tensors: {listed(missing)}")
    if unknown:
        problems.append(f"has {len(unknown)} tensors that nothing uses: {listed(unknown)}")
    problems += [f"tensor {name!r} is {list(file.tensors[name].ne)}, the metadata imply {list(shape[::-1])}"
                 for name, shape in wanted.items()
                 if name in file.tensors and not _holds(file.tensors[name], shape)][:3]
    if problems:
        raise InputError(file.path, "; ".join(problems), hint="metadata and tensors are not of one whole model")


def _holds(info: TensorInfo, shape: tuple[int, ...]) -> bool:
    """Whether its rows are those of `shape` (rows first): dimensions of 1 and a split of the rows say nothing."""
    return prod(info.ne) == prod(shape) and (info.ne[0] if info.ne else 1) == shape[-1] \
        and not (len(shape) == 3 and len(info.ne) == 3 and info.ne[::-1] != shape)


def _as_tensors(  # noqa: PLR0917  - what it is in either world, and where it lies
    row: TensorRow, layer: int | None, shape: tuple[int, ...], info: TensorInfo, shard: Shard, begin: int,
) -> Iterator[tuple[str, SourceTensor]]:
    """The checkpoint's tensors that a GGUF tensor holds, by name: itself, or one per expert."""
    experts: list[int | None] = list(range(shape[0])) if row.is_stacked else [None]
    own = shape[1:] if row.is_stacked else shape
    n_bytes = info.n_bytes // len(experts)
    for i, expert in enumerate(experts):
        yield row.source.format(layer=layer, expert=expert), SourceTensor(
            info.name, info.format.name, own, shard, begin + i * n_bytes, n_bytes, format=info.format, expert=expert)
