"""Naming what is wrong with a tensor: what a fault looks like is compared with what known mistakes give.

A name is given only where the evidence shows it: the values that the mistake would have left are computed from the
source, and those in the file must be as close to them as our own encoding is to the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.measure import measure_errors
from dsv4tools.verify.judge import MAX_RATIO
from dsv4tools.verify.mistakes import MIN_FACTOR, Strip, name_factor, whole_mistakes
from dsv4tools.verify.report import Fault
from dsv4tools.verify.spots import describe_blocks, describe_errors, find_wrong_tiles, join_places

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from dsv4tools.checkpoint.matrix import Matrix
    from dsv4tools.plan import PlannedTensor
    from dsv4tools.verify.bench import Bench
    from dsv4tools.verify.judge import Judged
    from dsv4tools.verify.spots import Tile
    from dsv4tools.verify.tally import MatrixTally, TensorTally

    Floats = NDArray[np.float32]

MAX_EXAMINED = 16       # matrices of a tensor, and places in a matrix, that are looked at; the rest is counted
BULK_SHARE = 0.25       # of a matrix's cells: from here on what happened to all of it is asked
CLOSE = 0.02            # relative RMSE that a named mistake may leave at least, also in lossless types
_SIGNATURE_ROWS = 4
_STRIP_ROWS = 16
_STRIP_VALUES = 1 << 22


@dataclass(frozen=True, slots=True)
class Candidate:
    """A source matrix whose data may stand in a wrong place."""

    tensor: str
    number: int | None   # of the expert
    matrix: Matrix

    def __str__(self) -> str:
        return self.tensor if self.number is None else f"{self.tensor} expert {self.number}"


def diagnose(
    planned: PlannedTensor, tally: TensorTally, judged: Judged, bench: Bench, others: Sequence[Candidate]
) -> tuple[Fault, ...]:
    """What is wrong with a tensor, place by place; errors of reading and encoding the source.

    `others` are matrices of other tensors, of the same shape, whose data it may hold.
    """
    wrong = judged.wrong
    if planned.tensor.holds_integers:
        return (_compare_ids(planned, bench),)
    if not tally.whole.n_measured:   # a type that cannot be decoded
        return ()
    bulk = [n for n in wrong if tally.matrices[n].n_wrong_cells >= BULK_SHARE * max(1, tally.matrices[n].n_cells)]
    places = find_places(planned, tally, bulk, bench, others)
    faults = list(_describe_places(planned, places))
    rest = [n for n in wrong if n not in places]
    for number in rest[:MAX_EXAMINED]:
        faults += _examine(planned, tally.matrices[number], number, bench, by_bytes=judged.by_bytes)
    if len(rest) > MAX_EXAMINED:
        faults.append(Fault(f"{len(rest) - MAX_EXAMINED} more experts", "are wrong, and were not examined"))
    return tuple(faults)


def where_is(planned: PlannedTensor, number: int, place: str = "") -> str:
    """``expert 3 rows 0-127``: a place in one of a tensor's matrices."""
    expert = f"expert {number}" if len(planned.tensor.sources) > 1 else ""
    return f"{expert} {place}".strip()


# ------------------------------------------------------------------------------------------- data of other matrices


def find_places(
    planned: PlannedTensor, tally: TensorTally, numbers: Sequence[int], bench: Bench, others: Sequence[Candidate]
) -> dict[int, tuple[Candidate, float]]:
    """For each of the matrices `numbers` whose data are another's: whose, and the cosine. Looks at a few rows."""
    if not numbers:
        return {}
    sources = planned.tensor.sources
    n = min(_SIGNATURE_ROWS, sources[0].n_rows)
    first = (sources[0].n_rows - n) // 2
    siblings = [Candidate(planned.name, i if len(sources) > 1 else None, m) for i, m in enumerate(sources)]
    found = {i: bench.found(planned, i, first, n) for i in numbers}
    placed: dict[int, tuple[Candidate, float]] = {}
    for candidates in (siblings, others):
        best: dict[int, tuple[Candidate, float]] = {}
        signatures = {i: _normalized(values) for i, values in found.items() if i not in placed}
        for candidate in candidates if signatures else ():
            signature = _normalized(bench.source(candidate.matrix, first, n))
            for i, of_found in signatures.items():
                cosine = float(of_found @ signature)
                if i not in best or cosine > best[i][1]:
                    best[i] = candidate, cosine
        for i, (candidate, cosine) in best.items():
            values = bench.source(candidate.matrix, first, n)
            if candidate.matrix is not sources[i] and _is_close(found[i], values, tally.matrices[i].own.relative_rmse):
                placed[i] = candidate, cosine
    return dict(sorted(placed.items()))


def _is_close(found: Floats, values: Floats, own_error: float) -> bool:
    """Whether the file is as close to `values` as our encoding is to the source."""
    return measure_errors(found, values).relative_rmse <= max(MAX_RATIO * own_error, CLOSE)


def _normalized(values: Floats) -> Floats:
    flat = values.reshape(-1).astype(np.float64)
    norm = np.linalg.norm(flat)
    return (flat / norm if norm else flat).astype(np.float32)


def _describe_places(planned: PlannedTensor, places: dict[int, tuple[Candidate, float]]) -> Iterator[Fault]:
    done: set[int] = set()
    for i, (candidate, cosine) in places.items():
        if i in done:
            continue
        j = candidate.number
        inside = candidate.tensor == planned.name
        back = places.get(j) if inside and j is not None else None
        if j is not None and back is not None and back[0].number == i and back[0].tensor == planned.name:
            done.add(j)
            yield Fault(f"experts {i} and {j}", f"are swapped: each holds the other's data (cosine {cosine:.4f} and "
                                                f"{back[1]:.4f})")
        else:
            whose = f"expert {j}" if inside else f"{candidate} ({candidate.matrix.weight.name})"
            yield Fault(where_is(planned, i), f"holds the data of {whose} (cosine {cosine:.4f})")


# ---------------------------------------------------------------------------------------------- inside of one matrix


def _examine(
    planned: PlannedTensor, tally: MatrixTally, number: int, bench: Bench, *, by_bytes: bool
) -> list[Fault]:
    """What happened to one matrix that holds its own data, or nobody's."""
    where, name = where_is(planned, number), planned.tensor.sources[number].weight.name
    if tally.n_wrong_cells:
        strip = _take_strip(planned, tally, number, bench)
        for mistake in whole_mistakes(strip):
            if _is_close(strip.found, mistake.values, strip.own_error):
                return [Fault(where, mistake.what)]
        few = by_bytes and tally.n_different <= MAX_EXAMINED   # bytes of a small matrix: they are named one by one
        if tally.n_wrong_cells >= BULK_SHARE * tally.n_cells and not few:
            in_places = _examine_tiles(planned, tally, number, bench, by_bytes=False, named_only=True)
            if in_places:   # blocks of the source that take a large part of a small matrix
                return in_places
            error, cosine = tally.found.relative_rmse, tally.found.cosine
            return [Fault(where, f"resembles nothing that was tried: relative RMSE {error:.3g}, cosine {cosine:.3g} "
                                 f"with {name}")]
    spread = tally.found.squared_error - tally.squared_in_cells
    if not by_bytes and spread > (MAX_RATIO * tally.own.relative_rmse) ** 2 * tally.found.squared_source:
        return [Fault(where, f"has larger errors everywhere, in no place that stands out; it is still {name}")]
    if not tally.n_wrong_cells:   # damage too small to show in the values: the bytes say it
        return describe_blocks(planned, tally, number, bench)
    return _examine_tiles(planned, tally, number, bench, by_bytes=by_bytes)


def _take_strip(planned: PlannedTensor, tally: MatrixTally, number: int, bench: Bench) -> Strip:
    """A few rows that hold the first wrong cell."""
    matrix = planned.tensor.sources[number]
    row = tally.cells[0] // matrix.n_cols - number * matrix.n_rows
    height = matrix.block[0] if matrix.block[0] > 1 else _STRIP_ROWS
    first = row // height * height
    n = min(height, matrix.n_rows - first, max(1, _STRIP_VALUES // matrix.n_cols))
    own, source = bench.own(planned, number, first, n), bench.source(matrix, first, n)
    own_error = measure_errors(own, source).relative_rmse
    return Strip(bench, matrix, first, bench.found(planned, number, first, n), source, own_error)


def _examine_tiles(
    planned: PlannedTensor, tally: MatrixTally, number: int, bench: Bench, *, by_bytes: bool, named_only: bool = False
) -> list[Fault]:
    """Faults of blocks of the source: the runs of values that share a scale there.

    With `named_only` none at all unless each of them has a name.
    """
    scales = bench.scales(planned.tensor.sources[number])
    tiles, n_more = find_wrong_tiles(planned, tally, number, bench, MAX_EXAMINED)
    named = [(tile, _name_tile(tile, scales)) for tile in tiles]
    if named_only and (n_more or not all(what for _, what in named)):
        return []
    faults = [Fault(where_is(planned, number, tile.place), what) for tile, what in named if what]
    if not faults and by_bytes and tally.n_different <= MAX_EXAMINED:   # the cause; what follows is its effect
        faults = describe_blocks(planned, tally, number, bench)
    # What shares a block with a named place is off because its scale is: that needs no line of its own.
    explained = {tile.block for tile, what in named if what}
    for block in sorted({tile.block for tile in tiles} - explained):
        of_block = [tile for tile in tiles if tile.block == block]
        faults.append(Fault(where_is(planned, number, join_places(of_block)), describe_errors(of_block)))
    if n_more:
        faults.append(Fault(where_is(planned, number), f"{n_more} more such places are wrong"))
    return _without_repeats(faults) or describe_blocks(planned, tally, number, bench)


def _name_tile(tile: Tile, scales: NDArray[np.uint8]) -> str:
    """What is wrong with one block of the source; empty if nothing is known."""
    if not np.isfinite(tile.found).all():
        return ""
    if not tile.found.any():
        return "is all zeros"
    if tile.found.shape[0] == tile.found.shape[1] > 1 and tile.is_like(tile.source.T):
        return "is transposed"
    factor = measure_errors(np.ascontiguousarray(tile.found), np.ascontiguousarray(tile.source)).factor
    if abs(factor - 1) > MIN_FACTOR and tile.is_like(np.float32(factor) * tile.source):
        return name_factor(factor) + _whose_scale(scales, tile.row, tile.column, factor)
    return ""


def _whose_scale(scales: NDArray[np.uint8], row: int, column: int, factor: float) -> str:
    """If another block's scale explains the factor: that of the block on the other side of the diagonal."""
    if scales.shape[0] <= column or scales.shape[1] <= row or row == column or factor <= 0:
        return ""
    if scales.shape[0] == 1 or scales[row, column] == scales[column, row]:
        return ""
    expected = int(scales[column, row]) - int(scales[row, column])
    return f": it has the scale of block ({column}, {row})" if abs(log2(factor) - expected) < 0.1 else ""


def _without_repeats(faults: list[Fault]) -> list[Fault]:
    """The same thing in many places, once with the first place and a count."""
    by_what: dict[str, list[Fault]] = {}
    for fault in faults:
        by_what.setdefault(fault.what, []).append(fault)
    return [each[0] if len(each) == 1 else Fault(f"{each[0].where} and {len(each) - 1} more", each[0].what)
            for each in by_what.values()]


def _compare_ids(planned: PlannedTensor, bench: Bench) -> Fault:
    """What differs in a routing table."""
    expected = bench.ids(planned.tensor.sources[0])
    found = bench.file.read_tensor_bytes(planned.name).view("<i4").reshape(expected.shape)
    rows = np.flatnonzero((found != expected).any(axis=1))
    row = int(rows[0])
    said = f"routes to experts {found[row].tolist()}, the source to {expected[row].tolist()}"
    if (np.sort(found[rows], axis=1) == np.sort(expected[rows], axis=1)).all():
        said += "; all rows that differ name the same experts in another order"
    more = f"; {len(rows) - 1:,} more rows differ" if len(rows) > 1 else ""
    return Fault(f"token {row}", said + more)
