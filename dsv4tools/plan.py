"""The plan: every tensor's type, size, offset and sources, known before a byte is written.

Pure data, made from headers alone; `--dry-run` prints the object that the writer consumes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from dsv4tools import __version__
from dsv4tools.errors import UsageError
from dsv4tools.flags import rules_from_flags
from dsv4tools.formats.codecs import NEEDS_IMPORTANCE, USES_IMPORTANCE
from dsv4tools.gguf.header import TensorInfo, encode_header, lay_out
from dsv4tools.gguf.rules import DEFAULT_ALIGNMENT
from dsv4tools.gguf.splits import split_kvs
from dsv4tools.gguf.values import KV
from dsv4tools.imatrix import HASH_KEY, ImatrixFile, assign_importance, open_imatrix, provenance
from dsv4tools.policy import KEEP, Policy, decide_formats, load_policy
from dsv4tools.requantize import change_of, check_changes
from dsv4tools.template import Template, TemplateTensor, apply_template_file, derive_template
from dsv4tools.workers import EXTRA_THREADS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.checkpoint.matrix import Matrix
    from dsv4tools.formats.table import Format
    from dsv4tools.imatrix import Coverage, Importance

NanPolicy = Literal["refuse", "zero"]
QUANTIZATION_VERSION = 2          # GGML_QNT_VERSION: the block layouts of the K types
MAX_UNIT_VALUES = 1 << 22         # 4 Mi values: at most 16 MB read and 16 MB written, about 50 ms of Q4_K
NAN_KEY = "dsv4tools.nan"
QUANTIZED_BY = "general.quantized_by"
POLICY_KEY = "dsv4tools.policy"
POLICY_HASH_KEY = "dsv4tools.policy_sha256"
REQUANTIZED_KEY = "dsv4tools.requantized"   # the types that tensors had before they were rounded a second time
_IMATRIX = "quantize.imatrix."
TEMPLATE_KEY = "dsv4tools.template"   # in header-only files, so that a truncated model is never taken for one


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output. `offset` counts from the start of the data section of its file, which is `part`.

    `importance` weighs its columns, where there is an importance matrix and its type uses one.
    """

    tensor: TemplateTensor
    format: Format
    rule: str
    offset: int
    n_bytes: int
    importance: Importance | None = None
    part: int = 0

    @property
    def name(self) -> str:
        """GGUF name."""
        return self.tensor.name

    @property
    def rows_each(self) -> int:
        """Rows of an expert, or all of them."""
        return self.tensor.ne[1] if len(self.tensor.ne) > 1 else 1

    @property
    def kernels(self) -> set[str]:
        """The formats whose kernels it needs: its own, and that of a source GGUF where that is another one."""
        stored = self.tensor.stored_format
        return {self.format.name, stored.name if stored else self.format.name} - {"I32", "I64"}


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece of work: a run of rows of one source matrix, and the bytes it fills in its tensor.

    `start` counts from the tensor's first byte.
    """

    planned: PlannedTensor
    matrix: Matrix
    first_row: int
    n_rows: int
    start: int
    n_bytes: int

    @property
    def first_tensor_row(self) -> int:
        """Its first row, counted over all rows of its tensor."""
        return self.start // max(1, self.n_bytes // self.n_rows)


def tensor_units(planned: PlannedTensor) -> Iterator[Unit]:
    """The units of one tensor in order: at most MAX_UNIT_VALUES values each, but always whole rows."""
    row_bytes = planned.format.row_bytes(planned.tensor.ne[0], planned.name)
    start = 0
    for matrix in planned.tensor.sources:
        step = max(1, MAX_UNIT_VALUES // max(1, matrix.n_cols))
        step = step // matrix.block[0] * matrix.block[0] or step   # whole blocks, so that scales are read once
        for first in range(0, matrix.n_rows, step):
            n_rows = min(step, matrix.n_rows - first)
            yield Unit(planned, matrix, first, n_rows, start, n_rows * row_bytes)
            start += n_rows * row_bytes


@dataclass(frozen=True)
class PlannedFile:
    """One file of the output: all of it, or a part of a split set.

    `start` is where it begins if all files are laid out one after the other; `header` is all before its data section.
    """

    header: bytes = field(repr=False)
    start: int
    n_bytes: int
    tensors: tuple[PlannedTensor, ...] = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """What a conversion will write.

    Attributes
    ----------
    checkpoint, policy, template:
        What it was made from.
    kvs:
        Metadata in file order, complete.
    tensors:
        In file order.
    nan:
        What happens to values that are not finite.
    imatrix:
        The importance matrix that weighs columns; None without one, or where no type uses it.
    coverage:
        What it, or one that is of no use, has for the tensors.
    """

    checkpoint: Checkpoint
    policy: Policy
    template: Template
    kvs: tuple[KV, ...] = field(repr=False)
    tensors: tuple[PlannedTensor, ...] = field(repr=False)
    nan: NanPolicy
    imatrix: ImatrixFile | None = None
    coverage: Coverage | None = None

    @cached_property
    def files(self) -> tuple[PlannedFile, ...]:
        """The files of the output in order: one, unless `split_plan` has cut it."""
        groups = [tuple(group) for _, group in itertools.groupby(self.tensors, key=lambda t: t.part)] or [()]
        files: list[PlannedFile] = []
        start = 0
        for i, tensors in enumerate(groups):
            marks = split_kvs(i, len(groups), len(self.tensors)) if len(groups) > 1 else []
            # Later parts have no metadata of their own, so none that states another alignment.
            alignment = DEFAULT_ALIGNMENT if i else self.template.alignment
            infos = [TensorInfo(t.name, t.tensor.ne, t.format, t.offset) for t in tensors]
            header = encode_header([*(() if i else self.kvs), *marks], infos, alignment)
            n_bytes = len(header) + lay_out([t.n_bytes for t in tensors], alignment)[1]
            files.append(PlannedFile(header, start, n_bytes, tensors))
            start += n_bytes
        return tuple(files)

    @property
    def header(self) -> bytes:
        """The first file's bytes before its data section."""
        return self.files[0].header

    @property
    def data_offset(self) -> int:
        """Where the data section begins in the first file."""
        return len(self.header)

    @property
    def data_bytes(self) -> int:
        """Tensor data with padding, of all files."""
        return sum(file.n_bytes - len(file.header) for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Size of the output, all files together."""
        return sum(file.n_bytes for file in self.files)

    @property
    def kernels(self) -> set[str]:
        """The formats whose kernels it needs."""
        return {name for t in self.tensors for name in t.kernels}

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read, scales included."""
        return sum(t.tensor.source_bytes for t in self.tensors)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was changed or decided on the way that a user may want to know, one sentence each."""
        without = [t for t in self.tensors if t.format.name in NEEDS_IMPORTANCE and t.tensor.stored_format != t.format
                   and (t.importance is None or None in t.importance.vectors)]
        if not without:
            return self.template.notes
        types = ", ".join(sorted({t.format.name for t in without}))
        note = (f"{len(without)} tensors have a type that needs importance ({types}) and none, or not for all experts: "
                "columns are weighed by the squares of the weights themselves, as ds4's quantizer does it; --imatrix "
                "weighs them by what they are multiplied with")
        return (*self.template.notes, note)

    def memory_bytes(self, threads: int) -> int:
        """Bytes of buffers that a conversion holds: source and output of the largest unit, per thread."""
        largest = max((u.n_bytes + u.n_rows * u.matrix.n_bytes // max(1, u.matrix.n_rows) for t in self.tensors
                       for u in itertools.islice(tensor_units(t), 1)), default=0)
        return largest * (threads + EXTRA_THREADS)

    def bytes_by_format(self) -> dict[str, int]:
        """Type name -> bytes, largest first."""
        totals: dict[str, int] = {}
        for t in self.tensors:
            totals[t.format.name] = totals.get(t.format.name, 0) + t.n_bytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def position(self, unit: Unit) -> int:
        """Where a unit's bytes begin in the output, all files laid out one after the other."""
        file = self.files[unit.planned.part]
        return file.start + len(file.header) + unit.planned.offset + unit.start

    @cached_property
    def n_units(self) -> int:
        """How many units there are."""
        return sum(1 for _ in self.units())

    def units(self) -> Iterator[Unit]:
        """All units in file order."""
        for planned in self.tensors:
            yield from tensor_units(planned)


def make_plan(
    checkpoint: Checkpoint, *, policy: str | Path | Policy = "q4k", template_file: Path | None = None,
    families: Mapping[str, str | None] | None = None, tensor_types: Sequence[str] = (), nan: NanPolicy = "refuse",
    allow_requantize: bool = False, imatrix: str | Path | ImatrixFile | None = None, imatrix_strict: bool = False,
) -> Plan:
    """Plan the conversion of `checkpoint` (or of a re-routed view of it, or of a GGUF: `open_source`).

    Parameters
    ----------
    policy:
        A shipped policy's name, a policy file, or ``template`` (or ``keep``) to keep the types of a template file, or
        else of a source GGUF.
    template_file:
        A GGUF, header-only or whole, that gives tensor order, metadata and tokenizer.
    families, tensor_types:
        The C quantizer's flags, asked before the policy (`flags.rules_from_flags`).
    nan:
        ``refuse`` values that are not finite, or ``zero`` them.
    allow_requantize:
        Give tensors of a source GGUF that were rounded already another type, which rounds them again.
    imatrix:
        An importance matrix of the model, a file or opened: the types of `USES_IMPORTANCE` weigh columns with it.
    imatrix_strict:
        Refuse an importance matrix that does not have all that is asked for.

    Raises
    ------
    UsageError, InputError
        As the parts do: `load_policy`, `rules_from_flags`, `derive_template`, `apply_template_file`, `decide_formats`,
        `open_imatrix`, `assign_importance`, `check_changes`.
    """
    if imatrix_strict and imatrix is None:
        raise UsageError("--imatrix-strict", "needs --imatrix")
    if nan not in ("refuse", "zero"):
        raise UsageError("--nan", f"is {nan!r}, expected refuse or zero")
    flags = rules_from_flags(families or {}, tensor_types)
    chosen = (policy if isinstance(policy, Policy) else load_policy(policy)).with_flags(flags)
    template = derive_template(checkpoint)
    if template_file is not None:
        template = apply_template_file(template, template_file)
    decisions = decide_formats(chosen, template.tensors, template.file_formats)
    sizes = [decisions[t.name].format.n_bytes(t.ne, t.name) for t in template.tensors]
    offsets, _ = lay_out(sizes, template.alignment)
    weights: Mapping[str, Importance] = {}
    coverage = None
    if imatrix is not None:
        imatrix = imatrix if isinstance(imatrix, ImatrixFile) else open_imatrix(imatrix)
        users = [t for t in template.tensors if uses_importance(t, decisions[t.name].format)]
        weights, coverage = assign_importance(imatrix, template.tensors, users, checkpoint.config.o_groups,
                                              strict=imatrix_strict)
    used = imatrix if weights else None
    tensors = tuple(
        PlannedTensor(t, decisions[t.name].format, decisions[t.name].rule, offset, n_bytes, weights.get(t.name))
        for t, offset, n_bytes in zip(template.tensors, offsets, sizes, strict=True)
    )
    check_changes(tensors, allow_requantize=allow_requantize)
    kvs = _complete_entries(template, chosen, tensors, nan, used)
    return Plan(checkpoint, chosen, template, kvs, tensors, nan, used, coverage)


def uses_importance(tensor: TemplateTensor, target: Format) -> bool:
    """Whether an importance matrix changes the bytes of `tensor` in this type: not of blocks that are copied."""
    return target.name in USES_IMPORTANCE and tensor.stored_format != target


def _complete_entries(
    template: Template, policy: Policy, tensors: Sequence[PlannedTensor], nan: NanPolicy, imatrix: ImatrixFile | None
) -> tuple[KV, ...]:
    entries = [
        KV("general.file_type", "u32", _file_type(policy, tensors)),
        KV("general.quantization_version", "u32", QUANTIZATION_VERSION),
        KV(QUANTIZED_BY, "str", f"dsv4tools {__version__}"),
        KV(POLICY_KEY, "str", policy.name),
        KV(POLICY_HASH_KEY, "str", policy.sha256),
    ]
    if policy.name == KEEP and template.history and all(change_of(t) == "copied" for t in tensors):
        # Nothing was decided here: who made the file, and by which policy, stays as it is.
        entries = [template.history.get(kv.key, kv) for kv in entries[:2]]
        entries += [kv for key, kv in template.history.items() if key in {QUANTIZED_BY, POLICY_KEY, POLICY_HASH_KEY}]
    if nan == "zero" or NAN_KEY in template.history:
        entries.append(KV(NAN_KEY, "str", "zero"))
    entries += _history(template, tensors, imatrix)
    at = next((i for i, kv in enumerate(template.kvs) if not kv.key.startswith("general.")), len(template.kvs))
    return (*template.kvs[:at], *entries, *template.kvs[at:])


def _history(template: Template, tensors: Sequence[PlannedTensor], imatrix: ImatrixFile | None) -> list[KV]:
    """What was done to the tensors of a source GGUF before, where it still holds; and which `imatrix` was used now."""
    before = template.history.get(REQUANTIZED_KEY)
    types = set(before.value) if before is not None and before.item_type == "str" else set()
    types |= {t.tensor.stored_format.name for t in tensors if t.tensor.stored_format and change_of(t) == "requantized"}
    entries = [KV(REQUANTIZED_KEY, "arr", sorted(types), "str")] if types else []
    if imatrix is not None:
        entries += provenance(imatrix)
    elif any(change_of(t) == "copied" and t.format.block_values > 1 for t in tensors):
        entries += [kv for key, kv in template.history.items() if key.startswith((_IMATRIX, HASH_KEY))]
    return entries


def _file_type(policy: Policy, tensors: Sequence[PlannedTensor]) -> int:
    if policy.file_type is not None:
        return policy.file_type
    totals: dict[Format, int] = {}
    for t in tensors:
        totals[t.format] = totals.get(t.format, 0) + t.n_bytes
    return max(totals, key=lambda f: totals[f]).file_type or 0
