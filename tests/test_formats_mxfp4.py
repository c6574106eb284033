"""MXFP4: FP4 rows repacked without loss, floats as ggml rounds them, and what cannot be repacked."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_reference import FP4, decode_fp4, differing_blocks
from test_formats_k import INPUTS

from dsv4tools.formats.codecs import dequantize, encode_rows, quantize
from dsv4tools.formats.source import FaultKind, SourceKind, SourceRows
from dsv4tools.formats.table import FORMATS

GOLDEN = {
    key.split("/")[1]: blocks
    for key, blocks in np.load(Path(__file__).parent / "data" / "quant_mxfp4.npz").items()
    if key.endswith("/none")
}
MXFP4 = FORMATS["MXFP4"]
ALL_BYTES = np.arange(256, dtype=np.uint8)


def repack(packed, scales, scale_cols=32, scale_rows=1, first_row=0, **options):
    """Rows of blocks [rows, blocks, 17] and the faults."""
    n_rows, n_cols = len(packed), 2 * packed.shape[1]
    source = SourceRows(SourceKind.FP4, packed.reshape(-1), n_rows, n_cols, scales, scale_rows, scale_cols, first_row)
    out = np.full(n_rows * MXFP4.row_bytes(n_cols), 0xAA, np.uint8)
    faults = encode_rows(source, MXFP4, out, **options)
    return out.reshape(n_rows, -1, 17), faults


def same(a, b):
    return (a.view(np.uint32) == b.view(np.uint32)).all()


# ---- From FP4


def test_every_code_under_every_scale_keeps_its_value():
    packed = np.tile(ALL_BYTES, (253, 1))
    scales = np.repeat(np.arange(253, dtype=np.uint8)[:, None], 16, axis=1)
    blocks, faults = repack(packed, scales)
    assert faults.first is None
    assert (blocks[:, :, 0] == scales).all()
    assert same(dequantize(blocks.reshape(253, -1), "MXFP4"), decode_fp4(packed, scales))


def test_where_nibbles_go():
    packed = np.arange(0x10, 0x20, dtype=np.uint8)[None]     # values 2i and 2i + 1 have the codes i and 1
    blocks, _ = repack(packed, np.uint8([[127]]))
    expected = [nibble for i in range(8) for nibble in (i | (i + 8) << 4, 1 | 1 << 4)]
    assert blocks[0, 0].tolist() == [127, *expected]


@pytest.mark.parametrize("scale", [253, 254, 255])
def test_values_beyond_float32_and_nan_are_faults(scale):
    packed = np.tile(ALL_BYTES, (2, 1))
    scales = np.full((2, 16), 120, np.uint8)
    scales[1, 5] = scale
    codes = np.stack([packed[1, 80:96] & 15, packed[1, 80:96] >> 4], axis=-1).reshape(-1)   # block 5 of row 1
    with np.errstate(over="ignore"):
        values = FP4[codes] * np.float32(2.0 ** (min(scale, 254) - 127))
    wrong = np.isinf(values) | (scale == 255)
    kind = FaultKind.NAN_SCALE if scale == 255 else FaultKind.SCALED_OVERFLOW
    blocks, faults = repack(packed, scales)
    assert (faults.n_source, faults.n_target) == (wrong.sum(), 0)
    assert faults.first == (kind, 1, 160 + int(np.argmax(wrong)))
    assert not blocks.any()
    blocks, again = repack(packed, scales, zero_nan=True)
    assert again == faults
    assert same(dequantize(blocks[1, 5], "MXFP4"), np.where(wrong, np.float32(0), values))
    assert blocks[1, 5].any() == (scale != 255)
    untouched, _ = repack(packed[:1], scales[:1])
    assert (blocks[0] == untouched[0]).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5), st.integers(1, 9), st.sampled_from([2, 16, 32, 64, 96, 128]), st.integers(1, 4),
    st.integers(0, 5), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_block_of_scales(n_rows, n_blocks, scale_cols, scale_rows, first_row, seed):
    """Where a scale covers whole blocks it is kept, else values are rounded again; both give the values' nearest."""
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (n_rows, 16 * n_blocks), dtype=np.uint8)
    lines = -(-(first_row + n_rows) // scale_rows)
    scales = rng.integers(1, 250, (lines, -(-32 * n_blocks // scale_cols)), dtype=np.uint8)
    blocks, faults = repack(packed, scales, scale_cols, scale_rows, first_row)
    values = decode_fp4(packed, scales, scale_cols, scale_rows, first_row)
    assert faults.first is None
    if scale_cols % 32 == 0:
        assert same(dequantize(blocks.reshape(n_rows, -1), "MXFP4"), values)
    else:
        assert (blocks.reshape(n_rows, -1) == quantize_mxfp4(values)).all()


# ---- From floats


def quantize_mxfp4(x):
    """float32 [rows, n] to MXFP4 uint8 [rows, n / 32 * 17], as the C code says it: every code is tried."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, 32)
    size = np.abs(blocks).max(axis=1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        exponent = np.floor(np.log2(size.astype(np.float64)).astype(np.float32))
    scale = np.where(size > 0, exponent + 125, 0).astype(np.int64) & 255
    unit = np.where(scale == 255, 2.0**127, 2.0 ** (scale - 128.0)).astype(np.float32)
    twice = np.float32([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
    with np.errstate(over="ignore"):
        errors = np.abs(twice * unit[:, None, None] - blocks[:, :, None])
    codes = np.argmin(errors, axis=2).astype(np.uint8)
    out = np.concatenate([scale[:, None].astype(np.uint8), codes[:, :16] | codes[:, 16:] << 4], axis=1)
    return out.reshape(len(x), -1)


@pytest.mark.parametrize("kind", sorted(GOLDEN))
def test_blocks_are_those_of_ggml(kind):
    assert not (report := differing_blocks(quantize(INPUTS[f"in/{kind}"], "MXFP4"), GOLDEN[kind], 17)), report
    assert not (report := differing_blocks(quantize_mxfp4(INPUTS[f"in/{kind}"]), GOLDEN[kind], 17)), report


def test_largest_values_around_powers_of_two():
    """The logarithm of a float just below a power of two rounds up, the sooner the larger the exponent."""
    bits = (np.arange(256)[:, None] << 23) + np.arange(-100, 100)
    bits = bits[(bits > 0) & (bits < 0x7F800000)].astype(np.uint32)
    x = np.zeros((len(bits), 32), np.float32)
    x[:, 3], x[:, 20] = bits.view(np.float32), bits.view(np.float32) * np.float32(-0.4375)
    assert not (report := differing_blocks(quantize(x, "MXFP4"), quantize_mxfp4(x), 17)), report


@pytest.mark.parametrize("seed", range(4))
def test_any_float(seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 0x7F800000, (2000, 32), dtype=np.int64)
    if seed % 2:
        bits = bits[:, :1] + rng.integers(-1 << 25, 1 << 23, bits.shape)     # of similar size
    bits = bits.clip(0, 0x7F7FFFFF) | rng.integers(0, 2, bits.shape) << 31
    x = bits.astype(np.uint32).view(np.float32)
    assert not (report := differing_blocks(quantize(x, "MXFP4"), quantize_mxfp4(x), 17)), report


def test_middles_go_to_the_smaller_code():
    x = np.zeros(32, np.float32)
    x[:9] = [4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, -0.25, -0.75]      # the scale is 1
    assert dequantize(quantize(x, "MXFP4"), "MXFP4")[:9].tolist() == [4.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 0.0, -0.5]


def test_blocks_are_decoded_as_gguf_does():
    blocks = np.random.default_rng(0).integers(0, 256, (5000, 17), dtype=np.uint8)
    blocks[:256, 0] = ALL_BYTES
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    assert same(dequantize(blocks, "MXFP4"), expected)
