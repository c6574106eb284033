"""Routing tables: which expert ids a token goes to in a hash layer, checked and cut chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


@dataclass
class TableCutter:
    """Cuts one table [tokens, experts per token] to its first `n_kept` columns, and looks at every id on the way.

    `n_repeats` counts the rows that name an expert twice among the kept columns; `first_repeat` is the first of them
    with that expert. Such a token visits fewer experts than its neighbours; a loader does not mind.
    """

    where: str
    n_columns: int
    n_kept: int
    n_experts: int
    n_rows: int = 0
    n_repeats: int = 0
    first_repeat: tuple[int, int] | None = None

    def cut(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """The next rows of the table, integers [n, n_columns], as a contiguous array [n, n_kept].

        InputError names row and column of the first id outside ``[0, n_experts)``, in whatever column.
        """
        bad = np.argwhere((ids < 0) | (ids >= self.n_experts))
        if len(bad):
            row, column = (int(n) for n in bad[0])
            raise InputError(self.where, f"row {self.n_rows + row} column {column} routes to expert "
                             f"{ids[row, column]}, expected 0 to {self.n_experts - 1}")
        kept = np.ascontiguousarray(ids[:, : self.n_kept])
        ordered = np.sort(kept, axis=1)
        twice = ordered[:, 1:] == ordered[:, :-1]
        rows = np.flatnonzero(twice.any(axis=1))
        if len(rows) and self.first_repeat is None:
            first = int(rows[0])
            self.first_repeat = self.n_rows + first, int(ordered[first, 1:][twice[first]][0])
        self.n_repeats += len(rows)
        self.n_rows += len(ids)
        return kept


def check_layers(tables: Iterable[int], n_hash_layers: int, n_layers: int, says: str, where: object) -> None:
    """InputError unless there is a table for exactly the first `n_hash_layers` layers, as `says` (a key) has it."""
    present = set(tables)
    missing = sorted(set(range(min(n_hash_layers, n_layers))) - present)
    surplus = sorted(present - set(range(n_hash_layers)))
    if missing:
        raise InputError(where, f"has no tid2eid table for layers {_listed(missing)}, {says} is {n_hash_layers}")
    if surplus:
        raise InputError(where, f"has a tid2eid table for layers {_listed(surplus)}, {says} is {n_hash_layers}")


def _listed(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:5]))
    return f"{shown} and {len(layers) - 5} more" if len(layers) > 5 else shown


def describe_repeats(cutters: Iterable[TableCutter]) -> list[str]:
    """One warning per table that names an expert twice for some token among the kept columns."""
    warnings = []
    for c in cutters:
        if c.first_repeat is not None:
            row, expert = c.first_repeat
            warnings.append(f"{c.where}: {c.n_repeats} of {c.n_rows} tokens have an expert twice in the first "
                            f"{c.n_kept} columns, first token {row} (expert {expert}): they use fewer experts")
    return warnings
