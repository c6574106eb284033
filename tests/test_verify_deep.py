"""`verify --deep`: faults in single blocks, and statistics, against what gguf-py decodes."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from gguf_bytes import T_F32, gguf, kv_str, kv_u32, tensor
from gguf_edit import Edit

import dsv4tools as dt
from dsv4tools.formats.measure import ErrorSums, measure_cells, measure_errors, measure_values
from dsv4tools.formats.scales import SCALE_FIELDS, check_scales, find_field
from dsv4tools.formats.table import FORMATS
from dsv4tools.verify import report_data

DOWN, Q_B = "blk.1.ffn_down_exps.weight", "blk.1.attn_q_b.weight"


@pytest.fixture(scope="module")
def right(_written, tmp_path_factory):
    """A small file. Not to be changed."""
    from conftest import SMALL  # noqa: PLC0415  - the suite's own module

    source = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    out = tmp_path_factory.mktemp("deep") / "right.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(source)), out)
    return out


@pytest.fixture
def edit(right):
    return Edit(right)


def look(edited, tmp_path, **options):
    path = edited.write(tmp_path / "edited.gguf")
    return dt.verify(path, deep=True, engines=["none"], **options)


# ---------------------------------------------------------------------------------------------------- faulty blocks


@pytest.mark.parametrize(("name", "block", "data", "at", "said"), [
    (DOWN, 0, b"\x00\x7e", 0, "block 0 (expert 0 row 0 column 0): d is NaN"),
    (DOWN, 700, b"\x00\xfc", 2, "block 700 (expert 2 row 188 column 0): dmin is infinite"),
    (DOWN, 1023, b"\xff\xff\xff\x7f", 0, "block 1,023 (expert 3 row 255 column 0): d is NaN and dmin is NaN"),
    (Q_B, 77, b"\x01\x7c", 0, "block 77 (row 9 column 160): d is NaN"),
    (Q_B, 8191, b"\x00\x7c", 0, "block 8,191 (row 1023 column 224): d is infinite"),
])  # fmt: skip
def test_a_scale_that_is_not_finite(name, block, data, at, said, edit, tmp_path, dsv4tools):
    size = 144 if name == DOWN else 34
    edit.put(name, data, block * size + at)
    path = edit.write(tmp_path / "edited.gguf")
    assert dsv4tools("verify", path).code == 0      # the header says nothing of it
    ended = dsv4tools("verify", path, "--deep", "--engine", "none")
    assert (ended.code, ended.err) == (5, "")
    assert f"error: {name}: {said} (byte {edit.places[name][0] + block * size:,})\n" in ended.out
    assert ended.out.endswith("edited.gguf: NOT right: 1 error\n")
    assert dsv4tools("verify", path, "--deep", "--tensor", name).code == 5
    assert dsv4tools("verify", path, "--deep", "--tensor", "token_embd.weight").code == 0


def test_many_blocks_are_counted_and_the_first_named(edit, tmp_path):
    for block in (900, 5, 7, 1000):
        edit.put(DOWN, b"\x00\x7e", block * 144)
    for n in range(40):
        edit.put(Q_B, b"\x00\x7c", (100 + n) * 34)
    report = look(edit, tmp_path)
    by_name = {f.where: f.message for f in report.errors}
    assert by_name[DOWN] == "block 5 (expert 0 row 5 column 0): d is NaN; 3 more such blocks: 7, 900, 1,000"
    assert by_name[Q_B].endswith("; 39 more such blocks: 101, 102, 103, 104, 105, 106, 107 ...")


# Q1_0 and Q2_0 are younger than gguf-py's decoders; Q8_1 and Q8_K are no types of files; IQ1_M's scale is in pieces.
@pytest.mark.parametrize("kind", sorted(set(SCALE_FIELDS) - {"Q1_0", "Q2_0", "Q8_1", "Q8_K", "MXFP4", "IQ1_M"}))
def test_scales_lie_where_gguf_py_reads_them(kind):
    """0x7F as the high byte of an F16 makes it NaN, and with it every value of the block; elsewhere it makes none."""
    target = FORMATS[kind]
    blocks = np.full((target.block_bytes, target.block_bytes), 0x11, np.uint8)
    np.fill_diagonal(blocks, 0x7F)
    finite = np.isfinite(decode(kind, blocks))
    spoiled = np.flatnonzero(~finite.any(axis=1))
    assert spoiled.tolist() == [f.offset + 1 for f in SCALE_FIELDS[kind]]
    assert finite.all(axis=1).sum() == target.block_bytes - len(spoiled)
    inside = [at for at in range(target.block_bytes) if find_field(target, at) is not None]
    assert inside == [f.offset + i for f in SCALE_FIELDS[kind] for i in (0, 1)]


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01, 0x7BFF, 0x0001, 0x8000, 0x3C5A])
def test_the_scale_of_iq1_m_is_in_four_pieces(bits):
    rng = np.random.default_rng(bits)
    blocks = rng.integers(0, 256, (3, 56), np.uint8)
    words = blocks[:, 48:].view("<u2")
    words[:] &= 0x0FFF
    words[0] |= 0x0000
    words[1] |= np.array([(bits >> 4 * i & 15) << 12 for i in range(4)], np.uint16)
    counts = check_scales(blocks.reshape(-1), FORMATS["IQ1_M"])
    finite = np.isfinite(decode("IQ1_M", blocks)).all(axis=1)
    assert finite.tolist() == [True, bits & 0x7FFF < 0x7C00, True]
    assert [block for block, _ in counts.faults] == np.flatnonzero(~finite).tolist()
    assert counts.n_zero == 2 + (bits & 0x7FFF == 0)
    assert counts.n_subnormal == (0 < bits & 0x7FFF < 0x400)


def decode(kind, blocks):
    with np.errstate(all="ignore"):
        return dequantize(blocks.reshape(-1, FORMATS[kind].block_bytes), GGMLQuantizationType[kind])


def test_every_kind_of_scale_is_counted():
    blocks = np.zeros((6, 144), np.uint8)
    for i, (d, dmin) in enumerate([(0, 0), (0x8000, 0), (1, 0), (0x03FF, 5), (0x0400, 0x7C00), (0xFE00, 0xFC01)]):
        blocks[i, :4] = np.frombuffer(struct.pack("<HH", d, dmin), np.uint8)
    counts = check_scales(blocks.reshape(-1), FORMATS["Q4_K"], 100)
    assert (counts.n_blocks, counts.n_zero, counts.n_subnormal, counts.n_not_finite) == (6, 2, 2, 2)
    assert counts.faults == [(104, "dmin is infinite"), (105, "d is NaN and dmin is NaN")]
    mxfp4 = np.zeros((3, 17), np.uint8)
    mxfp4[:, 0] = 0, 254, 255
    counts = check_scales(mxfp4.reshape(-1), FORMATS["MXFP4"])
    assert (counts.n_blocks, counts.n_zero, counts.n_not_finite, counts.faults) == (3, 0, 1, [(2, "e is NaN")])
    floats = np.zeros((2, 292), np.uint8)
    floats[1, :4] = 0, 0, 0x80, 0xFF
    assert check_scales(floats.reshape(-1), FORMATS["Q8_K"]).faults == [(1, "d is infinite")]


# ----------------------------------------------------------------------------------------------------- faulty values


@pytest.mark.parametrize(("name", "index", "data", "said"), [
    ("token_embd.weight", 256 * 3 + 17, b"\x01\x7c", "row 3 column 17 is NaN"),
    ("token_embd.weight", 256 * 3 + 17, b"\x00\xfc", "row 3 column 17 is infinite"),
    ("blk.2.attn_norm.weight", 255, b"\x00\x00\x80\x7f", "row 0 column 255 is infinite"),
    ("output_hc_base.weight", 2, b"\xff\xff\xff\xff", "row 0 column 2 is NaN"),
])  # fmt: skip
def test_a_value_that_is_not_finite(name, index, data, said, edit, tmp_path):
    report = look(edit.put(name, data, index * len(data)), tmp_path)
    (finding,) = report.errors
    assert (finding.where, finding.message, finding.code) == (name, said, "value")
    assert finding.offset == edit.places[name][0] + index * len(data)


def test_several_values(edit, tmp_path):
    report = look(edit.put("token_embd.weight", b"\x00\x7c" * 5, 1000), tmp_path)
    assert [f.message for f in report.errors] == ["row 1 column 244 is infinite, and 4 more such values"]


@pytest.mark.parametrize(("expert", "ok"), [(3, True), (0, True), (4, False), (-1, False), (2**31 - 1, False)])
def test_ids_must_be_experts(expert, ok, edit, tmp_path):
    name = "blk.0.ffn_gate_tid2eid.weight"
    report = look(edit.put(name, struct.pack("<i", expert), 4 * (2 * 300 + 1)), tmp_path)
    assert report.ok is ok
    if not ok:
        (finding,) = report.errors
        assert finding.message == f"row 300 column 1 routes to expert {expert}, expected 0 to 3"


def test_zeros_are_odd_and_no_error(edit, tmp_path):
    start, data = edit.expert(DOWN, 2)
    edit.put(DOWN, bytes(len(data)), start).put(Q_B, bytes(len(edit.data(Q_B))))
    report = look(edit, tmp_path)
    assert report.ok
    assert {(f.where, f.message) for f in report.findings} == {
        (DOWN, "all values of expert 2 are 0"), (Q_B, "all values are 0")}
    checks = {d.name: d for d in report.depth}
    assert (checks[DOWN].zero_matrices, checks[DOWN].scales.n_zero, checks[DOWN].scales.n_blocks) == ((2,), 256, 1024)
    assert checks[Q_B].zero_matrices == (0,)


def test_the_end_of_f16(edit, tmp_path):
    report = look(edit.put("token_embd.weight", b"\xff\x7b\xff\xfb\xfe\x7b", 0), tmp_path)
    assert report.ok
    (finding,) = report.findings
    assert "2 values have the magnitude 65504, the largest of F16" in finding.message


# -------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("small", [False, True])
def test_statistics_are_those_of_an_independent_computation(small, right, monkeypatch):
    if small:
        module = sys.modules["dsv4tools.verify.depth"]
        monkeypatch.setattr(module, "MAX_PIECE_VALUES", 1280)
        monkeypatch.setattr(module, "CHUNK_VALUES", 512)
        monkeypatch.setattr(module, "SAMPLED_VALUES", 512)
    report = dt.verify(right, deep=True, engines=["none"], threads=3)
    assert report.ok
    tensors = {t.name: t for t in GGUFReader(right).tensors}
    assert [d.name for d in report.depth] == list(tensors)
    for d in report.depth:
        t = tensors[d.name]
        assert (d.format, d.n_bytes) == (t.tensor_type.name, t.n_bytes)
        blocks = t.n_bytes // FORMATS[d.format].block_bytes if d.format in SCALE_FIELDS else 0
        assert (d.scales.n_blocks, d.scales.n_not_finite, d.zero_matrices) == (blocks, 0, ())
        if d.format == "I32":
            assert d.values is None
            continue
        x = dequantize(t.data, t.tensor_type).astype(np.float64).reshape(-1)
        v = d.values
        assert (v.n, v.lowest, v.highest, v.n_not_finite) == (x.size, x.min(), x.max(), 0)
        assert v.total == pytest.approx(x.sum(), rel=1e-9, abs=1e-9)
        assert v.rms == pytest.approx(np.sqrt((x**2).mean()))
        assert v.mean == pytest.approx(x.mean(), abs=1e-12)
        assert v.n_zero == (x == 0).sum()
        assert v.n_small == (np.abs(x) < 2.0**-14).sum()
        if small and x.size % 512 == 0:   # then all values are in the sample
            expected = np.bincount(np.frexp(x[x != 0])[1] + 126, minlength=256)   # none here is subnormal
            expected[0] = (x == 0).sum()
            assert d.exponents == tuple(expected)


def test_nothing_depends_on_threads(right):
    assert report_data(dt.verify(right, deep=True, threads=1)) == report_data(dt.verify(right, deep=True, threads=7))


@pytest.mark.parametrize("n", [0, 1, 5, 15, 16, 17, 31, 1000])
def test_sums_of_any_number_of_values(n):
    rng = np.random.default_rng(n)
    x, y = (rng.normal(size=n).astype(np.float32) for _ in range(2))
    if n > 4:
        x[[1, 3]] = np.nan, -np.inf
        y[2] = np.nan
    fine = np.isfinite(x)
    a, b = x[fine].astype(np.float64), np.where(np.isfinite(y), y, 0)[fine].astype(np.float64)
    found = measure_errors(x, y)
    assert (found.n, found.n_not_finite) == (fine.sum(), n - fine.sum())
    expected = [((a - b) ** 2).sum(), (a * b).sum(), (a * a).sum(), (b * b).sum()]
    assert [found.squared_error, found.product, found.squared_found, found.squared_source] == pytest.approx(expected)
    v = measure_values(x)
    assert (v.n, v.n_not_finite, v.total) == (fine.sum(), n - fine.sum(), pytest.approx(a.sum()))
    cells = measure_cells(x, y, 7)
    assert cells.shape == (-(-n // 7), 3)
    assert cells.sum(axis=0) == pytest.approx([found.squared_error, np.nansum(y.astype(float) ** 2), n - fine.sum()])
    if n == 0:
        assert (v.lowest, v.highest) == (np.inf, -np.inf)
        assert np.isnan(v.mean)
        assert np.isnan(v.rms)
    else:
        assert (v.lowest, v.highest) == (a.min(), a.max())
        assert found.largest_error == np.abs(x[fine] - np.where(np.isfinite(y), y, np.float32(0))[fine]).max()
        assert abs(x[found.largest_at] - np.nan_to_num(y[found.largest_at])) == found.largest_error


def test_sums_at_the_ends_of_the_numbers():
    largest, least = np.float32(3.4e38), np.float32(1e-45)
    found = measure_errors(np.array([largest, -largest], np.float32), np.array([-largest, -largest], np.float32))
    assert found.largest_error == np.inf      # as float32 has it; the sums are float64
    assert np.isfinite(found.squared_error)
    tiny = measure_errors(np.array([least] * 3, np.float32), np.array([least, 0, -least], np.float32))
    assert tiny.relative_rmse == pytest.approx(np.sqrt(5 / 2))
    assert (ErrorSums().relative_rmse, ErrorSums().cosine) == (0.0, 1.0)
    assert np.isnan(measure_errors(np.zeros(3, np.float32), np.ones(3, np.float32)).cosine)
    assert measure_errors(np.ones(3, np.float32), np.zeros(3, np.float32)).relative_rmse == np.inf
    v = measure_values(np.array([-0.0, 0.0, 65504, -65504, 65503, 6.1e-5, 6.2e-5], np.float32))
    assert (v.n_zero, v.n_large, v.n_small) == (2, 2, 3)


# -------------------------------------------------------------------------------------------------------- odd files


def written(tmp_path, kvs, tensors, data):
    path = tmp_path / "odd.gguf"
    path.write_bytes(gguf(kvs, tensors, data))
    return path


def test_types_that_cannot_be_decoded(tmp_path):
    """Their scales are looked at all the same, where it is known where they lie."""
    data = bytearray(160 + 256)
    data[50:52] = b"\x00\x7e"
    tensors = [tensor("a", (256, 3), 19), tensor("b", (4, 8), 27, 160), tensor("c", (0,), T_F32, 416)]
    report = dt.verify(written(tmp_path, [], tensors, bytes(data)), deep=True)
    assert [str(f.message) for f in report.errors] == ["block 1 (row 1 column 0): d is NaN"]
    iq1, i64, empty = report.depth
    assert (iq1.scales.n_blocks, iq1.values, i64.scales.n_blocks, i64.values) == (3, None, 0, None)
    assert (empty.values.n, empty.zero_matrices) == (0, ())
    report_data(report)


@pytest.mark.parametrize("kvs", [[], [kv_str("deepseek4.expert_count", "many")], [kv_u32("deepseek4.expert_count", 8)]])
def test_ids_without_a_count_of_experts_are_not_judged(kvs, tmp_path):
    path = written(tmp_path, kvs, [tensor("blk.0.ffn_gate_tid2eid.weight", (2, 4), 26)], b"\x07\0\0\0" * 8)
    assert dt.verify(path, deep=True, engines=["none"]).ok


def test_what_has_no_data(right, tmp_path, dsv4tools):
    path = tmp_path / "cut.gguf"
    path.write_bytes(right.read_bytes()[:-5000])
    ended = dsv4tools("verify", path, "--deep", "--json")
    assert (ended.code, ended.data["depth"]) == (5, [])
    path.write_bytes(b"no GGUF")
    assert dsv4tools("verify", path, "--deep").code == 5


def test_a_template_has_no_blocks(make_checkpoint, tmp_path, dsv4tools):
    path = tmp_path / "t.gguf"
    assert dsv4tools("template", make_checkpoint(layers=1), path, "--sparse").code == 0
    ended = dsv4tools("verify", path, "--deep")
    assert ended.code == 5
    assert "is a template" in ended.out


def test_progress_adds_up(right):
    totals, steps = [], []
    dt.verify(right, deep=True, announce=totals.append, progress=steps.append)
    assert totals == [sum(steps)] == [sum(int(t.n_bytes) for t in GGUFReader(right).tensors)]


def test_the_terminal_shows_what_was_seen(right, dsv4tools):
    ended = dsv4tools("verify", right, "--deep", "--engine", "none")
    assert ended.succeeded
    rows = {line.split()[0]: line.split()[1:] for line in ended.out.splitlines()}
    kinds = [t.tensor_type.name for t in GGUFReader(right).tensors]
    for kind in ("F16", "F32", "Q4_K", "Q8_0", "I32"):
        assert rows[kind][0] == str(kinds.count(kind))
    assert len(rows["I32"]) == 1
    assert len(rows["Q8_0"]) == 5
