"""The strict GGUF reader: scans a header without trusting it, reports all that is wrong, reads tensor bytes.

A file is right when every loader must take it: `scan_gguf` refuses at least what ggml's loader (gguf.cpp) refuses,
with the data present, and beyond that invalid UTF-8, trailing bytes and integers that wrap. Rules are in rules.py.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dsv4tools.errors import InputError, UsageError
from dsv4tools.gguf.parse import Finding, parse_header
from dsv4tools.gguf.regular import open_regular, read_into
from dsv4tools.gguf.rules import DEFAULT_ALIGNMENT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.gguf.header import TensorInfo
    from dsv4tools.gguf.values import KV

__all__ = ["Finding", "GgufFile", "open_gguf", "scan_gguf"]


@dataclass(eq=False)
class GgufFile:
    """What a GGUF file says, and its open handle. Close it, or use it as a context manager.

    Attributes
    ----------
    path:
        As given.
    version:
        2 or 3 (they have the same layout); whatever was found if the file is refused for it.
    alignment:
        Of the data section and each tensor in it, bytes.
    kvs, tensors:
        By key and name, in the file's order. The first of two with the same name is kept.
    data_offset:
        Byte offset in the file of the data section; 0 if the header could not be read to its end.
    n_file_bytes:
        Size of the file.
    template:
        The file ends before its data section, and the caller allowed that.
    findings:
        All that is wrong or odd, in the file's order.
    """

    path: Path
    version: int = 0
    alignment: int = DEFAULT_ALIGNMENT
    kvs: dict[str, KV] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    data_offset: int = 0
    n_file_bytes: int = 0
    template: bool = False
    findings: list[Finding] = field(default_factory=list)
    _fd: int = field(default=-1, repr=False)

    def __post_init__(self) -> None:
        self._closer = weakref.finalize(self, os.close, self._fd) if self._fd >= 0 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the handle back; may be called twice. The header stays readable."""
        if self._closer is not None:
            self._closer()

    @property
    def paths(self) -> list[Path]:
        """The files that it lies in: one, or those of a split set."""
        return [self.path]

    @property
    def ok(self) -> bool:
        """No finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def value(self, key: str, default: Any = None) -> Any:  # noqa: ANN401  - a value of any of 13 types
        """Value of the metadata entry `key`, or `default` if there is none."""
        kv = self.kvs.get(key)
        return default if kv is None else kv.value

    def read_tensor_bytes(self, name: str, start: int = 0, n: int | None = None) -> NDArray[np.uint8]:
        """`n` bytes of a tensor's data from its byte `start` on (to its end by default), uint8 [n].

        Raises
        ------
        InputError
            There is no such tensor, or its data is not (all) in the file.
        UsageError
            The range is not inside the tensor, or the file was closed.
        ResourceError
            The read failed or came back short.
        """
        tensor = self._find(name)
        out = np.empty(max(tensor.n_bytes - start, 0) if n is None else max(n, 0), np.uint8)
        self.read_tensor_into(name, out, start)
        return out

    def read_tensor_into(self, name: str, out: NDArray[np.uint8], start: int = 0) -> None:
        """Fill the contiguous array `out` with a tensor's bytes from `start` on; errors of `read_tensor_bytes`."""
        tensor = self._find(name)
        where = f"{self.path}: {name}"
        end = start + out.nbytes
        if not out.flags.c_contiguous:
            raise UsageError(where, "the array to read into is not contiguous")
        if not 0 <= start <= end <= tensor.n_bytes:
            raise UsageError(where, f"bytes {start} to {end} were asked for, the tensor has {tensor.n_bytes}")
        if self._closer is None or not self._closer.alive:
            raise UsageError(where, "the file was closed")
        first = self.data_offset + tensor.offset
        if self.template or not self.data_offset or first + tensor.n_bytes > self.n_file_bytes:
            raise InputError(
                where, f"data ends at byte {first + tensor.n_bytes}, the file has {self.n_file_bytes} bytes"
            )
        if out.nbytes:
            read_into(self._fd, out.data.cast("B"), first + start, self.path)

    def _find(self, name: str) -> TensorInfo:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise InputError(self.path, f"has no tensor {name}")
        return tensor


def scan_gguf(path: str | os.PathLike[str], *, template: bool = False) -> GgufFile:
    """Read the header of `path` and report all that is wrong with the file; a bad file raises nothing.

    Parameters
    ----------
    path:
        A regular file or a link to one.
    template:
        Accept a file that ends where its data section would begin.

    Raises
    ------
    InputError
        There is no such file, or it is a directory, pipe or device.
    ResourceError
        Opening or reading it failed.
    """
    fd, n_file_bytes = open_regular(path)
    gguf = GgufFile(Path(path), n_file_bytes=n_file_bytes, _fd=fd)
    try:
        header = parse_header(fd, n_file_bytes, gguf.path, template=template)
    except BaseException:
        gguf.close()
        raise
    gguf.version, gguf.alignment = header.version, header.alignment
    gguf.kvs, gguf.tensors = header.kvs, header.tensors
    gguf.data_offset, gguf.template, gguf.findings = header.data_offset, header.template, header.findings
    return gguf


def open_gguf(path: str | os.PathLike[str], *, template: bool = False) -> GgufFile:
    """`scan_gguf`, raising InputError with the first error if the file is not right."""
    gguf = scan_gguf(path, template=template)
    errors = [finding for finding in gguf.findings if finding.severity == "error"]
    if errors:
        gguf.close()
        first = errors[0]
        hint = f"{len(errors) - 1} more errors in this file" if errors[1:] else ""
        raise InputError(f"{gguf.path}: {first.where}", f"{first.message} (byte {first.offset})", hint=hint)
    return gguf
