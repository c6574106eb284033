"""The table of the 13 GGUF metadata value types, one metadata entry, and how its value becomes bytes.

Ids and layout: the GGUF specification (ggml, docs/gguf.md), little-endian, version 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ValueType:
    """One metadata value type.

    Attributes
    ----------
    name:
        As tables write it: ``u32``.
    type_id:
        The number in a metadata entry.
    code:
        Character of the `struct` module, empty for ``str`` and ``arr``.
    dtype:
        numpy's name of the stored number (``bool`` is stored as uint8), empty for ``str`` and ``arr``.
    """

    name: str
    type_id: int
    code: str = ""
    dtype: str = ""

    @property
    def n_bytes(self) -> int:
        """Bytes of one value; for ``str`` and ``arr`` the smallest number of bytes that a value takes."""
        if self.code:
            return struct.calcsize("<" + self.code)
        return 8 if self.name == "str" else 12


_ROWS = (
    ValueType("u8", 0, "B", "<u1"),
    ValueType("i8", 1, "b", "<i1"),
    ValueType("u16", 2, "H", "<u2"),
    ValueType("i16", 3, "h", "<i2"),
    ValueType("u32", 4, "I", "<u4"),
    ValueType("i32", 5, "i", "<i4"),
    ValueType("f32", 6, "f", "<f4"),
    ValueType("bool", 7, "B", "<u1"),
    ValueType("str", 8),
    ValueType("arr", 9),
    ValueType("u64", 10, "Q", "<u8"),
    ValueType("i64", 11, "q", "<i8"),
    ValueType("f64", 12, "d", "<f8"),
)

VALUE_TYPES: dict[str, ValueType] = {t.name: t for t in _ROWS}
VALUE_TYPE_BY_ID: dict[int, ValueType] = {t.type_id: t for t in _ROWS}


@dataclass(frozen=True, slots=True, eq=False)
class KV:
    """One metadata entry.

    Two entries are equal when they say the same in the same types, bit for bit: NaN equals NaN, 0.0 is not -0.0.

    Attributes
    ----------
    key:
        Unique in its file.
    type:
        Name in the table of value types: ``u32``, ``str``, ``arr``.
    value:
        int, float, bool or str. For ``arr``: list[str] for strings, list[bool] for bools, and for numbers a
        read-only one-dimensional numpy array of the item type. The encoder also takes any list of plain values.
    item_type:
        Element type of an array, else None.
    """

    key: str
    type: str
    value: Any
    item_type: str | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KV):
            return NotImplemented
        mine, theirs = (self.key, self.type, self.item_type), (other.key, other.type, other.item_type)
        return mine == theirs and _same(self.value, other.value)

    def __hash__(self) -> int:
        return hash((self.key, self.type, self.item_type))


def _same(a: Any, b: Any) -> bool:  # noqa: ANN401  - values of any type are compared
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        a, b = np.asarray(a), np.asarray(b)
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(type(a) is type(b) and a == b)


def encode_string(text: object, where: object) -> bytes:
    """Length (u64) and UTF-8 bytes; InputError if `text` is no string or has no UTF-8 form."""
    if not isinstance(text, str):
        raise InputError(where, f"value is {_described(text)}, expected a string")
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise InputError(where, f"string has no UTF-8 form ({error.reason} at character {error.start})") from None
    return len(raw).to_bytes(8, "little") + raw


def encode_value(kv: KV) -> bytes:
    """The bytes of `kv`'s value, without its key and type; for an array with its item type and count.

    InputError names the key if the value does not fit the type exactly: an integer out of range, a float for an
    integer, a bool for a number, an array whose items differ in kind.
    """
    if kv.type not in VALUE_TYPES:
        raise InputError(kv.key, f"unknown value type {kv.type!r}, known are {', '.join(VALUE_TYPES)}")
    if kv.type != "arr":
        if kv.item_type is not None:
            raise InputError(kv.key, f"a {kv.type} entry has an item type ({kv.item_type}), only arrays have one")
        return _encode_item(VALUE_TYPES[kv.type], kv.value, kv.key)
    item = VALUE_TYPES.get(kv.item_type or "")
    if item is None or item.name == "arr":
        raise InputError(kv.key, f"array of {kv.item_type!r}, expected an item type other than arr")
    if isinstance(kv.value, np.ndarray):
        payload = _encode_ndarray(item, kv.value, kv.key)
    elif isinstance(kv.value, (list, tuple)):
        payload = b"".join([_encode_item(item, v, kv.key) for v in kv.value])
    else:
        raise InputError(kv.key, f"array value is {_described(kv.value)}, expected a list or a numpy array")
    return struct.pack("<IQ", item.type_id, len(kv.value)) + payload


def _encode_item(item: ValueType, value: object, where: str) -> bytes:
    if item.name == "str":
        return encode_string(value, where)
    is_bool = isinstance(value, (bool, np.bool_))
    if item.name == "bool" and is_bool:
        return b"\1" if value else b"\0"
    if item.code in "fd":
        fits = isinstance(value, (int, float, np.integer, np.floating)) and not is_bool
    else:
        fits = isinstance(value, (int, np.integer)) and not is_bool and item.name != "bool"
    if not fits:
        raise InputError(where, f"value is {_described(value)}, expected {item.name}")
    try:
        return struct.pack("<" + item.code, value)
    except (struct.error, OverflowError):
        raise InputError(where, f"{value} is out of range for {item.name}") from None


def _encode_ndarray(item: ValueType, array: NDArray[Any], where: str) -> bytes:
    kinds = {"bool": "b", "f32": "f", "f64": "f"}.get(item.name, "" if item.name == "str" else "iu")
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise InputError(
            where, f"numpy array is {array.dtype}{list(array.shape)}, expected one dimension of {item.name}"
        )
    dtype = np.dtype(item.dtype)
    if array.dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        low, high = int(array.min()), int(array.max())
        if low < int(limits.min) or high > int(limits.max):
            raise InputError(where, f"items span {low} to {high}, out of range for {item.name}")
    with np.errstate(over="ignore"):
        stored = array.astype(dtype)
    if array.dtype.kind == "f" and not np.array_equal(np.isinf(stored), np.isinf(array)):
        raise InputError(where, f"an item is out of range for {item.name}")
    return stored.tobytes()


def _described(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"
