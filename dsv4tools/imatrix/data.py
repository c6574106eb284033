"""An importance matrix in memory: what was summed, over how many inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(slots=True)
class Sums:
    """One tensor's entry.

    Attributes
    ----------
    squares:
        float [n matrices, n columns]: the sum over all inputs x of x squared, column by column. One matrix, or one per
        expert.
    counts:
        int64 [n counts]: of how many inputs; one number for each matrix, or one for all.
    """

    squares: NDArray[np.floating[Any]]
    counts: NDArray[np.int64]


@dataclass(slots=True)
class Imatrix:
    """Sums by GGUF tensor name, and what they were made from.

    Attributes
    ----------
    n_chunks, chunk_size:
        How many chunks of how many tokens went through the model; a size of 0 is unknown.
    datasets:
        Names of the texts.
    """

    entries: dict[str, Sums]
    n_chunks: int = 0
    chunk_size: int = 0
    datasets: tuple[str, ...] = field(default=())
