"""Bits of single values: float32 as uint32 and back, little-endian words in byte arrays, F16 and BF16.

numba has no float16, and LLVM's own conversion needs an instruction or a library routine that not every processor or
platform has. The integer forms below are exact everywhere, and loops over them still become vector code. The same
formulas over lanes are in `lanes`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from dsv4tools.formats.compile import helper, instruction

_WORD = {types.uint16: ir.IntType(16), types.uint32: ir.IntType(32)}

# An intrinsic is a numba type rule plus the LLVM instructions for it: numba calls both with its own objects.


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, word: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(cgutils.gep_inbounds(builder, data, offset), word.as_pointer())


def _loader(word: Any) -> Any:
    def load(typing: Any, array: Any, offset: Any) -> Any:
        def emit(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            value = builder.load(_pointer(context, builder, array, args[0], args[1], _WORD[word]))
            value.align = 1
            return value

        return word(array, types.int64), emit

    load.__doc__ = f"The {word} that starts at byte `offset` of a byte array, at any alignment, unchecked."
    return instruction(load)


def _storer(word: Any) -> Any:
    def store(typing: Any, array: Any, offset: Any, value: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            cast = context.cast(builder, args[2], signature.args[2], word)
            pointer = _pointer(context, builder, array, args[0], args[1], _WORD[word])
            builder.store(cast, pointer).align = 1
            return context.get_dummy_value()

        return types.void(array, types.int64, value), emit

    store.__doc__ = f"Put a {word} at byte `offset` of a byte array, at any alignment, unchecked."
    return instruction(store)


load_u16 = _loader(types.uint16)
load_u32 = _loader(types.uint32)
store_u16 = _storer(types.uint16)
store_u32 = _storer(types.uint32)


@instruction
def float_bits(typing: Any, value: Any) -> Any:
    """The uint32 with the bits of a float32."""
    if value != types.float32:
        return None

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), emit


@instruction
def bits_float(typing: Any, value: Any) -> Any:
    """The float32 with the bits of a uint32."""
    if not isinstance(value, types.Integer):
        return None

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), emit


@helper
def is_finite(value: np.float32) -> bool:
    """Whether a float32 is neither NaN nor infinite."""
    return (float_bits(value) & np.uint32(0x7F800000)) != np.uint32(0x7F800000)


@helper
def f16_to_float(half: np.uint16) -> np.float32:
    """The float32 that equals an F16 given as uint16 bits."""
    magnitude = np.uint32(half & 0x7FFF)
    sign = np.uint32(np.uint32(half & 0x8000) << np.uint32(16))
    moved = np.uint32(magnitude << np.uint32(13))
    normal = np.uint32(moved + np.uint32(0x38000000))                      # exponent bias 15 -> 127
    special = np.uint32(moved + np.uint32(0x70000000))                     # infinity and NaN
    small = float_bits(np.float32(np.int32(magnitude)) * np.float32(2.0**-24))
    bits = normal if magnitude >= np.uint32(0x0400) else small
    return bits_float(np.uint32(sign | (special if magnitude >= np.uint32(0x7C00) else bits)))


@helper
def float_to_f16(value: np.float32) -> np.uint16:
    """The uint16 bits of the F16 nearest to a float32, ties to even; NaN becomes 0x7E00 with its sign."""
    bits = float_bits(value)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(magnitude - np.uint32(0x38000000) + np.uint32(0x0FFF) + odd) >> np.uint32(13))
    # Below 2^-14 the spacing is that of float32 at 0.5: let the addition round.
    small = np.uint32(float_bits(bits_float(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000))
    half = normal if magnitude >= np.uint32(0x38800000) else small
    half = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else half      # 65520 and above
    half = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else half
    return np.uint16(sign | half)


@helper
def float_to_bf16(value: np.float32) -> np.uint16:
    """The uint16 bits of the BF16 nearest to a float32, ties to even; NaN is made quiet."""
    bits = float_bits(value)
    upper = np.uint32(bits >> np.uint32(16))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + np.uint32(upper & np.uint32(1))) >> np.uint32(16))
    is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(np.uint32(upper | np.uint32(64)) if is_nan else rounded)


@helper
def bf16_to_float(bits: np.uint16) -> np.float32:
    """The float32 that equals a BF16 given as uint16 bits."""
    return bits_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@helper
def e8m0_to_float(code: np.uint8) -> np.float32:
    """The scale 2^(code - 127) of an E8M0 byte; code 255 is NaN (OCP Microscaling Formats 1.0, section 5.4.1)."""
    bits = np.uint32(np.uint32(code) << np.uint32(23))
    bits = np.uint32(0x00400000) if code == 0 else bits
    return bits_float(np.uint32(0x7FC00000) if code == 255 else bits)


@helper
def e4m3_to_float(code: np.uint8) -> np.float32:
    """The float32 that equals an F8_E4M3 byte (e4m3fn: bias 7, no infinities, NaN at 0x7F and 0xFF)."""
    magnitude = np.uint32(code & 0x7F)
    sign = np.uint32(np.uint32(code & 0x80) << np.uint32(24))
    normal = np.uint32(np.uint32(magnitude << np.uint32(20)) + np.uint32(0x3C000000))       # exponent bias 7 -> 127
    small = float_bits(np.float32(np.int32(magnitude)) * np.float32(2.0**-9))
    bits = normal if magnitude >= np.uint32(8) else small
    return bits_float(np.uint32(sign | (np.uint32(0x7FC00000) if magnitude == np.uint32(0x7F) else bits)))


@helper
def e2m1_to_float(code: np.uint8) -> np.float32:
    """The float32 of an FP4 (E2M1) code 0..15. Code 8 is +0.0: the C tool's table says so, and F32 output shows it."""
    magnitude = np.uint32(code & 7)
    sign = np.uint32(np.uint32(code & 8) << np.uint32(28))
    large = np.uint32(np.uint32(magnitude << np.uint32(22)) + np.uint32(0x3F000000))        # 1 and above
    small = float_bits(np.float32(np.int32(magnitude)) * np.float32(0.5))
    bits = large if magnitude >= np.uint32(2) else small
    return bits_float(np.uint32(np.uint32(0) if magnitude == np.uint32(0) else sign | bits))
