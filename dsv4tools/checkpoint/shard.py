"""One safetensors file: its header, strictly read, and its bytes by position.

The header rules are those of the safetensors format (README of huggingface/safetensors): length first, JSON object,
tensors back to back without overlap or hole, spans equal to shape times dtype, nothing behind the last byte.
Unlike the library we also refuse duplicate keys. Reads are positional: a mapped file that is truncated under its
reader kills the process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from dsv4tools.checkpoint.strict_json import MAX_JSON_BYTES, parse_json, shown
from dsv4tools.errors import InputError, ResourceError, VerifyError
from dsv4tools.files import insist, pread_into

if TYPE_CHECKING:
    from pathlib import Path

# Bits of one element, for every dtype that safetensors 0.8 knows.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64,
}
MAX_DIMENSION = 1 << 48   # far above any tensor, far below what could overflow an int64 of bytes
MAX_RANK = 64             # what numpy and torch can hold; a product of more could take minutes
MAX_OFFSET = (1 << 63) - 1
MAX_NAME_LENGTH = 1000    # published names have up to 60 characters; messages repeat them


@dataclass(frozen=True, slots=True)
class ShardTensor:
    """A tensor's place in its file. `begin` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file as it was when its header was read.

    `n_file_bytes` and `header_sha256` identify its content across copies, `mtime_ns` and `inode` say whether the file
    is still the one that was planned with.
    """

    path: Path
    n_file_bytes: int
    header_sha256: str
    mtime_ns: int
    inode: int
    tensors: dict[str, ShardTensor] = field(repr=False)
    metadata: dict[str, str]

    @property
    def state(self) -> list[int | str]:
        """What says cheaply that the file was not touched."""
        return [self.mtime_ns, self.inode]

    @property
    def at_hand(self) -> bool:
        """Whether its bytes can be read again at no price to speak of."""
        return True

    def read_into(self, begin: int, out: memoryview) -> None:
        """Fill `out` with the file's bytes from position `begin`.

        The file is opened for each call: no run ever holds more handles than it has readers, and each read sees
        whether the file was exchanged since the plan. What fails with EIO or ESTALE is tried again, the file opened
        again: network disks recover.

        Raises
        ------
        VerifyError
            Size, time or inode differ from those the plan was made with.
        ResourceError
            The file cannot be read, or ended early.
        """
        try:
            insist(lambda: self._read_once(begin, out))
        except OSError as e:
            what = "cannot be opened" if e.filename else f"read failed at byte {begin:,}"
            raise ResourceError(self.path, f"{what}: {e.strerror}") from None

    def _read_once(self, begin: int, out: memoryview) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._check_unchanged(os.fstat(fd))
            done = 0
            while done < len(out):
                n = pread_into(fd, out[done:], begin + done)
                if n == 0:
                    raise ResourceError(
                        self.path, f"ends at byte {begin + done:,} while it was being read, expected "
                        f"{self.n_file_bytes:,} bytes", hint="the file was truncated: fetch it again"
                    )
                done += n
        finally:
            os.close(fd)

    def _check_unchanged(self, now: os.stat_result) -> None:
        if not stat.S_ISREG(now.st_mode):
            raise VerifyError(self.path, "source changed: no longer a regular file")
        pairs = (("size", self.n_file_bytes, now.st_size), ("modification time", self.mtime_ns, now.st_mtime_ns),
                 ("inode", self.inode, now.st_ino))
        for what, then, found in pairs:
            if then != found:
                raise VerifyError(self.path, f"source changed since the plan was made: {what} {found}, was {then}",
                                  hint="start again with the new file")


def read_shard(path: Path) -> Shard:
    """Open `path`, read and validate its header.

    Raises
    ------
    InputError
        The file is missing, no regular file, or its header breaks a rule of the format.
    ResourceError
        It cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)   # NONBLOCK: a FIFO must not hang us
    except FileNotFoundError:
        raise InputError(path, "is missing") from None
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise InputError(path, "is a link to itself") from None
        raise ResourceError(path, f"cannot be opened: {e.strerror}") from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise InputError(path, "is not a regular file")
        raw = _read_header_bytes(fd, info.st_size, path)
    except OSError as e:
        raise ResourceError(path, f"cannot be read: {e.strerror}") from None
    finally:
        os.close(fd)
    tensors, metadata = parse_header(raw, info.st_size, path)
    return Shard(path, info.st_size, hashlib.sha256(raw).hexdigest(), info.st_mtime_ns, info.st_ino, tensors, metadata)


def _read_header_bytes(fd: int, n_file_bytes: int, where: Path) -> bytes:
    if n_file_bytes < 8:
        raise InputError(where, f"has {n_file_bytes} bytes, too short for a safetensors header",
                         hint="the download is incomplete")
    n_header = check_header_length(os.pread(fd, 8, 0), n_file_bytes, where)
    raw = os.pread(fd, n_header, 8)
    while len(raw) < n_header:
        more = os.pread(fd, n_header - len(raw), 8 + len(raw))
        if not more:
            raise ResourceError(where, "ended while its header was being read")
        raw += more
    return raw


def check_header_length(prefix: bytes, n_file_bytes: int, where: object) -> int:
    """The header's length from the file's first 8 bytes, refused where it exceeds the cap or the file."""
    n_header = int.from_bytes(prefix, "little")
    if prefix == b"version ":
        raise InputError(where, "is a git-lfs pointer, not the file itself", hint="run: git lfs pull")
    if n_header > MAX_JSON_BYTES:
        raise InputError(where, f"header length {n_header:,} is above the format's cap of {MAX_JSON_BYTES:,}")
    if n_header < 2 or 8 + n_header > n_file_bytes:
        raise InputError(where, f"header length {n_header:,} does not fit a file of {n_file_bytes:,} bytes",
                         hint="the file is truncated or no safetensors file")
    return n_header


def parse_header(raw: bytes, n_file_bytes: int, where: object) -> tuple[dict[str, ShardTensor], dict[str, str]]:
    """Tensors (in file order) and metadata of a safetensors header.

    Parameters
    ----------
    raw:
        The JSON bytes, without the 8 bytes of length.
    n_file_bytes:
        The whole file's size; the tensors must fill it to the last byte.
    where:
        What messages call the file.
    """
    if raw[:1] != b"{":
        raise InputError(where, "header does not start with '{'")
    head = parse_json(raw, where)
    metadata = head.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(where, "__metadata__ is not an object of strings")
    data_start = 8 + len(raw)
    tensors = {name: _parse_entry(name, entry, data_start, where) for name, entry in head.items()}
    _check_spans(tensors, data_start, n_file_bytes, where)
    return tensors, metadata


def _parse_entry(name: str, entry: Any, data_start: int, where: object) -> ShardTensor:  # noqa: ANN401  - unchecked JSON
    at = f"{where}: tensor {shown(name)}"
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise InputError(at, f"name is empty, has control characters or more than {MAX_NAME_LENGTH:,} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(at, "entry must have exactly dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputError(at, f"unknown dtype {shown(dtype)}, known are {', '.join(DTYPE_BITS)}")
    if not _are_naturals(shape, MAX_DIMENSION) or len(shape) > MAX_RANK:
        raise InputError(at, f"shape {shown(shape)} is not a list of sizes")
    if not _are_naturals(span, MAX_OFFSET) or len(span) != 2:
        raise InputError(at, f"data_offsets {shown(span)} are not two non-negative integers")
    begin, end = span
    n_bits = prod(shape) * DTYPE_BITS[dtype]   # exact integers: no product can wrap
    if n_bits % 8 or end - begin != n_bits // 8:
        needed = f"{n_bits:,} bits" if n_bits % 8 else f"{n_bits // 8:,}"
        raise InputError(at, f"data_offsets span {end - begin:,} bytes, shape {shown(shape)} x {dtype} needs {needed}")
    return ShardTensor(dtype, tuple(shape), data_start + begin, end - begin)


def _are_naturals(value: Any, limit: int) -> bool:  # noqa: ANN401  - unchecked JSON
    # bool is an int to Python, and 1.0 == 1: neither is a size.
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= limit for n in value)


def _check_spans(tensors: dict[str, ShardTensor], data_start: int, n_file_bytes: int, where: object) -> None:
    position, before = data_start, "the header"
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].n_bytes)):
        if t.begin != position:
            kind = "overlaps" if t.begin < position else "leaves a hole after"
            raise InputError(f"{where}: tensor {name!r}",
                             f"{kind} {before}: begins at {t.begin:,}, expected {position:,}")
        position, before = t.begin + t.n_bytes, f"tensor {name!r}"
    if position != n_file_bytes:
        what = "is truncated" if position > n_file_bytes else "has bytes behind its last tensor"
        raise InputError(where, f"{what}: {n_file_bytes:,} bytes, its header describes {position:,}",
                         hint="fetch the file again")
