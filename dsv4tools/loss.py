"""What a conversion from a GGUF has cost: errors of the values that got another type, measured on the finished file.

A sample is enough and the same for every run: one per cent of each tensor and at least one piece of every expert,
chosen by tensor name alone. `verify --source` measures all.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.checkpoint.matrix import RowReader
from dsv4tools.errors import Interrupted
from dsv4tools.formats import measure
from dsv4tools.formats.codecs import decode_rows, decode_source
from dsv4tools.formats.measure import ErrorSums, measure_errors
from dsv4tools.requantize import change_of
from dsv4tools.verify.roles import FAMILIES, family_of
from dsv4tools.verify.sample import sample_units
from dsv4tools.workers import run_in_order

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from dsv4tools.formats.table import Format
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.plan import Plan, Unit
    from dsv4tools.workers import StopRequest

SAMPLED_PER_CENT = 1.0


@dataclass(slots=True)
class Loss:
    """Errors against the source of one family of tensors that went from one type to another.

    `errors` are sums over the sampled values; `stored` and `target` are the types before and after.
    """

    family: str
    stored: Format
    target: Format
    n_tensors: int
    errors: ErrorSums

    def as_data(self) -> dict[str, Any]:
        """JSON-ready."""
        error = self.errors.relative_rmse
        return {"family": self.family, "from": self.stored.name, "to": self.target.name, "n_tensors": self.n_tensors,
                "relative_rmse": error if isfinite(error) else None, "largest_error": self.errors.largest_error,
                "n_sampled": self.errors.n}


def measure_losses(plan: Plan, file: GgufFile, *, threads: int, stop: StopRequest | None = None) -> list[Loss]:
    """The losses of `plan`, whose output `file` is, by family; empty where its source is a checkpoint.

    Raises ResourceError and VerifyError as reading does, Interrupted soon after `stop` was set.
    """
    changed = [t for t in plan.tensors if change_of(t) in {"encoded", "requantized"}]
    if not changed:
        return []
    measure.prepare()
    losses: dict[tuple[str, str, str], Loss] = {}
    of_tensor: dict[str, Loss] = {}
    for t in changed:
        stored = t.tensor.stored_format
        if stored is not None:
            key = family_of(t.name), stored.name, t.format.name
            loss = losses.setdefault(key, Loss(key[0], stored, t.format, 0, ErrorSums()))
            loss.n_tensors += 1
            of_tensor[t.name] = loss

    def make_worker(computing: threading.Semaphore) -> Callable[[Unit], ErrorSums]:
        reader = RowReader()

        def work(unit: Unit) -> ErrorSums:
            rows = reader.read_rows(unit.matrix, unit.first_row, unit.n_rows)
            data = file.read_tensor_bytes(unit.planned.name, unit.start, unit.n_bytes)
            source, found = np.empty((2, unit.n_rows, unit.matrix.n_cols), np.float32)
            with computing, np.errstate(all="ignore"):
                decode_source(rows, source)
                decode_rows(data, unit.planned.format, unit.n_rows, unit.matrix.n_cols, found)
                return measure_errors(found, source)

        return work

    units = (unit for t in changed for unit in sample_units(t, SAMPLED_PER_CENT))
    with closing(run_in_order(units, make_worker, threads)) as results:
        for unit, errors in results:
            of_tensor[unit.planned.name].errors.add(errors)
            if stop is not None and stop.is_set():
                raise Interrupted(stop.signal_number, "stopped while the loss was being measured",
                                  hint="the file is complete")
    return sorted(losses.values(), key=lambda loss: FAMILIES.index(loss.family))
