"""What a file predicts beside its source: the reference forward pass of both on a fixed set of prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.compare import compare
from dsv4tools.errors import InputError
from dsv4tools.gguf.reader import Finding
from dsv4tools.model import open_model
from dsv4tools.tokenizer import load_tokenizer
from dsv4tools.verify.report import Behaviour

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from dsv4tools.checkpoint import Checkpoint

# Prose, code, another script, arithmetic: what a wrong tensor spoils it spoils in one of them. Short, because every
# token of a full-size model reads gigabytes. The numbers of two reports compare only while these stay as they are.
PROMPTS = (
    "The lighthouse keeper climbed the stairs at dusk, trimmed the wick and wrote the weather into the log: wind from",
    "def is_prime(n: int) -> bool:\n    if n < 2:\n        return False\n    for d in range(2, int(n ** 0.5) + 1):\n",
    "水的沸点在海平面是一百摄氏度，随着海拔升高，气压下降，沸点也会",
    "A train leaves at 9:40 and arrives at 13:05. The journey takes 3 hours and 25 minutes. With a delay of 17 minutes",
)


def encode_prompts(checkpoint: Checkpoint) -> list[NDArray[np.int64]]:
    """The prompts as token ids of the checkpoint's tokenizer, each behind the token that begins a sentence."""
    tokenizer = load_tokenizer(checkpoint)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [np.array(begin + tokenizer.encode(prompt), np.int64) for prompt in PROMPTS]


def compare_behaviour(
    path: Path, checkpoint: Checkpoint, *, allowed_kl: float | None = None, threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Behaviour | None, list[Finding]]:
    """Run the file and its source on the prompts.

    Where the file cannot be run at all that is a finding. `progress` is called with the tokens done since the last
    call. Raises InputError where the checkpoint cannot be run.
    """
    prompts = encode_prompts(checkpoint)
    with open_model(checkpoint, threads=threads) as of_source:
        try:
            of_file = open_model(path, threads=threads)
        except InputError as e:
            return None, [Finding("error", "forward", e.where, f"cannot be run: {e.what}", None)]
        with of_file:
            try:
                result = compare(of_source, of_file, prompts, layers=True, progress=progress)
            except InputError as e:
                if not e.where.startswith(str(path)):   # the source's fault, or that the two do not fit
                    raise
                return None, [Finding("error", "forward", e.where, f"cannot be run: {e.what}", None)]
    kl = result.all("kl")
    return Behaviour(
        len(prompts), len(kl), result.mean_kl, float(kl.max()), float(result.all("same_top").mean()),
        result.perplexity("a"), result.perplexity("b"), result.parting_layer, allowed_kl,
    ), []
