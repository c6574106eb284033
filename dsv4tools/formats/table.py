"""The table of ggml tensor types: name, id, block. Everything else about a type derives from its row.

Ids and block sizes are those of ggml.h and ggml-common.h (ggml 0.25); ids 4, 5, 31-33 and 36-38 were removed
from ggml and are refused. No numba here: readers and planners need sizes, not kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from dsv4tools.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Format:
    """One ggml type.

    Attributes
    ----------
    name:
        As the field writes it: ``Q4_K``.
    type_id:
        The number in a GGUF tensor descriptor.
    block_values, block_bytes:
        A row is a whole number of blocks of `block_values` values, `block_bytes` bytes each.
    file_type:
        llama.cpp's LLAMA_FTYPE for a file mostly of this type, None where there is none.
    """

    name: str
    type_id: int
    block_values: int
    block_bytes: int
    file_type: int | None = None

    @property
    def bits_per_value(self) -> float:
        """Storage cost, block scales included."""
        return 8 * self.block_bytes / self.block_values

    def row_bytes(self, n_cols: int, where: object = "row") -> int:
        """Bytes of a row of `n_cols` values; InputError if it is not a whole number of blocks."""
        n_blocks, rest = divmod(n_cols, self.block_values)
        if rest or n_cols < 0:
            raise InputError(
                where, f"{n_cols} columns are not a whole number of {self.name} blocks of {self.block_values} values"
            )
        return n_blocks * self.block_bytes

    def n_bytes(self, ne: Sequence[int], where: object = "tensor") -> int:
        """Bytes of a tensor with GGUF dimensions `ne` (fastest first)."""
        return self.row_bytes(ne[0] if ne else 1, where) * prod(ne[1:])


_ROWS = (
    Format("F32", 0, 1, 4, 0),
    Format("F16", 1, 1, 2, 1),
    Format("Q4_0", 2, 32, 18, 2),
    Format("Q4_1", 3, 32, 20, 3),
    Format("Q5_0", 6, 32, 22, 8),
    Format("Q5_1", 7, 32, 24, 9),
    Format("Q8_0", 8, 32, 34, 7),
    Format("Q8_1", 9, 32, 36),
    Format("Q2_K", 10, 256, 84, 10),
    Format("Q3_K", 11, 256, 110, 11),
    Format("Q4_K", 12, 256, 144, 14),
    Format("Q5_K", 13, 256, 176, 16),
    Format("Q6_K", 14, 256, 210, 18),
    Format("Q8_K", 15, 256, 292),
    Format("IQ2_XXS", 16, 256, 66, 19),
    Format("IQ2_XS", 17, 256, 74, 20),
    Format("IQ3_XXS", 18, 256, 98, 23),
    Format("IQ1_S", 19, 256, 50, 24),
    Format("IQ4_NL", 20, 32, 18, 25),
    Format("IQ3_S", 21, 256, 110, 26),
    Format("IQ2_S", 22, 256, 82, 28),
    Format("IQ4_XS", 23, 256, 136, 30),
    Format("I8", 24, 1, 1),
    Format("I16", 25, 1, 2),
    Format("I32", 26, 1, 4),
    Format("I64", 27, 1, 8),
    Format("F64", 28, 1, 8),
    Format("IQ1_M", 29, 256, 56, 31),
    Format("BF16", 30, 1, 2, 32),
    Format("TQ1_0", 34, 256, 54, 36),
    Format("TQ2_0", 35, 256, 66, 37),
    Format("MXFP4", 39, 32, 17, 38),
    Format("NVFP4", 40, 64, 36, 39),
    Format("Q1_0", 41, 128, 18, 40),
    Format("Q2_0", 42, 64, 18, 41),
)

FORMATS: dict[str, Format] = {f.name: f for f in _ROWS}
BY_ID: dict[int, Format] = {f.type_id: f for f in _ROWS}
REMOVED_IDS = frozenset({4, 5, 31, 32, 33, 36, 37, 38})


def _fold(name: str) -> str:
    return name.replace("_", "").replace("-", "").upper()


_BY_FOLDED = {_fold(name): f for name, f in FORMATS.items()}


def find_format(name: str) -> Format:
    """The format called `name`, in any case, with or without its underscore; UsageError names the known ones."""
    found = _BY_FOLDED.get(_fold(name))
    if found is None:
        raise UsageError("type", f"unknown ggml type {name!r}, known are {', '.join(FORMATS)}")
    return found
