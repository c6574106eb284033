"""The number formats once more, in numpy and from their definitions: what the kernels are compared with.

Nothing here comes from the package under test. Arrays hold one block per row, sums run over columns one by one, and
every operation is float32.
"""

from __future__ import annotations

import ctypes

import numpy as np

F = np.float32

# E2M1 by definition (sign, two exponent bits of bias 1, one mantissa bit), but code 8 is +0.0 as in the C tool.
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], F)


def e4m3(code):
    """The float of an F8_E4M3 code in exact arithmetic."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code & 0x80 else size


E4M3 = np.array([e4m3(code) for code in range(256)], F)
E8M0 = np.array([2.0 ** (code - 127) for code in range(255)] + [float("nan")], F)   # 2^-127 is subnormal


def decode_scaled(values, scales, scale_rows, scale_cols, first_row=0):
    """Values times the scale of the block that each lies in."""
    n_rows, n_cols = values.shape
    rows = (first_row + np.arange(n_rows)) // scale_rows
    columns = np.arange(n_cols) // scale_cols
    with np.errstate(over="ignore", invalid="ignore"):
        return (values * E8M0[scales[rows[:, None], columns]]).astype(F)


def decode_fp4(packed, scales, scale_cols=32, scale_rows=1, first_row=0):
    """uint8 [rows, cols / 2] to float32 [rows, cols]."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return decode_scaled(FP4[codes], scales, scale_rows, scale_cols, first_row)


def decode_fp8(codes, scales, scale_rows=128, scale_cols=128, first_row=0):
    """uint8 [rows, cols] to float32 [rows, cols]."""
    return decode_scaled(E4M3[codes], scales, scale_rows, scale_cols, first_row)


def nint(v):
    """C's nearest integer through the mantissa bits."""
    bits = (np.asarray(v, F) + F(12582912.0)).astype(F).view(np.uint32) & np.uint32(0x7FFFFF)
    return bits.astype(np.int64) - 0x400000


def running_sum(terms):
    """Sum over columns, left to right."""
    total = terms[:, 0].astype(F)
    for i in range(1, terms.shape[1]):
        total = total + terms[:, i]
    return total


def search(x, w, rmin, rdelta, n_steps, highest=15):
    """scale, -minimum and levels of sub-blocks x [n, 32] with weights w."""
    lo, hi = x.min(axis=1), x.max(axis=1)
    sw, sx = running_sum(w), running_sum(w * x)
    lo = np.where(lo > 0, F(0), lo)
    flat = hi == lo
    start = lo
    inverse = F(highest) / (hi - lo)
    scale = F(1) / inverse
    levels = np.clip(nint(inverse[:, None] * (x - lo[:, None])), 0, highest)
    error = scale[:, None] * levels.astype(F) + lo[:, None] - x
    best = running_sum(w * (error * error))
    for step in range(n_steps + 1):
        inverse = (F(rmin) + F(rdelta) * F(step) + F(highest)) / (hi - lo)
        trial = np.clip(nint(inverse[:, None] * (x - lo[:, None])), 0, highest)
        level = trial.astype(F)
        sl, sl2, sxl = running_sum(w * level), running_sum(w * level * level), running_sum(w * level * x)
        det = sw * sl2 - sl * sl
        s = (sw * sxl - sx * sl) / det
        m = (sl2 * sx - sl * sxl) / det
        s = np.where(m > 0, sxl / sl2, s)
        m = np.where(m > 0, F(0), m)
        error = s[:, None] * level + m[:, None] - x
        total = running_sum(w * (error * error))
        better = (det > 0) & (total < best) & ~flat
        best = np.where(better, total, best)
        levels = np.where(better[:, None], trial, levels)
        scale = np.where(better, s, scale)
        lo = np.where(better, m, lo)
    return np.where(flat, F(0), scale), np.where(flat, -start, -lo), np.where(flat[:, None], 0, levels)


def fit_positive(x, w, highest=63):
    """scale and levels of x [n, 8] with x = scale * level."""
    hi = np.maximum(x.max(axis=1), F(0))
    tiny = hi < F(1e-15)
    inverse = F(highest) / hi
    error = x - (F(1) / inverse)[:, None] * (nint(inverse[:, None] * x) & 255).astype(F)
    best = running_sum(w * error * error)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        trial = (F(0.1) * F(step) + F(highest)) / hi
        level = np.minimum(nint(trial[:, None] * x), highest).astype(F)
        error = x - (F(1) / trial)[:, None] * level
        total = running_sum(w * error * error)
        inverse = np.where(total < best, trial, inverse)
        best = np.where(total < best, total, best)
    first = np.minimum(nint(inverse[:, None] * x), highest)
    sumlx, suml2 = running_sum(w * x * first.astype(F)), running_sum(w * first.astype(F) * first.astype(F))
    levels = first & 255
    for _ in range(5):
        before = levels.copy()
        for i in range(x.shape[1]):
            xi, wi, level = x[:, i], w[:, i], levels[:, i].astype(F)
            slx, sl2 = sumlx - wi * xi * level, suml2 - wi * level * level
            new = np.minimum(nint(xi * sl2 / slx), highest)
            changed = (slx > 0) & (sl2 > 0) & (new != levels[:, i])
            slx, sl2 = slx + wi * xi * new.astype(F), sl2 + wi * new.astype(F) * new.astype(F)
            changed &= slx * slx * suml2 > sumlx * sumlx * sl2
            levels[:, i] = np.where(changed, new & 255, levels[:, i])
            sumlx, suml2 = np.where(changed, slx, sumlx), np.where(changed, sl2, suml2)
        if (before == levels).all():
            break
    return np.where(~tiny & (suml2 > 0), sumlx / suml2, F(0)), np.where(tiny[:, None], 0, levels)


def plain_six_bits(x):
    """Levels of x [n, 8] as 63rds of the largest, and that 63rd."""
    hi = np.maximum(x.max(axis=1), F(0))
    inverse = np.where(hi > 0, F(63) / hi, F(0))
    return hi / F(63), np.minimum(nint(inverse[:, None] * x) & 255, 63)


def quantize_q4_k(x, importance=None):
    """float32 [rows, n] to Q4_K uint8 [rows, n / 256 * 144]."""
    with np.errstate(all="ignore"):
        blocks = np.ascontiguousarray(x, F).reshape(-1, 256)
        n = len(blocks)
        subs = blocks.reshape(-1, 32)
        if importance is None:
            w = np.sqrt(running_sum(subs * subs) / F(32))[:, None] + np.abs(subs)
            scale, low, levels = search(subs, w, -1.0, 0.1, 20)
            (unit, s), (unit_min, m) = plain_six_bits(scale.reshape(n, 8)), plain_six_bits(low.reshape(n, 8))
        else:
            q = np.tile(importance.reshape(-1, 256), (len(x), 1)).reshape(-1, 32)
            sigma2 = F(2) * running_sum(blocks * blocks) / F(256)
            w = q * np.sqrt(np.repeat(sigma2, 8)[:, None] + subs * subs)
            scale, low, levels = search(subs, w, -0.9, 0.05, 36)
            sw = running_sum(w).reshape(n, 8)
            (unit, s), (unit_min, m) = fit_positive(scale.reshape(n, 8), sw), fit_positive(low.reshape(n, 8), sw)
        d, dmin = unit.astype(np.float16), unit_min.astype(np.float16)
        packed = np.zeros((n, 12), np.int64)
        packed[:, :4] = s[:, :4] | s[:, 4:] >> 4 << 6
        packed[:, 4:8] = m[:, :4] | m[:, 4:] >> 4 << 6
        packed[:, 8:] = s[:, 4:] & 15 | m[:, 4:] << 4
        packed &= 255
        s = np.concatenate([packed[:, :4] & 63, packed[:, 8:] & 15 | packed[:, :4] >> 6 << 4], axis=1)
        m = np.concatenate([packed[:, 4:8] & 63, packed[:, 8:] >> 4 | packed[:, 4:8] >> 6 << 4], axis=1)
        dd = (d.astype(F)[:, None] * s.astype(F)).reshape(-1, 1)
        dm = (dmin.astype(F)[:, None] * m.astype(F)).reshape(-1, 1)
        levels = np.where(dd != 0, np.clip(nint((subs + dm) / dd), 0, 15), levels).reshape(n, 4, 2, 32)
        nibbles = (levels[:, :, 0] | levels[:, :, 1] << 4).reshape(n, 128)
        head = np.stack([d, dmin], axis=1).view(np.uint8)
        out = np.concatenate([head, packed.astype(np.uint8), nibbles.astype(np.uint8)], axis=1)
    return out.reshape(len(x), -1)


def quantize_q8_0(x):
    """float32 [rows, n] to Q8_0 uint8 [rows, n / 32 * 34]."""
    with np.errstate(all="ignore"):
        blocks = np.ascontiguousarray(x, F).reshape(-1, 32)
        d = np.abs(blocks).max(axis=1) / F(127)
        inverse = F(1) / d
        inverse = np.where(np.isfinite(inverse), inverse, F(0))
        v = blocks * inverse[:, None]
        size = np.trunc(np.abs(v))
        q = np.copysign(size + (np.abs(v) - size >= F(0.5)), v).astype(np.int8)
        head = d.astype(np.float16)[:, None].view(np.uint8)
        return np.concatenate([head, q.view(np.uint8)], axis=1).reshape(len(x), -1)


GGML_TYPES = {   # id, values and bytes of a block
    "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "MXFP4": (39, 32, 17),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
    "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ2_S": (22, 256, 82),
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
    "IQ3_XXS": (18, 256, 98), "IQ3_S": (21, 256, 110), "IQ4_NL": (20, 32, 18), "IQ4_XS": (23, 256, 136),
}  # fmt: skip


class Ggml:
    """ggml's own quantizer, from a shared library."""

    def __init__(self, path):
        self._quantize = ctypes.CDLL(str(path)).ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
            ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
        ]  # fmt: skip

    def quantize(self, x, name, importance=None):
        """float32 [rows, n] to uint8 [rows, bytes]."""
        type_id, values, n_bytes = GGML_TYPES[name]
        x = np.ascontiguousarray(x, F)
        out = np.zeros((len(x), x.shape[1] // values * n_bytes), np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance, F)
        self._quantize(
            type_id, x.ctypes.data, out.ctypes.data, 0, *x.shape, None if weights is None else weights.ctypes.data
        )
        return out


def kinds_of_rows(rng, n_rows, n_cols):
    """Name -> float32 [n_rows, n_cols]: ordinary weights, and whatever a search for scales might trip over."""
    shape, per_sub = (n_rows, n_cols), (n_rows, n_cols // 32)
    normal, uniform = rng.normal(size=shape), rng.random(shape)

    def repeat(values):
        return np.repeat(values, 32, axis=1)

    def fp4(low, high):
        return FP4[rng.integers(0, 16, shape)] * 2.0 ** repeat(rng.integers(low, high, per_sub))

    kinds = {
        "weights": normal * 0.02,
        "fp4": fp4(-12, -3),
        "fp4 of all scales": fp4(-127, 13),
        "fp4 of the smallest scales": fp4(-127, -106),   # nint leaves its range
        "tiny": normal * 1e-20,
        "subnormal": normal * repeat(10.0 ** rng.uniform(-45, -36, per_sub)),
        "sparse": np.where(uniform < 0.05, normal, 0),
        "one in a block": np.where(uniform < 1 / 64, normal, 0),
        "empty sub-blocks": np.where(repeat(rng.random(per_sub)) < 0.3, normal, 0),
        "outliers": normal * np.where(uniform < 0.01, 1e3, 1),
        "large outliers": normal * np.where(uniform < 0.02, 1e7, 1),
        "flat": repeat(rng.normal(size=per_sub)),
        "nearly flat": repeat(rng.normal(size=per_sub)) * (1 + 1e-7 * rng.integers(-2, 3, shape)),
        "positive": normal + 10,
        "negative": normal - 10,
        "far from zero": normal + repeat(rng.choice([-1e6, -1e4, 1e4, 1e6], per_sub)),
        "integers": rng.integers(-8, 8, shape),
        "signed zeros": np.where(uniform < 0.4, -0.0, np.where(uniform < 0.7, 0.0, normal)),
        "zeros only": np.where(uniform < 0.5, -0.0, 0.0),
        "every magnitude": normal * 10.0 ** rng.uniform(-30, 6, shape),
        "two values": rng.choice([-1.0, 1.0], shape) * repeat(rng.random(per_sub)),
    }
    return {name: np.ascontiguousarray(x, F) for name, x in kinds.items()}


def kinds_of_importance(rng, n_cols):
    """Name -> float32 [n_cols] or None."""
    uniform = rng.random(n_cols)
    return {
        "none": None,
        "even": np.ones(n_cols, F),
        "spread": (uniform**8 * 1e3).astype(F),
        "some zeros": np.where(uniform < 0.3, 0, uniform).astype(F),
        "zeros": np.zeros(n_cols, F),
        "one column": (np.arange(n_cols) % 256 == 0).astype(F),
        "tiny": (10.0 ** rng.uniform(-45, -30, n_cols)).astype(F),
        "huge": (10.0 ** rng.uniform(10, 38, n_cols)).astype(F),
    }


def differing_blocks(found, expected, block_bytes):
    """"" if equal, else a report: how many blocks differ, and the first in hexadecimal."""
    found, expected = found.reshape(-1, block_bytes), expected.reshape(-1, block_bytes)
    wrong = np.flatnonzero((found != expected).any(axis=1))
    if not len(wrong):
        return ""
    worst = wrong[np.argmax(np.unpackbits(found[wrong] ^ expected[wrong], axis=1).sum(axis=1))]
    return (
        f"{len(wrong)} of {len(found)} blocks differ, most in block {worst}:\n"
        f"found    {found[worst].tobytes().hex()}\nexpected {expected[worst].tobytes().hex()}"
    )
