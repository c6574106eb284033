"""Re-routing from GGUF to GGUF: one metadata value and the routing tables change, all other bytes are copied."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.errors import Dsv4Error, InputError, ResourceError, UsageError, VerifyError
from dsv4tools.files import preallocate, pwrite_all
from dsv4tools.gguf.header import TensorInfo, encode_header, lay_out
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.gguf.splits import SPLIT_KEYS, open_whole
from dsv4tools.lock import OutputLock
from dsv4tools.outfile import check_not_input, check_place, check_space, complete_file, explained, partial_path
from dsv4tools.output import working_paths
from dsv4tools.plan import TEMPLATE_KEY
from dsv4tools.reroute.directory import Rerouted
from dsv4tools.reroute.effect import count_gguf, measure_effect
from dsv4tools.reroute.tables import TableCutter, check_layers, describe_repeats
from dsv4tools.template.tables import load_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.gguf.values import KV

_CHUNK_BYTES = 1 << 23
_TABLE_FORMAT = "I32"   # what both engines read


@dataclass(frozen=True)
class _Plan:
    """The new file: its header, where its tensors lie, and which of them are tables of which layer."""

    kvs: tuple[KV, ...]
    tensors: dict[str, TensorInfo]
    tables: dict[int, str]
    experts: tuple[int, int, int]
    n_layers: int
    header: bytes
    n_bytes: int


def reroute_gguf(
    source: str | Path, out: str | Path, experts_per_token: int, *, overwrite: bool = False,
    progress: Callable[[int], None] | None = None, announce: Callable[[int], None] | None = None,
) -> Rerouted:
    """Write the GGUF `source` with `experts_per_token` to `out`.

    ``expert_used_count`` and the tables ``ffn_gate_tid2eid`` change; every other entry and every other tensor's bytes
    are those of `source`, which may be any part of a split set: `out` is one file. Memory is one chunk. `out` has its
    name only when it is complete, checked and on disk.

    Parameters
    ----------
    progress, announce:
        `announce` is called once with the size of the new file, `progress` with the bytes written since the last call.

    Raises
    ------
    UsageError
        More experts than there are, or as many; `out` exists or is `source`; `source` is a template.
    InputError
        `source` is no good GGUF of this architecture: tables and metadata disagree, an id is no expert.
    ResourceError
        No space, no permission, a read or write failed.
    VerifyError
        `source` changed while it was being read.
    """
    source, out = Path(source), Path(out)
    advance = progress or (lambda _: None)
    with open_whole(source) as file:
        before = _states(file)
        plan = _make_plan(file, experts_per_token)
        check_not_input(out, file.paths)
        check_place(out, overwrite=overwrite)
        check_space(out, plan.n_bytes)
        if announce is not None:
            announce(plan.n_bytes)
        cutters = {name: _make_cutter(file, name, plan) for name in plan.tables.values()}
        partial = partial_path(out)
        with _not_in_conversion(out) as lock, complete_file(out) as fd:
            with explained(partial):
                preallocate(fd, plan.n_bytes)
            for name, tensor in plan.tensors.items():
                position = len(plan.header) + tensor.offset
                for data in _read_chunks(file, name, cutters.get(name)):
                    with explained(partial):
                        pwrite_all(fd, data, position)
                    position += len(data)
                    advance(len(data))
            with explained(partial):
                pwrite_all(fd, memoryview(plan.header), 0)   # last: until now no reader takes the file for a GGUF
                os.fsync(fd)
            if before != _states(file):
                raise VerifyError(source, "source changed while it was being read", hint="start again")
            _check_written(partial, plan, file)
            lock.check()
        effect = measure_effect(count_gguf(file.tensors.values()), plan.experts, plan.tables, plan.n_layers)
    return Rerouted(out, effect, tuple(plan.tables.values()), {out.name: "rewritten"}, plan.n_bytes,
                    tuple(describe_repeats(cutters.values())))


def _states(file: GgufFile) -> list[tuple[int, int, int]]:
    """What says cheaply that no file of the source was exchanged."""
    states = [path.stat() for path in file.paths]
    return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]


@contextlib.contextmanager
def _not_in_conversion(out: Path) -> Iterator[OutputLock]:
    """Keep conversions from writing `out`, and our hands from what an interrupted one will go on with."""
    _, _, journal, lock_path = working_paths(out)
    lock = OutputLock(lock_path)
    try:
        lock.acquire()
    except ResourceError as e:
        hint = "if you are sure that it is gone, remove the file" if "--steal-lock" in e.hint else e.hint
        raise ResourceError(e.where, e.what, hint=hint) from None
    try:
        if journal.exists():
            raise UsageError(journal, "is of an interrupted conversion to the same output",
                             hint="continue it, or remove the journal, or choose another name")
        yield lock
    finally:
        lock.release()


def _make_plan(file: GgufFile, experts_per_token: int) -> _Plan:
    architecture = load_tables().architecture
    if file.value("general.architecture") != architecture:
        raise InputError(f"{file.path}: key 'general.architecture'",
                         f"is {file.value('general.architecture')!r}, expected {architecture!r}")
    if file.value(TEMPLATE_KEY) is True:
        raise UsageError(file.path, "is a template without weights",
                         hint=f"dsv4tools template SRC OUT.gguf --experts-per-token {experts_per_token} makes another")
    used_key = f"{architecture}.expert_used_count"
    used, n_experts, n_layers = (_count(file, key) for key in (
        used_key, f"{architecture}.expert_count", f"{architecture}.block_count"))
    if experts_per_token == used:
        raise UsageError("--experts-per-token", f"is {used}, which the file has already: nothing to change",
                         hint=f"choose 1 to {used - 1}" if used > 1 else "")
    if not 1 <= experts_per_token < used:
        raise UsageError("--experts-per-token", f"is {experts_per_token}, the file routes each token to {used}: "
                         f"its tid2eid tables have no further columns", hint=f"choose 1 to {used - 1}")
    tables = _find_tables(file, n_layers, used)
    kvs = tuple(replace(kv, value=experts_per_token) if kv.key == used_key else kv
                for kv in file.kvs.values() if kv.key not in SPLIT_KEYS)
    changed = [replace(t, ne=(experts_per_token, *t.ne[1:])) if name in tables.values() else t
               for name, t in file.tensors.items()]
    offsets, n_data_bytes = lay_out([t.n_bytes for t in changed], file.alignment)
    tensors = {t.name: replace(t, offset=offset) for t, offset in zip(changed, offsets, strict=True)}
    header = encode_header(kvs, list(tensors.values()), file.alignment)
    return _Plan(kvs, tensors, tables, (used, experts_per_token, n_experts), n_layers, header,
                 len(header) + n_data_bytes)


def _count(file: GgufFile, key: str) -> int:
    value = file.value(key)
    if type(value) is not int or value < 1:
        raise InputError(f"{file.path}: key {key!r}", f"is {'missing' if value is None else repr(value)}, "
                         f"expected a number of at least 1")
    return value


def _find_tables(file: GgufFile, n_layers: int, used: int) -> dict[int, str]:
    """Layer -> name of its routing table, checked against the metadata."""
    rows = [row for row in load_tables().tensors if row.integers]
    names = {row.name.format(layer=layer): layer for row in rows for layer in range(n_layers)}
    tables = {names[name]: name for name in file.tensors if name in names}
    stray = [t.name for t in file.tensors.values() if "tid2eid" in t.name and t.name not in names]
    if stray:
        raise InputError(f"{file.path}: tensor {stray[0]!r}", f"belongs to none of the {n_layers} layers")
    key = f"{load_tables().architecture}.hash_layer_count"
    n_hash = file.value(key)
    if type(n_hash) is int:
        check_layers(tables, n_hash, n_layers, key, file.path)
    for name in tables.values():
        t = file.tensors[name]
        where = f"{file.path}: tensor {name!r}"
        if t.format.name != _TABLE_FORMAT:
            raise InputError(where, f"is {t.format.name}, expected {_TABLE_FORMAT}")
        if len(t.ne) != 2 or t.ne[0] != used:
            raise InputError(where, f"has dimensions {list(t.ne)}, the metadata say expert_used_count = {used}",
                             hint="table and metadata must agree")
        vocabulary = file.tensors.get("token_embd.weight")
        if vocabulary is not None and t.ne[1] != vocabulary.ne[-1]:
            raise InputError(where, f"has {t.ne[1]} rows, token_embd.weight has {vocabulary.ne[-1]}")
    return dict(sorted(tables.items()))


def _make_cutter(file: GgufFile, name: str, plan: _Plan) -> TableCutter:
    before, after, n_experts = plan.experts
    return TableCutter(f"{file.path.name}: tensor {name!r}", before, after, n_experts)


def _read_chunks(file: GgufFile, name: str, cutter: TableCutter | None) -> Iterator[memoryview]:
    """The bytes of a tensor in order, at most `_CHUNK_BYTES` at a time, through `cutter` if it is a table."""
    n_bytes = file.tensors[name].n_bytes
    row_bytes = 4 * cutter.n_columns if cutter else 1
    step = max(_CHUNK_BYTES // row_bytes, 1) * row_bytes
    buffer = np.empty(min(step, n_bytes), np.uint8)
    for begin in range(0, n_bytes, step):
        part = buffer[: min(step, n_bytes - begin)]
        file.read_tensor_into(name, part, begin)
        if cutter is None:
            yield part.data
        else:
            yield cutter.cut(part.view("<i4").reshape(-1, cutter.n_columns)).data.cast("B")


def _check_written(path: Path, plan: _Plan, source: GgufFile) -> None:
    """Read `path` strictly and compare it with the plan, its tables with the source; a difference is a bug of ours."""
    with open_gguf(path) as file:
        if (tuple(file.kvs.values()), file.tensors, file.n_file_bytes) != (plan.kvs, plan.tensors, plan.n_bytes):
            raise Dsv4Error(path, "was written wrongly: it does not match its plan", hint="please report this")
        for name in plan.tables.values():
            again = _make_cutter(source, name, plan)
            at = 0
            for rows in _read_chunks(source, name, again):
                if file.read_tensor_bytes(name, at, len(rows)).data != rows:
                    raise Dsv4Error(path, f"was written wrongly: tensor {name!r} differs", hint="please report this")
                at += len(rows)
