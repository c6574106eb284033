"""Comparing a GGUF with the checkpoint it was made from: every tensor derived again, in the type that the file has."""

from __future__ import annotations

from contextlib import closing
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.derive import UnitDeriver
from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.codecs import ENCODABLE, prepare, self_test
from dsv4tools.gguf.reader import Finding
from dsv4tools.gguf.values import encode_value
from dsv4tools.plan import NAN_KEY, PlannedTensor, tensor_units
from dsv4tools.reroute import reroute
from dsv4tools.template import apply_template_file, derive_template
from dsv4tools.verify.report import TensorCheck
from dsv4tools.workers import run_units

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.plan import Unit
    from dsv4tools.template import Template


def select_tensors(file: GgufFile, globs: Sequence[str]) -> list[str]:
    """Names in file order that match one of `globs` (all without any); UsageError for a glob that matches none."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in file.tensors):
            raise UsageError("--tensor", f"{glob!r} matches no tensor of {file.path}")
    return [name for name in file.tensors if not globs or any(fnmatchcase(name, glob) for glob in globs)]


def view_as_in(file: GgufFile, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as the file was made from it: re-routed where the file uses fewer experts per token."""
    used = file.value("deepseek4.expert_used_count")
    have = checkpoint.config.num_experts_per_tok
    return reroute(checkpoint, used) if type(used) is int and 1 <= used < have else checkpoint


def plan_comparison(
    file: GgufFile, checkpoint: Checkpoint, names: Sequence[str]
) -> tuple[list[PlannedTensor], list[Finding]]:
    """What to derive for each of `names`, and what metadata, tensor set and types say that the source does not.

    InputError where the checkpoint itself is wrong; contradictions between file and checkpoint are findings.
    """
    derived = derive_template(checkpoint)
    try:
        template = apply_template_file(derived, file.path)
    except InputError as e:
        return [], [Finding("error", "source-mismatch", e.where, f"does not fit the source: {e.what}", None)]
    findings = list(_compare_entries(file, derived))
    planned = []
    for tensor in template.tensors:
        info = file.tensors[tensor.name]
        expected = None if tensor.is_matrix else "I32" if tensor.holds_integers else "F32"
        if tensor.name not in names:
            continue
        if expected not in {None, info.format.name}:
            what = f"has type {info.format.name}, expected {expected}"
            findings.append(Finding("error", "source-type", tensor.name, what, None))
        elif info.format.name not in ENCODABLE | {"I32"}:
            what = f"has type {info.format.name}, which cannot be derived again for comparison"
            findings.append(Finding("error", "source-type", tensor.name, what, None))
        else:
            planned.append(PlannedTensor(tensor, info.format, "", info.offset, info.n_bytes))
    return planned, findings


def _compare_entries(file: GgufFile, derived: Template) -> Iterator[Finding]:
    """Model and tokenizer entries that differ from the source's without contradicting its weights."""
    for own in derived.kvs:
        if own.key.startswith("general."):
            continue
        held, kind = file.kvs.get(own.key), own.item_type or own.type
        if held is None:
            what = f"is missing, the source gives it as {kind}"
        elif (held.type, held.item_type) != (own.type, own.item_type):
            what = f"has type {held.item_type or held.type}, the source gives {kind}"
        elif own.key.startswith("tokenizer.") and encode_value(held) != encode_value(own):
            what = "differs from the source's"
        else:
            continue
        yield Finding("warning", "source-metadata", f"key {own.key!r}", what, None)


def compare_tensors(
    file: GgufFile, checkpoint: Checkpoint, planned: Sequence[PlannedTensor], threads: int,
    progress: Callable[[int], None] | None = None,
) -> list[TensorCheck]:
    """Derive each planned tensor from `checkpoint` and compare byte by byte with what `file` holds.

    Raises InputError, ResourceError and VerifyError as reading and encoding the source do.
    """
    prepare({t.format.name for t in planned} - {"I32"})
    self_test()
    zero_nan = file.value(NAN_KEY) == "zero"

    def make_worker(computing: threading.Semaphore) -> Callable[[Unit], tuple[int, int, str]]:
        deriver = UnitDeriver(checkpoint.config.n_routed_experts, zero_nan=zero_nan)
        held = np.zeros(0, np.uint8)

        def work(unit: Unit) -> tuple[int, int, str]:
            nonlocal held
            rows = deriver.read(unit)
            if len(held) < unit.n_bytes:
                held = np.zeros(unit.n_bytes, np.uint8)
            found = held[: unit.n_bytes]
            file.read_tensor_into(unit.planned.name, found, unit.start)
            with computing:
                expected, _ = deriver.encode(unit, rows)
                return _first_difference(unit, found, expected)

        return work

    units = (unit for t in planned for unit in tensor_units(t))
    counts = dict.fromkeys((t.name for t in planned), 0)
    firsts: dict[str, tuple[int, str]] = {}
    with closing(run_units(units, make_worker, threads)) as results:
        for unit, (n_different, at, text) in results:
            name = unit.planned.name
            counts[name] += n_different
            if n_different and (name not in firsts or at < firsts[name][0]):
                firsts[name] = (at, text)
            if progress is not None:
                progress(unit.n_bytes)
    return [TensorCheck(t.name, t.format.name, t.n_bytes, counts[t.name], firsts.get(t.name, (0, ""))[1])
            for t in planned]


def _first_difference(
    unit: Unit, found: np.ndarray[tuple[int], np.dtype[np.uint8]], expected: np.ndarray[tuple[int], np.dtype[np.uint8]]
) -> tuple[int, int, str]:
    different = np.flatnonzero(found != expected)
    if not len(different):
        return 0, 0, ""
    first = int(different[0])
    block, byte = divmod(first, unit.planned.format.block_bytes)
    row, column = divmod(block * unit.planned.format.block_values, unit.matrix.n_cols)
    at = unit.start + first
    text = (f"byte {at:,} is 0x{found[first]:02x}, the source gives 0x{expected[first]:02x} "
            f"(byte {byte} of the block at row {unit.first_row + row} column {column} of {unit.matrix.weight.name})")
    return len(different), at, text
