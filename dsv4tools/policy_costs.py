"""What policies cost, side by side: bytes, bits per weight, and errors that were measured on a sample of the source.

The sample is the same for every policy and every run: up to `N_PIECES` pieces of each role, spread over its tensors and
experts. They are encoded as a conversion would, decoded, and compared with the source.
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.derive import UnitDeriver
from dsv4tools.formats import measure
from dsv4tools.formats.codecs import DECODABLE, decode_rows, decode_source, prepare, self_test
from dsv4tools.formats.measure import ErrorSums, measure_errors
from dsv4tools.plan import Unit
from dsv4tools.verify.roles import FAMILIES, family_of, place_of
from dsv4tools.verify.sample import sample_pieces
from dsv4tools.workers import run_in_order

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from dsv4tools.plan import Plan, PlannedTensor

N_PIECES = 128   # of each role: up to four million values, and some in every layer of the largest model


@dataclass(slots=True)
class RoleCost:
    """The matrices of one role under one policy.

    Attributes
    ----------
    role, family:
        ``ffn_gate_exps``, and the family of roles that it belongs to.
    n_tensors, n_values, n_bytes:
        How many there are, how many values they have, and how many bytes these take.
    types:
        Type name -> how many tensors get it.
    errors:
        Sums over the sampled values.
    """

    role: str
    family: str
    n_tensors: int = 0
    n_values: int = 0
    n_bytes: int = 0
    types: Counter[str] = field(default_factory=Counter)
    errors: ErrorSums = field(default_factory=ErrorSums)

    @property
    def bits_per_weight(self) -> float:
        """Of all its values."""
        return 8 * self.n_bytes / max(1, self.n_values)

    def as_data(self) -> dict[str, Any]:
        """JSON-ready; the error is None where it has no finite value, or nothing of the role can be decoded."""
        error = self.errors.relative_rmse if self.errors.n else None
        return {"role": self.role, "family": self.family, "n_tensors": self.n_tensors, "n_values": self.n_values,
                "types": dict(self.types), "n_bytes": self.n_bytes, "bits_per_weight": round(self.bits_per_weight, 4),
                "relative_rmse": error if error is not None and isfinite(error) else None,
                "largest_error": self.errors.largest_error, "n_sampled": self.errors.n}


@dataclass(frozen=True, slots=True)
class PolicyCost:
    """All roles under one policy, in the order of `FAMILIES`; vectors and routing tables are only in the totals."""

    plan: Plan
    roles: tuple[RoleCost, ...]

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors, without metadata."""
        return 8 * sum(t.n_bytes for t in self.plan.tensors) / max(1, sum(prod(t.tensor.ne) for t in self.plan.tensors))

    def as_data(self) -> dict[str, Any]:
        """JSON-ready."""
        policy = self.plan.policy
        return {"policy": policy.name, "description": policy.description, "sha256": policy.sha256,
                "total_bytes": self.plan.total_bytes, "bits_per_weight": round(self.bits_per_weight, 4),
                "roles": [role.as_data() for role in self.roles]}


def compare_policies(plans: Sequence[Plan], *, threads: int) -> list[PolicyCost]:
    """What each of `plans` costs, all made of one source.

    Raises ResourceError and VerifyError as reading the source does, InputError for values that cannot be encoded.
    """
    kernels = set().union(*(plan.kernels for plan in plans))
    prepare(kernels)
    measure.prepare()
    self_test(kernels)
    errors = _measure(plans, threads)
    return [PolicyCost(plan, _sum_up(plan, errors)) for plan in plans]


def _sum_up(plan: Plan, errors: dict[tuple[str, str], ErrorSums]) -> tuple[RoleCost, ...]:
    roles: dict[str, RoleCost] = {}
    for t in _matrices(plan):
        _, role = place_of(t.name)
        cost = roles.setdefault(role, RoleCost(role, family_of(t.name)))
        cost.n_tensors += 1
        cost.n_values += prod(t.tensor.ne)
        cost.n_bytes += t.n_bytes
        cost.types[t.format.name] += 1
        if (t.name, t.format.name) in errors:
            cost.errors.add(errors[t.name, t.format.name])
    return tuple(sorted(roles.values(), key=lambda cost: FAMILIES.index(cost.family)))


def _matrices(plan: Plan) -> list[PlannedTensor]:
    return [t for t in plan.tensors if t.tensor.is_matrix]


def _units(plans: Sequence[Plan]) -> Iterator[Unit]:
    """The sampled pieces, each once for every type that its tensor gets."""
    types: dict[str, dict[str, PlannedTensor]] = {}
    roles: dict[str, list[PlannedTensor]] = {}
    for plan in plans:
        for t in _matrices(plan):
            types.setdefault(t.name, {}).setdefault(t.format.name, t)
    for t in _matrices(plans[0]):
        roles.setdefault(place_of(t.name)[1], []).append(t)
    for tensors in roles.values():
        for planned, number, first, n_rows in sample_pieces(tensors, N_PIECES):
            matrix = planned.tensor.sources[number]
            for t in types[planned.name].values():
                if t.format.name not in DECODABLE:   # it is kept as it is in a GGUF; whatever it holds, nothing is lost
                    continue
                row_bytes = t.format.row_bytes(matrix.n_cols, t.name)
                yield Unit(t, matrix, first, n_rows, (number * matrix.n_rows + first) * row_bytes, n_rows * row_bytes)


def _measure(plans: Sequence[Plan], threads: int) -> dict[tuple[str, str], ErrorSums]:
    """Errors by tensor and type."""
    n_experts, zero_nan = plans[0].checkpoint.config.n_routed_experts, plans[0].nan == "zero"

    def make_worker(computing: threading.Semaphore) -> Callable[[Unit], ErrorSums]:
        deriver = UnitDeriver(n_experts, zero_nan=zero_nan)

        def work(unit: Unit) -> ErrorSums:
            rows = deriver.read(unit)
            if isinstance(rows, np.ndarray):   # ids of a routing table, which have no error
                return ErrorSums()
            source, found = np.empty((2, unit.n_rows, unit.matrix.n_cols), np.float32)
            with computing, np.errstate(all="ignore"):
                decode_source(rows, source)
                data, _ = deriver.encode(unit, rows)
                decode_rows(data, unit.planned.format, unit.n_rows, unit.matrix.n_cols, found)
                return measure_errors(found, source)

        return work

    sums: dict[tuple[str, str], ErrorSums] = {}
    with closing(run_in_order(_units(plans), make_worker, threads)) as results:
        for unit, errors in results:
            sums.setdefault((unit.planned.name, unit.planned.format.name), ErrorSums()).add(errors)
    return sums
