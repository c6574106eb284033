"""Q4_K: 256 values to F16 d and dmin, eight 6-bit scales and mins, 256 nibbles (ggml-common.h, block_q4_K)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.formats.bits import f16_to_float, float_bits, float_to_f16, load_u16, store_u16
from dsv4tools.formats.compile import helper, kernel
from dsv4tools.formats.tiles import BLOCK_OVERFLOW, DECODE, ENCODE, N_TARGET, encode_tiles, note_fault

if TYPE_CHECKING:
    from dsv4tools.formats.tiles import Bytes, Floats, FaultSlots, Shape

VALUES = 256
BYTES = 144
_TILE = 16 * VALUES
F = np.float32


@helper
def nint(v):
    bits = np.int64(float_bits(F(v + F(12582912.0))) & np.uint32(0x7FFFFF))
    return bits - 0x400000


@helper
def clip15(v):
    return max(0, min(15, v))


@helper
def search(x, w, L, trial, rmin, rdelta, nstep):
    lo = x[0]
    hi = x[0]
    sw = w[0]
    sx = F(w[0] * x[0])
    for i in range(1, 32):
        if x[i] < lo:
            lo = x[i]
        if x[i] > hi:
            hi = x[i]
        sw = F(sw + w[i])
        sx = F(sx + F(w[i] * x[i]))
    if lo > F(0.0):
        lo = F(0.0)
    if hi <= lo:
        for i in range(32):
            L[i] = 0
        return F(0.0), F(-lo)
    iscale = F(15.0) / F(hi - lo)
    scale = F(1.0) / iscale
    best = F(0.0)
    for i in range(32):
        l = clip15(nint(F(iscale * F(x[i] - lo))))
        L[i] = l
        e = F(F(F(scale * F(l)) + lo) - x[i])
        best = F(best + F(w[i] * F(e * e)))
    for step in range(nstep + 1):
        iscale = F(F(rmin + F(rdelta * F(step))) + F(15.0)) / F(hi - lo)
        sl = F(0.0)
        sl2 = F(0.0)
        sxl = F(0.0)
        for i in range(32):
            l = clip15(nint(F(iscale * F(x[i] - lo))))
            trial[i] = l
            wl = F(w[i] * F(l))
            sl = F(sl + wl)
            sl2 = F(sl2 + F(wl * F(l)))
            sxl = F(sxl + F(wl * x[i]))
        D = F(F(sw * sl2) - F(sl * sl))
        if D > F(0.0):
            s = F(F(sw * sxl) - F(sx * sl)) / D
            m = F(F(sl2 * sx) - F(sl * sxl)) / D
            if m > F(0.0):
                m = F(0.0)
                s = sxl / sl2
            err = F(0.0)
            for i in range(32):
                e = F(F(F(s * F(trial[i])) + m) - x[i])
                err = F(err + F(w[i] * F(e * e)))
            if err < best:
                for i in range(32):
                    L[i] = trial[i]
                best = err
                scale = s
                lo = m
    return scale, F(-lo)


@helper
def positive(x, w, L):
    hi = F(0.0)
    for i in range(8):
        hi = max(hi, x[i])
    if hi < F(1e-15):
        for i in range(8):
            L[i] = 0
        return F(0.0)
    iscale = F(63.0) / hi
    scale = F(1.0) / iscale
    best = F(0.0)
    for i in range(8):
        e = F(x[i] - F(scale * F(nint(F(iscale * x[i])))))
        best = F(best + F(F(w[i] * e) * e))
    for step in range(-4, 5):
        if step != 0:
            iscale_t = F(F(F(0.1) * F(step)) + F(63.0)) / hi
            scale_t = F(1.0) / iscale_t
            mse = F(0.0)
            for i in range(8):
                l = min(63, nint(F(iscale_t * x[i])))
                e = F(x[i] - F(scale_t * F(l)))
                mse = F(mse + F(F(w[i] * e) * e))
            if mse < best:
                best = mse
                iscale = iscale_t
    sumlx = F(0.0)
    suml2 = F(0.0)
    for i in range(8):
        l = min(63, nint(F(iscale * x[i])))
        L[i] = l
        sumlx = F(sumlx + F(F(w[i] * x[i]) * F(l)))
        suml2 = F(suml2 + F(F(w[i] * F(l)) * F(l)))
    for _ in range(5):
        changed = False
        for i in range(8):
            slx = F(sumlx - F(F(w[i] * x[i]) * F(L[i])))
            sl2 = F(suml2 - F(F(w[i] * F(L[i])) * F(L[i])))
            if slx > F(0.0) and sl2 > F(0.0):
                l = min(63, nint(F(F(x[i] * sl2) / slx)))
                if l != L[i]:
                    slx = F(slx + F(F(w[i] * x[i]) * F(l)))
                    sl2 = F(sl2 + F(F(w[i] * F(l)) * F(l)))
                    if F(F(slx * slx) * suml2) > F(F(sumlx * sumlx) * sl2):
                        L[i] = l
                        sumlx = slx
                        suml2 = sl2
                        changed = True
        if not changed:
            break
    return sumlx / suml2 if suml2 > F(0.0) else F(0.0)


@helper
def encode_block(x, importance, out, at):
    w = np.empty(32, np.float32)
    L = np.empty(256, np.int64)
    trial = np.empty(32, np.int64)
    scales = np.empty(8, np.float32)
    mins = np.empty(8, np.float32)
    ws = np.empty(8, np.float32)
    ls = np.empty(8, np.int64)
    lm = np.empty(8, np.int64)
    sigma2 = F(0.0)
    if importance.size:
        for i in range(256):
            sigma2 = F(sigma2 + F(x[i] * x[i]))
        sigma2 = F(F(2.0) * sigma2) / F(256.0)
    for j in range(8):
        sub = x[32 * j : 32 * j + 32]
        if importance.size:
            for i in range(32):
                w[i] = F(importance[32 * j + i] * np.sqrt(F(sigma2 + F(sub[i] * sub[i]))))
            total = F(0.0)
            for i in range(32):
                total = F(total + w[i])
            ws[j] = total
            scales[j], mins[j] = search(sub, w, L[32 * j : 32 * j + 32], trial, F(-0.9), F(0.05), 36)
        else:
            total = F(0.0)
            for i in range(32):
                total = F(total + F(sub[i] * sub[i]))
            av = np.sqrt(F(total / F(32.0)))
            for i in range(32):
                w[i] = F(av + abs(sub[i]))
            scales[j], mins[j] = search(sub, w, L[32 * j : 32 * j + 32], trial, F(-1.0), F(0.1), 20)
    if importance.size:
        d = float_to_f16(positive(scales, ws, ls))
        dmin = float_to_f16(positive(mins, ws, lm))
    else:
        hs = F(0.0)
        hm = F(0.0)
        for j in range(8):
            hs = max(hs, scales[j])
            hm = max(hm, mins[j])
        inv = F(63.0) / hs if hs > F(0.0) else F(0.0)
        invm = F(63.0) / hm if hm > F(0.0) else F(0.0)
        for j in range(8):
            ls[j] = min(63, nint(F(inv * scales[j])) & 255)
            lm[j] = min(63, nint(F(invm * mins[j])) & 255)
        d = float_to_f16(hs / F(63.0))
        dmin = float_to_f16(hm / F(63.0))
    store_u16(out, at, d)
    store_u16(out, at + 2, dmin)
    for j in range(8):
        ls[j] &= 255
        lm[j] &= 255
    for j in range(4):
        out[at + 4 + j] = np.uint8(ls[j] | (ls[j + 4] >> 4) << 6)
        out[at + 8 + j] = np.uint8(lm[j] | (lm[j + 4] >> 4) << 6)
        out[at + 12 + j] = np.uint8((ls[j + 4] & 15) | (lm[j + 4] & 15) << 4)
    for j in range(8):
        dd = F(f16_to_float(d) * F(ls[j] & 63))
        dm = F(f16_to_float(dmin) * F(lm[j] & 63))
        if dd != F(0.0):
            for i in range(32):
                L[32 * j + i] = clip15(nint(F(F(x[32 * j + i] + dm) / dd)))
    for j in range(0, 8, 2):
        for i in range(32):
            out[at + 16 + 16 * j + i] = np.uint8(L[32 * j + i] | L[32 * j + 32 + i] << 4)
    return (d & 0x7FFF) < 0x7C00 and (dmin & 0x7FFF) < 0x7C00


@helper
def _encode_tile(
    tile: Floats, count: int, first: int, n_cols: int, importance: Floats, out: Bytes, at: int, faults: FaultSlots
) -> None:
    for block in range(count // VALUES):
        column = (first + VALUES * block) % n_cols
        if not encode_block(tile[VALUES * block :], importance[column:], out, at + BYTES * block):
            note_fault(faults, N_TARGET, BLOCK_OVERFLOW, first + VALUES * block, 1)


@kernel(ENCODE)
def encode(
    kind: int, shape: Shape, data: Bytes, scales: Bytes, importance: Floats, out: Bytes, faults: FaultSlots
) -> None:
    encode_tiles(_encode_tile, _TILE, VALUES, BYTES, kind, shape, data, scales, importance, out, faults)


@kernel(DECODE)
def decode(data: Bytes, out: Floats) -> None:
    for block in range(out.size // VALUES):
        at = BYTES * block
        d = f16_to_float(load_u16(data, at))
        dmin = f16_to_float(load_u16(data, at + 2))
        for j in range(8):
            if j < 4:
                scale = data[at + 4 + j] & 63
                low = data[at + 8 + j] & 63
            else:
                scale = (data[at + 8 + j] & 15) | (data[at + j] >> 6) << 4
                low = (data[at + 8 + j] >> 4) | (data[at + 4 + j] >> 6) << 4
            dd = F(d * F(scale))
            dm = F(dmin * F(low))
            shift = 4 * (j & 1)
            nibbles = at + 16 + 32 * (j >> 1)
            for i in range(32):
                out[VALUES * block + 32 * j + i] = F(dd * F((data[nibbles + i] >> shift) & 15)) - dm
