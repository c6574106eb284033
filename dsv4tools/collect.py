"""Measuring an importance matrix: the reference forward pass over a text, and sums of what each matrix is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.errors import UsageError
from dsv4tools.imatrix import Imatrix, Sums

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from dsv4tools.model import Model
    from dsv4tools.model.functions import Floats
    from dsv4tools.workers import StopRequest

CHUNK_SIZE = 512          # tokens, as llama-imatrix takes them unless told otherwise
OUTPUT = "output.weight"
_SOFTMAX_VALUES = 1 << 22   # logits that are looked at together: 32 MB in float64


@dataclass(frozen=True, slots=True)
class Collection:
    """What `collect_imatrix` measured.

    Attributes
    ----------
    imatrix:
        The sums.
    n_tokens:
        Tokens that went through the model; what did not fill a chunk did not.
    perplexity:
        Of the text, each chunk by itself: a high one says that text and model do not fit.
    without_data:
        Tensor name -> experts that no token was routed to.
    """

    imatrix: Imatrix
    n_tokens: int
    perplexity: float
    without_data: dict[str, tuple[int, ...]]


class _Sums:
    """Adds up squares in float64, for each matrix by itself: a `ProductObserver`."""

    def __init__(self, model: Model, *, with_output: bool) -> None:
        self._weights, self._with_output = model.weights, with_output
        self.entries: dict[str, Sums] = {}

    def __call__(self, name: str, rows: tuple[int, int] | None, x: Floats) -> None:
        if name == OUTPUT and not self._with_output:
            return
        entry = self.entries.get(name)
        shape = self._weights.shape(name)
        if entry is None:
            n = shape[0] if len(shape) > 2 else 1
            entry = self.entries[name] = Sums(np.zeros((n, shape[-1])), np.zeros(n, np.int64))
        # Groups of rows of one matrix have inputs of their own, but share a vector: llama-quantize takes no other.
        number = rows[0] // shape[1] if rows is not None and len(shape) > 2 else 0
        entry.squares[number] += np.square(x, dtype=np.float64).sum(axis=0)
        entry.counts[number] += len(x)


def collect_imatrix(
    model: Model, tokens: ArrayLike, *, chunk_size: int = CHUNK_SIZE, max_chunks: int | None = None,
    bos_id: int | None = None, process_output: bool = False, datasets: Sequence[str] = (),
    progress: Callable[[int], None] | None = None, stop: StopRequest | None = None,
) -> Collection:
    """Run `tokens` through a model in chunks, and add up what every matrix is multiplied with.

    As llama-imatrix does it: each chunk begins anew, tokens that do not fill the last one are left out, routed experts
    have sums and counts of their own, a column's sum is that of its squared inputs. Beyond it, the sums are float64,
    matrices outside the layers are measured too, and all groups of ``attn_output_a`` are taken together.

    Parameters
    ----------
    tokens:
        Ids [S].
    chunk_size:
        Tokens of a chunk.
    max_chunks:
        Stop after so many.
    bos_id:
        Replaces the first token of every chunk, as every prompt begins with it.
    process_output:
        Measure ``output.weight`` too; llama.cpp advises against using importance for it.
    datasets:
        Names of the texts, for the file.
    progress:
        Called with the number of tokens done since the last call.
    stop:
        Set it to stop after the chunk in hand; there must be one at least.

    Raises
    ------
    UsageError
        Fewer tokens than a chunk, a number out of range, or as `Model.forward`.
    InputError, ResourceError, VerifyError
        As `Model.forward`.
    """
    ids = model.check_tokens(tokens)
    if chunk_size < 2:
        raise UsageError("--chunk-size", f"is {chunk_size}, expected 2 or more")
    n_chunks = len(ids) // chunk_size
    if not n_chunks:
        raise UsageError("tokens", f"found {len(ids)}, expected a chunk of {chunk_size} at least",
                         hint="give more text, or a smaller --chunk-size")
    if max_chunks is not None:
        if max_chunks < 1:
            raise UsageError("--chunks", f"is {max_chunks}, expected 1 or more")
        n_chunks = min(n_chunks, max_chunks)
    sums, surprise, n_done = _Sums(model, with_output=process_output), 0.0, 0
    model.weights.watch = sums
    try:
        for chunk in np.split(ids[: n_chunks * chunk_size], n_chunks):
            if bos_id is not None:
                chunk[0] = bos_id
            surprise += _run(model, chunk, progress)
            n_done += 1
            if stop is not None and stop.is_set():
                break
    finally:
        model.weights.watch = None
    imatrix = Imatrix(sums.entries, n_done, chunk_size, tuple(datasets))
    without_data = {name: tuple(np.flatnonzero(entry.counts == 0).tolist()) for name, entry in sums.entries.items()
                    if not entry.counts.all()}
    return Collection(imatrix, n_done * chunk_size, float(np.exp(surprise / (n_done * (chunk_size - 1)))), without_data)


def _run(model: Model, chunk: NDArray[np.int64], progress: Callable[[int], None] | None) -> float:
    """One chunk through the model; the surprise of its tokens but the first, in nats."""
    done, total = 0, 0.0
    for logits in model.run(chunk):
        following = chunk[done + 1 : done + 1 + len(logits)]
        step = max(1, _SOFTMAX_VALUES // logits.shape[1])
        for first in range(0, len(following), step):
            part = logits[first : first + step].astype(np.float64)[: len(following) - first]
            part -= part.max(axis=1, keepdims=True)
            total += float(np.log(np.exp(part).sum(axis=1)).sum())
            total -= float(part[np.arange(len(part)), following[first : first + step]].sum())
        done += len(logits)
        if progress is not None:
            progress(len(logits))
    return total
