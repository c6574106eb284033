"""The comparisons that a profile may ask of metadata values: one row each.

A comparison of single values that is asked of an array is asked of each of its first block_count items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_SHOWN_ITEMS = 4


@dataclass(frozen=True, slots=True)
class Comparison:
    """`holds(value, of)`, and what is expected in words; `whole` ones look at an array as a whole."""

    holds: Callable[[Any, Any], bool]
    expected: str
    whole: bool = False


def _close(value: float, of: float) -> bool:
    # ds4: config_expect_f32, computed in float32
    return bool(abs(np.float32(value) - np.float32(of)) <= np.float32(1e-6) * np.float32(max(1.0, abs(of))))


def _close_relative(value: float, of: float) -> bool:
    # ds4: config_expect_epsilon, computed in float32
    return bool(abs(np.float32(value) - np.float32(of)) <= max(np.float32(abs(of)) * np.float32(1e-5),
                                                               np.float32(1e-30)))


CHECKS: dict[str, Comparison] = {
    "one_of": Comparison(lambda v, of: v in of, "{of}"),
    "equal": Comparison(lambda v, of: v == of, "{of}"),
    "at_least": Comparison(lambda v, of: v >= of, "at least {of}"),
    "at_most": Comparison(lambda v, of: v <= of, "at most {of}"),
    "below": Comparison(lambda v, of: v < of, "less than {of}"),
    "multiple_of": Comparison(lambda v, of: of != 0 and v % of == 0, "a multiple of {of}"),
    "divides": Comparison(lambda v, of: v != 0 and of % v == 0, "a divisor of {of}"),
    "power_of_two": Comparison(lambda v, _: v > 0 and v & (v - 1) == 0, "a power of two"),
    "close": Comparison(_close, "{of}"),
    "close_relative": Comparison(_close_relative, "{of}"),
    "contains": Comparison(lambda v, of: of in v, "{of} among them", whole=True),
    "unique": Comparison(lambda v, _: len(set(v)) == len(v), "no item twice", whole=True),
    "length": Comparison(lambda v, of: len(v) == of, "{of} items", whole=True),
    "length_at_most": Comparison(lambda v, of: len(v) <= of, "at most {of} items", whole=True),
    "length_at_least": Comparison(lambda v, of: len(v) >= of, "at least {of} items", whole=True),
}


def shown(value: object) -> str:
    """A value as the engines print it: ``%.9g`` for floats, in float32; long ones cut."""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return f"{float(np.float32(value)):.9g}"
    if isinstance(value, (list, tuple)):
        few = len(value) <= _SHOWN_ITEMS
        items = [shown(v) for v in value[:_SHOWN_ITEMS]]
        return either(items) if few else f"{', '.join(items)}, ... ({len(value)} in all)"
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def either(names: Iterable[str]) -> str:
    """``a, b or c``."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
