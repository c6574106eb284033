"""Where the scales of a block lie, and what can be wrong with them. Plain numpy: scales are few.

Offsets are those of the block structures in ggml-common.h (ggml 0.25). A scale that is NaN or infinite makes every
value of its block so: ggml's own check of quantized data (ggml_validate_row_data) refuses exactly these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.formats.table import Format

_INFINITY = {"f16": 0x7C00, "f32": 0x7F800000, "nibbles": 0x7C00, "e8m0": 255}   # and NaN from here on
_MAGNITUDE = {"f16": 0x7FFF, "f32": 0x7FFFFFFF, "nibbles": 0x7FFF, "e8m0": 255}   # all bits but the sign
_SMALLEST = {"f16": 0x0400, "f32": 0x00800000, "nibbles": 0x0400}    # normal number
_N_NAMED = 8   # blocks that are named; the rest is counted


@dataclass(frozen=True, slots=True)
class ScaleField:
    """One scale of a block: its name in ggml, its byte in the block, and how it is stored.

    As f16, f32 or e8m0, or as IQ1_M has it: a float16 in the highest four bits of each of four words.
    """

    name: str
    offset: int
    kind: str = "f16"

    @property
    def n_bytes(self) -> int:
        """Bytes that it takes."""
        return {"f16": 2, "f32": 4, "e8m0": 1, "nibbles": 8}[self.kind]


def _at(**offsets: int) -> tuple[ScaleField, ...]:
    return tuple(ScaleField(name, offset) for name, offset in offsets.items())


# Types that are missing have no block scale, or (NVFP4) one that is finite whatever its bits are.
SCALE_FIELDS: dict[str, tuple[ScaleField, ...]] = {
    "Q4_0": _at(d=0), "Q4_1": _at(d=0, m=2), "Q5_0": _at(d=0), "Q5_1": _at(d=0, m=2), "Q8_0": _at(d=0),
    "Q8_1": _at(d=0, s=2), "Q2_K": _at(d=80, dmin=82), "Q3_K": _at(d=108), "Q4_K": _at(d=0, dmin=2),
    "Q5_K": _at(d=0, dmin=2), "Q6_K": _at(d=208), "Q8_K": (ScaleField("d", 0, "f32"),), "IQ2_XXS": _at(d=0),
    "IQ2_XS": _at(d=0), "IQ3_XXS": _at(d=0), "IQ1_S": _at(d=0), "IQ4_NL": _at(d=0), "IQ3_S": _at(d=0),
    "IQ2_S": _at(d=0), "IQ4_XS": _at(d=0), "TQ1_0": _at(d=52), "TQ2_0": _at(d=64),
    "MXFP4": (ScaleField("e", 0, "e8m0"),), "Q1_0": _at(d=0), "Q2_0": _at(d=0),
    "IQ1_M": (ScaleField("d", 48, "nibbles"),),
}  # fmt: skip


@dataclass(slots=True)
class ScaleCounts:
    """What the scales of a run of blocks are like.

    Attributes
    ----------
    n_blocks:
        How many blocks there were.
    n_not_finite:
        Blocks with a scale that is NaN or infinite.
    n_zero:
        Blocks whose scales are all zero: every value of them is.
    n_subnormal:
        Blocks whose first scale is a subnormal F16: it has fewer than eleven bits.
    faults:
        ``(block, what is wrong)`` of the first blocks that are not finite.
    """

    n_blocks: int = 0
    n_not_finite: int = 0
    n_zero: int = 0
    n_subnormal: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: ScaleCounts) -> None:
        """Take another run's counts in."""
        self.n_blocks += other.n_blocks
        self.n_not_finite += other.n_not_finite
        self.n_zero += other.n_zero
        self.n_subnormal += other.n_subnormal
        self.faults = sorted([*self.faults, *other.faults])[:_N_NAMED]


def find_field(target: Format, byte: int) -> ScaleField | None:
    """The scale that byte `byte` of a block belongs to."""
    fields = SCALE_FIELDS.get(target.name, ())
    return next((f for f in fields if f.offset <= byte < f.offset + f.n_bytes), None)


def check_scales(data: NDArray[np.uint8], target: Format, first_block: int = 0) -> ScaleCounts:
    """Look at the scales of whole blocks, uint8 [n * block_bytes]; `first_block` is the number of the first."""
    blocks = data.reshape(-1, target.block_bytes)
    counts = ScaleCounts(len(blocks))
    zero: NDArray[np.bool_] | None = None
    bad = np.zeros(len(blocks), np.bool_)
    for number, each in enumerate(SCALE_FIELDS.get(target.name, ())):
        magnitude = _magnitude(blocks, each)
        bad |= magnitude >= _INFINITY[each.kind]
        if each.kind == "e8m0":   # there is no zero
            continue
        is_zero = magnitude == 0
        zero = is_zero if zero is None else zero & is_zero
        if number == 0:
            counts.n_subnormal = int(np.count_nonzero(magnitude < _SMALLEST[each.kind]) - np.count_nonzero(is_zero))
    counts.n_zero = int(np.count_nonzero(zero)) if zero is not None else 0
    counts.n_not_finite = int(np.count_nonzero(bad))
    if counts.n_not_finite:
        counts.faults = [(first_block + int(i), _describe(blocks[i], target)) for i in np.flatnonzero(bad)[:_N_NAMED]]
    return counts


def not_finite(data: NDArray[np.uint8], target: Format) -> NDArray[np.bool_]:
    """Which of these whole blocks have a scale that is NaN or infinite, bool [n]; none of a type without scales."""
    blocks = data.reshape(-1, target.block_bytes)
    bad = np.zeros(len(blocks), np.bool_)
    for each in SCALE_FIELDS.get(target.name, ()):
        bad |= _magnitude(blocks, each) >= _INFINITY[each.kind]
    return bad


def _magnitude(blocks: NDArray[np.uint8], each: ScaleField) -> NDArray[np.unsignedinteger]:
    """The bits of one scale of each block, without the sign."""
    stored = blocks[:, each.offset : each.offset + each.n_bytes]
    if each.kind == "nibbles":
        bits: NDArray[np.unsignedinteger] = _join_nibbles(np.ascontiguousarray(stored))
    else:   # a view of numbers that lie apart, copied once: byte by byte it takes three times as long
        bits = np.ascontiguousarray(stored.view(f"<u{each.n_bytes}")[:, 0])
    return np.bitwise_and(bits, bits.dtype.type(_MAGNITUDE[each.kind]), out=bits if bits.flags.owndata else None)


def _join_nibbles(stored: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """The bits of float16 whose four nibbles, the lowest first, stand highest in the four words of each row."""
    words = stored.view("<u2") >> 12
    bits: NDArray[np.uint16] = (words << np.arange(0, 16, 4, dtype=np.uint16)).sum(axis=1, dtype=np.uint16)
    return bits


def _describe(block: NDArray[np.uint8], target: Format) -> str:
    wrong = []
    for each in SCALE_FIELDS[target.name]:
        raw = block[each.offset : each.offset + each.n_bytes].tobytes()
        if each.kind == "nibbles":
            raw = _join_nibbles(np.frombuffer(raw, np.uint8)[None]).astype("<u2").tobytes()
        if each.kind == "e8m0":
            value = np.nan if raw[0] == _INFINITY["e8m0"] else 1.0
        else:
            value = float(np.frombuffer(raw, "<f4" if each.kind == "f32" else "<f2")[0])
        if not np.isfinite(value):
            wrong.append(f"{each.name} is {'NaN' if np.isnan(value) else 'infinite'}")
    return " and ".join(wrong)
