"""Comparing a GGUF with the checkpoint it was made from: every tensor derived again, in the type that the file has."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.checkpoint.strict_json import shown
from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.codecs import DECODABLE, ENCODABLE
from dsv4tools.gguf.reader import Finding
from dsv4tools.gguf.values import encode_value
from dsv4tools.imatrix import FILE_KEY, HASH_KEY, assign_importance
from dsv4tools.plan import PlannedTensor, uses_importance
from dsv4tools.reroute import reroute
from dsv4tools.template import apply_template, derive_template
from dsv4tools.verify.bench import Bench
from dsv4tools.verify.diagnose import Candidate, diagnose
from dsv4tools.verify.judge import judge_tensors
from dsv4tools.verify.report import Fault
from dsv4tools.verify.tally import compare_units

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.imatrix import ImatrixFile, Importance
    from dsv4tools.plan import Unit
    from dsv4tools.template import Template
    from dsv4tools.verify.report import TensorCheck

MAX_DIAGNOSED = 32   # wrong tensors that are examined; where there are more the file is of another model


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
    file: GgufFile, checkpoint: Checkpoint, names: Sequence[str], imatrix: ImatrixFile | None = None
) -> tuple[list[PlannedTensor], list[Finding]]:
    """What to derive for each of `names`, and what metadata, tensor set and types say that the source does not.

    InputError where the source or the importance matrix is wrong or cannot be decoded; contradictions between file and
    source are findings.
    """
    derived = derive_template(checkpoint)
    try:
        template = apply_template(derived, file)
    except InputError as e:
        return [], [Finding("error", "source-mismatch", e.where, f"does not fit the source: {e.what}", None)]
    findings = list(_compare_entries(file, derived))
    weights: Mapping[str, Importance] = {}
    users = [t for t in template.tensors if uses_importance(t, file.tensors[t.name].format)]
    if users:
        findings += _compare_provenance(file, imatrix)
    if imatrix is not None:
        weights, _ = assign_importance(imatrix, template.tensors, users, checkpoint.config.o_groups)
    planned = []
    for tensor in template.tensors:
        info = file.tensors[tensor.name]
        expected = None if tensor.is_matrix else "I32" if tensor.holds_integers else "F32"
        if tensor.name not in names:
            continue
        if expected not in {None, info.format.name}:
            what = f"has type {info.format.name}, expected {expected}"
            findings.append(Finding("error", "source-type", tensor.name, what, None))
        elif info.format == tensor.stored_format:
            planned.append(PlannedTensor(tensor, info.format, "", info.offset, info.n_bytes))
        elif tensor.stored_format is not None and tensor.stored_format.name not in DECODABLE | {"I32", "I64"}:
            raise InputError(tensor.sources[0].weight.where, f"is {tensor.stored_format.name}, which cannot be decoded "
                             f"to be compared with {info.format.name}", hint="--tensor leaves tensors out")
        elif info.format.name not in ENCODABLE | DECODABLE | {"I32"}:
            what = f"has type {info.format.name}, which cannot be derived again for comparison"
            findings.append(Finding("error", "source-type", tensor.name, what, None))
        else:
            planned.append(PlannedTensor(tensor, info.format, "", info.offset, info.n_bytes, weights.get(tensor.name)))
    return planned, findings


def _compare_provenance(file: GgufFile, imatrix: ImatrixFile | None) -> Iterator[Finding]:
    """What the file says about the importance matrix that it was made with, beside the one that was given."""
    name, sha256 = file.value(FILE_KEY), file.value(HASH_KEY)
    where, made = f"key {FILE_KEY!r}", f"says that it was made with the importance matrix {shown(name)}"
    if imatrix is None:
        if name is not None:
            what = f"{made}: give it with --imatrix to compare bytes, without it values are compared"
            yield Finding("warning", "imatrix-missing", where, what, None)
    elif name is None:
        what = f"is missing: nothing says that it was made with {imatrix.path.name} or any importance matrix"
        yield Finding("warning", "imatrix-unsaid", where, what, None)
    elif sha256 is not None and sha256 != imatrix.sha256:
        what = f"{made} with sha256 {shown(sha256)}, {imatrix.path} has {imatrix.sha256}"
        yield Finding("warning", "imatrix-other", where, what, None)


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
    file: GgufFile, checkpoint: Checkpoint, planned: Sequence[PlannedTensor], units: Iterable[Unit], *, threads: int,
    progress: Callable[[int], None] | None = None,
) -> list[TensorCheck]:
    """Derive `units` of the planned tensors from `checkpoint`, compare with `file`, judge, and name what is wrong.

    Raises InputError, ResourceError and VerifyError as reading and encoding the source do.
    """
    tallies = compare_units(file, checkpoint, planned, units, threads=threads, progress=progress)
    judged = judge_tensors(tallies)
    bench = Bench(file, checkpoint)
    checks, n_diagnosed = [], 0
    for tally, each in zip(tallies, judged, strict=True):
        check = each.check
        if each.wrong and n_diagnosed < MAX_DIAGNOSED:
            others = _others_like(tally.planned, planned)
            with np.errstate(all="ignore"):   # a wrong tensor may hold NaN, infinities, anything
                faults = diagnose(tally.planned, tally, each, bench, others)
            check = replace(check, faults=faults)
            n_diagnosed += 1
        elif each.wrong:
            check = replace(check, faults=(Fault("", f"not examined: {MAX_DIAGNOSED} wrong tensors were"),))
        checks.append(check)
    return checks


def _others_like(planned: PlannedTensor, all_planned: Sequence[PlannedTensor]) -> list[Candidate]:
    """Source matrices of the same shape in other tensors: all of its own layer, and those of its kind in the others."""
    like = planned.tensor.sources[0]
    kind = planned.name.split(".")[2:]
    found = []
    for other in all_planned:
        sources = other.tensor.sources
        same_layer = other.tensor.layer == planned.tensor.layer
        same_kind = other.name.split(".")[2:] == kind
        if other is planned or not (same_layer or same_kind or len(sources) == 1):
            continue
        if sources[0].kind is None or (sources[0].n_rows, sources[0].n_cols) != (like.n_rows, like.n_cols):
            continue
        found += [Candidate(other.name, i if len(sources) > 1 else None, m) for i, m in enumerate(sources)]
    return found
