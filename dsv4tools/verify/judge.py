"""From what was found in each tensor to right or wrong. docs/verify.md gives the reasons for each number.

Two questions are asked of a tensor that is not what we would have written. Was it encoded by our recipe? Then every
block that differs is damage, however small its effect. Was it encoded otherwise, by another tool or with importance?
Then its values count: they must be about as close to the source as our own encoding in the same type is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, sqrt
from statistics import median
from typing import TYPE_CHECKING

from dsv4tools.verify.report import TensorCheck

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4tools.formats.measure import ErrorSums
    from dsv4tools.formats.table import Format
    from dsv4tools.verify.report import Judgement
    from dsv4tools.verify.tally import MatrixTally, TensorTally

# Differences are a matter of rounding, not damage, where they are everywhere: in so many blocks of a tensor and in so
# many of its sixteenths, or in half of the tensors of a type in a larger share than this. Builds of the C quantizer
# that contract to FMA differ in 1 to 3.5 % of Q4_K blocks.
ROUNDING_BLOCKS, ROUNDING_SEGMENTS = 32, 12
ROUNDING_SHARE = 0.005
OTHERWISE_SHARE = 0.5   # a tensor of which more blocks differ was not encoded by our recipe at all
MAX_RATIO = 2.0         # of its relative RMSE to that of our own encoding
MIN_COSINE = 0.99       # asked for only where our own encoding reaches it: not of two bits
ROUNDING = 2.0**-23     # relative RMSE that a lossless type may have: one rounding of float32


@dataclass(frozen=True, slots=True)
class Judged:
    """A tensor's check, the numbers of its matrices that are wrong, and whether every byte of it counted."""

    check: TensorCheck
    wrong: tuple[int, ...]
    by_bytes: bool


def judge_tensors(tallies: Sequence[TensorTally]) -> list[Judged]:
    """One for each tally: all are needed, because how one tensor was encoded shows in the others of its type."""
    otherwise = _find_types_rounded_otherwise(tallies)
    return [_judge_tensor(t, by_values=t.planned.format.name in otherwise) for t in tallies]


def _find_types_rounded_otherwise(tallies: Sequence[TensorTally]) -> set[str]:
    shares: dict[str, list[float]] = {}
    for tally in tallies:
        whole = tally.whole
        if whole.n_blocks:
            shares.setdefault(tally.planned.format.name, []).append(whole.n_blocks_different / whole.n_blocks)
    # A single tensor does not show what is usual: one of its few blocks may be damaged.
    return {name for name, each in shares.items() if len(each) > 1 and median(each) > ROUNDING_SHARE}


def _judge_tensor(tally: TensorTally, *, by_values: bool) -> Judged:
    whole, planned = tally.whole, tally.planned
    everywhere = whole.n_blocks_different >= ROUNDING_BLOCKS and len(whole.segments) >= ROUNDING_SEGMENTS
    mostly = whole.n_blocks_different > OTHERWISE_SHARE * whole.n_blocks or not whole.n_blocks
    by_bytes = planned.tensor.holds_integers or not (by_values or everywhere or mostly)
    reasons: dict[int, str] = {}
    for number, matrix in enumerate(tally.matrices):
        reason = find_reason(matrix, planned.format, by_bytes=by_bytes) if _differs(matrix) else ""
        if reason:
            reasons[number] = reason
    judgement: Judgement = "wrong" if reasons else "within" if _differs(whole) else "identical"
    return Judged(TensorCheck(
        name=planned.name, format=planned.format.name, n_values=_n_values(tally), n_bytes=planned.n_bytes,
        n_compared=whole.n_bytes, judgement=judgement, reason=_explain(tally, whole, reasons, judgement),
        n_different=whole.n_different, n_blocks=whole.n_blocks, n_blocks_different=whole.n_blocks_different,
        difference=whole.first[1], error=whole.found if whole.n_measured else None,
        own=whole.own if whole.own.n else None, n_measured=whole.n_measured,
        by_matrix=tuple(m.found.relative_rmse for m in tally.matrices) if whole.n_measured else (),
    ), tuple(reasons), by_bytes)


def _differs(matrix: MatrixTally) -> bool:
    """Whether it is not known to be our bytes: some differ, or there are none of ours."""
    return bool(matrix.n_different) or (matrix.n_blocks == 0 and matrix.n_bytes > 0)


def _n_values(tally: TensorTally) -> int:
    return tally.planned.n_bytes // tally.planned.format.block_bytes * tally.planned.format.block_values


def find_reason(matrix: MatrixTally, target: Format, *, by_bytes: bool) -> str:
    """Why a matrix that differs is wrong; empty if it is not."""
    found = matrix.found
    count = f"{matrix.n_blocks_different:,} of {matrix.n_blocks:,}"
    if found.n_not_finite:
        return f"{found.n_not_finite:,} values are NaN or infinite"
    if not matrix.n_measured:
        return f"{count} values differ" if by_bytes else f"{matrix.n_different:,} bytes differ, and cannot be measured"
    reason = _out_of_bounds(matrix, target)
    if reason or not by_bytes:
        return reason
    verb = "differs" if matrix.n_blocks_different == 1 else "differ"
    return f"{count} blocks {verb} from our encoding, which the file's {target.name} is otherwise"


def _out_of_bounds(matrix: MatrixTally, target: Format) -> str:
    found, own, error = matrix.found, matrix.own, matrix.found.relative_rmse
    if not own.n:
        allowed = expected_error(target)
        return f"its relative RMSE is {error:.3g}, expected at most {allowed:.3g}" if error > allowed else ""
    if error > max(MAX_RATIO * own.relative_rmse, ROUNDING):
        return f"its relative RMSE is {error:.3g}, that of our own encoding {own.relative_rmse:.3g}"
    if _is_below(found, MIN_COSINE) and not _is_below(own, MIN_COSINE):
        return f"its cosine with the source is {found.cosine:.4g}, that of our own encoding {own.cosine:.4g}"
    if matrix.n_wrong_cells:
        return f"{matrix.n_wrong_cells:,} of {matrix.n_cells:,} runs of 256 values have errors beyond their bounds"
    return ""


def _is_below(errors: ErrorSums, cosine: float) -> bool:
    return isnan(errors.cosine) or errors.cosine < cosine


def expected_error(target: Format) -> float:
    """Bound of the relative RMSE in a type that we cannot encode.

    That of rounding a normal distribution to as many levels as the bits per value give, over plus and minus three
    deviations, with no search for a scale: encoders are better.
    """
    levels = 2.0 ** int(target.bits_per_value)
    return 6 / levels / sqrt(12)


def _explain(tally: TensorTally, whole: MatrixTally, reasons: dict[int, str], judgement: Judgement) -> str:
    if judgement == "within":
        return (f"{whole.n_blocks_different:,} of {whole.n_blocks:,} blocks differ from our encoding, by values as "
                f"close to the source" if whole.n_blocks else "values are as close to the source as its type allows")
    if judgement == "identical":
        return ""
    number, reason = next(iter(reasons.items()))
    if len(tally.matrices) == 1:
        return reason
    more = "" if len(reasons) == 1 else f"; {len(reasons)} of {len(tally.matrices)} experts are wrong"
    return f"expert {number}: {reason}{more}"
