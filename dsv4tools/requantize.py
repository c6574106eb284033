"""What a GGUF as a source allows: which tensors are copied as they are, and which would be rounded a second time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dsv4tools.errors import InputError
from dsv4tools.formats.codecs import DECODABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4tools.formats.table import Format
    from dsv4tools.plan import PlannedTensor

# What holds a model's own values: numbers as they were trained, or FP4 codes as they were published.
ORIGINAL = frozenset({"F32", "F16", "BF16", "I32", "I64", "MXFP4"})
_WIDEST = "F32"      # every value of every other type is one of its values

Change = Literal["copied", "widened", "encoded", "requantized"]


def change_of(planned: PlannedTensor) -> Change | None:
    """What happens to a tensor; None where its source is a checkpoint.

    ``copied``: its bytes are. ``widened``: to F32, with every value as it is. ``encoded``: once, from values of the
    model itself. ``requantized``: from values that were rounded before.
    """
    stored = planned.tensor.stored_format
    if stored is None:
        return None
    if stored == planned.format or planned.tensor.holds_integers:
        return "copied"
    if planned.format.name == _WIDEST:
        return "widened"
    return "encoded" if stored.name in ORIGINAL else "requantized"


@dataclass(frozen=True, slots=True)
class Conversions:
    """The tensors of a plan that go from one type to another (or stay): how many there are, and their bytes there."""

    change: Change
    stored: Format
    target: Format
    n_tensors: int
    n_bytes: int


def list_changes(tensors: Sequence[PlannedTensor]) -> list[Conversions]:
    """What happens to the tensors of a plan by type, the most bytes first; empty where its source is a checkpoint."""
    counts: Counter[tuple[Change, Format, Format]] = Counter()
    sizes: Counter[tuple[Change, Format, Format]] = Counter()
    for t in tensors:
        change, stored = change_of(t), t.tensor.stored_format
        if change is not None and stored is not None:
            counts[change, stored, t.format] += 1
            sizes[change, stored, t.format] += t.n_bytes
    return [Conversions(*key, counts[key], n_bytes) for key, n_bytes in sizes.most_common()]


def check_changes(tensors: Sequence[PlannedTensor], *, allow_requantize: bool) -> None:
    """InputError names the first tensor whose type cannot be decoded, or that would be rounded a second time."""
    for t in tensors:
        stored, change = t.tensor.stored_format, change_of(t)
        if stored is None or change in {None, "copied"}:
            continue
        where = f"{t.tensor.sources[0].weight.shard.path.name}: tensor {t.name!r}"
        if stored.name not in DECODABLE:
            raise InputError(where, f"is {stored.name}, which cannot be decoded to become {t.format.name} ({t.rule})",
                             hint=f"keep its type: --tensor-type {t.name}=keep")
        if change == "requantized" and not allow_requantize:
            n = sum(change_of(other) == "requantized" for other in tensors)
            more = f" and {n - 1} more tensors like it" if n > 1 else ""
            raise InputError(
                where, f"is {stored.name}, rounded already, and would be rounded again to {t.format.name} ({t.rule})"
                f"{more}", hint='--allow-requantize does it; --policy keep, or a rule with type = "keep", copies')
