"""A cursor over a header: reads the file in growing steps, and takes numbers, strings and arrays from it.

Nothing is allocated on a file's word: every length and count is held against the bytes that remain first, and a
header as a whole against `rules.MAX_HEADER_BYTES`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.gguf.regular import read_into
from dsv4tools.gguf.rules import MAX_HEADER_BYTES, Fault
from dsv4tools.gguf.values import VALUE_TYPE_BY_ID, ValueType

if TYPE_CHECKING:
    from pathlib import Path

_FIRST_READ = 1 << 20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class Unreadable(Exception):  # noqa: N818  - control flow inside the reader, never seen outside
    """The header cannot be read any further: what is wrong at which byte."""

    def __init__(self, code: str, message: str, offset: int) -> None:
        super().__init__(code, message, offset)
        self.code = code
        self.message = message
        self.offset = offset


class HeaderWindow:
    """The first bytes of a file, more of them as they are needed.

    Attributes
    ----------
    pos:
        Byte offset in the file of what is taken next.
    faults:
        What was odd about values taken so far but did not keep them from being taken, each with its byte offset;
        the caller empties the list.
    """

    def __init__(self, fd: int, n_file_bytes: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._n_file_bytes = n_file_bytes
        self._bytes = b""
        self.pos = 0
        self.faults: list[tuple[Fault, int]] = []

    @property
    def n_remaining(self) -> int:
        """Bytes of the file behind `pos`."""
        return self._n_file_bytes - self.pos

    def take(self, n_bytes: int, what: str) -> bytes:
        """The next `n_bytes`; Unreadable names `what` if the file has fewer."""
        self._need(self.pos, n_bytes, what)
        start = self.pos
        self.pos += n_bytes
        return self._bytes[start : self.pos]

    def take_u32(self, what: str) -> int:
        """The next unsigned 32-bit integer."""
        return int(_U32.unpack(self.take(4, what))[0])

    def take_u64(self, what: str) -> int:
        """The next unsigned 64-bit integer."""
        return int(_U64.unpack(self.take(8, what))[0])

    def take_text(self, what: str) -> tuple[str, bytes]:
        """The next string, decoded and as stored. Bytes that are not UTF-8 become a fault and surrogates."""
        n_bytes = self.take_u64(f"the length of {what}")
        start = self.pos
        raw = self.take(n_bytes, what)
        try:
            return raw.decode(), raw
        except UnicodeDecodeError as error:
            self.faults.append((Fault("error", "utf8", f"{what} is not UTF-8: {error.reason}"), start + error.start))
            return raw.decode(errors="surrogateescape"), raw

    def take_type(self, what: str) -> ValueType:
        """The next value type id; Unreadable if there is no such type, since the value's size is unknown then."""
        at = self.pos
        type_id = self.take_u32(f"the type of {what}")
        found = VALUE_TYPE_BY_ID.get(type_id)
        if found is None:
            raise Unreadable("value-type", f"type of {what} is {type_id}, expected 0 to {max(VALUE_TYPE_BY_ID)}", at)
        return found

    def take_value(self, value_type: ValueType) -> tuple[Any, str | None]:
        """The next value of `value_type`, and its item type if it is an array. See `KV` for the Python types."""
        if value_type.name == "arr":
            return self._take_array()
        if value_type.name == "str":
            return self.take_text("the value")[0], None
        at = self.pos
        (value,) = struct.unpack("<" + value_type.code, self.take(value_type.n_bytes, "the value"))
        if value_type.name == "bool":
            if value > 1:
                self.faults.append((Fault("warning", "bool", f"bool has the value {value}, expected 0 or 1"), at))
            value = bool(value)
        return value, None

    def _take_array(self) -> tuple[Any, str]:
        at = self.pos
        item = self.take_type("the array's items")
        if item.name == "arr":
            raise Unreadable("nested-array", "is an array of arrays, expected items of another type", at)
        at = self.pos
        count = self.take_u64("the array's length")
        if count * item.n_bytes > self.n_remaining:
            raise Unreadable(
                "array-length",
                f"array of {count} {item.name} takes at least {count * item.n_bytes} bytes, "
                f"the file has {self.n_remaining} more",
                at,
            )
        if item.name == "str":
            return self._take_strings(count), item.name
        at = self.pos
        array = np.frombuffer(self.take(count * item.n_bytes, "the array's items"), item.dtype)
        if item.name == "bool":
            odd = np.flatnonzero(array > 1)
            if odd.size:
                first = int(odd[0])
                message = f"{odd.size} bools have values other than 0 and 1, the first is item {first}"
                self.faults.append((Fault("warning", "bool", message), at + first))
            return (array != 0).tolist(), item.name
        return array, item.name

    def _take_strings(self, count: int) -> list[str]:
        items: list[str] = []
        undecoded: list[tuple[int, int]] = []
        unpack = _U64.unpack_from
        data, pos, have = self._bytes, self.pos, len(self._bytes)
        for index in range(count):
            start = pos + 8
            if start > have:
                self._need(pos, 8, f"the length of item {index}")
                data, have = self._bytes, len(self._bytes)
            end = start + unpack(data, pos)[0]
            if end > have:
                self._need(start, end - start, f"item {index}")
                data, have = self._bytes, len(self._bytes)
            pos = end
            try:
                items.append(data[start:end].decode())
            except UnicodeDecodeError as error:
                undecoded.append((index, start + error.start))
                items.append(data[start:end].decode(errors="surrogateescape"))
        self.pos = pos
        if undecoded:
            index, at = undecoded[0]
            message = f"{len(undecoded)} strings are not UTF-8, the first is item {index}"
            self.faults.append((Fault("error", "utf8", message), at))
        return items

    def _need(self, start: int, n_bytes: int, what: str) -> None:
        """Have the bytes from `start` on in memory, or raise Unreadable."""
        end = start + n_bytes
        have = len(self._bytes)
        if end <= have:
            return
        if end > self._n_file_bytes:
            raise Unreadable(
                "truncated",
                f"{what} takes {n_bytes} bytes, the file has {max(self._n_file_bytes - start, 0)} more",
                start,
            )
        if end > MAX_HEADER_BYTES:
            raise Unreadable(
                "header-too-long", f"{what} takes {n_bytes} bytes, a header may have {MAX_HEADER_BYTES} in all", start
            )
        target = min(max(end, 2 * have, _FIRST_READ), self._n_file_bytes, MAX_HEADER_BYTES)
        more = bytearray(target - have)
        read_into(self._fd, memoryview(more), have, self._path)
        self._bytes = b"".join((self._bytes, more))
