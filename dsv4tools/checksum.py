"""The checksum of finished work: against accidents, at the speed of the processor's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PIECE_BYTES = 1 << 18


def checksum(*arrays: NDArray[np.uint8]) -> str:
    """xxh3 of 128 bits, hex, over the pieces of each array (uint8, 1-D, contiguous) from its last one to its first.

    Backwards, because what was read or written last is still in the cache of a processor that the whole does not fit;
    whoever takes the array from its beginning next then finds that there. Forwards, every byte would come from memory:
    four times as slow.
    """
    digest = xxhash.xxh3_128()
    for array in arrays:
        view = array.data
        for start in range((len(view) - 1) // PIECE_BYTES * PIECE_BYTES, -1, -PIECE_BYTES):
            digest.update(view[start: start + PIECE_BYTES])
    return digest.hexdigest()
