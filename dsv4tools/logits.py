"""Writing the logits of a prompt to a .npy file, a chunk at a time."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.files import pwrite_all
from dsv4tools.model.model import CHUNK
from dsv4tools.outfile import check_not_input, check_place, check_space, complete_file, explained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import ArrayLike

    from dsv4tools.model import Model


def write_logits(
    model: Model, tokens: ArrayLike, out: Path, *, overwrite: bool = False, chunk: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Write the logits of `tokens` to `out` as float32 [S, vocab], numpy's .npy format; returns that shape.

    Parameters
    ----------
    overwrite:
        Replace an existing `out`, at the end and in one step.
    progress:
        Called with the number of tokens done since the last call.

    Raises
    ------
    UsageError
        `out` exists or is one of the model's files, or as `Model.forward`.
    InputError, ResourceError
        As `Model.forward`; no space or permission to write.
    """
    ids = model.check_tokens(tokens)
    check_not_input(out, model.weights.paths)
    check_place(out, overwrite=overwrite)
    shape = len(ids), model.config.vocab_size
    check_space(out, 4 * shape[0] * shape[1])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with complete_file(out) as fd, explained(out):
        position = len(header.getvalue())
        pwrite_all(fd, memoryview(header.getvalue()), 0)
        for logits in model.run(ids, chunk=chunk):
            data = np.ascontiguousarray(logits, "<f4")
            pwrite_all(fd, data.data.cast("B"), position)
            position += data.nbytes
            if progress is not None:
                progress(len(data))
    return shape
