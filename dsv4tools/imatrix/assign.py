"""Which vector weighs which rows: entries of an importance matrix file, given to the tensors of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv4tools.checkpoint.strict_json import listed
from dsv4tools.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from dsv4tools.imatrix.file import ImatrixFile
    from dsv4tools.imatrix.parse import Entry
    from dsv4tools.template import TemplateTensor

# llama.cpp multiplies each group of rows of this matrix with inputs of its own, and its files have a vector for each;
# its quantizer, and files of others, know one for all.
GROUPED = "attn_output_a.weight"


@dataclass(frozen=True, slots=True)
class Importance:
    """The weights of one tensor's columns.

    Attributes
    ----------
    file:
        Where they are read from.
    vectors:
        For each run of rows (each expert, each group, or all rows) the entry and the number of its first value; None
        where the file has none.
    rows_each:
        Rows of a run.
    n_cols:
        Values of a vector.
    """

    file: ImatrixFile
    vectors: tuple[tuple[str, int] | None, ...]
    rows_each: int
    n_cols: int

    def read(self, number: int) -> NDArray[np.float32] | None:
        """The vector of a run of rows, float32 [n_cols], or None; errors of `ImatrixFile.read_mean`."""
        found = self.vectors[number]
        return None if found is None else self.file.read_mean(found[0], found[1], self.n_cols)


@dataclass(frozen=True, slots=True)
class Coverage:
    """What an importance matrix has for the tensors of a plan.

    Attributes
    ----------
    n_tensors:
        How many tensors have a type that uses importance.
    covered:
        Names of those that get some.
    missing:
        Names of those that get none.
    without_data:
        Tensor name -> its experts (0 of a single matrix) that no input reached: their columns weigh the same.
    without_entry:
        Tensor name -> its experts that have no entry, where others of the tensor have one: they are encoded as without
        a matrix.
    n_unused:
        Entries of tensors whose types use no importance.
    unknown:
        Names of entries that no tensor of the plan asks for.
    """

    n_tensors: int
    covered: tuple[str, ...]
    missing: tuple[str, ...]
    without_data: Mapping[str, tuple[int, ...]]
    without_entry: Mapping[str, tuple[int, ...]]
    n_unused: int
    unknown: tuple[str, ...]

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "n_tensors": self.n_tensors, "n_covered": len(self.covered), "missing": list(self.missing),
            "experts_without_data": {name: list(numbers) for name, numbers in self.without_data.items()},
            "experts_without_entry": {name: list(numbers) for name, numbers in self.without_entry.items()},
            "n_unused": self.n_unused, "unknown": list(self.unknown),
        }


def assign_importance(
    file: ImatrixFile, tensors: Sequence[TemplateTensor], users: Sequence[TemplateTensor], n_groups: int, *,
    strict: bool = False,
) -> tuple[dict[str, Importance], Coverage]:
    """The importance of each of `users`, by name, where the file has any; and what it has.

    Parameters
    ----------
    tensors:
        All tensors of the plan.
    users:
        Those of them whose types use importance.
    n_groups:
        Groups of rows of ``attn_output_a`` (config.json's ``o_groups``).
    strict:
        Refuse a file that lacks a tensor, or data of an expert, that is asked for.

    Raises
    ------
    InputError
        An entry does not have the size that its tensor needs; no entry is of any tensor (another model); or `strict`.
    """
    assigned, without_data, without_entry, asked = {}, {}, {}, set[str]()
    for tensor in users:
        found = _find_vectors(file, tensor, n_groups)
        if found is None:
            continue
        assigned[tensor.name] = found
        asked.update(v[0] for v in found.vectors if v is not None)
        if empty := tuple(_without_data(found)):
            without_data[tensor.name] = empty
        if absent := tuple(number for number, vector in enumerate(found.vectors) if vector is None):
            without_entry[tensor.name] = absent
    names = {name for tensor in tensors for number in range(_n_experts(tensor)) for name in _names(tensor, number)}
    coverage = Coverage(len(users), tuple(assigned), tuple(t.name for t in users if t.name not in assigned),
                        without_data, without_entry, sum(name in names and name not in asked for name in file.entries),
                        tuple(name for name in file.entries if name not in names))
    if len(coverage.unknown) == len(file.entries):
        raise InputError(file.path, f"has no entry of any tensor of this model, but {listed(coverage.unknown[:8])}",
                         hint="an importance matrix belongs to one model")
    if strict:
        _refuse_gaps(file, coverage)
    return assigned, coverage


def _refuse_gaps(file: ImatrixFile, coverage: Coverage) -> None:
    problems = []
    if coverage.missing:
        problems.append(f"has no entry for {len(coverage.missing)} of {coverage.n_tensors} tensors whose types use "
                        f"importance: {listed(coverage.missing)}")
    for kind, gaps in (("entry", coverage.without_entry), ("data", coverage.without_data)):
        if gaps:
            experts = [f"{name} {', '.join(map(str, numbers))}" for name, numbers in gaps.items()]
            problems.append(f"has no {kind} of some experts: {listed(experts)}")
    if problems:
        raise InputError(file.path, "; ".join(problems), hint="leave --imatrix-strict out, or measure on more text")


def _n_experts(tensor: TemplateTensor) -> int:
    return tensor.ne[2] if len(tensor.ne) > 2 else 1


def _names(tensor: TemplateTensor, expert: int) -> Iterator[str]:
    """What an entry may be called, the likelier first: ds4's quantizer asks in this order."""
    is_stacked = len(tensor.ne) > 2
    own = [tensor.name]
    if len(tensor.source_names) == _n_experts(tensor):
        own.append(tensor.source_names[expert])
    for name in own:
        if is_stacked:
            yield f"{name}.expert.{expert}"
            yield f"{name}.expert_{expert}"
        yield name


def _find_vectors(file: ImatrixFile, tensor: TemplateTensor, n_groups: int) -> Importance | None:
    n_cols, n_experts = tensor.ne[0], _n_experts(tensor)
    n_rows = tensor.ne[1] if len(tensor.ne) > 1 else 1
    vectors: list[tuple[str, int] | None] = []
    for expert in range(n_experts):
        name = next((name for name in _names(tensor, expert) if name in file.entries), None)
        entry = file.entries[name] if name is not None else None
        if entry is None:
            vectors.append(None)
        elif entry.n_values == n_cols:
            vectors.append((entry.name, 0))
        elif n_experts > 1 and entry.n_values == n_cols * n_experts:
            vectors.append((entry.name, expert * n_cols))
        elif tensor.name.endswith(GROUPED) and entry.n_values == n_cols * n_groups and n_rows % n_groups == 0:
            groups = tuple((entry.name, group * n_cols) for group in range(n_groups))
            return Importance(file, groups, n_rows // n_groups, n_cols)
        else:
            raise _wrong_size(file, entry, tensor, n_groups)
    return None if not any(vectors) else Importance(file, tuple(vectors), n_rows, n_cols)


def _wrong_size(file: ImatrixFile, entry: Entry, tensor: TemplateTensor, n_groups: int) -> InputError:
    sizes = [f"{tensor.ne[0]}"]
    if len(tensor.ne) > 2:
        sizes.append(f"{tensor.ne[0]} x {tensor.ne[2]} experts")
    if tensor.name.endswith(GROUPED):
        sizes.append(f"{tensor.ne[0]} x {n_groups} groups")
    return InputError(f"{file.path}: entry {entry.name!r}", f"has {entry.n_values} values, tensor {tensor.name} needs "
                      f"{' or '.join(sizes)}", hint="an importance matrix belongs to one model")


def _without_data(importance: Importance) -> Iterator[int]:
    """Numbers of the vectors that stand in the file, but say nothing."""
    for number, found in enumerate(importance.vectors):
        if found is None:
            continue
        entry = importance.file.entries[found[0]]
        if entry.counts[found[1] // entry.values_per_count] == 0:
            yield number
        elif importance.file.legacy and entry.n_values > importance.n_cols:
            vector = importance.read(number)   # writers of this form put 1 there
            if vector is not None and (vector == 1).all():
                yield number
