"""What `compare` says of two models, and of two arrays of logits worked out by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from conftest import SMALL
from tamper import read_tensor, write_tensor

import dsv4tools as dt
from dsv4tools.compare import compare, compare_logits
from dsv4tools.errors import InputError, UsageError
from dsv4tools.model import open_model
from dsv4tools.svg import plot_positions

PROMPTS = [np.random.default_rng(0).integers(0, 512, 30), [1, 2, 3]]


@pytest.fixture(scope="module")
def source(_written):
    return _written(shape=SMALL, seed=0, shards=2, merges_form="strings")


@pytest.fixture(scope="module")
def q4k(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "q4k.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(source)), out)
    return out


class TestLogits:
    def test_by_hand(self):
        a = np.log(np.array([[0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125], [0.9, 0.02, 0.02, 0.02, 0.02, 0.02]]))
        b = np.log(np.array([[0.25, 0.5, 0.125, 0.0625, 0.03125, 0.03125], [0.9, 0.02, 0.02, 0.02, 0.02, 0.02]])) + 3.0
        found = compare_logits(a, b)
        assert found.kl == pytest.approx([0.25 * math.log(2), 0.0], abs=1e-12)   # 0.5 ln 2 - 0.25 ln 2
        assert found.same_top.tolist() == [False, True]
        assert found.common_top.tolist() == [1.0, 1.0]
        assert found.max_difference == pytest.approx([3 + math.log(2), 3.0])
        assert found.mean_difference == pytest.approx([3.0, 3.0])

    def test_against_plain_sums(self):
        random = np.random.default_rng(1)
        a, b = random.normal(0, 3, (2, 4, 40)).astype(np.float32)
        found = compare_logits(a, b)
        for t in range(4):
            p, q = ([math.exp(v) for v in x[t].tolist()] for x in (a, b))
            kl = sum(u / sum(p) * math.log(u / sum(p) / (v / sum(q))) for u, v in zip(p, q, strict=True))
            assert found.kl[t] == pytest.approx(kl, rel=1e-9)
            tops = [set(sorted(range(40), key=lambda i, x=x: -x[t][i])[:5]) for x in (a, b)]
            assert found.common_top[t] == len(tops[0] & tops[1]) / 5

    def test_far_apart(self):
        """A certain prediction against its opposite: large and finite."""
        found = compare_logits(np.array([[1000.0, 0.0]]), np.array([[0.0, 1000.0]]))
        assert found.kl == pytest.approx([1000.0])


class TestModels:
    def test_a_model_is_itself(self, source):
        with open_model(source) as a, open_model(source) as b:
            result = compare(a, b, PROMPTS, layers=True, chunk=11)
        assert result.mean_kl == 0
        assert result.all("max_difference").max() == 0
        assert result.all("same_top").all()
        assert result.parting_layer is None
        assert all(entry.routing == 1.0 and entry.difference == 0 for entry in result.layers)

    def test_against_one_forward_pass_of_each(self, source, q4k):
        done = []
        with open_model(source) as a, open_model(q4k) as b:
            result = compare(a, b, PROMPTS, chunk=7, progress=done.append)
            whole_a, whole_b = (np.concatenate(list(m.run(PROMPTS[0]))) for m in (a, b))
        assert sum(done) == 33
        assert [len(p.tokens) for p in result.prompts] == [30, 3]
        expected = compare_logits(whole_a, whole_b)
        first = result.prompts[0]
        assert first.agreement.kl == pytest.approx(expected.kl, rel=1e-2, abs=1e-6)
        assert result.mean_kl > 1e-3
        for side, logits in (("a", whole_a), ("b", whole_b)):
            surprise = [math.log(sum(math.exp(v) for v in row)) - row[t]
                        for row, t in zip(logits[:-1].astype(float).tolist(), PROMPTS[0][1:], strict=True)]
            assert getattr(first, f"surprise_{side}") == pytest.approx(surprise, abs=1e-3)
        both = np.concatenate([p.surprise_a for p in result.prompts])
        assert result.perplexity("a") == pytest.approx(math.exp(both.mean()))

    def test_perplexity_needs_a_second_token(self, source):
        with open_model(source) as a:
            assert compare(a, a, [[5]]).perplexity("a") is None

    def test_fewer_experts(self, source):
        """Hash layers route to the first of the same experts; scored ones to the best of the same."""
        with open_model(source) as a, open_model(source, experts_per_token=1) as b:
            layers = compare(a, b, PROMPTS, layers=True).layers
        assert [entry.ratio for entry in layers] == [0, 4, 128]
        assert layers[0].routing == 1.0
        assert layers[0].difference > 0.01

    @pytest.mark.parametrize("layer", [0, 1, 2])
    def test_the_layer_where_streams_part(self, make_checkpoint, layer):
        path, name = make_checkpoint(), f"layers.{layer}.attn.wo_b.weight"
        codes = np.frombuffer(read_tensor(path, name), np.uint8)
        write_tensor(path, name, (codes ^ 0x80).tobytes())   # other signs
        with open_model(make_checkpoint("right")) as a, open_model(path) as b:
            result = compare(a, b, PROMPTS, layers=True)
        assert result.parting_layer == layer
        assert all(entry.difference == 0 for entry in result.layers[:layer])

    def test_rounding_is_told_from_change(self, source):
        """float32 and float64 part in every layer, and by rounding only."""
        with open_model(source) as a, open_model(source, dtype=np.float64) as b:
            result = compare(a, b, PROMPTS, layers=True)
        assert all(0 < entry.difference < result.rounding for entry in result.layers)
        assert result.parting_layer is None

    def test_models_that_are_no_pair(self, source, make_checkpoint):
        other = make_checkpoint("other", layers=2, lead_ratios=(0, 4))
        small = make_checkpoint("small", vocab=300)
        with open_model(source) as a, open_model(other) as b, open_model(small) as c:
            assert compare(a, b, [[1]]).mean_kl > 0   # logits can be compared
            with pytest.raises(InputError, match="differ in num_hidden_layers: 3 and 2"):
                compare(a, b, [[1]], layers=True)
            with pytest.raises(InputError, match="differ in vocab_size: 512 and 300"):
                compare(a, c, [[1]])
            for prompts in ([], [[]], [[1], []], [[512]]):
                with pytest.raises(UsageError):
                    compare(a, a, prompts)


class TestPlot:
    def test_points_are_where_their_values_are(self):
        svg = plot_positions([1.0, 0.1, 0.01, 0.0], "a & <b>", "nats")
        assert svg.startswith("<svg ")
        assert "a &amp; &lt;b&gt;" in svg
        points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', svg)[1].split()]
        xs, ys = zip(*points, strict=True)
        assert xs[1] - xs[0] == pytest.approx(xs[3] - xs[2], abs=0.2)
        assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)   # a decade is a decade
        assert ys[3] == ys[2]                                          # zero lies on the axis

    @pytest.mark.parametrize("values", [[], [0.0], [5.0], [1e-300, 1e300]])
    def test_few_and_extreme_values(self, values):
        svg = plot_positions(values, "", "")
        assert svg.endswith("</svg>\n")
        assert "nan" not in svg
        assert svg.count("\n") < 40

