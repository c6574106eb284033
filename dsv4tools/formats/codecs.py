"""Encoding and decoding rows: the registry of formats, and the functions that everything else calls.

Importing this module costs nothing; numba and the kernels come with the first call, or with `prepare`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats import compile as compiled
from dsv4tools.formats import selftest
from dsv4tools.formats.source import SOURCE_BITS, FaultKind, Faults, SourceKind, SourceRows
from dsv4tools.formats.table import FORMATS, Format, find_format
from dsv4tools.formats.unpack import unpacked

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class _Codec:
    """Where the kernels of a format are: a module of this package, and names in it ("" where there is none)."""

    module: str
    encoder: str = "encode"
    decoder: str = "decode"
    uses_importance: bool = False
    needs_importance: bool = False


# One row per format. A kernel has the signature ENCODE or DECODE of `tiles`.
_CODECS: dict[str, _Codec] = {
    "F32": _Codec("floats", "encode_f32", "decode_f32"),
    "F16": _Codec("floats", "encode_f16", "decode_f16"),
    "BF16": _Codec("floats", "encode_bf16", "decode_bf16"),
    "Q8_0": _Codec("q8_0"),
    "Q4_0": _Codec("legacy", uses_importance=True),
    "Q4_1": _Codec("legacy", uses_importance=True),
    "Q5_0": _Codec("legacy", uses_importance=True),
    "Q5_1": _Codec("legacy", uses_importance=True),
    "Q2_K": _Codec("q2_k", uses_importance=True),
    "Q3_K": _Codec("q3_k", uses_importance=True),
    "Q4_K": _Codec("q4_k", uses_importance=True),
    "Q5_K": _Codec("q5_k", uses_importance=True),
    "Q6_K": _Codec("q6_k", uses_importance=True),
    "IQ2_XXS": _Codec("iq2_xxs", uses_importance=True, needs_importance=True),
    "IQ2_XS": _Codec("iq2_xs", "encode_xs", "decode_xs", uses_importance=True, needs_importance=True),
    "IQ2_S": _Codec("iq2_xs", "encode_s", "decode_s", uses_importance=True),
    "MXFP4": _Codec("mxfp4"),
    "IQ3_XXS": _Codec("iq3", uses_importance=True),
    "IQ3_S": _Codec("iq3", uses_importance=True),
    "IQ4_NL": _Codec("iq4", uses_importance=True),
    "IQ4_XS": _Codec("iq4", uses_importance=True),
}

ENCODABLE = frozenset(name for name, codec in _CODECS.items() if codec.encoder)
DECODABLE = frozenset(name for name, codec in _CODECS.items() if codec.decoder)
# Formats whose bytes depend on an importance vector; the others ignore it.
USES_IMPORTANCE = frozenset(name for name, codec in _CODECS.items() if codec.uses_importance)
# Those among them that ggml does not encode without one: too much is lost where every column counts the same.
NEEDS_IMPORTANCE = frozenset(name for name, codec in _CODECS.items() if codec.needs_importance)

_NO_SCALES = np.zeros((1, 1), np.uint8)
_NO_IMPORTANCE = np.zeros(0, np.float32)
_LARGEST = 2**40   # of any size: products and sums of two stay far inside int64
_N_FAULT_SLOTS = 4   # tiles.N_FAULT_SLOTS; importing it here would import numba


def prepare(names: Iterable[str] = ENCODABLE) -> None:
    """Compile or load the kernels of these formats and of the source formats, so that later calls start at once."""
    for module in _modules(names):
        compiled.load(module)


def self_test(names: Iterable[str] | None = None) -> None:
    """Run known blocks through the kernels of these formats (None: of all that are loaded); takes milliseconds.

    Raises Dsv4Error naming a kernel that gives wrong bytes, for instance because something in this process has
    switched subnormal numbers off.
    """
    if names is None:
        names = [name for name, codec in _CODECS.items() if compiled.is_loaded(codec.module)]
    selftest.check(names, quantize, dequantize, lambda name: FORMATS[name].block_bytes, decode_source)


def _modules(names: Iterable[str]) -> list[str]:
    return sorted({"floats"} | {_CODECS[name].module for name in names if name in _CODECS})


def _kernel(target: Format, role: str) -> Any:
    codec = _CODECS.get(target.name)
    name = getattr(codec, role) if codec else ""
    if not codec or not name:
        known = ", ".join(sorted(ENCODABLE if role == "encoder" else DECODABLE))
        verb = "encoded" if role == "encoder" else "decoded"
        raise UsageError("type", f"{target.name} cannot be {verb}, these can: {known}")
    return getattr(compiled.load(codec.module), name)


def encode_rows(
    source: SourceRows,
    target: Format,
    out: NDArray[np.uint8],
    *,
    importance: NDArray[np.float32] | None = None,
    zero_nan: bool = False,
) -> Faults:
    """Encode a run of rows. Releases the GIL; needs no memory beyond a tile that fits the cache.

    Parameters
    ----------
    source:
        The rows as stored.
    target:
        A format of `ENCODABLE`.
    out:
        uint8 [n_rows * target.row_bytes(n_cols)], filled completely.
    importance:
        float32 [n_cols], finite and not negative: the weight of each column. Formats that know no importance
        ignore it, those of `NEEDS_IMPORTANCE` must have it; see `add_column_energy`.
    zero_nan:
        Accept values that are faults of the source, as +0.0.

    Returns
    -------
    What is wrong with the values. If anything is that was not accepted, `out` is all zero bytes.

    Raises
    ------
    UsageError:
        `target` cannot be encoded, or not without importance.
    InputError:
        An array does not have the size or type that goes with the others, or a value of `importance` is not allowed.
    """
    if source.blocks is not None:
        return _encode_blocks(source, target, out, importance, zero_nan=zero_nan)
    encode = _kernel(target, "encoder")
    shape = _check_source(source)
    expected = source.n_rows * target.row_bytes(source.n_cols)
    if out.dtype != np.uint8 or out.shape != (expected,) or not out.flags.c_contiguous:
        raise InputError("out", f"found {_describe(out)}, expected contiguous uint8 [{expected}]")
    weights = _check_importance(importance, source.n_cols, target)
    if not expected:
        return Faults()
    slots = np.zeros(_N_FAULT_SLOTS, np.int64)
    encode(int(source.kind), shape, source.data, _scales(source), weights, out, slots)
    faults = _faults(slots, source.n_cols)
    if faults.n_target or (faults.n_source and not zero_nan):
        out[:] = 0
    return faults


def _encode_blocks(
    source: SourceRows, target: Format, out: NDArray[np.uint8], importance: NDArray[np.float32] | None, *,
    zero_nan: bool,
) -> Faults:
    """`encode_rows` for rows in blocks of a ggml type: a few rows are decoded, then encoded."""
    _check_blocks(source)
    row_bytes = target.row_bytes(source.n_cols)
    faults = Faults()
    for first, rows in unpacked(source, decode_rows):
        part = out[first * row_bytes : (first + rows.n_rows) * row_bytes]
        faults = faults.then(encode_rows(rows, target, part, importance=importance, zero_nan=zero_nan), first)
    if faults.n_target or (faults.n_source and not zero_nan):
        out[:] = 0
    return faults


def decode_source(source: SourceRows, out: NDArray[np.float32]) -> Faults:
    """Decode a run of rows to float32 [n_rows, n_cols], with the C tool's values.

    Faulty values are what IEEE 754 makes of them: NaN or an infinity. Raises InputError as `encode_rows` does.
    """
    if source.blocks is not None:
        _check_blocks(source)
        faults = Faults()
        for first, rows in unpacked(source, decode_rows):
            faults = faults.then(decode_source(rows, out[first : first + rows.n_rows]), first)
        return faults
    shape = _check_source(source)
    _check_floats(out, (source.n_rows, source.n_cols))
    if not out.size:
        return Faults()
    slots = np.zeros(_N_FAULT_SLOTS, np.int64)
    decode = compiled.load("floats").decode_source
    decode(int(source.kind), shape, source.data, _scales(source), out.reshape(-1), slots)
    return _faults(slots, source.n_cols)


def add_column_energy(source: SourceRows, energy: NDArray[np.float32]) -> Faults:
    """Add the squares of a run's values to the sums of their columns.

    These sums over all rows of a matrix are what ds4's quantizer takes for importance where IQ2_XXS has none. They are
    float32 and taken row after row: feed the runs of a matrix in order, from zeros on.

    Parameters
    ----------
    source:
        The rows as stored.
    energy:
        float32 [n_cols]: the sums so far.

    Returns
    -------
    What is wrong with the values; these count as 0.

    Raises
    ------
    InputError:
        An array does not have the size or type that goes with the others.
    """
    shape = _check_source(source)
    _check_floats(energy, (source.n_cols,))
    slots = np.zeros(_N_FAULT_SLOTS, np.int64)
    if energy.size:
        add = compiled.load("floats").add_squares
        add(int(source.kind), shape, source.data, _scales(source), energy, slots)
    return _faults(slots, source.n_cols)


def decode_rows(
    data: NDArray[np.uint8], source_format: Format, n_rows: int, n_cols: int, out: NDArray[np.float32]
) -> None:
    """Decode rows of a GGUF tensor to float32, with ggml's values.

    Parameters
    ----------
    data:
        uint8 [n_rows * source_format.row_bytes(n_cols)], contiguous.
    source_format:
        A format of `DECODABLE`.
    n_rows, n_cols:
        Shape of the rows.
    out:
        float32 [n_rows, n_cols], contiguous.

    Raises
    ------
    UsageError:
        `source_format` cannot be decoded.
    InputError:
        An array does not have the size or type that goes with the others.
    """
    decode = _kernel(source_format, "decoder")
    expected = n_rows * source_format.row_bytes(n_cols)
    if data.dtype != np.uint8 or data.shape != (expected,) or not data.flags.c_contiguous:
        raise InputError("data", f"found {_describe(data)}, expected contiguous uint8 [{expected}]")
    _check_floats(out, (n_rows, n_cols))
    if out.size:
        decode(data, out.reshape(-1))


def quantize(
    x: NDArray[np.float32], type: str | Format, importance: NDArray[np.float32] | None = None, threads: int = 1  # noqa: A002  - the word of the field
) -> NDArray[np.uint8]:
    """Encode an array, row by row along its last axis.

    Parameters
    ----------
    x:
        float32 [..., n]; n is a whole number of blocks.
    type:
        Name of a ggml type, in any case (``"Q4_K"``), or its `Format`.
    importance:
        float32 [n], finite and not negative: the weight of each column; used by the types of `USES_IMPORTANCE`,
        indispensable for those of `NEEDS_IMPORTANCE`.
    threads:
        How many share the rows. The bytes do not depend on it.

    Returns
    -------
    uint8 [..., bytes per row].

    Raises
    ------
    UsageError:
        The type is unknown, has no encoder, or needs an importance vector.
    InputError:
        `x` or `importance` is not as above, holds NaN or infinity, or does not fit the range of the type.
    """
    target = type if isinstance(type, Format) else find_format(type)
    encode = _kernel(target, "encoder")
    if x.dtype != np.float32 or not x.ndim:
        raise InputError("x", f"found {_describe(x)}, expected float32 [..., n]")
    n_cols = x.shape[-1]
    row_bytes = target.row_bytes(n_cols, "x")
    weights = _check_importance(importance, n_cols, target)
    rows = np.ascontiguousarray(x).reshape(-1, n_cols) if x.size else np.zeros((0, n_cols), np.float32)
    out = np.zeros((len(rows), row_bytes), np.uint8)

    def work(start: int, stop: int) -> Faults:
        slots = np.zeros(_N_FAULT_SLOTS, np.int64)
        shape = (stop - start, n_cols, 1, 1, 0)
        data = rows[start:stop].reshape(-1).view(np.uint8)
        encode(int(SourceKind.F32), shape, data, _NO_SCALES, weights, out[start:stop].reshape(-1), slots)
        return _faults(slots, n_cols, start)

    for faults in _share(work, len(rows), threads):
        if faults.first:
            kind, row, column = faults.first
            where = f"x[{', '.join(map(str, (*np.unravel_index(row, x.shape[:-1]), column)))}]"
            raise InputError(where, _WRONG[kind].format(value=rows[row, column], type=target.name))
    return out.reshape(*x.shape[:-1], row_bytes)


def dequantize(data: NDArray[np.uint8], type: str | Format, threads: int = 1) -> NDArray[np.float32]:  # noqa: A002  - the word of the field
    """Decode an array of encoded rows along its last axis: uint8 [..., bytes per row] to float32 [..., n].

    Raises UsageError for a type that has no decoder, InputError for rows that are not whole blocks.
    """
    source = type if isinstance(type, Format) else find_format(type)
    decode = _kernel(source, "decoder")
    if data.dtype != np.uint8 or not data.ndim:
        raise InputError("data", f"found {_describe(data)}, expected uint8 [..., bytes per row]")
    n_blocks, rest = divmod(data.shape[-1], source.block_bytes)
    if rest:
        wanted = f"a whole number of {source.name} blocks of {source.block_bytes} bytes"
        raise InputError("data", f"{data.shape[-1]} bytes are not {wanted}")
    n_cols = n_blocks * source.block_values
    rows = np.ascontiguousarray(data).reshape(-1, data.shape[-1]) if data.size else np.zeros((0, 0), np.uint8)
    out = np.zeros((*data.shape[:-1], n_cols), np.float32)
    flat = out.reshape(-1, n_cols) if data.size else out

    def work(start: int, stop: int) -> None:
        decode(rows[start:stop].reshape(-1), flat[start:stop].reshape(-1))

    for _ in _share(work, len(rows), threads):
        pass
    return out


_WRONG = {
    FaultKind.NOT_FINITE: "{value} is not a finite number",
    FaultKind.TARGET_OVERFLOW: "{value} is beyond the range of {type}",
    FaultKind.BLOCK_OVERFLOW: "the block that starts here needs a scale beyond the range of F16",
}


def _share(work: Any, n_rows: int, threads: int) -> list[Any]:
    """``work(start, stop)`` over `n_rows` rows in `threads` parts; the results in order."""
    if threads < 1:
        raise UsageError("threads", f"found {threads}, expected 1 or more")
    parts = min(threads, n_rows)
    if parts <= 1:
        return [work(0, n_rows)] if n_rows else []
    bounds = [n_rows * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(work, bounds[:-1], bounds[1:]))


def _check_source(source: SourceRows) -> tuple[int, int, int, int, int]:
    """The `shape` argument of kernels; InputError unless every byte that a kernel will read is there."""
    kind, n_rows, n_cols = source.kind, source.n_rows, source.n_cols
    sizes = (n_rows, n_cols, source.scale_rows, source.scale_cols, source.first_row)
    if min(sizes) < 0 or min(source.scale_rows, source.scale_cols) < 1 or max(sizes) > _LARGEST:
        raise InputError("source", f"impossible shape: {_shape_of(source)}")
    n_bits = n_rows * n_cols * SOURCE_BITS[kind]
    if kind is SourceKind.FP4 and (n_cols % 2 or source.scale_cols % 2):
        raise InputError("source", f"FP4 values come in pairs, found {_shape_of(source)}")
    if source.data.dtype != np.uint8 or source.data.shape != (n_bits // 8,) or not source.data.flags.c_contiguous:
        raise InputError(
            "source.data", f"found {_describe(source.data)}, expected contiguous uint8 [{n_bits // 8}]"
        )
    if kind in (SourceKind.FP8, SourceKind.FP4):
        needed = (-(-(source.first_row + n_rows) // source.scale_rows), -(-n_cols // source.scale_cols))
        scales = source.scales
        if (
            scales is None or scales.dtype != np.uint8 or scales.ndim != 2
            or scales.shape[0] < needed[0] or scales.shape[1] != needed[1]
        ):  # fmt: skip
            found = "none" if scales is None else _describe(scales)
            expected = f"uint8 [{needed[0]} or more, {needed[1]}] for {_shape_of(source)}"
            raise InputError("source.scales", f"found {found}, expected {expected}")
    return sizes


def _check_blocks(source: SourceRows) -> None:
    """InputError unless the data are the blocks that rows of this shape have."""
    stored = source.blocks
    expected = source.n_rows * stored.row_bytes(source.n_cols) if stored else 0
    if source.data.dtype != np.uint8 or source.data.shape != (expected,) or not source.data.flags.c_contiguous:
        raise InputError("source.data", f"found {_describe(source.data)}, expected contiguous uint8 [{expected}]")


def _scales(source: SourceRows) -> NDArray[np.uint8]:
    return _NO_SCALES if source.scales is None else np.ascontiguousarray(source.scales)


def _check_importance(
    importance: NDArray[np.float32] | None, n_cols: int, target: Format
) -> NDArray[np.float32]:
    """What the kernel gets, after checking what the caller gave, even where the format ignores it."""
    if importance is None and target.name in NEEDS_IMPORTANCE:
        raise UsageError("importance", f"{target.name} cannot be encoded without", hint="give a weight for each column")
    if importance is None:
        return _NO_IMPORTANCE
    if importance.dtype != np.float32 or importance.shape != (n_cols,):
        raise InputError("importance", f"found {_describe(importance)}, expected float32 [{n_cols}]")
    allowed = np.isfinite(importance) & (importance >= 0)
    if not allowed.all():
        i = int(np.argmin(allowed))
        raise InputError(f"importance[{i}]", f"found {importance[i]}, expected a finite number >= 0")
    return np.ascontiguousarray(importance) if target.name in USES_IMPORTANCE else _NO_IMPORTANCE


def _check_floats(out: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    if out.dtype != np.float32 or out.shape != shape or not out.flags.c_contiguous:
        raise InputError("out", f"found {_describe(out)}, expected contiguous float32 {list(shape)}")


def _faults(slots: NDArray[np.int64], n_cols: int, first_row: int = 0) -> Faults:
    n_source, n_target, kind, position = (int(v) for v in slots)
    if not kind:
        return Faults()
    row, column = divmod(position, n_cols)
    return Faults(n_source, n_target, (FaultKind(kind), first_row + row, column))


def _describe(array: NDArray[Any]) -> str:
    return f"{'' if array.flags.c_contiguous else 'strided '}{array.dtype} {list(array.shape)}"


def _shape_of(source: SourceRows) -> str:
    return (
        f"{source.n_rows} x {source.n_cols} values from row {source.first_row}, "
        f"one scale per {source.scale_rows} x {source.scale_cols}"
    )
