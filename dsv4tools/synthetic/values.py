"""Random values in the number formats of the checkpoint. Numpy only: nothing here shares code with the converter."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.synthetic.layout import Draw
from dsv4tools.synthetic.shapes import FP4_GROUP

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from dsv4tools.synthetic.layout import TensorRow
    from dsv4tools.synthetic.shapes import Shape

_E2M1_MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
"""Halfway between the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 of FP4."""


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest BF16, ties to even; finite input."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def encode_e4m3(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Nearest F8_E4M3 code (OCP MX specification: bias 7, no infinity), ties to the even code; `x` within +-448."""
    bits = np.abs(x).view(np.uint32)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20  # float32's exponent and the upper 3 bits of its fraction
    normal = rounded - ((127 - 7) << 3)  # wraps below 2**-6, where the codes are multiples of 2**-9
    codes = np.where(bits < np.float32(2**-6).view(np.uint32), np.rint(np.abs(x) * 512).astype(np.uint32), normal)
    return codes.astype(np.uint8) | (np.signbit(x).astype(np.uint8) << np.uint8(7))


def quantize_fp8(w: NDArray[np.float32], block: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """F8_E4M3 codes [rows, cols] and E8M0 scales [ceil(rows / block), ceil(cols / block)] of a float matrix.

    The scale is the least power of two that brings a block's magnitudes to 448 or below.
    """
    (rows, cols), (block_rows, block_cols) = w.shape, block
    n_down, n_across = -(-rows // block_rows), -(-cols // block_cols)
    padded = np.zeros((n_down * block_rows, n_across * block_cols), np.float32)
    padded[:rows, :cols] = w
    blocks = padded.reshape(n_down, block_rows, n_across, block_cols)
    exponents = _exponents(np.abs(blocks).max((1, 3)), 448)
    codes = encode_e4m3(blocks * _powers_of_two(-exponents)[:, None, :, None]).reshape(padded.shape)
    return np.ascontiguousarray(codes[:rows, :cols]), (exponents + 127).astype(np.uint8)


def quantize_fp4(w: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """Packed E2M1 codes [rows, cols / 2], low nibble the even column, and E8M0 scales [rows, cols / 32]."""
    rows, cols = w.shape
    groups = w.reshape(rows, cols // FP4_GROUP, FP4_GROUP)
    exponents = _exponents(np.abs(groups).max(-1), 6)
    magnitudes = np.abs(groups) * _powers_of_two(-exponents)[..., None]
    codes = np.searchsorted(_E2M1_MIDPOINTS, magnitudes).astype(np.uint8)  # a tie goes to the lower magnitude
    codes |= np.signbit(groups).astype(np.uint8) << 3
    codes = codes.reshape(rows, cols)
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(np.int8), (exponents + 127).astype(np.uint8)


def _exponents(largest: NDArray[np.float32], top: float) -> NDArray[np.int32]:
    """The least e with largest / top <= 2**e; from the bits, because log2 rounds as the CPU likes."""
    fraction, exponent = np.frexp(np.maximum(largest, np.float32(1e-12)) / np.float32(top))
    exponent[fraction == 0.5] -= 1
    return exponent.astype(np.int32)


def _powers_of_two(exponents: NDArray[np.int32]) -> NDArray[np.float32]:
    return np.ldexp(np.float32(1), exponents)


def quantized_values(shape: Shape, rows: Iterable[TensorRow], seed: int) -> Iterator[NDArray[Any]]:
    """Values of `rows`, in order: matrices are drawn as floats, then quantized as the publisher would."""
    rng = np.random.default_rng(seed)
    for row in rows:
        if row.draw is Draw.MATRIX:
            logical = (row.shape[0], row.fan)
            w = rng.standard_normal(logical).astype(np.float32) * np.float32(row.gain / sqrt(row.fan))
            yield from quantize_fp4(w) if row.dtype == "I8" else quantize_fp8(w, shape.fp8_block)
        elif row.draw is not Draw.SCALES:  # those came with their matrix
            yield plain_values(row, rng)


def plain_values(row: TensorRow, rng: np.random.Generator) -> NDArray[Any]:
    """Values of a tensor that is stored as it is drawn: BF16 (as bits), F32 or I64."""
    if row.draw is Draw.EXPERT_IDS:
        n_tokens, per_token = row.shape
        return np.stack([rng.permutation(row.fan)[:per_token] for _ in range(n_tokens)]).astype(np.int64)
    if row.draw is Draw.UNIFORM:
        return (0.5 + rng.random(row.shape)).astype(np.float32)
    x = rng.standard_normal(row.shape).astype(np.float32)
    # Python floats keep float32 arithmetic float32, and this order of operations is part of the bytes that tests pin.
    x = row.gain * (1 + 0.2 * x) if row.draw is Draw.AROUND_ONE else row.gain * x / sqrt(row.fan)
    return to_bf16(x) if row.dtype == "BF16" else x


_FP8_CODES = encode_e4m3(
    np.array([NormalDist(0, 150).inv_cdf((i + 0.5) / 256) for i in range(256)], np.float32)
).tobytes()
"""Byte -> F8_E4M3 code: uniform bytes become normally distributed codes, the largest 448. No NaN code among them."""
_FP4_SCALES = range(117, 121)  # 2**-10 to 2**-7: with uniform codes (much like a normal of deviation 2.7) plausible
_FP8_SCALES = range(112, 116)  # 2**-15 to 2**-12: likewise, with codes of deviation 150


def cheap_values(rows: Iterable[TensorRow], seed: int) -> Iterator[NDArray[Any]]:
    """Values of `rows`, in order: codes and scales are drawn as bytes, several times faster than quantizing."""
    rng = np.random.default_rng(seed)
    scales = _FP8_SCALES
    for row in rows:
        if row.draw is Draw.MATRIX:
            scales = _FP4_SCALES if row.dtype == "I8" else _FP8_SCALES
            raw = _random_bytes(rng, row.n_bytes)
            codes = raw if row.dtype == "I8" else np.frombuffer(raw.tobytes().translate(_FP8_CODES), np.uint8)
            yield codes
        elif row.draw is Draw.SCALES:
            yield (_random_bytes(rng, row.n_bytes) & 3) + np.uint8(scales.start)
        else:
            yield plain_values(row, rng)


def _random_bytes(rng: np.random.Generator, n_bytes: int) -> NDArray[np.uint8]:
    words = np.asarray(rng.bit_generator.random_raw(-(-n_bytes // 8)), "<u8")
    return words.view(np.uint8)[:n_bytes]
