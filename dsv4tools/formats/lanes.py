"""A lane type for numba: many values side by side in vector registers, in kernels that read like the scalar formula.

Where the order of a sum is fixed, a compiler cannot use vector registers along it. It can across: lane k works on
block k, every lane does what the scalar formula does, in its order, and `WIDTH` blocks are done at once. Lanes are
LLVM vectors, ``<32 x float>`` for instance. Any width compiles on any processor, a wide vector becomes as many
registers as it needs, and what a lane computes does not depend on how many there are.

In kernels: ``+ - * /`` and comparisons on float32 lanes, ``+ - *`` on float64 lanes (for sums that no format depends
on), ``+ - & | ^ << >>`` and comparisons on int32 and int8 lanes (``>>`` moves zeros in), ``& | ~`` on masks, and the
functions below. A number next to lanes fills as many. Nothing is contracted, reordered or approximated. There is no
conversion from float to integer, because out of range its result depends on the processor: see `clipped`, `nint` and
`truncated`.
"""

from __future__ import annotations

import operator
import os
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typeconv import Conversion
from numba.extending import lower_builtin, lower_cast, models, register_model, type_callable

from dsv4tools.errors import UsageError
from dsv4tools.formats.compile import helper, host_features, instruction

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _choose_width() -> int:
    """Lanes that keep the arithmetic units busy without running out of registers; DSV4TOOLS_LANES overrides it."""
    chosen = os.environ.get("DSV4TOOLS_LANES")
    if chosen is not None:
        if chosen not in ("8", "16", "32", "64"):
            raise UsageError("DSV4TOOLS_LANES", f"found {chosen!r}, expected 8, 16, 32 or 64")
        return int(chosen)
    return 64 if "+avx512f" in host_features() else 16


WIDTH = _choose_width()

_WORD = {
    "float32": ir.FloatType(), "float64": ir.DoubleType(), "int32": ir.IntType(32), "int8": ir.IntType(8),
    "mask": ir.IntType(1),
}  # fmt: skip
_INT32 = ir.IntType(32)


class LanesType(types.Type):
    """`width` lanes of one element: float32, float64, int32, int8 or mask."""

    def __init__(self, element: str, width: int) -> None:
        self.element = element
        self.width = width
        super().__init__(name=f"lanes({element} x {width})")

    @property
    def vector(self) -> Any:
        """The LLVM type."""
        return ir.VectorType(_WORD[self.element], self.width)

    def can_convert_from(self, _typing: Any, other: Any) -> Any:
        """Numbers become lanes that all hold them."""
        fits = isinstance(other, types.Integer) or (isinstance(other, types.Float) and self.element == "float32")
        return Conversion.unsafe if fits and self.element != "mask" else None


@cache
def lanes_type(element: str, width: int) -> LanesType:
    """The numba type of lanes."""
    return LanesType(element, width)


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: LanesType) -> None:
        super().__init__(dmm, fe_type, fe_type.vector)


@lower_cast(types.Float, LanesType)
@lower_cast(types.Integer, LanesType)
def _fill(context: Any, builder: Any, number: Any, lanes: LanesType, value: Any) -> Any:
    element = {"float32": types.float32, "int32": types.int32, "int8": types.int8}[lanes.element]
    undefined = ir.Constant(lanes.vector, ir.Undefined)
    one = builder.insert_element(undefined, context.cast(builder, value, number, element), ir.Constant(_INT32, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_INT32, lanes.width), [0] * lanes.width))


# ---- Operators: for each symbol and element the element of the result, and the LLVM instruction.

_OPERATORS: dict[Any, dict[str, tuple[str, Any]]] = {
    operator.add: {
        "float32": ("float32", "fadd"), "float64": ("float64", "fadd"),
        "int32": ("int32", "add"), "int8": ("int8", "add"),
    },
    operator.sub: {
        "float32": ("float32", "fsub"), "float64": ("float64", "fsub"),
        "int32": ("int32", "sub"), "int8": ("int8", "sub"),
    },
    operator.mul: {"float32": ("float32", "fmul"), "float64": ("float64", "fmul")},
    operator.truediv: {"float32": ("float32", "fdiv")},
    operator.and_: {"int32": ("int32", "and_"), "int8": ("int8", "and_"), "mask": ("mask", "and_")},
    operator.or_: {"int32": ("int32", "or_"), "int8": ("int8", "or_"), "mask": ("mask", "or_")},
    operator.xor: {"int32": ("int32", "xor"), "int8": ("int8", "xor"), "mask": ("mask", "xor")},
    operator.lshift: {"int32": ("int32", "shl"), "int8": ("int8", "shl")},
    operator.rshift: {"int32": ("int32", "lshr"), "int8": ("int8", "lshr")},
}
_COMPARISONS = {
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!=",
}  # fmt: skip


def _emit_comparison(builder: Any, element: str, sign: str, a: Any, b: Any) -> Any:
    """Signed, or as in C: with NaN only != is true."""
    if element != "float32":
        return builder.icmp_signed(sign, a, b)
    return (builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered)(sign, a, b)


def _declare_operator(symbol: Any) -> None:
    results = {e: r for e, (r, _) in _OPERATORS.get(symbol, {}).items()}
    if symbol in _COMPARISONS:
        results = dict.fromkeys(("float32", "int32", "int8"), "mask")

    @type_callable(symbol)
    def _type(_context: Any) -> Any:
        def typer(a: Any, b: Any) -> Any:
            lanes, other = (a, b) if isinstance(a, LanesType) else (b, a)
            if not isinstance(lanes, LanesType) or lanes.element not in results:
                return None
            if other != lanes and lanes.can_convert_from(None, other) is None:
                return None
            return lanes_type(results[lanes.element], lanes.width)(lanes, lanes)

        return typer

    @lower_builtin(symbol, LanesType, LanesType)
    def _lower(_context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = signature.args[0].element
        if symbol in _COMPARISONS:
            return _emit_comparison(builder, element, _COMPARISONS[symbol], *args)
        return getattr(builder, _OPERATORS[symbol][element][1])(*args)


for _symbol in (*_OPERATORS, *_COMPARISONS):
    _declare_operator(_symbol)


@type_callable(operator.invert)
def _type_invert(_context: Any) -> Any:
    return lambda mask: mask(mask) if isinstance(mask, LanesType) and mask.element == "mask" else None


@lower_builtin(operator.invert, LanesType)
def _lower_invert(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
    return builder.not_(args[0])


# ---- Functions. Each is a rule for its types and the LLVM instructions for it, which is how numba takes them.


def _function(name: str, operand: str, result: Any, emit: Any, doc: str) -> Any:
    """A function of one operand; `emit` gets the builder, the value and the LLVM type of the result.

    `result` is an element, for as many lanes as the operand has, or numba's type of a single value.
    """

    def rule(_typing: Any, x: Any) -> Any:
        if not isinstance(x, LanesType) or x.element != operand:
            return None
        returned = lanes_type(result, x.width) if isinstance(result, str) else result

        def lower(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return emit(builder, args[0], context.get_value_type(returned))

        return returned(x), lower

    rule.__name__, rule.__doc__ = name, doc
    return instruction(rule)


def _call(name: str) -> Any:
    """Emit a call of an LLVM intrinsic that is overloaded on the type of its operands."""
    letters = {ir.FloatType(): "f32", ir.IntType(32): "i32", ir.IntType(8): "i8", ir.IntType(1): "i1"}

    def emit(builder: Any, *args: Any) -> Any:
        *values, result = args
        vector = values[0].type
        full = f"llvm.{name}.v{vector.count}{letters[vector.element]}"
        declared = ir.FunctionType(result, [vector] * len(values))
        return builder.call(cgutils.get_or_insert_function(builder.module, declared, full), values)

    return emit


absolute = _function("absolute", "float32", "float32", _call("fabs"), "|x|")
square_root = _function("square_root", "float32", "float32", _call("sqrt"), "The correctly rounded square root.")
truncated = _function("truncated", "float32", "float32", _call("trunc"), "Rounded towards zero, still float32.")
to_float = _function("to_float", "int32", "float32", lambda b, x, t: b.sitofp(x, t), "float32 of int32.")
byte_to_float = _function("byte_to_float", "int8", "float32", lambda b, x, t: b.sitofp(x, t), "float32 of int8.")
widened = _function("widened", "float32", "float64", lambda b, x, t: b.fpext(x, t), "The same numbers as float64.")
byte_to_int = _function("byte_to_int", "int8", "int32", lambda b, x, t: b.zext(x, t), "int32 0..255 of bytes.")
to_byte = _function("to_byte", "int32", "int8", lambda b, x, t: b.trunc(x, t), "The low bytes of int32.")
bits_of = _function("bits_of", "float32", "int32", lambda b, x, t: b.bitcast(x, t), "The bits of float32.")
float_of = _function("float_of", "int32", "float32", lambda b, x, t: b.bitcast(x, t), "The float32 with these bits.")
largest_of = _function(
    "largest_of", "int32", types.int32, _call("vector.reduce.smax"), "The largest of all lanes."
)
smallest_of = _function(
    "smallest_of", "int32", types.int32, _call("vector.reduce.smin"), "The smallest of all lanes."
)
any_of = _function(
    "any_of", "mask", types.boolean, _call("vector.reduce.or"), "Whether a mask is true in any lane."
)


@instruction
def first_of(_typing: Any, mask: Any) -> Any:
    """The number of the first lane where a mask is true, -1 if it is so in several; undefined where it is in none."""
    if not isinstance(mask, LanesType) or mask.element != "mask":
        return None

    def lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        word = ir.IntType(mask.width)
        bits = builder.bitcast(args[0], word)
        several = builder.icmp_unsigned("!=", builder.and_(bits, builder.sub(bits, word(1))), word(0))
        first = builder.zext(builder.cttz(bits, ir.IntType(1)(1)), ir.IntType(64))
        return builder.select(several, ir.IntType(64)(-1), first)

    return types.int64(mask), lower


def _two(a: Any, b: Any, *elements: str) -> LanesType | None:
    """The type of two operands of one lanes type, one of which may be a number."""
    for lanes, other in ((a, b), (b, a)):
        if isinstance(lanes, LanesType) and lanes.element in elements:
            return lanes if other == lanes or lanes.can_convert_from(None, other) is not None else None
    return None


def _choose(name: str, llvm: str, doc: str) -> Any:
    def rule(_typing: Any, a: Any, b: Any) -> Any:
        lanes = _two(a, b, "int32", "int8")
        if lanes is None:
            return None

        def lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            return _call(llvm)(builder, *args, lanes.vector)

        return lanes(lanes, lanes), lower

    rule.__name__, rule.__doc__ = name, doc
    return instruction(rule)


smaller = _choose("smaller", "smin", "The smaller of two integers, in each lane.")
larger = _choose("larger", "smax", "The larger of two integers, in each lane.")


@instruction
def where(_typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """In each lane `a` where the mask is true, else `b`."""
    lanes = _two(a, b, "float32", "int32", "int8")
    if lanes is None or mask != lanes_type("mask", lanes.width):
        return None

    def lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return lanes(mask, lanes, lanes), lower


@instruction
def interleave(_typing: Any, a: Any, b: Any) -> Any:
    """Twice as many lanes: a[0], b[0], a[1], b[1] ..."""
    lanes = lanes_type(a.element, 2 * a.width)

    def lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        order = [i // 2 + a.width * (i % 2) for i in range(2 * a.width)]
        return builder.shuffle_vector(*args, ir.Constant(ir.VectorType(_INT32, 2 * a.width), order))

    return lanes(a, a), lower


@instruction
def fill(_typing: Any, value: Any) -> Any:
    """`WIDTH` float32 lanes that all hold `value`."""
    lanes = lanes_type("float32", WIDTH)
    return lanes(lanes), lambda _context, _builder, _signature, args: args[0]


@instruction
def lane_numbers(_typing: Any, n: Any) -> Any:
    """`n` int32 lanes (a literal number): 0, 1, 2 ..."""
    if not isinstance(n, types.Literal):
        return None
    lanes = lanes_type("int32", n.literal_value)
    return lanes(n), lambda *_: ir.Constant(lanes.vector, list(range(lanes.width)))


_ARRAY_ELEMENTS = {types.float32: "float32", types.float64: "float64", types.int32: "int32", types.uint8: "int8"}


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(cgutils.gep_inbounds(builder, data, index), vector.as_pointer())


@instruction
def load_lanes(_typing: Any, n: Any, array: Any, index: Any) -> Any:
    """`n` lanes (a literal number) from neighbours in an array of their element, from `index` on; unchecked."""
    if not isinstance(n, types.Literal):
        return None
    lanes = lanes_type(_ARRAY_ELEMENTS[array.dtype], n.literal_value)

    def lower(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        value = builder.load(_pointer(context, builder, array, args[1], args[2], lanes.vector))
        value.align = array.dtype.bitwidth // 8
        return value

    return lanes(n, array, types.int64), lower


@instruction
def spread(_typing: Any, n: Any, array: Any, index: Any) -> Any:
    """`n` lanes (a literal number) that all hold one element of an array; unchecked."""
    if not isinstance(n, types.Literal):
        return None
    lanes = lanes_type(_ARRAY_ELEMENTS[array.dtype], n.literal_value)

    def lower(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, array, args[1], args[2], lanes.vector.element)
        return _fill(context, builder, array.dtype, lanes, builder.load(pointer))

    return lanes(n, array, types.int64), lower


@instruction
def load_mask(_typing: Any, array: Any, index: Any) -> Any:
    """A mask from an unsigned integer of an array, as many lanes as that has bits, the lowest bit first; unchecked."""
    mask = lanes_type("mask", array.dtype.bitwidth)

    def lower(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, array, args[0], args[1], ir.IntType(mask.width))
        return builder.bitcast(builder.load(pointer), mask.vector)

    return mask(array, types.int64), lower


@helper
def load(array: NDArray[Any], index: int) -> Lanes:
    """`WIDTH` lanes from an array, see `load_lanes`."""
    return load_lanes(WIDTH, array, index)


@instruction
def store(_typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Put lanes to neighbours in an array of their element type, from `index` on; unchecked."""
    if not isinstance(value, LanesType) or value.element != _ARRAY_ELEMENTS.get(array.dtype):
        return None

    def lower(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, array, args[0], args[1], value.vector)
        builder.store(args[2], pointer).align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.int64, value), lower


@instruction
def transpose(_typing: Any, n: Any, source: Any, at: Any, stride: Any, target: Any, to: Any, pitch: Any) -> Any:
    """Copy `n` x `n` words of 32 bits from `source` to `target`, rows becoming columns; `n` is 4 or 8, literally.

    Rows start at element `at` of `source` and are `stride` elements apart, in `target` at `to` and `pitch` apart
    (bytes where that is a byte array). Unchecked.
    """
    if not isinstance(n, types.Literal):
        return None
    rows = n.literal_value
    vector = ir.VectorType(_INT32, rows)
    low, high = ([half + i // 2 + rows * (i % 2) for i in range(rows)] for half in (0, rows // 2))

    def lower(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
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
                builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, rows), order))
                for a, b in pairs
                for order in (low, high)
            ]
        for i, line in enumerate(lines):
            index = builder.add(to, builder.mul(pitch, ir.Constant(to.type, i)))
            builder.store(line, _pointer(context, builder, target, dst, index, vector)).align = 1
        return context.get_dummy_value()

    return types.void(n, source, types.int64, types.int64, target, types.int64, types.int64), lower


@helper
def aligned(n: int) -> NDArray[np.float32]:
    """Room for `n` float32, on a cache line: lanes that straddle two lines cost twice."""
    room = np.empty(n + 15, np.float32)
    skip = (-room.ctypes.data // 4) % 16
    return room[skip : skip + n]


# ---- Arithmetic that formats share.


@helper
def clipped_integer(v: Lanes, highest: int) -> Lanes:
    """``clip(nint(v), 0, highest)`` as int32 lanes for 0 < highest < 2^22, with C's `nint` for every v.

    Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low mantissa bits; the C code takes these bits
    whatever happened to the exponent, so that NaN gives 0 and values beyond 2^22 something else.
    """
    bits = bits_of(v + 12582912.0) & 0x7FFFFF
    return smaller(larger(bits, 0x400000), 0x400000 + highest) - 0x400000


@helper
def clipped(v: Lanes, highest: int, everywhere: bool) -> Lanes:
    """`clipped_integer` as float32 lanes; unless `everywhere` (a constant) only right for ``|v| < 2^22``."""
    bits = bits_of(v + 12582912.0)
    if everywhere:
        bits = bits & 0x7FFFFF | 0x4B000000
    return float_of(smaller(larger(bits, 0x4B400000), 0x4B400000 + highest)) - 12582912.0


@helper
def nint(v: Lanes) -> Lanes:
    """C's nearest integer, as int32 lanes: ties to even, the low bits of the sum where v is out of range."""
    return (bits_of(v + 12582912.0) & 0x7FFFFF) - 0x400000


@helper
def negated(v: Lanes) -> Lanes:
    """The other sign, of zeros too."""
    return float_of(bits_of(v) ^ -0x80000000)


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


if TYPE_CHECKING:

    class Lanes:
        """What type checkers know of lanes: operators give lanes."""

        def _operate(self, other: Lanes | float) -> Lanes: ...

        __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _operate
        __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = __lt__ = __le__ = __gt__ = __ge__ = _operate

        def __invert__(self) -> Lanes: ...

        def __eq__(self, other: object) -> Any: ...

        def __hash__(self) -> int: ...
