"""The two forms of importance matrix files: where the values of each entry lie, and what the file says about them.

Layouts: llama.cpp's tools/imatrix (imatrix.cpp) writes them, common/imatrix-loader.cpp reads them.

``.dat``, little-endian: i32 entries; for each an i32 length and a name, i32 calls, i32 values, float32 values (mean of
the squares times calls); then, or not, i32 chunks, and an i32 length and the name of the text.

GGUF: ``imatrix.datasets`` (strings), ``imatrix.chunk_count`` and ``imatrix.chunk_size`` (u32); for each tensor NAME of
the model ``NAME.in_sum2`` F32 [columns, matrices], the sums of the squares, and ``NAME.counts`` F32 [1, matrices].
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import InputError
from dsv4tools.gguf.reader import GgufFile, open_gguf
from dsv4tools.gguf.regular import read_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

SUMS_SUFFIX, COUNTS_SUFFIX = ".in_sum2", ".counts"
TYPE_KEY, TYPE = "general.type", "imatrix"
DATASETS_KEY, N_CHUNKS_KEY, CHUNK_SIZE_KEY = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MAX_NAME_BYTES = 4096      # ds4's quantizer takes no longer ones
MAX_TEXT_BYTES = 1 << 16   # of the name of a text
MAX_COUNT = 2.0**62
_SMALLEST_ENTRY = 17       # bytes in a .dat: a name of one, one value, three numbers


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an entry's values lie: `n_values` float32 from byte `position` of the file on.

    `counts`, int64 [n], says of how many inputs each n-th part of the values is the sum.
    """

    name: str
    position: int
    n_values: int
    counts: NDArray[np.int64]

    @property
    def values_per_count(self) -> int:
        """Values that share a count."""
        return self.n_values // len(self.counts)


@dataclass(frozen=True, slots=True)
class Header:
    """All of a file but its values."""

    entries: Mapping[str, Entry]
    n_chunks: int
    chunk_size: int
    datasets: tuple[str, ...]


class _Cursor:
    """Reads a file from front to back; InputError where it ends too early."""

    def __init__(self, fd: int, n_file_bytes: int, path: Path) -> None:
        self.fd, self.n_file_bytes, self.path, self.at = fd, n_file_bytes, path, 0

    @property
    def left(self) -> int:
        return self.n_file_bytes - self.at

    def take(self, n: int, what: str) -> bytes:
        start = self.skip(n, what)
        return bytes(read_bytes(self.fd, start, n, self.path))

    def skip(self, n: int, what: str) -> int:
        """Pass over `n` bytes; where they begin."""
        if n > self.left:
            raise InputError(self.path, f"ends at byte {self.n_file_bytes}: {what} needs {n} bytes from byte {self.at}",
                             hint="is it an importance matrix, and was it copied whole?")
        start, self.at = self.at, self.at + n
        return start

    def number(self, what: str, lowest: int, highest: int) -> int:
        start = self.at
        found = int(struct.unpack("<i", self.take(4, what))[0])
        if not lowest <= found <= highest:
            raise InputError(self.path, f"{what} is {found} (byte {start}), expected {lowest} to {highest}",
                             hint="is it an importance matrix of llama.cpp, in its GGUF or .dat form?")
        return found

    def text(self, what: str, lowest: int, highest: int) -> str:
        raw = self.take(self.number(f"the length of {what}", lowest, highest), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as e:
            raise InputError(self.path, f"{what} is no UTF-8 at its byte {e.start}") from None


def parse_dat(fd: int, n_file_bytes: int, path: Path) -> Header:
    """The header of a ``.dat`` file; InputError where it is none."""
    cursor, entries = _Cursor(fd, n_file_bytes, path), {}
    n_entries = cursor.number("the number of entries", 1, max(1, (n_file_bytes - 4) // _SMALLEST_ENTRY))
    for i in range(n_entries):
        name = cursor.text(f"the name of entry {i}", 1, MAX_NAME_BYTES)
        calls = cursor.number(f"the number of calls of {name!r}", -(1 << 31), (1 << 31) - 1)
        n_values = cursor.number(f"the number of values of {name!r}", 1, (1 << 31) - 1)
        position = cursor.skip(4 * n_values, f"{name!r} with {n_values} values")
        if name in entries:
            raise InputError(path, f"has two entries {name!r}, expected one")
        # Without calls the values are what they are: llama.cpp does not divide them.
        entries[name] = Entry(name, position, n_values, np.array([max(calls, 1)], np.int64))
    n_chunks, datasets = 0, tuple[str, ...]()
    if cursor.left:
        n_chunks = cursor.number("the number of chunks", 0, (1 << 31) - 1)
        name = cursor.text("the name of the text", 0, MAX_TEXT_BYTES) if cursor.left else ""
        datasets = (name,) if name else ()
    if cursor.left:
        raise InputError(path, f"has {cursor.left} bytes behind its end at byte {cursor.at}")
    return Header(entries, n_chunks, 0, datasets)


def parse_gguf(fd: int, path: Path) -> Header:
    """The header of a GGUF importance matrix; InputError where the file is no right GGUF, or none of that kind."""
    with open_gguf(path) as file:
        kind = _entry(file, TYPE_KEY, "str", "")
        if kind != TYPE:
            raise InputError(path, f"is a GGUF of the kind {kind or 'of a model'!r}, expected {TYPE!r}",
                             hint="give the file that llama-imatrix or dsv4tools imatrix wrote")
        datasets = _entry(file, DATASETS_KEY, "arr of str")
        n_chunks, chunk_size = _entry(file, N_CHUNKS_KEY, "u32"), _entry(file, CHUNK_SIZE_KEY, "u32")
        entries = {}
        for tensor, info in file.tensors.items():
            for suffix, other in ((SUMS_SUFFIX, COUNTS_SUFFIX), (COUNTS_SUFFIX, SUMS_SUFFIX)):
                name = tensor.removesuffix(suffix)
                if name == tensor:
                    continue
                if name + other not in file.tensors:
                    raise InputError(path, f"has {tensor!r} without {name + other!r}")
                if info.format.name != "F32" or not prod(info.ne):
                    raise InputError(f"{path}: tensor {tensor!r}", f"is {info.format.name} {list(info.ne)}, expected "
                                     "F32 values")
                if suffix == SUMS_SUFFIX:
                    position = file.data_offset + info.offset
                    entries[name] = Entry(name, position, prod(info.ne), _read_counts(fd, file, name))
    if not entries:
        raise InputError(path, f"has no tensor NAME{SUMS_SUFFIX}: no entries")
    return Header(entries, n_chunks, chunk_size, tuple(datasets))


def _entry(file: GgufFile, key: str, kind: str, default: Any = None) -> Any:  # noqa: ANN401  - as `GgufFile.value`
    kv = file.kvs.get(key)
    if kv is None and default is not None:
        return default
    found = "missing" if kv is None else f"{kv.type} of {kv.item_type}" if kv.type == "arr" else kv.type
    if kv is None or found != kind:
        raise InputError(f"{file.path}: key {key!r}", f"is {found}, expected {kind}")
    return kv.value


def _read_counts(fd: int, file: GgufFile, name: str) -> NDArray[np.int64]:
    sums, info = file.tensors[name + SUMS_SUFFIX], file.tensors[name + COUNTS_SUFFIX]
    where = f"{file.path}: tensor {info.name!r}"
    n, n_values = prod(info.ne), prod(sums.ne)
    if n > n_values or n_values % n:
        raise InputError(where, f"has {n} counts for {n_values} sums, expected a divisor of that number")
    raw = read_bytes(fd, file.data_offset + info.offset, 4 * n, file.path)
    counts = np.frombuffer(raw, "<f4").astype(np.float64)
    bad = np.flatnonzero(~((counts >= 0) & (counts <= MAX_COUNT)))
    if len(bad):
        raise InputError(where, f"count {bad[0]} is {counts[bad[0]]}, expected a number >= 0")
    return np.floor(counts + 0.5).astype(np.int64)   # as lround does
