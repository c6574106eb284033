"""Writing importance matrices in llama.cpp's two forms; layouts are described in parse.py."""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.errors import InputError, UsageError
from dsv4tools.files import pwrite_all
from dsv4tools.formats.table import FORMATS
from dsv4tools.gguf.header import TensorInfo, encode_header, lay_out
from dsv4tools.gguf.rules import DEFAULT_ALIGNMENT, pad
from dsv4tools.gguf.values import KV
from dsv4tools.imatrix import parse
from dsv4tools.outfile import check_place, check_space, complete_file, explained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dsv4tools.imatrix.data import Imatrix, Sums

FORMS = (".gguf", ".dat")
_ROOM_BYTES = 512   # for name, descriptors and padding of an entry, at most


def form_of(path: Path) -> str:
    """``.gguf`` or ``.dat``, by the name; UsageError for any other."""
    if path.suffix not in FORMS:
        raise UsageError(path, f"ends in {path.suffix or 'nothing'!r}, expected {' or '.join(FORMS)}",
                         hint="the name says in which of llama.cpp's forms it is written")
    return path.suffix


def write_imatrix(imatrix: Imatrix, path: str | Path, *, overwrite: bool = False) -> int:
    """Write `imatrix` in the form that the name asks for, entries in the order of their names; the number of bytes.

    In a ``.dat`` file counts are whole chunks (rounded up), values are means times that, and 1 times that where nothing
    was counted, as llama-imatrix writes them: of GGUF, all can be read back.

    Raises
    ------
    UsageError
        The name ends otherwise, or `path` exists without `overwrite`.
    InputError
        Sums that are not finite numbers >= 0 in float32, or no entries.
    ResourceError
        No space or permission.
    """
    path = Path(path)
    form = form_of(path)
    if not imatrix.entries:
        raise InputError(path, "an importance matrix needs one entry or more")
    check_place(path, overwrite=overwrite)
    check_space(path, sum(4 * (s.squares.size + s.counts.size) + _ROOM_BYTES for s in imatrix.entries.values()))
    position = 0
    with complete_file(path) as fd:
        for piece in _gguf(imatrix) if form == ".gguf" else _dat(imatrix):
            with explained(path):
                pwrite_all(fd, memoryview(piece), position)
            position += len(piece)
    return position


def _gguf(imatrix: Imatrix) -> Iterator[bytes]:
    kvs = [
        KV(parse.TYPE_KEY, "str", parse.TYPE),
        KV(parse.DATASETS_KEY, "arr", list(imatrix.datasets), "str"),
        KV(parse.N_CHUNKS_KEY, "u32", imatrix.n_chunks),
        KV(parse.CHUNK_SIZE_KEY, "u32", imatrix.chunk_size),
    ]
    entries = sorted(imatrix.entries.items())
    shapes = [(name + suffix, shape) for name, sums in entries
              for suffix, shape in ((parse.SUMS_SUFFIX, sums.squares.shape[::-1]),
                                    (parse.COUNTS_SUFFIX, (1, len(sums.counts))))]
    offsets, _ = lay_out([4 * prod(ne) for _, ne in shapes])
    yield encode_header(kvs, [TensorInfo(name, ne, FORMATS["F32"], offset)
                              for (name, ne), offset in zip(shapes, offsets, strict=True)])
    for name, sums in entries:
        for values in (_as_float32(name, sums), sums.counts.astype("<f4")):
            yield values.tobytes().ljust(pad(values.nbytes, DEFAULT_ALIGNMENT), b"\0")


def _dat(imatrix: Imatrix) -> Iterator[bytes]:
    chunk_size = max(1, imatrix.chunk_size)
    kept = [(name, sums) for name, sums in sorted(imatrix.entries.items()) if sums.counts.any()]
    yield struct.pack("<i", len(kept))
    for name, sums in kept:
        squares = _as_float32(name, sums).reshape(len(sums.counts), -1)
        counts = sums.counts.astype(np.float32)[:, None]
        calls = -(-int(sums.counts.max()) // chunk_size)   # rounded up: 0 would be no data at all
        means = np.where(counts > 0, squares, np.float32(1)) / np.where(counts > 0, counts, np.float32(1))
        # A count of as many calls must not round: what was read from such a file is written as it was.
        values = np.where(counts == calls, squares, means * np.float32(calls))
        yield _text(name) + struct.pack("<ii", calls, values.size) + values.astype("<f4").tobytes()
    yield struct.pack("<i", imatrix.n_chunks) + _text(imatrix.datasets[-1] if imatrix.datasets else "")


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<i", len(raw)) + raw


def _as_float32(name: str, sums: Sums) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        values = sums.squares.astype("<f4")
    bad = np.argwhere(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        matrix, column = (int(i) for i in bad[0])
        raise InputError(f"importance of {name}", f"column {column} of matrix {matrix} is {values[matrix, column]}, "
                         "expected a finite number >= 0 in float32")
    return values
