"""`verify --forward`: predictions from the file beside those of its source."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_edit import Edit

import dsv4tools as dt
from dsv4tools.model import open_model
from dsv4tools.verify.behaviour import PROMPTS, compare_behaviour, encode_prompts


@pytest.fixture(scope="module")
def model(_written, tmp_path_factory):
    """A checkpoint and its GGUFs by two policies. Not to be changed."""
    from conftest import SMALL  # noqa: PLC0415  - the suite's own module

    source = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    directory = tmp_path_factory.mktemp("forward")
    for policy in ("q4k", "f32"):
        dt.convert(dt.plan(dt.open_checkpoint(source), policy=policy), directory / f"{policy}.gguf", engines=["none"])
    return source, directory / "q4k.gguf", directory / "f32.gguf"


def test_the_numbers_are_those_of_both_models(model):
    source, q4k, _ = model
    report = dt.verify(q4k, source=source, forward=True)
    assert report.ok
    b = report.behaviour
    kl, same, n = [], [], 0
    with open_model(source) as first, open_model(q4k) as second:
        for prompt in encode_prompts(dt.open_checkpoint(source)):
            p, q = (m.forward(prompt).astype(np.float64) for m in (first, second))
            p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (p, q))
            p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
            kl.append((p * np.log(p / q)).sum(1))
            same.append(p.argmax(1) == q.argmax(1))
            n += len(prompt)
    assert (b.n_prompts, b.n_positions) == (len(PROMPTS), n)
    assert b.mean_kl == pytest.approx(np.concatenate(kl).mean(), rel=1e-4)
    assert b.largest_kl == pytest.approx(np.concatenate(kl).max(), rel=1e-4)
    assert b.same_top == pytest.approx(np.concatenate(same).mean(), abs=0.01)
    assert b.mean_kl > 1e-3
    assert b.parting_layer == 0


def test_exact_weights_predict_the_same(model, dsv4tools):
    source, _, f32 = model
    ended = dsv4tools("verify", f32, "--source", source, "--forward", "--max-kl", 1e-6, "--engine", "none")
    assert ended.succeeded
    assert "same top token 100.0%" in ended.out
    assert "within --max-kl 1e-06" in ended.out


def test_max_kl_decides(model, dsv4tools):
    source, q4k, _ = model
    ended = dsv4tools("verify", q4k, "--source", source, "--forward", "--max-kl", 1e-5, "--engine", "none")
    assert (ended.code, ended.err) == (5, "")
    assert "error: above --max-kl 1e-05" in ended.out
    assert ended.out.endswith("NOT right: 1 error\n")
    data = dsv4tools("verify", q4k, "--source", source, "--forward", "--max-kl", 100, "--json").data
    assert data["ok"]
    assert data["behaviour"].keys() == {
        "ok", "n_prompts", "n_positions", "mean_kl", "largest_kl", "same_top", "perplexity_source", "perplexity_file",
        "parting_layer", "allowed_kl",
    }  # fmt: skip


def test_a_file_that_cannot_be_run(model, tmp_path):
    source, q4k, _ = model
    broken = Edit(q4k).put("blk.0.attn_norm.weight", b"\x00\x00\xc0\x7f", 8).write(tmp_path / "nan.gguf")
    behaviour, findings = compare_behaviour(broken, dt.open_checkpoint(source))
    assert behaviour is None
    assert [(f.severity, f.code) for f in findings] == [("error", "forward")]
    assert "cannot be run" in findings[0].message
    report = dt.verify(broken, source=source, forward=True)
    assert not report.ok
    assert report.behaviour is None


def test_a_file_of_fewer_experts_is_compared_with_the_source_re_routed(model, tmp_path):
    source = model[0]
    checkpoint = dt.reroute(dt.open_checkpoint(source), experts_per_token=1)
    out = tmp_path / "one.gguf"
    dt.convert(dt.plan(checkpoint, policy="f32"), out, engines=["none"])
    report = dt.verify(out, source=source, forward=True, max_kl=1e-6)
    assert report.ok
    assert report.behaviour.same_top == 1


def test_options_that_do_not_go_together(model, dsv4tools):
    source, q4k, _ = model
    assert "--forward: needs --source" in dsv4tools("verify", q4k, "--forward").failed(2)
    assert "--max-kl: needs --forward" in dsv4tools("verify", q4k, "--source", source, "--max-kl", 1).failed(2)
