"""Policies side by side, and the hint that MXFP4 would be smaller and exact.

Errors are compared with those of the C quantizer's rules written out: the numpy reference encodes, gguf-py decodes.
"""

from __future__ import annotations

import json
import re

import gguf
import numpy as np
import pytest
from conftest import SMALL
from independent import Weights
from quant_reference import quantize_q4_k

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.engines import choose_engines, judge_plan
from dsv4tools.formats.table import FORMATS
from dsv4tools.hints import find_hints
from dsv4tools.plan import make_plan
from dsv4tools.policy_costs import N_PIECES, compare_policies
from dsv4tools.verify.sample import PIECE_VALUES, sample_pieces


@pytest.fixture
def source(_written):
    """A small checkpoint. Not to be changed."""
    return _written(shape=SMALL, seed=0, shards=2, merges_form="strings")


def test_sizes_bits_and_errors_are_those_of_the_policies(source, dsv4tools):
    shown = dsv4tools("policy", "explain", source, "--compare", "q4k, mxfp4,bf16", "--json").data["policies"]
    assert [p["policy"] for p in shown] == ["q4k", "mxfp4", "bf16"]
    for each in shown:
        explained = dsv4tools("policy", "explain", source, "--policy", each["policy"], "--json").data
        assert each["total_bytes"] == explained["total_bytes"]
        by_role = {}
        for t in explained["tensors"]:
            by_role[re.sub(r"blk\.\d+\.|\.weight$", "", t["tensor"])] = \
                by_role.get(re.sub(r"blk\.\d+\.|\.weight$", "", t["tensor"]), 0) + t["n_bytes"]
        for role in each["roles"]:
            assert role["n_bytes"] == by_role[role["role"]]
            assert sum(role["types"].values()) == role["n_tensors"]
            assert 0 < role["n_sampled"] <= role["n_values"]
    q4k, mxfp4, bf16 = ({role["role"]: role for role in p["roles"]} for p in shown)
    for part in ("gate", "up", "down"):
        role = f"ffn_{part}_exps"
        assert (q4k[role]["types"], q4k[role]["bits_per_weight"]) == ({"Q4_K": 3}, 4.5)
        assert (mxfp4[role]["types"], mxfp4[role]["bits_per_weight"]) == ({"MXFP4": 3}, 4.25)
        assert mxfp4[role]["relative_rmse"] == bf16[role]["relative_rmse"] == 0
    assert q4k["attn_q_a"] == mxfp4["attn_q_a"]
    assert list(q4k)[:3] == ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]


def test_a_sample_that_is_everything_has_the_error_of_everything(source):
    """The experts of this checkpoint are smaller than the sample, so that the error is known to the last value."""
    checkpoint = open_checkpoint(source)
    (cost,) = compare_policies([make_plan(checkpoint)], threads=2)
    role = next(r for r in cost.roles if r.role == "ffn_gate_exps")
    weights = Weights(source)
    x = np.concatenate([weights.gguf(f"blk.{layer}.ffn_gate_exps.weight") for layer in range(3)]).reshape(-1, 256)
    assert role.errors.n == role.n_values == x.size
    back = gguf.quants.dequantize(quantize_q4_k(x), gguf.GGMLQuantizationType.Q4_K)
    expected = np.sqrt(((back.astype(float) - x) ** 2).sum() / (x.astype(float) ** 2).sum())
    assert role.errors.relative_rmse == pytest.approx(expected, rel=1e-9)
    assert 0.01 < expected < 0.2


def test_the_sample_does_not_depend_on_threads_or_on_other_policies(source):
    checkpoint = open_checkpoint(source)
    plans = [make_plan(checkpoint, policy=name) for name in ("q8", "q4k")]
    both = [cost.as_data() for cost in compare_policies(plans, threads=1)]
    assert both == [compare_policies([plan], threads=3)[0].as_data() for plan in plans]


def test_pieces_are_spread_over_all_tensors_and_stay_inside(flash_plan):
    experts = [t for t in flash_plan.tensors if t.name.endswith("ffn_up_exps.weight")]
    pieces = list(sample_pieces(experts, N_PIECES))
    assert pieces == list(sample_pieces(experts, N_PIECES))
    assert len(pieces) == N_PIECES
    assert len({t.name for t, *_ in pieces}) == len(experts) == 43
    for t, number, first, n_rows in pieces:
        matrix = t.tensor.sources[number]
        assert 0 <= first < first + n_rows <= matrix.n_rows
        assert n_rows * matrix.n_cols <= PIECE_VALUES
    assert list(sample_pieces([], 4)) == []


def test_the_table_has_a_column_of_each_policy(source, dsv4tools):
    ended = dsv4tools("policy", "explain", source, "--compare", "q4k,mxfp4")
    lines = ended.out.splitlines()
    assert lines[0].split() == ["q4k", "mxfp4"]
    assert lines[1].split() == ["role", *("type", "bytes", "bits", "error") * 2]
    (experts,) = [line.split() for line in lines if line.startswith("ffn_up_exps")]
    assert (experts[1], experts[3], experts[5], experts[7], experts[8]) == ("Q4_K", "4.50", "MXFP4", "4.25", "0")
    assert re.search(r"^q4k +[\d.]+ .B \([\d.]+ .iB\) +[\d.]+ bits per weight$", ended.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--compare", "q4k,q9"), "--compare: 'q9' is neither a shipped policy"),
     (("--compare", " , "), "expected names of policies"),
     (("--compare", "q4k", "--policy", "q8"), "--compare: was given together with --policy")],
)  # fmt: skip
def test_comparisons_that_cannot_be(source, dsv4tools, arguments, message):
    ended = dsv4tools("policy", "explain", source, *arguments)
    assert ended.code == 2
    assert message in ended.err


# ------------------------------------------------------------------------------------------------------------- hints


def hints(plan, *names):
    asked = choose_engines(names)
    return find_hints(plan, judge_plan(plan, asked), asked)


def test_a_plan_with_larger_experts_says_that_mxfp4_is_exact(flash_plan):
    (hint,) = hints(flash_plan, "llama.cpp")
    experts = [t for t in flash_plan.tensors if "_exps." in t.name]
    assert hint.tensors == tuple(t.name for t in experts)
    assert hint.types == ("Q4_K",)
    assert hint.n_bytes == sum(t.n_bytes for t in experts)
    assert hint.mxfp4_bytes * 4.5 == hint.n_bytes * 4.25
    assert (hint.engines, hint.other_engines) == (("llama.cpp",), ())
    assert "(--experts mxfp4)" in hint.text


def test_who_takes_mxfp4_decides(flash_plan):
    """ds4 of May 2026 has no MXFP4: asked alone or with another it silences the hint, among all it is named."""
    assert hints(flash_plan, "ds4-may2026") == []
    assert hints(flash_plan, "ds4-may2026", "llama.cpp") == []
    assert hints(flash_plan, "none") == []
    (hint,) = hints(flash_plan)
    assert "ds4-may2026" in hint.other_engines
    assert {"ds4", "llama.cpp"} <= set(hint.engines)
    assert re.search(r"loads in .*, not in .*ds4-may2026", hint.text)


@pytest.mark.parametrize(
    ("type_", "hinted"),
    [("Q8_0", True), ("Q5_K", True), ("IQ4_NL", True), ("IQ4_XS", False), ("Q2_K", False), ("MXFP4", False),
     ("BF16", False)],
)  # fmt: skip
def test_only_types_that_are_larger_and_less_exact_are_hinted_at(source, type_, hinted):
    plan = make_plan(open_checkpoint(source), families={"experts": type_})
    assert bool(hints(plan, "llama.cpp")) is hinted


def test_experts_that_are_not_fp4_are_not_hinted_at(make_checkpoint):
    plan = make_plan(open_checkpoint(make_checkpoint(expert_dtype="fp8")))
    assert hints(plan, "llama.cpp") == []


def test_a_dry_run_shows_the_hint(source, tmp_path, dsv4tools):
    arguments = ("convert", source, tmp_path / "o.gguf", "--dry-run", "--engine", "llama.cpp")
    (line,) = [line for line in dsv4tools(*arguments).out.splitlines() if line.startswith("hint ")]
    (hint,) = dsv4tools(*arguments, "--json").data["hints"]
    assert line.split(maxsplit=1)[1] == hint["text"]
    assert hint["hint"] == "mxfp4-experts"
    assert hint["mxfp4_bytes"] == len(hint["tensors"]) * FORMATS["MXFP4"].n_bytes((256, 256, 4))
    assert json.dumps(hint)
    assert dsv4tools(*arguments, "--experts", "mxfp4", "--json").data["hints"] == []
