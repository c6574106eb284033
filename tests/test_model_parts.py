"""The parts of the forward pass one by one: above all those whose mistakes the logits of a small model hardly show."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.checkpoint.config import read_config
from dsv4tools.errors import UsageError
from dsv4tools.model import Sampling, generate, open_model
from dsv4tools.model import attention as attention_module
from dsv4tools.model.compressor import Rows
from dsv4tools.model.functions import clamped_swiglu, rms, sigmoid, softmax_with_sink
from dsv4tools.model.hyper import sinkhorn
from dsv4tools.model.rope import Rope, plain_frequencies, yarn_frequencies


def silu(x):
    return x / (1 + math.exp(-x))


class TestClampedSwiglu:
    """silu(min(gate, limit)) * clip(up, -limit, limit), worked out by hand."""

    def test_gate_is_clamped_before_silu(self):
        # silu(10) is 9.99954...: clamping after silu would give 10.
        (y,) = clamped_swiglu(np.array([20.0]), np.array([1.0]), 10.0)
        assert y == pytest.approx(silu(10), abs=1e-12)
        assert y < 9.9996

    def test_gate_is_clamped_from_above_only(self):
        # silu(-12) is -7.4e-5, silu(-10) is -4.5e-4.
        (y,) = clamped_swiglu(np.array([-12.0]), np.array([1.0]), 10.0)
        assert y == pytest.approx(silu(-12), abs=1e-12)

    def test_up_is_clamped_on_both_sides(self):
        y = clamped_swiglu(np.array([1.0, 1.0, 1.0]), np.array([30.0, -30.0, 3.0]), 10.0)
        assert y == pytest.approx([10 * silu(1), -10 * silu(1), 3 * silu(1)])


class TestSinkhorn:
    EPS = 1e-6

    def by_hand(self, z, n_column_steps, eps):
        """As nested loops over Python floats."""
        n = len(z)
        c = [[math.exp(v) / sum(map(math.exp, row)) + eps for v in row] for row in z]
        for step in range(n_column_steps):
            if step:
                c = [[v / (sum(row) + eps) for v in row] for row in c]
            sums = [sum(c[j][k] for j in range(n)) + eps for k in range(n)]
            c = [[c[j][k] / sums[k] for k in range(n)] for j in range(n)]
        return np.array(c)

    @pytest.fixture
    def z(self):
        return np.random.default_rng(3).standard_normal((4, 4)) * 3

    def test_twenty_column_steps(self, z):
        found = sinkhorn(z[None], 20, self.EPS)[0]
        assert found == pytest.approx(self.by_hand(z, 20, self.EPS), rel=1e-12)
        # ... and no other number of them
        for other in (19, 21):
            assert np.abs(found - self.by_hand(z, other, self.EPS)).max() > 1e-7

    def test_epsilon_counts(self, z):
        found = sinkhorn(z[None], 20, self.EPS)[0]
        assert np.abs(found - self.by_hand(z, 20, 0.0)).max() > 1e-7
        assert found.sum(axis=0) == pytest.approx(np.ones(4), abs=1e-5)   # ends with columns
        assert np.abs(found.sum(axis=0) - 1).max() < np.abs(found.sum(axis=1) - 1).max()

    def test_tokens_do_not_mix(self, z):
        both = sinkhorn(np.stack([z, 2 * z]), 20, self.EPS)
        np.testing.assert_array_equal(both[1], sinkhorn(2 * z[None], 20, self.EPS)[0])


@pytest.fixture(scope="module")
def small(_written):
    from conftest import SMALL  # noqa: PLC0415  - the suite's own module

    return _written(shape=SMALL, seed=0, shards=2, merges_form="strings")


def test_streams_are_weighed_with_epsilon(small):
    """pre has hc_eps added, post has not: seen where both gates are shut."""
    with open_model(small, dtype=np.float64) as model:
        around = model.layers[0].around_attention
        base = np.full(24, -800.0)
        model.weights._vectors["blk.0.hc_attn_base.weight"] = base
        pre, post, _ = around.mix(np.ones((1, 4, 256)))
    assert pre == pytest.approx(np.full((1, 4), 1e-6), rel=1e-12)
    assert post.max() < 1e-300


class TestRope:
    @pytest.fixture
    def config(self, data):
        return read_config(data / "configs" / "flash.json")

    def test_neighbours_are_pairs_and_only_the_last_channels_turn(self, config):
        x = np.random.default_rng(0).standard_normal((3, 2, 100))
        positions = np.array([0, 1, 1000])
        turned = Rope(config, compressed=False).rotate(x, positions)
        np.testing.assert_array_equal(turned[..., :36], x[..., :36])
        for s, position in enumerate(positions):
            for i in range(32):
                angle = position * 10000.0 ** (-2 * i / 64)
                z = complex(*x[s, 1, 36 + 2 * i : 38 + 2 * i]) * complex(math.cos(angle), math.sin(angle))
                assert turned[s, 1, 36 + 2 * i : 38 + 2 * i] == pytest.approx([z.real, z.imag], abs=2e-4)

    def test_inverse(self, config):
        x = np.random.default_rng(0).standard_normal((3, 64))
        rope, positions = Rope(config, compressed=True), np.array([5, 70_000, 1_000_000])
        there = rope.rotate(x, positions)
        assert np.abs(there - x).max() > 0.1
        assert rope.rotate(there, positions, inverse=True) == pytest.approx(x, abs=1e-12)

    def test_frequencies(self, config):
        plain, yarn = plain_frequencies(config), yarn_frequencies(config)
        assert plain.dtype == yarn.dtype == np.float32
        assert plain[[0, 16, 31]] == pytest.approx([1.0, 0.01, 10000 ** (-62 / 64)], rel=1e-6)
        own = 160000.0 ** (-2 * np.arange(32) / 64)
        # Corners 15 and 25: in front of them nothing changes, behind them all is divided by 16.
        assert yarn[:16] == pytest.approx(own[:16], rel=1e-6)
        assert yarn[25:] == pytest.approx(own[25:] / 16, rel=1e-6)
        assert yarn[20] == pytest.approx(own[20] * (0.5 + 0.5 / 16), rel=1e-6)

    def test_angles_are_float32_whatever_the_vectors_are(self, config):
        """At position 999,983 the float32 angle is off by 0.03 in the second frequency: float64 sees the same."""
        x = np.random.default_rng(0).standard_normal((1, 64))
        rope, position = Rope(config, compressed=False), np.array([999_983])
        single = rope.rotate(x.astype(np.float32), position)
        assert single == pytest.approx(rope.rotate(x, position), abs=1e-5)


def test_sink_takes_its_share_and_no_value():
    scores, sink = np.array([[[1.0, -np.inf, 2.0]]]), np.array([0.5])
    weights = softmax_with_sink(scores, sink)
    total = math.e + math.e**2 + math.e**0.5
    assert weights[0, 0] == pytest.approx([math.e / total, 0, math.e**2 / total])
    assert softmax_with_sink(np.array([[[-np.inf]]]), np.array([3.0])) == pytest.approx(0)


def test_sigmoid_and_rms_at_the_edges():
    assert sigmoid(np.array([-1000.0, 0.0, 1000.0], np.float32)).tolist() == [0.0, 0.5, 1.0]
    assert rms(np.array([3.0, 4.0]), 0.0) == pytest.approx(np.array([3.0, 4.0]) / math.sqrt(12.5))
    assert rms(np.zeros(4, np.float32), 1e-6).tolist() == [0.0] * 4


@given(st.lists(st.integers(0, 40), max_size=12))
@settings(max_examples=30, deadline=None)
def test_rows_grow(sizes):
    rows, expected = Rows(3, np.float32), np.zeros((0, 3))
    for i, n in enumerate(sizes):
        rows.append(np.full((n, 3), i, np.float32))
        expected = np.concatenate([expected, np.full((n, 3), i)])
        np.testing.assert_array_equal(rows.values, expected)


class TestIndexer:
    def test_equal_scores_keep_the_lower_number(self):
        index = attention_module.PreparedIndex(
            np.zeros((2, 1, 4)), np.ones((2, 1)), np.zeros((9, 4)), np.array([9, 2]), 3, 0
        )
        chosen = index.choose(0, 2, None)
        assert chosen[0].tolist() == [0, 1, 2]
        assert chosen[1][:2].tolist() == [0, 1]   # the third sees nothing: its place is masked later

    def test_it_is_asked_only_when_there_is_a_choice(self, small):
        seen = []
        with open_model(small) as model:
            n = 4 * model.config.index_topk
            cache = model.new_cache()
            model.forward(np.zeros(n + 3, int), cache, observe=lambda what, layer, _: seen.append((what, layer)))
            assert ("index_scores", 1) not in seen
            model.forward([0], cache, observe=lambda what, layer, _: seen.append((what, layer)))
            assert ("index_scores", 1) in seen


def test_small_blocks_of_queries_change_nothing(small, monkeypatch):
    tokens = np.random.default_rng(1).integers(0, 512, 150)
    with open_model(small) as model:
        whole = model.forward(tokens)
        monkeypatch.setattr(attention_module, "MAX_SCORES", 1)   # one query at a time
        assert np.abs(model.forward(tokens) - whole).max() <= 1e-4


def test_a_long_prompt_builds_nothing_of_the_size_s_x_s(small):
    with open_model(small) as model:
        def peak(n):
            tokens = np.random.default_rng(0).integers(0, 512, n)
            tracemalloc.start()
            for _ in model.run(tokens, chunk=16):
                pass
            n_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return n_bytes

        peak(16)   # vectors are read once and kept
        growth = peak(1200) - peak(300)
        assert growth < 2 * 1200**2, growth   # half of one S x S array of float32; attention has one per head


class TestRouting:
    def test_hash_layers_look_up_and_score_layers_choose(self, small):
        """Layer 0 routes by token id, layer 1 by score plus bias; the weights come from the score alone."""
        checkpoint = open_checkpoint(small)
        with open_model(checkpoint, dtype=np.float64) as model:
            x = np.random.default_rng(0).standard_normal((5, 256))
            tokens = np.array([7, 7, 8, 9, 511])
            hashed, _ = model.layers[0].experts.route(x, tokens)
            np.testing.assert_array_equal(hashed[0], hashed[1])
            chosen, shares = model.layers[1].experts.route(x, tokens)
            scores = np.sqrt(np.log1p(np.exp(model.weights.matmul("blk.1.ffn_gate_inp.weight", x))))
            bias = model.weights.vector("blk.1.exp_probs_b.bias")
            for t in range(5):
                best = np.argsort(-(scores[t] + bias))[: chosen.shape[1]]
                assert chosen[t].tolist() == best.tolist()
                s = scores[t][best]
                assert shares[t] == pytest.approx(1.5 * s / s.sum())

    def test_an_expert_that_is_named_twice_counts_twice(self, small):
        with open_model(small, dtype=np.float64) as model:
            experts = model.layers[0].experts
            x, tokens = np.random.default_rng(0).standard_normal((2, 256)), np.array([1, 2])
            twice = np.array([[3, 3], [0, 3]]), np.array([[0.25, 0.5], [1.0, 0.0]])
            experts.route = lambda *_: twice
            y = experts(x, tokens)
            experts.route = lambda *_: (np.array([[3], [0]]), np.array([[0.75], [1.0]]))
            np.testing.assert_allclose(y, experts(x, tokens), rtol=1e-12)


class TestSampling:
    LOGITS = np.log(np.array([0.1, 0.4, 0.3, 0.2]))

    def test_greedy_takes_the_first_of_equals(self):
        assert Sampling().choose(np.array([0.0, 2.0, 2.0]), np.random.default_rng(0)) == 1

    @pytest.mark.parametrize(("options", "expected"), [
        ({"temperature": 1.0}, [0.1, 0.4, 0.3, 0.2]),
        ({"temperature": 0.5}, np.array([1, 16, 9, 4]) / 30),
        ({"temperature": 1.0, "top_p": 0.7}, [0, 4 / 7, 3 / 7, 0]),
        ({"temperature": 1.0, "top_p": 0.71}, [0, 4 / 9, 3 / 9, 2 / 9]),
        ({"temperature": 1.0, "min_p": 0.6}, [0, 4 / 7, 3 / 7, 0]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0]),
        ({"temperature": 1e-3, "min_p": 1.0}, [0, 1, 0, 0]),
    ])
    def test_probabilities(self, options, expected):
        # A hair off the borders that a sum of four decimals could cross.
        logits = self.LOGITS + (0 if "top_p" not in options else np.array([0, 1e-9, 0, 0]))
        assert Sampling(**options).probabilities(logits) == pytest.approx(expected, abs=1e-6)

    def test_draws_follow_the_seed(self):
        sampling = Sampling(temperature=1.0)
        draws = [[sampling.choose(self.LOGITS, random) for _ in range(50)]
                 for random in map(np.random.default_rng, (1, 1, 2))]
        assert draws[0] == draws[1] != draws[2]
        assert set(draws[0]) == {0, 1, 2, 3}

    @pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": math.nan}, {"top_p": 0}, {"min_p": 2}])
    def test_impossible_values(self, options):
        with pytest.raises(UsageError, match="expected"):
            Sampling(**options)


class TestGenerate:
    def test_greedy_is_the_most_likely_token_each_time(self, small):
        with open_model(small) as model:
            tokens = [1, 2, 3]
            for token in generate(model, tokens, 6, chunk=2):
                expected = int(np.argmax(np.concatenate(list(model.run(tokens)))[-1]))
                assert token == expected
                tokens.append(token)
        assert len(tokens) == 9

    def test_stops_behind_a_stop_token(self, small):
        with open_model(small) as model:
            first, second = list(generate(model, [1, 2, 3], 2))
            assert list(generate(model, [1, 2, 3], 9, stop=[second])) == [first, second]

    def test_seeds(self, small):
        with open_model(small) as model:
            a, b, c = (list(generate(model, [5], 8, sampling=Sampling(1.0), seed=seed)) for seed in (3, 3, 4))
        assert a == b != c


@pytest.mark.parametrize("tokens", [[], [512], [-1], [1.0], [[1]], ["a"]])
def test_tokens_that_are_none(small, tokens):
    with open_model(small) as model, pytest.raises(UsageError, match="tokens: "):
        model.forward(tokens)
