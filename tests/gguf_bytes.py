"""GGUF files put together by hand, right and wrong. Knows nothing of our encoder: both are written from the spec."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
T_F32, T_F16, T_Q8_0, T_Q4_K, T_I8 = 0, 1, 8, 12, 24


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str | bytes, value_type: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", value_type & 0xFFFFFFFF) + payload


def kv_u32(key: str, value: int) -> bytes:
    return kv(key, U32, struct.pack("<I", value))


def kv_str(key: str | bytes, value: str | bytes) -> bytes:
    return kv(key, STR, text(value))


def kv_arr(key: str, item_type: int, count: int, payload: bytes = b"") -> bytes:
    return kv(key, ARR, struct.pack("<IQ", item_type & 0xFFFFFFFF, count) + payload)


def alignment(value: int) -> bytes:
    return kv_u32("general.alignment", value)


def tensor(
    name: str | bytes = "t",
    ne: Sequence[int] = (8,),
    type_id: int = T_F32,
    offset: int = 0,
    *,
    n_dims: int | None = None,
) -> bytes:
    wrapped = [n & (1 << 64) - 1 for n in ne]
    return b"".join((
        text(name),
        struct.pack(f"<I{len(wrapped)}Q", len(wrapped) if n_dims is None else n_dims, *wrapped),
        struct.pack("<IQ", type_id & 0xFFFFFFFF, offset & (1 << 64) - 1),
    ))


def padded(raw: bytes, alignment: int = 32) -> bytes:
    return raw + bytes(-len(raw) % alignment)


def gguf(
    kvs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes | None = None,
    *,
    magic: bytes = b"GGUF",
    version: bytes = b"\3\0\0\0",
    n_tensors: int | None = None,
    n_kvs: int | None = None,
    align: int = 32,
) -> bytes:
    """A whole file; without `data` the header is not padded either."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(kvs) if n_kvs is None else n_kvs)
    header = magic + version + struct.pack("<QQ", *(n & (1 << 64) - 1 for n in counts)) + b"".join((*kvs, *tensors))
    return header if data is None else padded(header, align) + data


EVERY_TYPE = [
    kv("u8", 0, b"\xff"), kv("i8", 1, b"\x80"), kv("u16", 2, b"\xff\xff"), kv("i16", 3, b"\0\x80"),
    kv_u32("u32", 2**32 - 1), kv("i32", 5, struct.pack("<i", -(2**31))), kv("f32", 6, struct.pack("<f", 1.5)),
    kv("bool", 7, b"\1"), kv_str("str", "grüße"), kv_arr("arr", STR, 2, text("") + text("b")),
    kv("u64", 10, struct.pack("<Q", 2**64 - 1)), kv("i64", 11, struct.pack("<q", -(2**63))),
    kv("f64", 12, struct.pack("<d", 0.1)), kv_str("empty.string", ""), kv_arr("empty.array", U8, 0),
    kv_arr("arr.i32", I32, 3, struct.pack("<3i", 1, -2, 3)), kv_arr("arr.bool", BOOL, 2, b"\0\1"),
]
# 8 F32 values (32 bytes), 2 x 32 Q8_0 values (68 bytes, padded to 96), 3 I8 values (padded to 32)
THREE = [tensor("a", (8,)), tensor("b", (32, 2), T_Q8_0, 32), tensor("c", (3,), T_I8, 128)]
THREE_DATA = b"".join(padded(bytes(range(1, n + 1))) for n in (32, 68, 3))
