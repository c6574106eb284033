"""What a forward pass shows of its inside to whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

# Called as ``observe(what, layer, array)`` with
#   "streams"       [S, n, D]   residual streams after the layer (layer -1: the embedding)
#   "router_scores" [S, E]      what a scored layer chooses its experts by
#   "experts"       [S, K]      ids of the chosen experts
#   "index_scores"  [B, T]      scores of the compressed rows for a block of tokens; -inf where invisible
# The arrays are the model's own: copy what is to be kept.
Observer = Callable[[str, int, NDArray[Any]], None]

# Called as ``watch(name, rows, x)`` with the inputs x [S, n_cols] of every product with a matrix, before it is made:
# its GGUF name and the first of the rows that are multiplied and the one behind the last (None: all of them). Products
# that are left out because nothing depends on them are shown too. The arrays are the model's own.
ProductObserver = Callable[[str, tuple[int, int] | None, NDArray[Any]], None]
