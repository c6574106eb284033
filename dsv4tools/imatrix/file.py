"""Importance matrix files, read without trusting them: checked once from end to end, then a vector at a time.

Both of llama.cpp's forms: GGUF (sums of squares and counts as tensors) and the older ``.dat``. All values are looked at
when a file is opened, and it must not change until it was used: the hash of its content stands in what is made with it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import InputError, VerifyError
from dsv4tools.gguf.regular import open_regular, read_into
from dsv4tools.imatrix.data import Imatrix, Sums
from dsv4tools.imatrix.parse import Entry, Header, parse_dat, parse_gguf

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class ImatrixFile:
    """An importance matrix in a file.

    Attributes
    ----------
    path:
        As given.
    sha256:
        Of the whole file, hexadecimal.
    legacy:
        Whether it is a ``.dat`` file: there the values of an expert that saw no data were written as 1.
    entries:
        By name as the file has it, in the file's order.
    n_chunks, chunk_size, datasets:
        As in `Imatrix`; what the file does not say is 0 or empty.
    """

    path: Path
    sha256: str
    legacy: bool
    entries: Mapping[str, Entry]
    n_chunks: int
    chunk_size: int
    datasets: tuple[str, ...]
    _state: tuple[int, int, int] = field(repr=False)

    def read_mean(self, name: str, first: int = 0, n: int | None = None) -> NDArray[np.float32]:
        """Values `first` .. of an entry, each divided by its count: float32 [n].

        Values whose count is 0 are 1, as llama.cpp reads them: nothing is known, so all columns weigh the same.
        VerifyError if the file is no longer the one that was opened, ResourceError if it cannot be read.
        """
        entry = self.entries[name]
        values = self.read_sums(name, first, n)
        counts = entry.counts[(first + np.arange(len(values))) // entry.values_per_count].astype(np.float32)
        return np.where(counts > 0, values / np.where(counts > 0, counts, np.float32(1)), np.float32(1))

    def read_sums(self, name: str, first: int = 0, n: int | None = None) -> NDArray[np.float32]:
        """Values `first` .. of an entry as stored: float32 [n]; errors of `read_mean`."""
        entry = self.entries[name]
        values = np.empty(entry.n_values - first if n is None else n, "<f4")
        fd, _ = open_regular(self.path)
        try:
            if _state_of(fd) != self._state:
                raise VerifyError(self.path, "was changed while it was in use", hint="run the same command again")
            read_into(fd, values.data.cast("B"), entry.position + 4 * first, self.path)
        finally:
            os.close(fd)
        return values.astype(np.float32, copy=False)

    def as_data(self) -> dict[str, Any]:
        """For JSON: what it is, without its values."""
        return {"path": str(self.path), "sha256": self.sha256, "form": "dat" if self.legacy else "gguf",
                "n_entries": len(self.entries), "n_chunks": self.n_chunks, "chunk_size": self.chunk_size,
                "datasets": list(self.datasets)}

    def load(self) -> Imatrix:
        """All of it in memory, as stored."""
        entries = {}
        for name, entry in self.entries.items():
            squares = self.read_sums(name).reshape(len(entry.counts), entry.values_per_count)
            entries[name] = Sums(squares, entry.counts.copy())
        return Imatrix(entries, self.n_chunks, self.chunk_size, self.datasets)


def open_imatrix(path: str | os.PathLike[str]) -> ImatrixFile:
    """Read an importance matrix file through, and say what is in it.

    Raises
    ------
    InputError
        There is no such file, or it is neither of llama.cpp's forms: whatever is cut off, contradicts itself, stands
        twice, or is not a finite number >= 0 is named with entry and position.
    ResourceError
        Opening or reading it failed.
    """
    path = Path(path)
    fd, n_file_bytes = open_regular(path)
    try:
        state = _state_of(fd)
        legacy = _read(fd, 0, min(4, n_file_bytes), path) != b"GGUF"
        header: Header = parse_dat(fd, n_file_bytes, path) if legacy else parse_gguf(fd, path)
        for entry in header.entries.values():
            _check_values(fd, path, entry)
        sha256 = _hash(fd, n_file_bytes, path)
        if _state_of(fd) != state or _state(path.stat()) != state:
            raise VerifyError(path, "was changed while it was read", hint="try again")
    finally:
        os.close(fd)
    return ImatrixFile(path, sha256, legacy, header.entries, header.n_chunks, header.chunk_size, header.datasets, state)


def _state_of(fd: int) -> tuple[int, int, int]:
    return _state(os.fstat(fd))


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read(fd: int, position: int, n: int, path: Path) -> bytes:
    out = bytearray(n)
    read_into(fd, memoryview(out), position, path)
    return bytes(out)


def _check_values(fd: int, path: Path, entry: Entry) -> None:
    room = np.empty(min(entry.n_values, _BLOCK_BYTES // 4), "<f4")
    for first in range(0, entry.n_values, len(room)):
        values = room[: min(len(room), entry.n_values - first)]
        read_into(fd, values.data.cast("B"), entry.position + 4 * first, path)
        allowed = np.isfinite(values) & (values >= 0)
        if not allowed.all():
            at = int(np.argmin(allowed))
            raise InputError(f"{path}: entry {entry.name!r}", f"value {first + at} is {values[at]}, expected a finite "
                             "number >= 0", hint="make the importance matrix again, on another text")


def _hash(fd: int, n_file_bytes: int, path: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    for position in range(0, n_file_bytes, _BLOCK_BYTES):
        part = memoryview(block)[: n_file_bytes - position]
        read_into(fd, part, position, path)
        digest.update(part)
    return digest.hexdigest()
