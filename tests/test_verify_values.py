"""Comparison by value: what is right though encoded otherwise, what is wrong, and whether the mistake gets its name."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from gguf_edit import Edit
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import E4M3, Weights
from tamper import read_tensor, write_tensor

import dsv4tools as dt
from dsv4tools.errors import UsageError
from dsv4tools.formats.measure import ErrorSums
from dsv4tools.formats.table import FORMATS
from dsv4tools.verify import report_data
from dsv4tools.verify.judge import expected_error, find_reason
from dsv4tools.verify.sample import sample_units
from dsv4tools.verify.source import plan_comparison
from dsv4tools.verify.tally import MatrixTally

Q_B = "blk.1.attn_q_b.weight"                # FP8 [1024, 256] to Q8_0
DOWN, UP, GATE = (f"blk.1.ffn_{part}_exps.weight" for part in ("down", "up", "gate"))   # FP4 [256, 256] to Q4_K


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint whose FP8 scales are not all the same, its weights, and its GGUF. Not to be changed."""
    from conftest import SMALL  # noqa: PLC0415  - the suite's own module

    from dsv4tools.synthetic import write_checkpoint  # noqa: PLC0415  - beside its use

    path = tmp_path_factory.mktemp("values")
    source = write_checkpoint(path / "checkpoint", SMALL, seed=5)
    scale = read_tensor(source, "layers.1.attn.wq_b.scale")
    write_tensor(source, "layers.1.attn.wq_b.scale", bytes(112 + i % 7 for i in range(len(scale))))
    out = path / "right.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(source)), out)
    return source, Weights(source), out


@pytest.fixture
def source(model):
    return model[0]


@pytest.fixture
def weights(model):
    return model[1]


@pytest.fixture
def right(model):
    return model[2]


@pytest.fixture
def edit(right):
    return Edit(right)


@pytest.fixture
def check(source, tmp_path):
    """Verify an edited file against the source; its checks by name."""

    def run(edited, **options):
        report = dt.verify(edited.write(tmp_path / "edited.gguf"), source=source, engines=["none"], **options)
        return report, {t.name: t for t in report.tensors}

    return run


def only_fault(check, edited, name):
    """The text of the one fault of the one wrong tensor."""
    report, checks = check(edited)
    assert not report.ok
    assert [t.name for t in report.wrong] == [name]
    (fault,) = checks[name].faults
    return str(fault)


# --------------------------------------------------------------------------------------------------------- statistics


def test_errors_are_those_of_an_independent_computation(model, check, edit, monkeypatch):
    _, weights, right = model
    monkeypatch.setattr(sys.modules["dsv4tools.verify.tally"], "MEASURED_OF", 1)
    report, checks = check(edit)
    assert report.ok
    for tensor in GGUFReader(right).tensors:
        found = checks[tensor.name]
        assert (found.judgement, found.n_blocks_different, found.faults) == ("identical", 0, ())
        if tensor.tensor_type.name == "I32":
            assert found.error is found.own is None
            continue
        y = weights.gguf(tensor.name).astype(np.float64).reshape(-1)
        x = dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(-1)
        assert found.n_measured == found.n_values == found.error.n == y.size
        assert found.error.relative_rmse == pytest.approx(np.sqrt(((x - y) ** 2).sum() / (y**2).sum()), rel=1e-9)
        assert found.error.cosine == pytest.approx(x @ y / np.sqrt(x @ x) / np.sqrt(y @ y), abs=1e-12)
        assert found.error.largest_error == np.float32(np.abs(x - y).max())
        if found.error.largest_error:
            assert abs(x - y)[found.error.largest_at] == pytest.approx(found.error.largest_error)
        assert found.own == found.error
        assert found.bits_per_weight == 8 * tensor.n_bytes / y.size
        matrices = x.reshape(len(found.by_matrix), -1), y.reshape(len(found.by_matrix), -1)
        each = [np.sqrt(((a - b) ** 2).sum() / (b**2).sum()) for a, b in zip(*matrices, strict=True)]
        assert found.by_matrix == pytest.approx(each, rel=1e-9)


def test_where_bytes_are_identical_a_part_is_measured(check, edit, monkeypatch):
    _, whole = check(edit)
    monkeypatch.setattr(sys.modules["dsv4tools.verify.tally"], "CHUNK_VALUES", 4096)
    _, part = check(edit)
    for name in (Q_B, DOWN, "output.weight"):
        assert part[name].n_values == part[name].error.n == whole[name].n_values
        assert part[name].n_measured == part[name].n_values // 8
        assert part[name].error.relative_rmse == pytest.approx(whole[name].error.relative_rmse, rel=0.05)
        assert 0.5 < part[name].error.largest_error / whole[name].error.largest_error <= 1
    flipped, checks = check(edit.flip(Q_B, 5000, 0))
    assert not flipped.ok
    assert checks[Q_B].n_measured == checks[Q_B].n_values   # what differs is measured all


def test_nothing_depends_on_threads(check, edit, weights, monkeypatch):
    edit.put_values(DOWN, weights.gguf(DOWN) * 1.07).swap_experts(UP, 0, 2).flip(Q_B, 99, 3)
    first = report_data(check(edit, threads=1)[0])
    assert first == report_data(check(edit, threads=8)[0])
    monkeypatch.setattr(sys.modules["dsv4tools.plan"], "MAX_UNIT_VALUES", 5000)
    other = report_data(check(edit, threads=3)[0])
    for a, b in zip(first["tensors"], other["tensors"], strict=True):   # sums in another order: the last digits
        assert [a[k] for k in ("name", "judgement", "n_different", "faults")] == \
            [b[k] for k in ("name", "judgement", "n_different", "faults")]


# --------------------------------------------------------------------------------------- encoded otherwise, and right


def importance(n):
    return np.random.default_rng(1).random(n).astype(np.float32) ** 2


def encode_with_importance(edit, weights):
    for name, kind in edit.types.items():
        if kind == "Q4_K":
            edit.put_values(name, weights.gguf(name), importance(edit.shapes[name][0]))
    return edit


def test_importance_is_no_fault(check, edit, weights, source, tmp_path, dsv4tools):
    report, checks = check(encode_with_importance(edit, weights))
    assert report.ok
    assert {t.judgement for t in report.tensors if t.format == "Q4_K"} == {"within"}
    assert {t.judgement for t in report.tensors if t.format != "Q4_K"} == {"identical"}
    found = checks[UP]
    assert found.own.relative_rmse < found.error.relative_rmse < 2 * found.own.relative_rmse
    assert found.n_blocks_different > 0.9 * found.n_blocks
    ended = dsv4tools("verify", tmp_path / "edited.gguf", "--source", source, "--engine", "none")
    assert ended.succeeded
    assert "9 more are encoded otherwise than we do, and as close to the source" in ended.out


def nudge_blocks(edit, weights, share):
    """Other rounding, as a build with FMA has it: a share of the Q4_K blocks becomes one of nearly the same values."""
    rng = np.random.default_rng(2)
    for name, kind in edit.types.items():
        if kind != "Q4_K":
            continue
        own = np.frombuffer(edit.data(name), np.uint8).reshape(-1, 144).copy()
        x = weights.gguf(name)
        other = dt.quantize(np.ascontiguousarray(x * np.float32(1.0001)), "Q4_K").reshape(-1, 144)
        chosen = rng.random(len(own)) < share
        own[chosen] = other[chosen]
        edit.put(name, own.tobytes())
    return edit


def test_other_rounding_is_no_fault(check, edit, weights):
    report, checks = check(nudge_blocks(edit, weights, 0.03))
    assert report.ok
    assert 0.005 < checks[UP].n_blocks_different / checks[UP].n_blocks < 0.05
    assert checks[UP].judgement == "within"


def test_faults_are_found_among_other_rounding(check, edit, weights):
    nudge_blocks(edit, weights, 0.03).swap_experts(UP, 1, 2).flip(DOWN, 144 * 500 + 1, 4)
    report, checks = check(edit)
    assert {t.name for t in report.wrong} == {UP, DOWN}
    assert "experts 1 and 2: are swapped" in str(checks[UP].faults[0])
    assert checks[DOWN].faults[0].where == "expert 1 row 244 columns 0-255"


def test_faults_are_found_in_a_file_made_with_importance(check, edit, weights):
    encode_with_importance(edit, weights).swap_experts(UP, 0, 3).flip(DOWN, 144 * 500 + 1, 4)
    report, checks = check(edit)
    assert {t.name for t in report.wrong} == {UP, DOWN}
    assert "experts 0 and 3: are swapped" in str(checks[UP].faults[0])
    assert checks[DOWN].faults[0].where == "expert 1 row 244 columns 0-255"


def test_the_sign_of_zero_is_no_fault(source, tmp_path):
    """FP4's code 8 is +0 for us and the C quantizer; others write -0, which is the same number."""
    out = tmp_path / "f16.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(source), policy="bf16"), out)
    edit = Edit(out)
    for name, kind in edit.types.items():
        if kind == "BF16" and "exps" in name:
            bits = np.frombuffer(edit.data(name), np.uint16).copy()
            bits[bits == 0] = 0x8000
            edit.put(name, bits.tobytes())
    report = dt.verify(edit.write(tmp_path / "edited.gguf"), source=source, engines=["none"])
    assert report.ok
    assert {t.judgement for t in report.tensors if "exps" in t.name} == {"within"}
    damaged = edit.put(UP, b"\x80\x3f", 2 * 700)   # among them a 1.0
    report = dt.verify(damaged.write(tmp_path / "edited.gguf"), source=source, engines=["none"])
    assert [t.name for t in report.wrong] == [UP]


def test_a_type_without_an_encoder_is_compared_by_value(check, edit, weights, monkeypatch):
    without = frozenset({"F32", "F16", "BF16", "Q4_K"})
    monkeypatch.setattr(sys.modules["dsv4tools.verify.tally"], "ENCODABLE", without)
    monkeypatch.setattr(sys.modules["dsv4tools.verify.source"], "ENCODABLE", without)
    report, checks = check(edit)
    assert report.ok
    assert (checks[Q_B].judgement, checks[Q_B].own, checks[Q_B].n_blocks) == ("within", None, 0)
    assert checks[Q_B].n_measured == checks[Q_B].n_values
    report, checks = check(edit.put_values(Q_B, weights.gguf(Q_B)[::-1]))
    assert [t.name for t in report.wrong] == [Q_B]
    assert "has its rows" in str(checks[Q_B].faults[0])


# ----------------------------------------------------------------------------------------------------- wrong, by name


def test_swapped_experts(check, edit):
    text = only_fault(check, edit.swap_experts(UP, 1, 3), UP)
    assert text.startswith("experts 1 and 3: are swapped: each holds the other's data (cosine 0.99")


def test_experts_in_a_ring(check, edit):
    a, b, c = (edit.expert(DOWN, i)[1] for i in (0, 1, 3))
    edit.move_expert(DOWN, 0, b).move_expert(DOWN, 1, c).move_expert(DOWN, 3, a)
    _, checks = check(edit)
    assert [str(f).split(" (cosine")[0] for f in checks[DOWN].faults] == [
        "expert 0: holds the data of expert 1", "expert 1: holds the data of expert 3",
        "expert 3: holds the data of expert 0",
    ]  # fmt: skip


@pytest.mark.parametrize("other", [GATE, "blk.2.ffn_up_exps.weight"])
def test_an_expert_of_another_tensor(other, check, edit):
    text = only_fault(check, edit.move_expert(UP, 2, edit.expert(other, 2)[1]), UP)
    part = "w1" if other == GATE else "w3"
    assert text.startswith(f"expert 2: holds the data of {other} expert 2 (layers.{other[4]}.ffn.experts.2.{part}.")


@pytest.mark.parametrize(("name", "other", "theirs"), [
    ("blk.1.attn_kv.weight", "blk.0.attn_kv.weight", "layers.0.attn.wkv.weight"),
    ("blk.1.attn_norm.weight", "blk.2.ffn_norm.weight", "layers.2.ffn_norm.weight"),
])  # fmt: skip
def test_a_tensor_of_another_layer(name, other, theirs, check, edit):
    text = only_fault(check, edit.put(name, edit.data(other)), name)
    assert text.startswith(f"holds the data of {other} ({theirs}) (cosine 1.0000)")


@pytest.mark.parametrize(("name", "at", "bit", "said"), [
    (DOWN, 144 * 300 + 77, 2, "block 300 (expert 1 row 44 column 0): one bit is flipped: bit 2 of byte 77"),
    (DOWN, 144 * 300 + 16, 0, "block 300 (expert 1 row 44 column 0): one bit is flipped: bit 0 of byte 16"),
    (Q_B, 34 * 9 + 12, 0, "block 9 (row 1 column 32): one bit is flipped: bit 0 of byte 12"),
    (Q_B, 34 * 9, 1, "block 9 (row 1 column 32): one bit is flipped: bit 1 of byte 0, in its scale d"),
    ("token_embd.weight", 2 * 257, 0, "block 257 (row 1 column 1): one bit is flipped: bit 0 of byte 0"),
    ("blk.0.ffn_norm.weight", 4 * 7, 1, "block 7 (row 0 column 7): one bit is flipped: bit 1 of byte 0"),
])  # fmt: skip
def test_one_flipped_bit(name, at, bit, said, check, edit):
    assert only_fault(check, edit.flip(name, at, bit), name) == said


def test_an_exponent_in_a_small_vector(check, edit):
    """All of it is one run of values, which is far off then; that is no reason not to name the bit."""
    name = "blk.0.attn_kv_a_norm.weight"
    _, checks = check(edit.flip(name, 4 * 7 + 3, 0))
    assert str(checks[name].faults[0]) == "block 7 (row 0 column 7): one bit is flipped: bit 0 of byte 3"


def test_a_flipped_bit_where_only_its_tensor_is_compared(check, edit):
    report, _ = check(edit.flip(DOWN, 144 * 300 + 77, 2), tensors=[DOWN])
    assert not report.ok


@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_damage_of_any_kind_is_found(model, tmp_path_factory, data):
    """A few bytes of a few tensors, or runs of them, written over: each of these tensors is wrong, and no other."""
    source, _, right = model
    edit, damaged = Edit(right), set()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(edit.places)))
        size = edit.places[name][1]
        n = data.draw(st.integers(1, min(size, 2000)))
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=3), st.sampled_from([bytes(n), b"\xff" * n])))[:size]
        at = data.draw(st.integers(0, size - len(new)))
        edit.put(name, new, at)
        damaged.add(name)
    path = edit.write(tmp_path_factory.getbasetemp() / "damaged.gguf")
    original = Edit(right)
    changed = {name for name in damaged if edit.data(name) != original.data(name)}
    report = dt.verify(path, source=source, engines=["none"])
    assert {t.name for t in report.wrong} == changed
    assert all(t.faults for t in report.wrong)
    json.dumps(report_data(report), allow_nan=False)


def test_a_few_bytes(check, edit):
    report, checks = check(edit.put(Q_B, b"\x7f" * 40, 34 * 20 + 10))
    assert not report.ok
    assert checks[Q_B].n_blocks_different == 2
    texts = [str(f) for f in checks[Q_B].faults]
    assert texts[0].startswith("row 2 columns 128-159: is off by up to ") or "columns 128-255" in texts[0]


def tiles(x, *place_and_change):
    """A copy in which one place is changed."""
    *place, change = place_and_change
    x = x.copy()
    x[tuple(place)] = change(x[tuple(place)])
    return x


def codes_of(source, name, shape):
    return E4M3[np.frombuffer(read_tensor(source, name), np.uint8)].reshape(shape)


MISTAKES = {
    "a transposed block": (Q_B, lambda x: tiles(x, slice(256, 384), slice(128, 256), np.transpose),
                           "rows 256-383 columns 128-255: is transposed"),
    "a block's scale": (Q_B, lambda x: tiles(x, slice(256, 384), slice(128, 256), lambda t: 4 * t),
                        "rows 256-383 columns 128-255: has the wrong scale: 2^2 times the source"),
    "a block of zeros": (Q_B, lambda x: tiles(x, slice(0, 128), slice(0, 128), lambda t: 0 * t),
                         "rows 0-127 columns 0-127: is all zeros"),
    "a block's sign": (Q_B, lambda x: tiles(x, slice(896, 1024), slice(0, 128), np.negative),
                       "rows 896-1023 columns 0-127: has the opposite sign"),
    "transposed": (Q_B, lambda x: x.T.reshape(x.shape), "is transposed"),
    "scaled": (Q_B, lambda x: x / 8, "has the wrong scale: 2^-3 times the source"),
    "scaled by no power": (Q_B, lambda x: x * 1.3, "has the wrong scale: 1.30"),
    "negated": (Q_B, np.negative, "has the opposite sign"),
    "zeros": (Q_B, lambda x: 0 * x, "is all zeros"),
    "rows moved": (Q_B, lambda x: np.roll(x, 5, 0), "has its rows moved: row 0 holds row 1019, and so on"),
    "rows in another order": (Q_B, lambda x: x[np.random.default_rng(3).permutation(len(x))],
                              "has its rows in another order: row 0 holds row "),
    "an FP4 scale": (DOWN, lambda x: tiles(x, 2, 7, slice(32, 64), lambda t: t / 2),
                     "expert 2 row 7 columns 32-63: has the wrong scale: 2^-1 times the source"),
    "nibbles": (DOWN, lambda x: tiles(x, 2, ..., lambda t: t.reshape(-1, 2)[:, ::-1].reshape(t.shape)),
                "expert 2: has neighbouring columns swapped"),
    "an expert transposed": (DOWN, lambda x: tiles(x, 3, ..., np.transpose), "expert 3: is transposed"),
    "an expert scaled": (DOWN, lambda x: tiles(x, 0, ..., lambda t: 2 * t), "expert 0: has the wrong scale: 2^1 times"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_its_name(mistake, check, edit, weights):
    name, change, said = MISTAKES[mistake]
    assert only_fault(check, edit.put_values(name, change(weights.gguf(name))), name).startswith(said)


def test_transposed_scales(check, edit, source, weights):
    shape = weights.raw["layers.1.attn.wq_b.scale"][1]
    scales = np.frombuffer(read_tensor(source, "layers.1.attn.wq_b.scale"), np.uint8).reshape(shape)
    turned = np.repeat(np.repeat(2.0 ** (scales.T.reshape(shape).astype(float) - 127), 128, 0), 128, 1)
    codes = codes_of(source, "layers.1.attn.wq_b.weight", (1024, 256))
    assert only_fault(check, edit.put_values(Q_B, codes * turned), Q_B) == "has its scales transposed"


def test_one_block_with_the_scale_of_another(check, edit, source, weights):
    shape = weights.raw["layers.1.attn.wq_b.scale"][1]
    scales = np.frombuffer(read_tensor(source, "layers.1.attn.wq_b.scale"), np.uint8).reshape(shape).astype(int)
    factor = 2.0 ** (scales[0, 1] - scales[1, 0])
    values = tiles(weights.gguf(Q_B), slice(128, 256), slice(0, 128), lambda t: t * factor)
    assert only_fault(check, edit.put_values(Q_B, values), Q_B).endswith("it has the scale of block (0, 1)")


def test_two_blocks_far_from_each_other(check, edit, weights):
    """Each is named, though the first alone has more wrong values than places are kept."""
    values = tiles(weights.gguf(Q_B), slice(0, 128), slice(128, 256), lambda t: 4 * t)
    values = tiles(values, slice(640, 768), slice(0, 128), np.transpose)
    _, checks = check(edit.put_values(Q_B, values))
    assert [str(f) for f in checks[Q_B].faults] == [
        "rows 0-127 columns 128-255: has the wrong scale: 2^2 times the source",
        "rows 640-767 columns 0-127: is transposed"]


def test_decoded_without_scales(check, edit, source):
    codes = codes_of(source, "layers.1.attn.wq_b.weight", (1024, 256))
    assert only_fault(check, edit.put_values(Q_B, codes), Q_B) == "was decoded without its scales"


def test_noise_is_named_as_what_it_is(check, edit, weights):
    x, rng = weights.gguf(DOWN), np.random.default_rng(4)
    noise = rng.normal(size=x.shape).astype(np.float32) * x.std()
    report, checks = check(edit.put_values(DOWN, x + 0.01 * noise))
    assert report.ok
    assert checks[DOWN].judgement == "within"
    _, checks = check(edit.put_values(DOWN, x + 0.2 * noise))
    assert checks[DOWN].judgement == "wrong"
    assert all("resembles nothing that was tried" in f.what for f in checks[DOWN].faults)
    _, checks = check(edit.put_values(DOWN, x + 0.11 * noise))
    assert checks[DOWN].judgement == "wrong"
    assert all("has larger errors everywhere, in no place that stands out" in f.what for f in checks[DOWN].faults)


def test_values_that_are_not_finite(check, edit):
    report, checks = check(edit.put(DOWN, b"\x00\x7e", 144 * 10))
    assert not report.ok
    assert checks[DOWN].reason.startswith("expert 0: 256 values are NaN or infinite")
    assert [str(f).split(", the first")[0] for f in checks[DOWN].faults] == [
        "block 10 (expert 0 row 10 column 0): 2 of 144 bytes differ",
        "expert 0 row 10 columns 0-255: holds values that are NaN or infinite",
    ]  # fmt: skip
    assert checks[DOWN].faults[0].what.endswith("in its scale d")


def test_ids(check, edit):
    name = "blk.0.ffn_gate_tid2eid.weight"
    ids = np.frombuffer(edit.data(name), "<i4").reshape(-1, 2).copy()
    ids[100] = ids[100][::-1]
    text = only_fault(check, edit.put(name, ids.tobytes()), name)
    assert text.startswith(f"token 100: routes to experts {ids[100].tolist()}, the source to {ids[100][::-1].tolist()}")
    assert "the same experts in another order" in text
    ids[200] = (ids[200] + 1) % 4
    text = only_fault(check, edit.put(name, ids.tobytes()), name)
    assert "1 more rows differ" in text
    assert "another order" not in text


def test_another_models_data_are_not_examined_for_ever(right, make_checkpoint):
    report = dt.verify(right, source=make_checkpoint(seed=77), engines=["none"])
    assert not report.ok
    examined = [t for t in report.wrong if "not examined" not in str(t.faults)]
    assert len(examined) == 32
    assert len(report.wrong) > 60


# ----------------------------------------------------------------------------------------------------------- bounds


def tally(error, own, *, cosine=1.0, own_cosine=1.0, n_wrong_cells=0):
    """A matrix with these relative errors and cosines."""
    def sums(e, c):
        return ErrorSums(1000, e * e, c, 1.0, 1.0)

    return MatrixTally(1000, 900, 100, 90, found=sums(error, cosine), own=sums(own, own_cosine), n_measured=1000,
                       n_wrong_cells=n_wrong_cells, n_cells=4)


@pytest.mark.parametrize(("matrix", "said"), [
    (tally(0.0199, 0.01), ""),
    (tally(0.0201, 0.01), "its relative RMSE is 0.0201, that of our own encoding 0.01"),
    (tally(2.0**-23, 0), ""),
    (tally(1.1 * 2.0**-23, 0), "its relative RMSE is"),
    (tally(0.1, 0.06, cosine=0.9901), ""),
    (tally(0.1, 0.06, cosine=0.9899), "its cosine with the source is 0.9899, that of our own encoding 1"),
    (tally(0.3, 0.2, cosine=0.95, own_cosine=0.98), ""),     # two bits: ours is no better
    (tally(0.011, 0.01, n_wrong_cells=1), "1 of 4 runs of 256 values have errors beyond their bounds"),
])  # fmt: skip
def test_the_bounds(matrix, said):
    assert find_reason(matrix, FORMATS["Q4_K"], by_bytes=False).startswith(said)
    assert bool(find_reason(matrix, FORMATS["Q4_K"], by_bytes=False)) == bool(said)
    assert find_reason(matrix, FORMATS["Q4_K"], by_bytes=True)      # our own encoding, and blocks differ


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K", "Q8_0"])
def test_what_a_type_may_lose_when_nothing_of_ours_compares(kind):
    x = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    decoded = dequantize(dt.quantize(x, kind), GGMLQuantizationType[kind])
    error = np.sqrt(((decoded - x) ** 2).mean() / (x**2).mean())
    assert 0.2 * expected_error(FORMATS[kind]) < error < expected_error(FORMATS[kind])


# ----------------------------------------------------------------------------------------------------------- samples


def units_of(right, source, sample, seed=0):
    from dsv4tools.gguf.reader import open_gguf  # noqa: PLC0415  - beside its use

    checkpoint = dt.open_checkpoint(source)
    with open_gguf(right) as file:
        planned, findings = plan_comparison(file, checkpoint, list(file.tensors))
    assert findings == []
    return {t.name: list(sample_units(t, sample, seed)) for t in planned}, planned


@pytest.mark.parametrize("sample", [0.5, 10, 37, 100])
def test_a_sample_is_a_share_of_each_tensor(sample, right, source, monkeypatch):
    monkeypatch.setattr(sys.modules["dsv4tools.verify.sample"], "PIECE_VALUES", 1024)
    units, planned = units_of(right, source, sample)
    for t in planned:
        chosen = units[t.name]
        assert {u.matrix.weight.name for u in chosen} == {m.weight.name for m in t.tensor.sources}
        starts = [u.start for u in chosen]
        assert starts == sorted(set(starts))
        n_bytes = sum(u.n_bytes for u in chosen)
        assert all(u.start + u.n_bytes <= t.n_bytes for u in chosen)
        assert n_bytes >= t.n_bytes * sample / 100 * 0.99 or t.n_bytes < 10_000
        if t.n_bytes > 100_000:
            assert n_bytes <= t.n_bytes * (sample / 100 + 0.05)
        if sample == 100:
            assert n_bytes == t.n_bytes


def test_the_seed_chooses(right, source, monkeypatch):
    monkeypatch.setattr(sys.modules["dsv4tools.verify.sample"], "PIECE_VALUES", 1024)
    places = [[u.start for u in units_of(right, source, 5, seed)[0][UP]] for seed in (0, 0, 1)]
    assert places[0] == places[1] != places[2]


def test_a_sample_finds_swapped_experts(check, edit, source, tmp_path, dsv4tools):
    report, checks = check(edit.swap_experts(UP, 1, 2), sample=1)
    assert [t.name for t in report.wrong] == [UP]
    assert "experts 1 and 2: are swapped" in str(checks[UP].faults[0])
    assert 0 < checks[UP].n_compared < checks[UP].n_bytes
    ended = dsv4tools("verify", tmp_path / "edited.gguf", "--source", source, "--sample", 1, "--engine", "none")
    assert ended.code == 5
    assert "byte for byte, in a sample of 1 %" in ended.out
    steps, totals = [], []
    dt.verify(tmp_path / "edited.gguf", source=source, sample=1, progress=steps.append, announce=totals.append)
    assert totals == [sum(steps)]


@pytest.mark.parametrize("sample", [0, -1, 100.5, float("nan")])
def test_a_sample_of_nothing(sample, right, source):
    with pytest.raises(UsageError, match="--sample"):
        dt.verify(right, source=source, sample=sample)


def test_options_that_need_the_source(right):
    for options in ({"sample": 1}, {"forward": True}, {"max_kl": 1}):
        with pytest.raises(UsageError, match="needs --"):
            dt.verify(right, **options)


def test_zeroed_values_are_compared_as_zeros(make_checkpoint, tmp_path):
    source = make_checkpoint()
    write_tensor(source, "head.weight", b"\xc0\x7f", at=34)       # a NaN
    out = tmp_path / "zeroed.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(source), nan="zero"), out)
    report = dt.verify(out, source=source)
    assert report.ok
    (head,) = [t for t in report.tensors if t.name == "output.weight"]
    assert 0 < head.error.relative_rmse < 0.01


def test_a_check_is_data(check, edit):
    report, _ = check(edit.flip(DOWN, 7, 7))
    data = report_data(report)
    entry = next(t for t in data["tensors"] if t["name"] == DOWN)
    assert entry["judgement"] == "wrong"
    assert entry["faults"][0]["what"].startswith("one bit is flipped")
    assert entry["error"].keys() == {"relative_rmse", "largest", "largest_at", "cosine", "n_not_finite"}
    assert data["sample_per_cent"] is None
    assert replace(report, path=Path("x")).ok is False
