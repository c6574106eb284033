"""A few blocks through every kernel at the start of a process, against bytes that are known to be right.

What can go wrong after all tests have passed: a processor or compiler that the tests never met, and a library in the
same process that switched the floating-point unit to flush subnormal numbers to zero. Hence the subnormal blocks.

The digests are the first eight bytes of SHA-256 over what the reference implementations gave for the same inputs: ggml
for blocks, numpy for F16, ml_dtypes for BF16, FP8, FP4 and their scales, gguf-py for decoded blocks.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.errors import Dsv4Error
from dsv4tools.formats.source import SourceKind, SourceRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray


def ramp(n: int, exponent: int) -> NDArray[np.float32]:
    """`n` values spread over -40..56 times ``2**exponent``, exact in every format of 7 significant bits."""
    i = np.arange(n)
    return np.ldexp(((7 * i * i + 13 * i) % 97 - 40).astype(np.float32), exponent)


# The exponents: ordinary, subnormal in F16, and partly subnormal in float32 (its normal numbers end at 2^-126).
EXPONENTS = (-5, -24, -130)
ENCODED = {
    "F32": "5596cdde1d9be87a",
    "F16": "0f2cd411150c3a56",
    "BF16": "4e593d0abbe78f09",
    "Q8_0": "b5a9b2a52778d00c",
    "Q4_K": "0d644b1432662833",
    "Q5_1": "0e62bcb07ec1897c",
    "Q5_0": "2bb2b8dcac4c6ffb",
    "Q4_1": "49c0c3b412271169",
    "Q4_0": "81c3670b3f92d973",
    "Q6_K": "e45e919bff2c87b7",
    "Q3_K": "b0a3e0c702901d01",
    "Q5_K": "2f9b9888535ac0a1",
    "Q2_K": "2cd5cb3a53c0d2cd",
    "MXFP4": "09d7a3df3922b0fb",
    "IQ3_XXS": "45d99722f98ef38d",
    "IQ3_S": "9ad00127551a4834",
    "IQ4_NL": "e4a175dd6a89eb60",
    "IQ4_XS": "1e2aa8a34d9e9879",
    "IQ2_S": "1fcf6add3549d45a",
}
IMPORTANT = {   # the same values, column i weighing ramp(i)^2
    "Q4_K": "dfe2e225917eafcf",
    "Q5_1": "446691994501a74b",
    "Q5_0": "aa343e7df15abb9b",
    "Q4_1": "086587099e392a05",
    "Q4_0": "fea97ca5f6762733",
    "Q6_K": "e45e919bff2c87b7",
    "Q3_K": "8c4a66037c45b02e",
    "Q5_K": "73e383b49c72cf5d",
    "Q2_K": "7ffdb40ccacc8a4f",
    "IQ3_XXS": "75bee736f18e2771",
    "IQ3_S": "4bb36c7fc240216c",
    "IQ4_NL": "3241fcd0d92cb79d",
    "IQ4_XS": "85373a6984f2e910",
    "IQ2_XXS": "f84233c78aec7e4c",
    "IQ2_XS": "ba5deee9531a80b1",
    "IQ2_S": "e985366db99920be",
}
DECODED = {   # 32 blocks of bytes
    "F32": "a8f787a3511b311e",
    "F16": "c6b7e2392ebea7c1",
    "BF16": "fa70a0b67884e2e5",
    "Q8_0": "ac1b16d7ecc1c791",
    "Q4_K": "1b2458670fe5a256",
    "Q5_1": "c8c8062889f15f75",
    "Q5_0": "6068a7cb9056b6b7",
    "Q4_1": "633058f164b5c81e",
    "Q4_0": "ce59cae2cf4ac66e",
    "Q6_K": "cf898ee4e1ab1347",
    "Q3_K": "1e62a9ec1327de2c",
    "Q5_K": "5018aaeaf5376a2b",
    "Q2_K": "07eb41f19ace9683",
    "MXFP4": "0a1dce93c9160ae9",
    "IQ3_XXS": "7295155e8fe17046",
    "IQ3_S": "faf83bd34a586e89",
    "IQ4_NL": "a4722723d0fa8939",
    "IQ4_XS": "167300800b45ca48",
    "IQ2_XXS": "5a6ee2eaf445d148",
    "IQ2_XS": "87f8bf97c9a75872",
    "IQ2_S": "d556df32fcb497ce",
}
SOURCES = {   # every code under the scales 2^-127, 1 and 2^100
    SourceKind.FP8: "fde677d4b4a7cea5",
    SourceKind.FP4: "074d6bf93fc22e37",
}


def values() -> NDArray[np.float32]:
    """float32 [3, 256]: what is encoded."""
    return np.stack([ramp(256, exponent) for exponent in EXPONENTS])


def blocks(n_bytes: int) -> NDArray[np.uint8]:
    """uint8 [32, n_bytes]: what is decoded; every second byte is small, so that no F16 among them is infinite."""
    i = np.arange(32 * n_bytes)
    return ((i * i * 31 + i * 17) % np.where(i % 2, 120, 251)).astype(np.uint8).reshape(32, n_bytes)


def rows(kind: SourceKind) -> SourceRows:
    """Three rows with every code but NaN, under the scale bytes 0, 127 and 227."""
    codes = np.arange(256, dtype=np.uint8)
    if kind is SourceKind.FP8:
        codes[codes & 0x7F == 0x7F] = 0
    n_cols = codes.size * 8 // (8 if kind is SourceKind.FP8 else 4)
    scales = np.repeat(np.array([[0], [127], [227]], np.uint8), n_cols // 32, axis=1)
    return SourceRows(kind, np.tile(codes, 3), 3, n_cols, scales, 1, 32)


def digest(array: NDArray[np.generic]) -> str:
    """The first eight bytes of SHA-256 over an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def check(
    names: Iterable[str],
    encode: Callable[[NDArray[np.float32], str, NDArray[np.float32] | None], NDArray[np.uint8]],
    decode: Callable[[NDArray[np.uint8], str], NDArray[np.float32]],
    block_bytes: Callable[[str], int],
    decode_source: Callable[[SourceRows, NDArray[np.float32]], object],
) -> None:
    """Run the kernels of the formats `names` and of the sources; Dsv4Error names the first that is wrong."""
    x = values()
    for name in names:
        if name in ENCODED:
            _compare(f"encoder of {name}", digest(encode(x, name, None)), ENCODED[name])
        if name in IMPORTANT:
            weights = ramp(256, 0) ** 2
            _compare(f"encoder of {name} with importance", digest(encode(x, name, weights)), IMPORTANT[name])
        if name in DECODED:
            _compare(f"decoder of {name}", digest(decode(blocks(block_bytes(name)), name)), DECODED[name])
    for kind, expected in SOURCES.items():
        source = rows(kind)
        out = np.zeros((source.n_rows, source.n_cols), np.float32)
        decode_source(source, out)
        _compare(f"decoder of {kind.name} rows", digest(out), expected)


def _compare(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise Dsv4Error(
            what, f"kernel self-test failed: found digest {found}, expected {expected}",
            hint="a library in this process may have switched subnormal numbers off; please report it if not",
        )  # fmt: skip
