"""The public functions: shapes, threads, errors, decoders, and the same bytes however wide the lanes are."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from quant_reference import kinds_of_importance, kinds_of_rows

from dsv4tools.errors import Dsv4Error, InputError, UsageError
from dsv4tools.formats import codecs, selftest
from dsv4tools.formats.codecs import DECODABLE, ENCODABLE, decode_rows, dequantize, quantize, self_test
from dsv4tools.formats.table import FORMATS


def random_blocks(name, n_rows, n_blocks, seed=0):
    """Rows of blocks with any bytes, but no F16 scale that is infinite or NaN (its upper byte is odd-numbered)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (n_rows, n_blocks, FORMATS[name].block_bytes), dtype=np.uint8)
    blocks[:, :, 1:4:2] &= 0xBB
    return blocks.reshape(n_rows, -1)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_blocks_are_decoded_as_gguf_does(name):
    blocks = random_blocks(name, 13, 7)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    found = dequantize(blocks, name)
    assert np.isfinite(expected).all()
    assert (found.view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_every_float_is_decoded(name):
    bits = np.arange(1 << 16, dtype=np.uint16)
    stored = (bits.astype(np.uint32) << 13).view(np.float32) if name == "F32" else bits
    expected = {
        "F32": lambda: stored,
        "F16": lambda: stored.view(np.float16).astype(np.float32),
        "BF16": lambda: (bits.astype(np.uint32) << 16).view(np.float32),
    }[name]()
    found = dequantize(stored.view(np.uint8), name)
    assert ((found.view(np.uint32) == expected.view(np.uint32)) | np.isnan(expected)).all()
    assert (np.isnan(found) == np.isnan(expected)).all()


@pytest.mark.parametrize("name", sorted(DECODABLE))
def test_decode_rows_is_dequantize(name):
    blocks = random_blocks(name, 3, 512 // FORMATS[name].block_values)
    out = np.zeros((3, 512), np.float32)
    decode_rows(blocks.reshape(-1), FORMATS[name], 3, 512, out)
    assert np.array_equal(out, dequantize(blocks, name), equal_nan=True)
    decode_rows(np.zeros(0, np.uint8), FORMATS[name], 0, 512, np.zeros((0, 512), np.float32))
    for data in (blocks, blocks.reshape(-1)[1:], blocks.reshape(-1)[::2], blocks.reshape(-1).view(np.int8)):
        with pytest.raises(InputError, match="expected contiguous uint8"):
            decode_rows(data, FORMATS[name], 3, 512, out)
    with pytest.raises(InputError, match="expected contiguous float32"):
        decode_rows(blocks.reshape(-1), FORMATS[name], 3, 512, out[:, ::-1])


@pytest.mark.parametrize("name", sorted(ENCODABLE & DECODABLE))
def test_decoding_comes_close_to_what_was_encoded(name):
    x = np.random.default_rng(1).normal(size=(5, 1024)).astype(np.float32)
    bound = {   # of the largest value, about half a level's share of the range
        "F32": 0, "F16": 2**-10, "BF16": 2**-7, "Q8_0": 0.02, "Q6_K": 0.04, "Q5_K": 0.1, "Q5_0": 0.1, "Q5_1": 0.1,
        "Q4_K": 0.25, "Q4_0": 0.2, "IQ4_NL": 0.2, "IQ4_XS": 0.2, "Q4_1": 0.2, "MXFP4": 0.25, "Q3_K": 0.35, "Q2_K": 0.6,
    }.get(name, 1.0)  # fmt: skip
    importance = np.ones(1024, np.float32) if name in codecs.NEEDS_IMPORTANCE else None
    assert np.abs(dequantize(quantize(x, name, importance), name) - x).max() <= bound * np.abs(x).max()


@pytest.mark.parametrize("name", sorted(ENCODABLE))
@pytest.mark.parametrize("shape", [(256,), (1, 256), (7, 512), (2, 3, 256), (0, 256), (3, 0), (2, 0, 256), (83, 768)])
def test_shapes_and_threads(name, shape):
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    weighted = name in codecs.USES_IMPORTANCE
    importance = np.random.default_rng(3).random(shape[-1], np.float32) if weighted else None
    alone = quantize(x, name, importance)
    assert alone.dtype == np.uint8
    assert alone.shape == (*shape[:-1], FORMATS[name].row_bytes(shape[-1]))
    for place in np.ndindex(*shape[:-1]):
        assert (quantize(x[place], name, importance) == alone[place]).all()
    back = dequantize(alone, name)
    assert back.shape == shape
    for threads in (2, 3, 8):
        assert (quantize(x, name, importance, threads=threads) == alone).all()
        assert (dequantize(alone, name, threads=threads) == back).all()


def test_arrays_that_are_not_contiguous_or_not_writeable():
    x = np.random.default_rng(4).normal(size=(256, 6)).astype(np.float32).T
    x.flags.writeable = False
    assert (quantize(x, "q4k") == quantize(x.copy(), FORMATS["Q4_K"])).all()
    data = quantize(x, "Q8_0")[::2]
    data.flags.writeable = False
    assert (dequantize(data, "Q8_0") == dequantize(data.copy(), "Q8_0")).all()
    importance = np.arange(512, dtype=np.float32)[::2]
    assert (quantize(x, "Q4_K", importance) == quantize(x, "Q4_K", importance.copy())).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_values_that_cannot_be_encoded(threads):
    x = np.zeros((2, 3, 256), np.float32)
    x[1, 2, 200] = np.inf
    with pytest.raises(InputError, match=r"^x\[1, 2, 200\]: inf is not a finite number$"):
        quantize(x, "Q4_K", threads=threads)
    x[1, 0, 7] = np.nan
    with pytest.raises(InputError, match=r"^x\[1, 0, 7\]: nan is not a finite number$"):
        quantize(x, "F32", threads=threads)
    with pytest.raises(InputError, match=r"^x\[3\]: 1000000.0 is beyond the range of F16$"):
        quantize(np.float32([0, 0, 0, 1e6]), "F16", threads=threads)
    x[:] = 0
    x[0, 1, 40] = 1e30
    with pytest.raises(InputError, match=r"^x\[0, 1, 32\]: the block that starts here needs a scale beyond .* F16$"):
        quantize(x, "Q8_0", threads=threads)


def test_arguments_that_are_wrong():
    x = np.zeros((2, 256), np.float32)
    with pytest.raises(UsageError, match="unknown ggml type 'Q9'"):
        quantize(x, "Q9")
    with pytest.raises(UsageError, match="I32 cannot be encoded"):
        quantize(x, "I32")
    with pytest.raises(UsageError, match="IQ1_S cannot be decoded"):
        dequantize(np.zeros(50, np.uint8), "IQ1_S")
    with pytest.raises(UsageError, match="threads: found 0"):
        quantize(x, "F32", threads=0)
    with pytest.raises(InputError, match="found float64"):
        quantize(x.astype(np.float64), "F32")
    with pytest.raises(InputError, match="expected float32"):
        quantize(np.float32(1).reshape(()), "F32")
    with pytest.raises(InputError, match="x: 250 columns are not a whole number of Q4_K blocks"):
        quantize(x[:, :250], "Q4_K")
    with pytest.raises(InputError, match="100 bytes are not a whole number of Q4_K blocks of 144 bytes"):
        dequantize(np.zeros((2, 100), np.uint8), "Q4_K")
    with pytest.raises(InputError, match="expected uint8"):
        dequantize(x, "Q4_K")
    with pytest.raises(InputError, match=r"importance\[0\]: found -1.0"):
        quantize(x, "Q4_K", np.full(256, -1, np.float32))


def test_the_fault_slots_of_kernels():
    from dsv4tools.formats import tiles  # noqa: PLC0415  - imports numba

    assert codecs._N_FAULT_SLOTS == tiles.N_FAULT_SLOTS


def test_importing_costs_no_compiler():
    code = "import sys, dsv4tools.formats.codecs; print({'numba', 'llvmlite'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


# ---- Self-test


def test_the_self_test_passes_and_knows_every_format():
    codecs.prepare()
    self_test()
    assert set(selftest.ENCODED) == ENCODABLE - codecs.NEEDS_IMPORTANCE
    assert set(selftest.DECODED) == DECODABLE
    assert set(selftest.IMPORTANT) == codecs.USES_IMPORTANCE


@pytest.mark.parametrize(
    ("table", "key", "what"),
    [("ENCODED", "Q8_0", "encoder of Q8_0"), ("IMPORTANT", "Q4_K", "encoder of Q4_K with importance"),
     ("DECODED", "BF16", "decoder of BF16")],
)  # fmt: skip
def test_the_self_test_names_a_wrong_kernel(monkeypatch, table, key, what):
    monkeypatch.setitem(getattr(selftest, table), key, "0" * 16)
    with pytest.raises(Dsv4Error, match=f"^{what}: kernel self-test failed"):
        self_test([key])


FLUSH_TO_ZERO = """
import platform
import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from dsv4tools.errors import Dsv4Error
from dsv4tools.formats.codecs import ENCODABLE, prepare, self_test

@intrinsic
def flush(typing):
    def lower(context, builder, signature, args):
        i8p, i32, i64, nothing = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64), ir.VoidType()
        if platform.machine() in ("x86_64", "AMD64"):
            place = builder.alloca(i32)
            builder.store(ir.Constant(i32, 0x9FC0), place)   # all exceptions masked, flush to zero, denormals are zero
            name, argument, type_ = "llvm.x86.sse.ldmxcsr", builder.bitcast(place, i8p), i8p
        else:
            name, argument, type_ = "llvm.aarch64.set.fpcr", ir.Constant(i64, 1 << 24), i64
        function = ir.Function(builder.module, ir.FunctionType(nothing, [type_]), name)
        builder.call(function, [argument])
        return context.get_dummy_value()
    return types.void(), lower

@numba.njit
def switch():
    flush()

prepare()
self_test()
switch()
for name in sorted(ENCODABLE):
    try:
        self_test([name])
    except Dsv4Error as error:
        print(error)
"""


def test_the_self_test_notices_that_subnormal_numbers_are_flushed():
    run = subprocess.run([sys.executable, "-c", FLUSH_TO_ZERO], check=True, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert len(lines) == len(ENCODABLE), run
    assert all("kernel self-test failed" in line and "subnormal numbers" in line for line in lines), lines


# ---- Width


def digest():
    """SHA-256 over many kinds of rows encoded as Q4_K."""
    rng = np.random.default_rng(11)
    weights = kinds_of_importance(rng, 768)
    total = hashlib.sha256()
    for x in kinds_of_rows(rng, 27, 768).values():
        for importance in (weights["none"], weights["spread"], weights["some zeros"]):
            for rows in (x, x[:1]):
                total.update(quantize(np.clip(rows, -1e6, 1e6), "Q4_K", importance).tobytes())
    return total.hexdigest()


def test_the_bytes_are_the_same_for_every_width_of_lanes():
    from dsv4tools.formats.lanes import WIDTH  # noqa: PLC0415  - imports numba

    own = str(WIDTH)
    code = "import test_formats_codecs as t; print(t.digest())"
    here, package = str(Path(__file__).parent), str(Path(codecs.__file__).parents[2])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=here,
            env={**os.environ, "DSV4TOOLS_LANES": width, "PYTHONPATH": os.pathsep.join([here, package])},
        )
        for width in sorted({"8", "16", "32", "64"} - {own})
    ]  # fmt: skip
    found = [run.communicate()[0].strip() for run in runs]
    assert found == [digest()] * 3


def test_a_width_that_is_none():
    code = "from dsv4tools.formats.codecs import prepare; prepare()"
    environment = {**os.environ, "DSV4TOOLS_LANES": "12"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "DSV4TOOLS_LANES: found '12', expected 8, 16, 32 or 64" in run.stderr
