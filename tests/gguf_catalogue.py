"""The catalogue of GGUF files that a strict reader must judge right.

Names in capitals are the hand-crafted cases of llama.cpp's tests/test-gguf.cpp; the others go beyond it. A verdict
is ``accept``, ``warn`` (accepted, with findings) or ``reject``; `code` is that of the first error, or of the warning.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from gguf_bytes import (
    ARR,
    BOOL,
    EVERY_TYPE,
    F32,
    I32,
    STR,
    T_F16,
    T_I8,
    T_Q4_K,
    THREE,
    THREE_DATA,
    U8,
    U32,
    U64,
    alignment,
    gguf,
    kv,
    kv_arr,
    kv_str,
    kv_u32,
    padded,
    tensor,
    text,
)


class Case(NamedTuple):
    name: str
    verdict: str
    code: str
    raw: bytes


def accept(name: str, raw: bytes) -> Case:
    return Case(name, "accept", "", raw)


def warn(name: str, code: str, raw: bytes) -> Case:
    return Case(name, "warn", code, raw)


def reject(name: str, code: str, raw: bytes) -> Case:
    return Case(name, "reject", code, raw)


# Bytes that 256 values take in each ggml type there is (ggml.h, ggml-common.h).
BYTES_OF_256 = {
    0: 1024, 1: 512, 2: 144, 3: 160, 6: 176, 7: 192, 8: 272, 9: 288, 10: 84, 11: 110, 12: 144, 13: 176, 14: 210,
    15: 292,
    16: 66, 17: 74, 18: 98, 19: 50, 20: 144, 21: 110, 22: 82, 23: 136, 24: 256, 25: 512, 26: 1024, 27: 2048, 28: 2048,
    29: 56, 30: 512, 34: 54, 35: 66, 39: 136, 40: 144, 41: 36, 42: 72,
}
NESTED = struct.pack("<IQ", ARR, 1)


def one(data: bytes = bytes(32), kvs: tuple[bytes, ...] = (), align: int = 32, **fields: object) -> bytes:
    """A file of one tensor, by default a right one."""
    return gguf(kvs, [tensor(**fields)], data, align=align)


CASES = [
    # the fixed header
    reject("HEADER_BAD_MAGIC", "magic", gguf(magic=b"GGUX", data=b"")),
    reject("HEADER_BAD_VERSION_0", "version", gguf(version=b"\0\0\0\0")),
    reject("HEADER_BAD_VERSION_1", "version", gguf(version=b"\1\0\0\0")),
    reject("HEADER_BAD_VERSION_FUTURE", "version", gguf(version=b"\4\0\0\0")),
    reject("big-endian", "big-endian", gguf(version=b"\0\0\0\3")),
    reject("big-endian-version-2", "big-endian", gguf(version=b"\0\0\0\2")),
    accept("version-2", gguf(EVERY_TYPE, THREE, THREE_DATA, version=b"\2\0\0\0")),
    reject("HEADER_BAD_N_KV", "kv-count", gguf(n_kvs=-1)),
    reject("HEADER_BAD_N_TENSORS", "tensor-count", gguf(n_tensors=-1)),
    reject("more-kvs-than-bytes", "kv-count", gguf([kv_u32("k", 1)], n_kvs=3)),
    reject("one-kv-too-many", "key-empty", gguf([kv_u32("k", 1)], data=b"", n_kvs=2)),
    accept("HEADER_EMPTY", gguf()),
    accept("HEADER_EMPTY-padded", gguf(data=b"")),
    reject("empty-file", "truncated", b""),
    reject("3-bytes", "magic", b"GGU"),
    reject("20-bytes", "truncated", gguf()[:20]),
    # metadata
    reject("KV_BAD_KEY_SIZE", "truncated", gguf([struct.pack("<Q", 2**64 - 1) + b"key" + bytes(40)])),
    reject("KV_EMPTY_KEY", "key-empty", gguf([kv_u32("", 1)])),
    reject("key-65536-bytes", "key-too-long", gguf([kv_u32("k" * 65536, 1)])),
    accept("key-65535-bytes", gguf([kv_u32("k" * 65535, 1)])),
    reject("key-with-zero-byte", "key-nul", gguf([kv_u32("a\0b", 1)])),
    warn("key-with-escape", "key-charset", gguf([kv_u32("a\x1b[2J", 1)])),
    warn("key-not-ascii", "key-charset", gguf([kv_u32("größe", 1)])),
    reject("KV_BAD_TYPE", "value-type", gguf([kv("k", 13, bytes(8))])),
    reject("type-minus-1", "value-type", gguf([kv("k", -1, bytes(8))])),
    reject("KV_BAD_VALUE_SIZE", "truncated", gguf([kv("k", STR, struct.pack("<Q", 2**64 - 1) + b"abc")])),
    reject("string-of-2-GiB", "truncated", gguf([kv("k", STR, struct.pack("<Q", 2**31) + b"abc")])),
    reject("array-item-beyond-the-end", "truncated",
           gguf([kv_arr("k", STR, 2, text("a") + struct.pack("<Q", 2**62) + b"b")])),
    reject("KV_DUPLICATE_KEY", "key-duplicate", gguf([kv_u32("k", 1), kv_u32("k", 1)])),
    reject("KV_BAD_ALIGN", "alignment", gguf([alignment(13)])),
    reject("align-0", "alignment", gguf([alignment(0)])),
    reject("KV_WRONG_TYPE_ALIGN", "alignment-type", gguf([kv("general.alignment", I32, struct.pack("<i", 32))])),
    reject("align-u64", "alignment-type", gguf([kv("general.alignment", U64, struct.pack("<Q", 32))])),
    reject("align-array", "alignment-type", gguf([kv_arr("general.alignment", U32, 1, struct.pack("<I", 32))])),
    reject("align-2-GiB", "alignment-too-big", gguf([alignment(2**31)])),
    reject("align-2-MiB", "alignment-too-big", gguf([alignment(2**21)])),
    reject("array-length-2^62", "array-length", gguf([kv_arr("k", U32, 2**62)])),
    reject("string-array-length-2^62", "array-length", gguf([kv_arr("k", STR, 2**62)])),
    reject("u8-array-10^8-in-100-bytes", "array-length", gguf([kv_arr("k", U8, 10**8, bytes(60))])),
    reject("array-of-arrays", "nested-array", gguf([kv_arr("k", ARR, 1, struct.pack("<IQ", U8, 1) + b"\1")])),
    reject("nested-5000-deep", "nested-array", gguf([kv("k", ARR, NESTED * 5000)])),
    reject("array-bad-item-type", "value-type", gguf([kv_arr("k", 13, 1, bytes(8))])),
    reject("array-item-type-minus-1", "value-type", gguf([kv_arr("k", -1, 1, bytes(8))])),
    reject("key-not-utf8", "utf8", gguf([kv(b"\xff\xfe", U32, bytes(4))])),
    reject("value-not-utf8", "utf8", gguf([kv_str("k", b"ab\xff")])),
    reject("array-item-not-utf8", "utf8", gguf([kv_arr("k", STR, 3, text("a") + text(b"\xc3") + text("c"))])),
    reject("value-surrogate", "utf8", gguf([kv_str("k", b"\xed\xa0\x80")])),
    warn("bool-2", "bool", gguf([kv("k", BOOL, b"\2")])),
    warn("bool-2-in-array", "bool", gguf([kv_arr("k", BOOL, 3, b"\0\1\2")])),
    accept("KV_SUCCESS", gguf(EVERY_TYPE, data=b"")),
    accept("f32-nan", gguf([kv("k", F32, struct.pack("<f", float("nan")))])),
    # tensor descriptors
    reject("TENSORS_BAD_NAME_SIZE", "name-too-long", one(name="n" * 64)),
    accept("name-63-bytes", one(name="n" * 63)),
    reject("name-64-bytes-utf8", "name-too-long", one(name="é" * 32)),
    reject("name-length-2^63", "truncated", gguf((), [struct.pack("<Q", 2**63) + bytes(60)], b"")),
    reject("name-empty", "name-empty", one(name="")),
    reject("name-with-zero-byte", "name-nul", one(name="a\0b")),
    reject("name-not-utf8", "utf8", one(name=b"a\xff")),
    warn("name-with-newline", "name-charset", one(name="a\nb")),
    reject("TENSORS_BAD_N_DIMS", "tensor-n-dims", one(ne=(8, 1, 1, 1, 1))),
    accept("4-dims", one(ne=(8, 1, 1, 1))),
    warn("0-dims", "tensor-no-dims", one(ne=())),
    reject("n-dims-2^32-1", "truncated", one(ne=(8,), n_dims=2**32 - 1)),
    reject("TENSORS_BAD_SHAPE", "tensor-shape", one(ne=(-1,))),
    reject("shape-second-minus-1", "tensor-shape", one(ne=(8, -1))),
    warn("TENSORS_ZERO_DIM", "tensor-zero-dim", one(data=b"", ne=(8, 0))),
    reject("TENSORS_NE_TOO_BIG", "tensor-too-big", one(ne=(2**40, 2**40))),
    reject("NBYTES_TOO_BIG", "tensor-too-big", one(ne=(2**62, 1))),
    reject("product-wraps-to-0", "tensor-too-big", one(ne=(2**33, 2**31))),
    reject("product-wraps-to-1", "tensor-too-big", one(ne=(2**32 + 1, 2**32 - 1, 2**32, 2**32), type_id=T_I8)),
    reject("product-wraps-before-a-zero", "tensor-too-big", one(ne=(2**33, 2**31, 0), data=b"")),
    reject("TENSORS_BAD_TYPE", "tensor-type", one(type_id=43)),
    reject("tensor-type-99", "tensor-type", one(type_id=99)),
    reject("tensor-type-minus-1", "tensor-type", one(type_id=-1)),
    *(reject(f"tensor-type-removed-{i}", "tensor-type", one(type_id=i)) for i in (4, 5, 31, 32, 33, 36, 37, 38)),
    reject("TENSORS_BAD_OFFSET", "tensor-offset", one(offset=-1)),
    reject("offset-unaligned", "tensor-offset", one(data=bytes(96), offset=7)),
    reject("overlap", "tensor-offset", gguf((), [tensor("a", (16,)), tensor("b", (8,), offset=32)], bytes(64))),
    reject("same-offset", "tensor-offset", gguf((), [tensor("a"), tensor("b")], bytes(32))),
    reject("hole", "tensor-offset", gguf((), [tensor("a"), tensor("b", offset=64)], bytes(96))),
    reject("hole-before-the-first", "tensor-offset", one(data=bytes(64), offset=32)),
    reject("out-of-order", "tensor-offset", gguf((), [tensor("a", offset=32), tensor("b")], bytes(64))),
    reject("TENSORS_DUPLICATE_NAME", "name-duplicate", gguf((), [tensor("a"), tensor("a", offset=32)], bytes(64))),
    reject("row-255-of-Q4_K", "tensor-row", one(data=bytes(160), ne=(255,), type_id=T_Q4_K)),
    reject("row-128x2-of-Q4_K", "tensor-row", one(data=bytes(160), ne=(128, 2), type_id=T_Q4_K)),
    *(accept(f"tensor-type-{i}", one(data=bytes(n + -n % 32), ne=(256,), type_id=i)) for i, n in BYTES_OF_256.items()),
    accept("row-256-of-Q4_K", one(data=bytes(160), ne=(256,), type_id=T_Q4_K)),
    reject("TENSORS_BAD_ALIGN", "alignment", one(kvs=(alignment(13),), align=13, data=bytes(39))),
    reject("TENSORS_INCONSISTENT_ALIGN", "tensor-offset", gguf(
        [alignment(64)], [tensor("a"), tensor("b", offset=32)], bytes(128), align=64)),
    warn("TENSORS_CUSTOM_ALIGN", "alignment-not-8", gguf(
        [alignment(1)], [tensor("a", (3,), T_I8), tensor("b", (5,), T_I8, 3)], bytes(8), align=1)),
    accept("align-8", gguf([alignment(8)], [tensor("a", (3,), T_I8), tensor("b", (8,), offset=8)], bytes(40), align=8)),
    accept("align-4096", gguf([alignment(4096)], [tensor("a"), tensor("b", offset=4096)], bytes(8192), align=4096)),
    accept("align-1-MiB", one(kvs=(alignment(2**20),), align=2**20, data=bytes(2**20))),
    reject("align-2-GiB-with-a-tensor", "alignment-too-big", one(kvs=(alignment(2**31),), data=bytes(64))),
    accept("TENSORS_SUCCESS", gguf((), THREE, THREE_DATA)),
    # data
    accept("DATA_SUCCESS", gguf(EVERY_TYPE, THREE, THREE_DATA)),
    reject("1-GiB-tensor-in-200-bytes", "tensor-extent", one(data=bytes(100), ne=(2**28,))),
    reject("DATA_NOT_ENOUGH_DATA", "tensor-extent", gguf((), THREE, bytes(127))),
    reject("no-data-at-all", "no-data", gguf((), THREE, b"")),
    reject("no-data-and-no-padding", "no-data", gguf((), THREE)),
    reject("last-padding-missing", "missing-padding", gguf((), THREE, bytes(131))),
    reject("last-padding-short", "missing-padding", gguf((), THREE, bytes(159))),
    reject("DATA_BAD_ALIGN", "alignment", gguf([alignment(13)], THREE, bytes(160))),
    reject("DATA_INCONSISTENT_ALIGN", "tensor-offset", gguf([alignment(64)], THREE, bytes(256), align=64)),
    warn("DATA_CUSTOM_ALIGN", "alignment-not-8", gguf(
        [alignment(1)], [tensor("a", (3,), T_F16), tensor("b", (5,), T_I8, 6)], bytes(11), align=1)),
    reject("DATA_MEM_SIZE_OVERFLOW", "data-too-big", gguf(
        (), [tensor("a", (2**63 - 64,), T_I8), tensor("b", (2**63 - 64,), T_I8, 2**63 - 64)], bytes(64))),
    reject("trailing-byte", "trailing-data", one(data=bytes(33))),
    reject("trailing-block", "trailing-data", one(data=bytes(64))),
    reject("trailing-without-tensors", "trailing-data", gguf(data=bytes(32))),
    warn("padding-of-a-tensor-not-zero", "padding", one(ne=(3,), type_id=T_I8, data=b"abcd" + bytes(28))),
    warn("padding-of-the-header-not-zero", "padding", padded(gguf((), [tensor("a")]))[:-1] + b"\1" + bytes(32)),
]
