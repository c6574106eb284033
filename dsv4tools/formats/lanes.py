"""A lane type for numba: W values side by side in vector registers, in kernels that read like the scalar formula.

Where the order of a sum is fixed, a compiler cannot use vector registers along it. It can across: lane k works on
block k, every lane does what the scalar formula does, in its order, and W blocks are done at once. `Lanes` are LLVM
vectors ``<W x float>``, ``<W x i32>`` or ``<W x i1>`` (a mask); any width compiles on any processor, a wide vector
becomes as many registers as it needs, and the bytes that come out never depend on W.

In kernels: ``+ - * /``, comparisons, ``& | ^ << >>`` on integer lanes, ``& | ~`` on masks. Numbers mix with lanes and
become float32 (or int32) first. Nothing is contracted, reordered or approximated. There is no conversion from float
to integer: on values out of range its result depends on the processor (see `rounded`).
"""

from __future__ import annotations

import operator
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.typeconv import Conversion
from numba.extending import intrinsic, lower_builtin, lower_cast, models, register_model, type_callable

from dsv4tools.errors import UsageError
from dsv4tools.formats.compile import helper

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _choose_width() -> int:
    """Lanes that keep the arithmetic units busy without running out of registers; DSV4TOOLS_LANES overrides it."""
    chosen = os.environ.get("DSV4TOOLS_LANES")
    if chosen is not None:
        if chosen not in ("8", "16", "32", "64"):
            raise UsageError("DSV4TOOLS_LANES", f"found {chosen!r}, expected 8, 16 or 32")
        return int(chosen)
    features = binding.get_host_cpu_features()
    return 32 if features.get("avx512f") else 16 if features.get("avx2") else 8


WIDTH = _choose_width()

_F32, _I32, _I1, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(1), ir.IntType(8)


class LanesType(types.Type):  # type: ignore[misc]  # numba has no types
    """`WIDTH` lanes of one element: "float32", "int32" or "mask"."""

    def __init__(self, element: str) -> None:
        self.element = element
        super().__init__(name=f"Lanes({element} x {WIDTH})")

    def can_convert_from(self, _typing: Any, other: Any) -> Any:  # noqa: ANN401  - numba's interface
        """A number next to lanes fills all of them."""
        if self.element == "float32" and isinstance(other, (types.Float, types.Integer)):
            return Conversion.unsafe
        if self.element == "int32" and isinstance(other, types.Integer):
            return Conversion.unsafe
        return None


F32 = LanesType("float32")
I32 = LanesType("int32")
MASK = LanesType("mask")
_VECTOR = {F32: ir.VectorType(_F32, WIDTH), I32: ir.VectorType(_I32, WIDTH), MASK: ir.VectorType(_I1, WIDTH)}


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]  # numba has no types
    def __init__(self, dmm: Any, fe_type: Any) -> None:  # noqa: ANN401  - numba's interface
        super().__init__(dmm, fe_type, _VECTOR[fe_type])


def _fill(builder: Any, value: Any) -> Any:  # noqa: ANN401  - LLVM values have no types
    vector = ir.VectorType(value.type, WIDTH)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    mask = ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)


@lower_cast(types.Float, F32)
@lower_cast(types.Integer, F32)
def _cast_to_f32(context: Any, builder: Any, fromty: Any, _toty: Any, value: Any) -> Any:  # noqa: ANN401  - numba's interface
    return _fill(builder, context.cast(builder, value, fromty, types.float32))


@lower_cast(types.Integer, I32)
def _cast_to_i32(context: Any, builder: Any, fromty: Any, _toty: Any, value: Any) -> Any:  # noqa: ANN401  - numba's interface
    return _fill(builder, context.cast(builder, value, fromty, types.int32))


def _operator(symbol: Any, operands: Any, result: Any, emit: Any) -> None:  # noqa: ANN401  - numba's interface
    """Make `symbol` on two lanes of type `operands`, or lanes and a number, give lanes of type `result`."""

    @type_callable(symbol)
    def _typer(_context: Any) -> Any:  # noqa: ANN401
        def typer(a: Any, b: Any) -> Any:  # noqa: ANN401
            if operands not in (a, b):
                return None
            other = b if a == operands else a
            fits = other == operands or operands.can_convert_from(None, other) is not None
            return result(operands, operands) if fits else None

        return typer

    @lower_builtin(symbol, operands, operands)
    def _lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:  # noqa: ANN401
        return emit(builder, *args)


for _symbol, _emit in {
    operator.add: lambda b, x, y: b.fadd(x, y),
    operator.sub: lambda b, x, y: b.fsub(x, y),
    operator.mul: lambda b, x, y: b.fmul(x, y),
    operator.truediv: lambda b, x, y: b.fdiv(x, y),
}.items():
    _operator(_symbol, F32, F32, _emit)

for _symbol, _emit in {
    operator.add: lambda b, x, y: b.add(x, y),
    operator.sub: lambda b, x, y: b.sub(x, y),
    operator.and_: lambda b, x, y: b.and_(x, y),
    operator.or_: lambda b, x, y: b.or_(x, y),
    operator.xor: lambda b, x, y: b.xor(x, y),
    operator.lshift: lambda b, x, y: b.shl(x, y),
    operator.rshift: lambda b, x, y: b.lshr(x, y),   # logical: the sign bit is a bit like others
}.items():
    _operator(_symbol, I32, I32, _emit)

for _symbol, _sign in {
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!=",
}.items():  # fmt: skip
    # As in C: comparisons with NaN are false, except that != is true.
    _compare = "fcmp_unordered" if _sign == "!=" else "fcmp_ordered"
    _operator(_symbol, F32, MASK, lambda b, x, y, sign=_sign, name=_compare: getattr(b, name)(sign, x, y))
    _operator(_symbol, I32, MASK, lambda b, x, y, sign=_sign: b.icmp_signed(sign, x, y))

_operator(operator.and_, MASK, MASK, lambda b, x, y: b.and_(x, y))
_operator(operator.or_, MASK, MASK, lambda b, x, y: b.or_(x, y))


@type_callable(operator.invert)
def _type_invert(_context: Any) -> Any:  # noqa: ANN401
    return lambda mask: MASK(MASK) if mask == MASK else None


@lower_builtin(operator.invert, MASK)
def _lower_invert(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:  # noqa: ANN401
    return builder.not_(args[0])


def _function(result: Any, operands: tuple[Any, ...], emit: Any, doc: str) -> Any:  # noqa: ANN401
    """A function on lanes with fixed types; numbers are accepted for lanes."""

    def typer(_typing: Any, *args: Any) -> Any:  # noqa: ANN401
        def lower(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:  # noqa: ANN401
            return emit(builder, *values)

        return result(*operands), lower

    unary = lambda typing, a: typer(typing, a)  # noqa: E731
    binary = lambda typing, a, b: typer(typing, a, b)  # noqa: E731
    function = unary if len(operands) == 1 else binary
    function.__doc__ = doc
    return intrinsic(function)


def _llvm(name: str, vector: Any) -> Any:  # noqa: ANN401
    """Emit a call of the LLVM intrinsic `name` on operands of one vector type."""
    kind = f"v{WIDTH}{'f32' if vector == _VECTOR[F32] else 'i32'}"

    def emit(builder: Any, *args: Any) -> Any:  # noqa: ANN401
        signature = ir.FunctionType(vector, [vector] * len(args))
        return builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}.{kind}"), args)

    return emit


absolute = _function(F32, (F32,), _llvm("fabs", _VECTOR[F32]), "|x|")
square_root = _function(F32, (F32,), _llvm("sqrt", _VECTOR[F32]), "The correctly rounded square root.")
smaller = _function(I32, (I32, I32), _llvm("smin", _VECTOR[I32]), "The smaller of two integers.")
larger = _function(I32, (I32, I32), _llvm("smax", _VECTOR[I32]), "The larger of two integers.")
to_float = _function(F32, (I32,), lambda b, x: b.sitofp(x, _VECTOR[F32]), "float32 of integers.")
bits_of = _function(I32, (F32,), lambda b, x: b.bitcast(x, _VECTOR[I32]), "The bits of float32 as integers.")
float_of = _function(F32, (I32,), lambda b, x: b.bitcast(x, _VECTOR[F32]), "The float32 with these bits.")
any_of = _function(
    types.boolean, (MASK,),
    lambda b, x: b.icmp_unsigned("!=", b.bitcast(x, ir.IntType(WIDTH)), ir.Constant(ir.IntType(WIDTH), 0)),
    "Whether a mask is true in any lane.",
)  # fmt: skip


@intrinsic
def where(_typing: Any, mask: Any, a: Any, b: Any) -> Any:  # noqa: ANN401
    """In each lane `a` where the mask is true, else `b`."""
    lanes = [t for t in (a, b) if isinstance(t, LanesType)]
    if mask != MASK or not lanes:
        return None

    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.select(*args)

    return lanes[0](MASK, lanes[0], lanes[0]), emit


@intrinsic
def fill(_typing: Any, value: Any) -> Any:  # noqa: ANN401
    """float32 lanes that all hold `value`."""

    def emit(_context: Any, _builder: Any, _signature: Any, args: Any) -> Any:  # noqa: ANN401
        return args[0]

    return F32(F32), emit


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:  # noqa: ANN401
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(cgutils.gep_inbounds(builder, data, index), vector.as_pointer())


@intrinsic
def load(_typing: Any, array: Any, index: Any) -> Any:  # noqa: ANN401
    """Lanes from `WIDTH` neighbours in a float32 or int32 array, from element `index` on; unchecked."""
    lanes = {types.float32: F32, types.int32: I32}.get(array.dtype)
    if lanes is None:
        return None

    def emit(context: Any, builder: Any, _signature: Any, args: Any) -> Any:  # noqa: ANN401
        value = builder.load(_pointer(context, builder, array, *args, _VECTOR[lanes]))
        value.align = 4
        return value

    return lanes(array, types.int64), emit


@intrinsic
def store(_typing: Any, array: Any, index: Any, value: Any) -> Any:  # noqa: ANN401
    """Put lanes to `WIDTH` neighbours in an array of their element type, from element `index` on; unchecked."""
    lanes = {types.float32: F32, types.int32: I32}.get(array.dtype)
    if lanes is None:
        return None

    def emit(context: Any, builder: Any, _signature: Any, args: Any) -> Any:  # noqa: ANN401
        builder.store(args[2], _pointer(context, builder, array, args[0], args[1], _VECTOR[lanes])).align = 4
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes), emit


@intrinsic(prefer_literal=True)
def transpose(_typing: Any, n: Any, source: Any, at: Any, stride: Any, target: Any, to: Any, pitch: Any) -> Any:  # noqa: ANN401
    """Copy `n` x `n` words of 32 bits from `source` to `target`, rows becoming columns; `n` is 4 or 8, literally.

    Rows start at element `at` of `source` and are `stride` elements apart, in `target` at `to` and `pitch` apart
    (bytes where that is a byte array). Unchecked.
    """
    rows = n.literal_value
    vector = ir.VectorType(_I32, rows)
    low, high = ([half + i // 2 + rows * (i % 2) for i in range(rows)] for half in (0, rows // 2))

    def emit(context: Any, builder: Any, _signature: Any, args: Any) -> Any:  # noqa: ANN401
        _, src, at, stride, dst, to, pitch = args
        lines = []
        for i in range(rows):
            index = builder.add(at, builder.mul(stride, ir.Constant(at.type, i)))
            lines.append(builder.load(_pointer(context, builder, source, src, index, vector)))
            lines[-1].align = 4
        # Interleaving the first half of the lines with the second, log2(n) times, transposes.
        for _ in range(rows.bit_length() - 1):
            pairs = list(zip(lines[: rows // 2], lines[rows // 2 :], strict=True))
            lines = [
                builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, rows), order))
                for a, b in pairs
                for order in (low, high)
            ]
        for i, line in enumerate(lines):
            index = builder.add(to, builder.mul(pitch, ir.Constant(to.type, i)))
            builder.store(line, _pointer(context, builder, target, dst, index, vector)).align = 1
        return context.get_dummy_value()

    return types.void(n, source, types.int64, types.int64, target, types.int64, types.int64), emit


@helper
def clipped_integer(v: Lanes, highest: int) -> Lanes:
    """``clip(nint(v), 0, highest)`` as int32 lanes, with C's `nint` for every v."""
    bits = bits_of(v + 12582912.0) & 0x7FFFFF
    return smaller(larger(bits, 0x400000), 0x400000 + highest) - 0x400000


@helper
def aligned(n: int) -> NDArray[np.float32]:
    """Room for `n` float32, on a cache line: lanes that straddle two lines cost twice."""
    room = np.empty(n + 15, np.float32)
    skip = (-room.ctypes.data // 4) % 16
    return room[skip : skip + n]


@helper
def clipped(v: Lanes, highest: int) -> Lanes:
    """float32 of ``clip(nint(v), 0, highest)`` for 0 < highest < 2^22, with C's `nint` for every v.

    Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low mantissa bits; the C code takes these bits
    whatever happened to the exponent, so that NaN gives 0 and values beyond 2^22 something else.
    """
    bits = bits_of(v + 12582912.0) & 0x7FFFFF
    bits = smaller(larger(bits, 0x400000), 0x400000 + highest)
    return float_of(bits | 0x4B000000) - 12582912.0


@helper
def nint(v: Lanes) -> Lanes:
    """C's nearest integer, as int32 lanes: ties to even, the low bits of the sum where v is out of range."""
    return (bits_of(v + 12582912.0) & 0x7FFFFF) - 0x400000


@helper
def to_f16(v: Lanes) -> Lanes:
    """The bits of the nearest F16, as int32 lanes; see `bits.float_to_f16`."""
    bits = bits_of(v)
    sign = (bits >> 16) & 0x8000
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude - 0x38000000 + 0x0FFF + ((magnitude >> 13) & 1)) >> 13
    small = bits_of(float_of(magnitude) + 0.5) - 0x3F000000
    half = where(magnitude >= 0x38800000, normal, small)
    half = where(magnitude >= 0x477FF000, 0x7C00, half)
    return sign | where(magnitude > 0x7F800000, 0x7E00, half)


@helper
def from_f16(half: Lanes) -> Lanes:
    """The float32 of F16 bits in int32 lanes; see `bits.f16_to_float`."""
    magnitude = half & 0x7FFF
    moved = magnitude << 13
    small = bits_of(to_float(magnitude) * 2.0**-24)
    bits = where(magnitude >= 0x0400, moved + 0x38000000, small)
    return float_of(((half & 0x8000) << 16) | where(magnitude >= 0x7C00, moved + 0x70000000, bits))


class Lanes:
    """What type checkers know of lanes."""

    __slots__ = ()

    def _op(self, other: Lanes | float) -> Lanes: ...

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _op
    __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = __lt__ = __le__ = __gt__ = __ge__ = _op
