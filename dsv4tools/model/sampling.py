"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose.

    Attributes
    ----------
    temperature:
        Logits are divided by it; 0 takes the most likely token.
    top_p:
        Keep the fewest most likely tokens that together have at least this probability.
    min_p:
        Keep tokens that have at least this share of the most likely one's probability.

    Raises UsageError for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value, fits, expected in (
            ("--temp", self.temperature, 0 <= self.temperature < np.inf, "0 or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--min-p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
        ):
            if not fits:
                raise UsageError(name, f"is {value}, expected {expected}")

    def probabilities(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """What is drawn from, float64 [vocab]: after temperature (not 0), then `top_p`, then `min_p`."""
        scaled = logits.astype(np.float64) / self.temperature
        p: NDArray[np.float64] = np.exp(scaled - scaled.max())
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]                  # probability of all more likely tokens
        p[order[before >= self.top_p]] = 0.0
        p[p < self.min_p * p.max()] = 0.0
        p /= p.sum()
        return p

    def choose(self, logits: NDArray[Any], random: np.random.Generator) -> int:
        """The next token for `logits` [vocab]; of equally likely ones the lowest id where nothing is drawn."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        return int(random.choice(len(logits), p=self.probabilities(logits)))
