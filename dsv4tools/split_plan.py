"""Cutting a plan into files of a limited size, as llama.cpp's split sets: whole tensors, in order."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dsv4tools.errors import UsageError
from dsv4tools.gguf.header import TensorInfo, descriptor_bytes, encode_header
from dsv4tools.gguf.rules import DEFAULT_ALIGNMENT, MAX_INT64, pad
from dsv4tools.gguf.splits import MAX_SPLITS, split_kvs, split_name, split_prefix
from dsv4tools.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dsv4tools.plan import Plan, PlannedTensor

_OPTION = "--split-max-size"


def split_plan(plan: Plan, max_bytes: int) -> Plan:
    """The same plan in as few files as the order allows, none of them larger than `max_bytes`, headers included.

    A plan that fits one file stays as it is: an ordinary GGUF.

    Raises
    ------
    UsageError
        `max_bytes` is no size of a file, one tensor alone takes more, or there would be more than 65,535 files.
    """
    if not 1 <= max_bytes <= MAX_INT64:
        raise UsageError(_OPTION, f"is {max_bytes} bytes, expected 1 to {MAX_INT64}")
    if plan.total_bytes <= max_bytes:
        return plan
    n = len(plan.tensors)
    alignment = plan.template.alignment
    first = len(encode_header([*plan.kvs, *split_kvs(0, 2, n)], [], alignment))
    later = len(encode_header(split_kvs(1, 2, n), []))
    placed: list[PlannedTensor] = []
    part, base, described, end = 0, first, 0, 0   # of the part in hand: header without tensors, descriptors, data
    for t in plan.tensors:
        described += descriptor_bytes(TensorInfo(t.name, t.tensor.ne, t.format, 0))
        size = pad(base + described, alignment) + end + pad(t.n_bytes, alignment)
        if size > max_bytes and end:
            part, base, alignment, end = part + 1, later, DEFAULT_ALIGNMENT, 0
            described = descriptor_bytes(TensorInfo(t.name, t.tensor.ne, t.format, 0))
            size = pad(base + described, alignment) + pad(t.n_bytes, alignment)
        if size > max_bytes:
            what = "the metadata and tensor" if part == 0 else "tensor"
            raise UsageError(_OPTION, f"is {format_bytes(max_bytes)}, {what} {t.name!r} alone take{'s' * (part > 0)} "
                             f"{format_bytes(size)}", hint="tensors are never divided: give a larger size")
        placed.append(replace(t, part=part, offset=end))
        end += pad(t.n_bytes, alignment)
    if part >= MAX_SPLITS:
        raise UsageError(_OPTION, f"makes {part + 1:,} files, more than {MAX_SPLITS:,}", hint="give a larger size")
    return replace(plan, tensors=tuple(placed))


def output_paths(plan: Plan, out: Path) -> list[Path]:
    """The files that a conversion of `plan` to `out` writes: `out`, or ``NAME-00001-of-00003.gguf`` and so on."""
    n = len(plan.files)
    if n == 1:
        return [out]
    prefix = split_prefix(out.name)
    return [out.with_name(split_name(prefix, i, n)) for i in range(n)]


def sized_files(plan: Plan, paths: Sequence[Path]) -> list[tuple[Path, int]]:
    """Each file with its size in bytes."""
    return [(path, file.n_bytes) for path, file in zip(paths, plan.files, strict=True)]
