"""Tensor descriptors, the layout of their data, and the bytes of a GGUF header."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4tools.errors import InputError
from dsv4tools.gguf import rules
from dsv4tools.gguf.rules import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, VERSION, pad
from dsv4tools.gguf.values import KV, VALUE_TYPES, encode_string, encode_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dsv4tools.formats.table import Format


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor descriptor.

    Attributes
    ----------
    name:
        Unique in its file.
    ne:
        Dimensions, fastest first: a matrix of R rows and C columns is ``(C, R)``.
    format:
        ggml type.
    offset:
        First byte, counted from the start of the data section.
    """

    name: str
    ne: tuple[int, ...]
    format: Format
    offset: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the data, without padding."""
        return self.format.n_bytes(self.ne, self.name)


def descriptor_bytes(tensor: TensorInfo) -> int:
    """Bytes that a tensor's descriptor takes in a header: name, dimensions, type, offset."""
    return 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.ne) + 4 + 8


def lay_out(sizes: Sequence[int], alignment: int = DEFAULT_ALIGNMENT) -> tuple[list[int], int]:
    """Offsets of tensors of `sizes` bytes, one after the other, each padded; and the bytes that they take in all.

    The last tensor is padded too: loaders read whole padded extents.
    """
    offsets = []
    end = 0
    for size in sizes:
        offsets.append(end)
        end += pad(size, alignment)
    return offsets, end


def encode_header(kvs: Sequence[KV], tensors: Sequence[TensorInfo], alignment: int = DEFAULT_ALIGNMENT) -> bytes:
    """Everything of a GGUF file before its data, padded with zeros to `alignment`.

    Empty strings and empty arrays are written like any other. An `alignment` other than 32 must also be among the
    metadata, since readers know it from there only.

    Raises
    ------
    InputError
        For whatever the strict reader would refuse: duplicate, empty or too long keys and names, values that do not
        fit their type, shapes that overflow or break a block, offsets other than those of `lay_out`.
    """
    _check_alignment(kvs, alignment)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(kvs))]
    seen: set[str] = set()
    for kv in kvs:
        raw = encode_string(kv.key, "metadata key")
        _refuse(rules.check_key(raw[8:]), kv.key)
        if kv.key in seen:
            raise InputError(kv.key, "metadata key appears twice, expected once")
        seen.add(kv.key)
        value = encode_value(kv)
        parts += [raw, VALUE_TYPES[kv.type].type_id.to_bytes(4, "little"), value]

    seen.clear()
    for tensor in tensors:
        raw = encode_string(tensor.name, "tensor name")
        _refuse(rules.check_name(raw[8:]), tensor.name)
        if tensor.name in seen:
            raise InputError(tensor.name, "tensor name appears twice, expected once")
        seen.add(tensor.name)
        _refuse(rules.check_shape(tensor.ne, tensor.format), tensor.name)
        n_dims = len(tensor.ne)
        parts += [raw, struct.pack(f"<I{n_dims}Q", n_dims, *tensor.ne)]
        if not 0 <= tensor.offset <= rules.MAX_INT64:
            raise InputError(tensor.name, f"offset is {tensor.offset}, expected 0 to {rules.MAX_INT64}")
        parts.append(struct.pack("<IQ", tensor.format.type_id, tensor.offset))

    offsets, n_data_bytes = lay_out([tensor.n_bytes for tensor in tensors], alignment)
    for tensor, offset in zip(tensors, offsets, strict=True):
        if tensor.offset != offset:
            raise InputError(tensor.name, f"offset is {tensor.offset}, expected {offset}, the end of the tensor before")
    header = b"".join(parts)
    n_bytes = pad(len(header), alignment)
    if n_bytes > rules.MAX_HEADER_BYTES:
        raise InputError("header", f"takes {n_bytes} bytes, expected at most {rules.MAX_HEADER_BYTES}")
    if n_bytes + n_data_bytes > rules.MAX_INT64:
        raise InputError("header", f"the tensors take {n_data_bytes} bytes, more than a file can hold")
    return header.ljust(n_bytes, b"\0")


def _check_alignment(kvs: Sequence[KV], alignment: int) -> None:
    _refuse(rules.check_alignment("u32", alignment), "alignment")
    stated = DEFAULT_ALIGNMENT
    for kv in kvs:
        if kv.key == ALIGNMENT_KEY:
            _refuse(rules.check_alignment(kv.type, kv.value), ALIGNMENT_KEY)
            stated = kv.value
    if stated != alignment:
        raise InputError(ALIGNMENT_KEY, f"the metadata say {stated}, the call says {alignment}; they must agree")


def _refuse(faults: Iterable[rules.Fault], where: str) -> None:
    for fault in faults:
        if fault.severity == "error":
            raise InputError(where, fault.message)
