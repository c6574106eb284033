"""Generation: a prompt in chunks, then one token after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.model.model import CHUNK
from dsv4tools.model.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from dsv4tools.model.model import Model
    from dsv4tools.model.observe import Observer


def generate(
    model: Model, prompt: Sequence[int], n: int, *, sampling: Sampling | None = None, seed: int = 0,
    stop: Collection[int] = (), chunk: int = CHUNK, observe: Observer | None = None,
) -> Iterator[int]:
    """Up to `n` tokens that follow `prompt`, each as soon as it is known; ends behind a token of `stop`.

    Greedy without `sampling`. The tokens depend on the arguments and the weights alone. Raises what `Model.forward`
    does.
    """
    sampling, random = sampling or Sampling(), np.random.default_rng(seed)
    cache = model.new_cache()
    for first in range(0, max(1, len(prompt)), chunk):   # an empty prompt is the model's to refuse
        logits = model.forward(prompt[first : first + chunk], cache, last_only=True, observe=observe)
    for i in range(n):
        token = sampling.choose(logits[0], random)
        yield token
        if token in stop or i == n - 1:
            return
        logits = model.forward([token], cache, observe=observe)
