"""What a GGUF header may say: the limits, and one function per kind of thing that they bound.

The reader reports what these functions find, the encoder refuses it; neither has rules of its own about keys,
names, shapes or alignments. Limits are those of ggml's loader (gguf.cpp, ggml.h) where it has one.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from dsv4tools.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dsv4tools.formats.table import Format

Severity = Literal["error", "warning"]

MAGIC = b"GGUF"
VERSION = 3                        # what is written; version 2 has the same layout and is read too
READABLE_VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20            # the padding of a header must not become an attack on memory
MAX_KEY_BYTES = 65_535             # the specification's limit
MAX_NAME_BYTES = 63                # ggml keeps names in 64 bytes, one of them the final zero
MAX_DIMS = 4
MAX_HEADER_BYTES = 128 << 20       # published headers of 130,000-token vocabularies take about 6 MB
MAX_INT64 = (1 << 63) - 1          # file offsets and ggml's sizes are signed


class Fault(NamedTuple):
    """A broken rule: how bad, a stable slug, and the sentence."""

    severity: Severity
    code: str
    message: str


def pad(n_bytes: int, alignment: int) -> int:
    """`n_bytes` rounded up to a multiple of `alignment`."""
    return -(-n_bytes // alignment) * alignment


def check_key(raw: bytes) -> Iterator[Fault]:
    """Faults of a metadata key."""
    if not raw:
        yield Fault("error", "key-empty", "key is empty")
    if len(raw) > MAX_KEY_BYTES:
        yield Fault("error", "key-too-long", f"key has {len(raw)} bytes, expected at most {MAX_KEY_BYTES}")
    yield from _check_text(raw, "key")


def check_name(raw: bytes) -> Iterator[Fault]:
    """Faults of a tensor name."""
    if not raw:
        yield Fault("error", "name-empty", "tensor name is empty")
    if len(raw) > MAX_NAME_BYTES:
        yield Fault("error", "name-too-long", f"tensor name has {len(raw)} bytes, expected at most {MAX_NAME_BYTES}")
    yield from _check_text(raw, "name")


def _check_text(raw: bytes, kind: str) -> Iterator[Fault]:
    if 0 in raw:
        # Loaders in C see the text up to the zero, others all of it: two names for one thing.
        yield Fault("error", f"{kind}-nul", "contains a zero byte, expected printable text")
    elif not raw.isascii():
        yield Fault("warning", f"{kind}-charset", "is not ASCII, as the specification asks")
    elif not raw.decode().isprintable():
        yield Fault("warning", f"{kind}-charset", "contains control characters")


def check_alignment(value_type: str, value: object) -> Iterator[Fault]:
    """Faults of the metadata entry ``general.alignment``."""
    if value_type != "u32" or not isinstance(value, int):
        yield Fault("error", "alignment-type", f"has type {value_type}, expected u32")
    elif value < 1 or value & (value - 1):
        yield Fault("error", "alignment", f"is {value}, expected a power of two")
    elif value > MAX_ALIGNMENT:
        yield Fault("error", "alignment-too-big", f"is {value}, expected at most {MAX_ALIGNMENT}")
    elif value % 8:
        yield Fault("warning", "alignment-not-8", f"is {value}, the specification asks for a multiple of 8")


def check_shape(ne: Sequence[int], tensor_format: Format | None) -> Iterator[Fault]:
    """Faults of a tensor's dimensions (fastest first); `tensor_format` is None where the type is unknown."""
    if len(ne) > MAX_DIMS:
        yield Fault("error", "tensor-n-dims", f"has {len(ne)} dimensions, expected at most {MAX_DIMS}")
        return
    if not ne:
        yield Fault("warning", "tensor-no-dims", "has no dimensions, which some loaders refuse")
    for axis, n in enumerate(ne):
        if not 0 <= n <= MAX_INT64:
            yield Fault("error", "tensor-shape", f"dimension {axis} is {n}, expected 0 to {MAX_INT64}")
            return
    # Zeros are left out of the product: a loader that multiplies in 64 bits wraps before it meets them.
    if prod(n for n in ne if n) > MAX_INT64:
        yield Fault("error", "tensor-too-big", f"shape {list(ne)} holds more than {MAX_INT64} values")
        return
    if 0 in ne:
        yield Fault("warning", "tensor-zero-dim", f"shape {list(ne)} holds no values")
    if tensor_format is None:
        return
    try:
        n_bytes = tensor_format.n_bytes(ne)
    except InputError as error:
        yield Fault("error", "tensor-row", error.what)
        return
    if n_bytes > MAX_INT64:
        yield Fault("error", "tensor-too-big", f"{tensor_format.name} {list(ne)} takes more than {MAX_INT64} bytes")
