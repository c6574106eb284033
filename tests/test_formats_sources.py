"""What checkpoints store, decoded and encoded; and what is wrong with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_reference import E4M3, decode_fp4, decode_fp8, differing_blocks, quantize_q4_k, quantize_q8_0

from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.codecs import decode_source, encode_rows
from dsv4tools.formats.source import FaultKind, Faults, SourceKind, SourceRows
from dsv4tools.formats.table import FORMATS

BITS = {SourceKind.F32: np.uint32, SourceKind.F16: np.uint16, SourceKind.BF16: np.uint16}


def plain(kind, bits):
    """Rows of F32, F16 or BF16 from their bits."""
    bits = np.ascontiguousarray(bits, BITS[kind])
    return SourceRows(kind, bits.reshape(-1).view(np.uint8), *bits.shape)


def fp4(packed, scales, scale_cols=32, scale_rows=1, first_row=0):
    return SourceRows(
        SourceKind.FP4, packed.reshape(-1), len(packed), 2 * packed.shape[1], scales, scale_rows, scale_cols, first_row
    )


def fp8(codes, scales, scale_rows=128, scale_cols=128, first_row=0):
    return SourceRows(SourceKind.FP8, codes.reshape(-1), *codes.shape, scales, scale_rows, scale_cols, first_row)


def decode(source):
    out = np.full((source.n_rows, source.n_cols), 12345, np.float32)
    return out, decode_source(source, out)


def encode(source, name, **options):
    out = np.full(source.n_rows * FORMATS[name].row_bytes(source.n_cols), 0xAA, np.uint8)
    return out, encode_rows(source, FORMATS[name], out, **options)


def same(a, b):
    """Equal bits; any NaN equals any NaN."""
    return ((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all()


# ---- Values


def test_every_fp8_code_under_every_scale():
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    found, faults = decode(fp8(codes, scales, 1, 256))
    expected = decode_fp8(codes, scales, 1, 256)
    assert same(found, expected)
    assert faults.n_source == (~np.isfinite(expected)).sum()
    assert found[127, 0x80].view(np.uint32) == 0x80000000          # -0 stays
    assert found[0, 0x01].view(np.uint32) == 1 << 13               # 2^-9 * 2^-127 is subnormal


def test_every_fp4_code_under_every_scale():
    packed = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)
    found, faults = decode(fp4(packed, scales))
    expected = decode_fp4(packed, scales)
    assert same(found, expected)
    assert faults.n_source == (~np.isfinite(expected)).sum()
    assert found[127, 0x80 * 2].view(np.uint32) == 0               # code 0 below, 8 above: both +0
    assert found[127, 0x80 * 2 + 1].view(np.uint32) == 0
    assert found[127, 0x21 * 2 : 0x21 * 2 + 2].tolist() == [0.5, 1.0]   # the low nibble comes first


@pytest.mark.parametrize("kind", [SourceKind.F16, SourceKind.BF16])
def test_every_half(kind):
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    found, faults = decode(plain(kind, bits))
    as_f16 = kind is SourceKind.F16
    expected = bits.view(np.float16).astype(np.float32) if as_f16 else (bits.astype(np.uint32) << 16).view(np.float32)
    assert same(found, expected)
    assert faults.n_source == (~np.isfinite(expected)).sum()


def test_f32_keeps_every_bit():
    bits = np.random.default_rng(0).integers(0, 1 << 32, (40, 99), dtype=np.uint32)
    found, _ = decode(plain(SourceKind.F32, bits))
    assert (found.view(np.uint32) == bits).all()


shapes = st.tuples(st.integers(1, 9), st.integers(1, 300), st.integers(1, 5), st.integers(1, 140), st.integers(0, 7))


@settings(deadline=None, max_examples=150)
@given(shapes, st.booleans(), st.integers(0, 2**32 - 1))
def test_any_shape_of_rows_and_scale_blocks(shape, four_bits, seed):
    """Edge blocks, scale blocks narrower than a vector, runs that start inside a scale block."""
    n_rows, n_cols, scale_rows, scale_cols, first_row = shape
    if four_bits:
        n_cols, scale_cols = 2 * n_cols, 2 * scale_cols
    rng = np.random.default_rng(seed)
    n_scales = (-(-(first_row + n_rows) // scale_rows), -(-n_cols // scale_cols))
    scales = rng.integers(0, 256, n_scales, dtype=np.uint8)
    codes = rng.integers(0, 256, (n_rows, n_cols // 2 if four_bits else n_cols), dtype=np.uint8)
    make, reference = (fp4, decode_fp4) if four_bits else (fp8, decode_fp8)
    place = {"scale_rows": scale_rows, "scale_cols": scale_cols, "first_row": first_row}
    found, faults = decode(make(codes, scales, **place))
    expected = reference(codes, scales, **place)
    assert same(found, expected)
    assert faults.n_source == (~np.isfinite(expected)).sum()


def test_bytes_at_any_alignment():
    """A tensor may start anywhere in a file."""
    values = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    for kind, stored in ((SourceKind.F32, values), (SourceKind.F16, values.astype(np.float16))):
        room = np.zeros(stored.nbytes + 1, np.uint8)
        room[1:] = stored.reshape(-1).view(np.uint8)
        room.flags.writeable = False   # as a mapped file is
        source = SourceRows(kind, room[1:], 3, 256)
        assert (decode(source)[0] == stored.astype(np.float32)).all()
        assert not differing_blocks(encode(source, "Q8_0")[0], quantize_q8_0(stored.astype(np.float32)), 34)


# ---- Sources to targets


@pytest.mark.parametrize("n_rows", [1, 3, 70])
@pytest.mark.parametrize("first_row", [0, 130])
@pytest.mark.parametrize(
    "scales",
    [(-15, -5), (-127, -106), (-127, 10)],   # as trained; the smallest, where C's nint leaves its range; all that fit
    ids=["ordinary", "smallest", "all"],
)
def test_scaled_rows_are_decoded_and_then_encoded(n_rows, first_row, scales):
    rng = np.random.default_rng(n_rows + first_row)
    n_cols = 512
    importance = rng.random(n_cols, np.float32)
    packed = rng.integers(0, 256, (n_rows, n_cols // 2), dtype=np.uint8)
    small = rng.integers(127 + scales[0], 127 + scales[1], (first_row + n_rows, n_cols // 32), dtype=np.uint8)
    codes = rng.choice(np.flatnonzero(np.isfinite(E4M3)).astype(np.uint8), (n_rows, n_cols))
    large = rng.integers(127 + scales[0], 127 + scales[1] - 5, (-(-(first_row + n_rows) // 128), 4), dtype=np.uint8)
    for source, x in (
        (fp4(packed, small, first_row=first_row), decode_fp4(packed, small, first_row=first_row)),
        (fp8(codes, large, first_row=first_row), decode_fp8(codes, large, first_row=first_row)),
    ):
        for name, expected in (
            ("Q4_K", quantize_q4_k(x)),
            ("Q8_0", quantize_q8_0(x)),
            ("F16", x.astype(np.float16)),
            ("F32", x),
        ):
            found, faults = encode(source, name)
            assert faults == Faults()
            wanted = np.ascontiguousarray(expected).reshape(-1).view(np.uint8)
            report = differing_blocks(found, wanted, FORMATS[name].block_bytes)
            assert not report, (source.kind, name, report)
        found, _ = encode(source, "Q4_K", importance=importance)
        assert not (report := differing_blocks(found, quantize_q4_k(x, importance), 144)), (source.kind, report)


def test_a_run_of_rows_gives_the_same_bytes_as_the_whole():
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 120, (300, 512), dtype=np.uint8)
    scales = rng.integers(110, 125, (3, 4), dtype=np.uint8)
    whole, _ = encode(fp8(codes, scales), "Q4_K")
    for start, stop in ((0, 1), (1, 127), (127, 129), (129, 300)):
        part, _ = encode(fp8(codes[start:stop], scales, first_row=start), "Q4_K")
        assert (part == whole[start * 288 : stop * 288]).all()


def test_no_rows():
    empty = SourceRows(SourceKind.F32, np.zeros(0, np.uint8), 0, 256)
    out, faults = encode(empty, "Q4_K")
    assert (out.size, faults) == (0, Faults())
    assert decode(empty)[1] == Faults()


# ---- Faults


def expected_faults(kinds):
    """Faults of source values from their kinds by row and column (0: none)."""
    places = np.argwhere(kinds)
    if not len(places):
        return Faults()
    row, column = map(int, places[0])
    return Faults(n_source=len(places), first=(FaultKind(int(kinds[row, column])), row, column))


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0, 1e-4, 0.01, 0.5]), st.sampled_from(["Q4_K", "Q8_0", "F16", "F32"])
)
def test_faults_of_fp8(seed, share, name):
    rng = np.random.default_rng(seed)
    n_rows, n_cols = int(rng.integers(1, 70)), 256
    codes = rng.integers(0, 0x30, (n_rows, n_cols), dtype=np.uint8)
    scales = rng.integers(100, 130, (-(-n_rows // 32), 8), dtype=np.uint8)
    codes[rng.random(codes.shape) < share] = 0x7F
    codes[rng.random(codes.shape) < share] = 0xFF
    scales[rng.random(scales.shape) < share] = 255
    by_scale = np.repeat(np.repeat(scales, 32, axis=0), 32, axis=1)[:n_rows]
    kinds = np.where(codes & 0x7F == 0x7F, FaultKind.NAN_CODE, 0)
    kinds = np.where(by_scale == 255, FaultKind.NAN_SCALE, kinds)
    source = fp8(codes, scales, 32, 32)

    out, faults = encode(source, name)
    assert faults == expected_faults(kinds)
    if faults.first:
        assert not out.any()   # refused
    out, faults = encode(source, name, zero_nan=True)
    assert faults == expected_faults(kinds)
    x = np.where(kinds > 0, np.float32(0), decode_fp8(codes, scales, 32, 32))
    expected = {"Q4_K": quantize_q4_k, "Q8_0": quantize_q8_0, "F16": lambda x: x.astype(np.float16), "F32": lambda x: x}
    wanted = np.ascontiguousarray(expected[name](x)).reshape(-1).view(np.uint8)
    assert not (report := differing_blocks(out, wanted, FORMATS[name].block_bytes)), report


def test_faults_of_fp4():
    packed = np.full((3, 64), 0x77, np.uint8)   # 6 and 6
    scales = np.full((3, 4), 120, np.uint8)
    scales[1, 2] = 254   # 6 * 2^127 is beyond float32
    scales[2, 0] = 255
    packed[1, 40] = 0x70   # 0 and 6
    out, faults = encode(fp4(packed, scales), "F32", zero_nan=True)
    assert faults == Faults(n_source=31 + 32, first=(FaultKind.SCALED_OVERFLOW, 1, 64))
    values = out.view(np.float32).reshape(3, 128)
    assert (values[1, 64:96] == 0).all()
    assert (values[2, :32] == 0).all()
    assert (values[2, 32:] == 6 * 2.0**-7).all()


@pytest.mark.parametrize("kind", [SourceKind.F32, SourceKind.F16, SourceKind.BF16])
def test_faults_of_floats(kind):
    infinity = {SourceKind.F32: 0x7F800000, SourceKind.F16: 0x7C00, SourceKind.BF16: 0x7F80}[kind]
    sign = 1 << (31 if kind is SourceKind.F32 else 15)
    bits = np.zeros((5, 512), BITS[kind])
    bits[2, 77] = infinity + 1    # a NaN
    bits[2, 78] = sign | infinity
    bits[4, 511] = infinity
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_K"):
        out, faults = encode(plain(kind, bits), name, zero_nan=True)
        assert faults == Faults(n_source=3, first=(FaultKind.NOT_FINITE, 2, 77))
        assert not out.any()


@pytest.mark.parametrize(("name", "limit"), [("F16", 65520.0), ("BF16", np.uint32(0x7F7F8000).view(np.float32))])
def test_a_value_beyond_the_target(name, limit):
    x = np.zeros((9, 1000), np.float32)
    x[8, 999] = np.nextafter(np.float32(limit), np.float32(0))
    assert encode(plain(SourceKind.F32, x.view(np.uint32)), name)[1] == Faults()
    x[5, 3], x[8, 0] = limit, -limit
    out, faults = encode(plain(SourceKind.F32, x.view(np.uint32)), name, zero_nan=True)
    assert faults == Faults(n_target=2, first=(FaultKind.TARGET_OVERFLOW, 5, 3))
    assert not out.any()   # not to be zeroed, so refused


@pytest.mark.parametrize(("name", "n", "size"), [("Q8_0", 32, 127 * 65520.0), ("Q4_K", 256, 63 * 15 * 65520.0)])
def test_a_block_scale_beyond_f16(name, n, size):
    x = np.zeros((3, 1024), np.float32)
    x[1, 2 * n + 5] = np.float32(0.99 * size)
    source = plain(SourceKind.F32, x.view(np.uint32))
    assert encode(source, name)[1] == Faults()
    x[1, 2 * n + 5] = np.float32(1.01 * size)
    x[2, 7] = -np.float32(1.01 * size)
    assert encode(source, name)[1] == Faults(n_target=2, first=(FaultKind.BLOCK_OVERFLOW, 1, 2 * n))


def test_the_first_fault_is_first_in_the_rows():
    """A target's fault in an early block comes before a source's fault in a later one, though it is found later."""
    x = np.zeros((1, 512), np.float32)
    x[0, 0], x[0, 300] = 1e30, np.nan
    source = plain(SourceKind.F32, x.view(np.uint32))
    for name in ("Q8_0", "Q4_K"):
        assert encode(source, name)[1] == Faults(1, 1, (FaultKind.BLOCK_OVERFLOW, 0, 0))
    assert encode(source, "F16")[1] == Faults(1, 1, (FaultKind.TARGET_OVERFLOW, 0, 0))


# ---- Arguments


def test_a_target_that_cannot_be_encoded():
    source = plain(SourceKind.F32, np.zeros((1, 256), np.uint32))
    with pytest.raises(UsageError, match=r"IQ1_S cannot be encoded, these can: .*Q4_K"):
        encode_rows(source, FORMATS["IQ1_S"], np.zeros(50, np.uint8))


BAD_SOURCES = {
    "short": lambda: SourceRows(SourceKind.F32, np.zeros(1023, np.uint8), 1, 256),
    "long": lambda: SourceRows(SourceKind.F32, np.zeros(1025, np.uint8), 1, 256),
    "strided": lambda: SourceRows(SourceKind.F32, np.zeros(2048, np.uint8)[::2], 1, 256),
    "type": lambda: SourceRows(SourceKind.F32, np.zeros(256, np.float32), 1, 256),
    "rank": lambda: SourceRows(SourceKind.F32, np.zeros((1, 1024), np.uint8), 1, 256),
    "negative": lambda: SourceRows(SourceKind.F32, np.zeros(1024, np.uint8), -1, -256),
    "no scales": lambda: SourceRows(SourceKind.FP8, np.zeros(256, np.uint8), 1, 256),
    "few scale rows": lambda: fp8(np.zeros((129, 256), np.uint8), np.zeros((1, 2), np.uint8)),
    "few scale rows below": lambda: fp8(np.zeros((1, 256), np.uint8), np.zeros((1, 2), np.uint8), first_row=128),
    "few scale columns": lambda: fp8(np.zeros((1, 256), np.uint8), np.zeros((1, 1), np.uint8)),
    "many scale columns": lambda: fp8(np.zeros((1, 256), np.uint8), np.zeros((1, 3), np.uint8)),
    "scale type": lambda: fp8(np.zeros((1, 256), np.uint8), np.zeros((1, 2), np.float32)),
    "scale block": lambda: fp8(np.zeros((1, 256), np.uint8), np.zeros((1, 2), np.uint8), scale_cols=0),
    "a size that overflows": lambda: fp8(
        np.zeros((1, 256), np.uint8), np.zeros((1, 2), np.uint8), scale_rows=2**63 - 1, first_row=2**63 - 2
    ),
    "first_row": lambda: fp8(np.zeros((1, 256), np.uint8), np.zeros((1, 2), np.uint8), first_row=-1),
    "half a pair": lambda: SourceRows(
        SourceKind.FP4, np.zeros(127, np.uint8), 1, 255, np.zeros((1, 8), np.uint8), 1, 32
    ),
    "odd scales": lambda: fp4(np.zeros((1, 128), np.uint8), np.zeros((1, 9), np.uint8), scale_cols=31),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_source_that_does_not_fit_itself(name):
    source = BAD_SOURCES[name]()
    with pytest.raises(InputError):
        encode_rows(source, FORMATS["Q8_0"], np.zeros(272 * 129, np.uint8))
    with pytest.raises(InputError):
        decode_source(source, np.zeros((abs(source.n_rows), abs(source.n_cols)), np.float32))


def test_an_output_that_does_not_fit():
    source = plain(SourceKind.F32, np.zeros((2, 256), np.uint32))
    room = np.zeros(576, np.uint8)
    for out in (room[:287], room[::2], room[:288].reshape(2, 144), room[:288].view(np.int8)):
        with pytest.raises(InputError, match="expected contiguous uint8 \\[288\\]"):
            encode_rows(source, FORMATS["Q4_K"], out)
    for shape in ((2, 255), (1, 512), (512,)):
        with pytest.raises(InputError, match="expected contiguous float32 \\[2, 256\\]"):
            decode_source(source, np.zeros(shape, np.float32))


def test_columns_that_are_no_whole_blocks():
    with pytest.raises(InputError, match="300 columns are not a whole number of Q4_K blocks"):
        encode_rows(plain(SourceKind.F32, np.zeros((1, 300), np.uint32)), FORMATS["Q4_K"], np.zeros(144, np.uint8))


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])   # also where it is ignored
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-30])
def test_importance_must_be_finite_and_not_negative(bad, name):
    importance = np.ones(256, np.float32)
    importance[200] = bad
    source = plain(SourceKind.F32, np.zeros((1, 256), np.uint32))
    with pytest.raises(InputError, match=r"importance\[200\]: found .*, expected a finite number >= 0"):
        encode(source, name, importance=importance)
    with pytest.raises(InputError, match="expected float32 \\[256\\]"):
        encode(source, name, importance=np.ones(255, np.float32))
    with pytest.raises(InputError, match="found float64"):
        encode(source, name, importance=np.ones(256))
