"""Measured importance matrices: against the formulas over a whole prompt, whose inputs are watched from outside."""

from __future__ import annotations

import signal
from collections import defaultdict

import numpy as np
import pytest
from conftest import SMALL
from gguf import GGUFReader
from imatrix_bytes import read_dat, read_gguf
from independent import EXPERTS, LAYER, MODEL, Weights
from paper_model import PaperModel

import dsv4tools as dt
from dsv4tools.errors import UsageError
from dsv4tools.tokenizer import load_tokenizer
from dsv4tools.workers import StopRequest

CHUNK = 80   # more than four times the rows that an indexer keeps


class Watched(np.ndarray):
    """A matrix that notes what it is multiplied with: in ``x @ W.T`` and in the einsum of `attn_output_a`."""

    notes = None

    def __array_finalize__(self, made_from):
        self.notes = getattr(made_from, "notes", None)

    def __rmatmul__(self, x):
        self.notes.append(np.asarray(x))
        return np.asarray(x) @ self.view(np.ndarray)

    def __array_function__(self, function, types, arguments, options):
        plain = [a.view(np.ndarray) if isinstance(a, Watched) else a for a in arguments]
        if function is np.einsum:
            self.notes.append(np.asarray(plain[1]).reshape(-1, plain[1].shape[-1]))   # groups are taken together
        return function(*plain, **options)


class WatchedModel(PaperModel):
    """`seen` holds, by checkpoint name, all inputs of each matrix."""

    def __init__(self, weights):
        super().__init__(weights)
        self.seen = defaultdict(list)

    def w(self, name):
        value = super().w(name)
        if value.ndim < 2 or value.dtype == np.int64 or name.endswith((".ape", "embed.weight")):
            return value
        value = value.view(Watched)
        value.notes = self.seen[name]
        return value


def our_name(theirs) -> tuple[str, int]:
    """Checkpoint name -> GGUF name and number of the expert."""
    if not theirs.startswith("layers."):
        return next(ours for ours, name in MODEL.items() if name == theirs), 0
    _, layer, rest = theirs.split(".", 2)
    if rest.startswith("ffn.experts."):
        expert, kind = rest.split(".")[2:4]
        return f"blk.{layer}.{next(ours for ours, name in EXPERTS.items() if name == kind)}", int(expert)
    return f"blk.{layer}.{next(ours for ours, name in LAYER.items() if name == rest)}", 0


def expected_sums(source, chunks):
    """GGUF name -> expert -> (sums of squares, count), and the mean surprise: by formulas, in float64."""
    sums, surprise = defaultdict(dict), []
    paper = WatchedModel(Weights(source))
    for chunk in chunks:
        logits = np.asarray(paper.logits(chunk))
        assert paper.sound() == len(chunk), "a near-tie: another seed"
        p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(
            1, keepdims=True)
        surprise += (-p[np.arange(len(chunk) - 1), chunk[1:]]).tolist()
    for theirs, notes in paper.seen.items():
        name, expert = our_name(theirs)
        x = np.concatenate(notes)
        sums[name][expert] = ((x**2).sum(0), len(x))
    return sums, np.mean(surprise)


@pytest.fixture(scope="module")
def source(_written):
    return _written(shape=SMALL, seed=0, shards=2, merges_form="strings")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(8).integers(0, 512, 2 * CHUNK + 20)


@pytest.fixture(scope="module")
def expected(tiny_6e, tokens):
    return expected_sums(tiny_6e, [tokens[:CHUNK], tokens[CHUNK : 2 * CHUNK]])


def collect(source, tokens, **options):
    dtype = options.pop("dtype", np.float32)
    with dt.open_model(source, dtype=dtype) as model:
        return dt.collect_imatrix(model, tokens, **options)


# The formulas are float64; in float32 rounding shows where a column is far smaller than the others of its matrix.
@pytest.mark.parametrize(("dtype", "of_each"), [(np.float64, 1e-5), (np.float32, 1e-4)])
def test_every_sum_is_that_of_the_formulas(dtype, of_each, tiny_6e, tokens, expected):
    found = collect(tiny_6e, tokens, chunk_size=CHUNK, process_output=True, dtype=dtype)
    sums, surprise = expected
    assert set(found.imatrix.entries) == set(sums)
    n_experts = 0
    for name, experts in sums.items():
        entry = found.imatrix.entries[name]
        assert entry.counts.tolist() == [experts[e][1] if e in experts else 0 for e in range(len(entry.counts))], name
        for number, (squares, _) in experts.items():
            n_experts += 1
            np.testing.assert_allclose(entry.squares[number], squares, rtol=of_each, err_msg=name)
            np.testing.assert_allclose(entry.squares[number], squares, rtol=0, atol=1e-5 * squares.mean(), err_msg=name)
    assert n_experts > 200
    assert (found.n_tokens, found.imatrix.n_chunks, found.imatrix.chunk_size) == (2 * CHUNK, 2, CHUNK)
    assert found.perplexity == pytest.approx(np.exp(surprise), rel=1e-5)


def test_matrices_outside_the_experts_have_one_vector(source, tokens):
    found = collect(source, tokens, chunk_size=CHUNK).imatrix.entries
    assert "output.weight" not in found
    assert "output_hc_fn.weight" in found
    for name, entry in found.items():
        n = 4 if name.endswith("_exps.weight") else 1
        assert (len(entry.counts), len(entry.squares)) == (n, n), name
    # Four groups of rows, each with inputs of its own, share a vector.
    assert found["blk.0.attn_output_a.weight"].counts.tolist() == [4 * 2 * CHUNK]
    assert found["blk.0.attn_output_b.weight"].counts.tolist() == [2 * CHUNK]
    assert sum(found["blk.1.ffn_up_exps.weight"].counts) == SMALL.experts_per_token * 2 * CHUNK


def test_an_indexer_that_has_nothing_to_choose_is_measured(source, tokens):
    """Few tokens make few rows, all of which are kept: its products are left out, but their inputs count."""
    found = collect(source, tokens, chunk_size=40).imatrix.entries
    for own, same_inputs in (("blk.1.indexer.attn_q_b.weight", "blk.1.attn_q_b.weight"),
                             ("blk.1.indexer.proj.weight", "blk.1.attn_q_a.weight")):
        np.testing.assert_array_equal(found[own].squares, found[same_inputs].squares)
        np.testing.assert_array_equal(found[own].counts, found[same_inputs].counts)


def test_chunks_are_independent(source, tokens):
    both = collect(source, tokens[:100], chunk_size=50)
    first, second = (collect(source, part, chunk_size=50) for part in (tokens[:50], tokens[50:100]))
    for name, entry in both.imatrix.entries.items():
        np.testing.assert_array_equal(entry.counts, first.imatrix.entries[name].counts +
                                      second.imatrix.entries[name].counts)
        np.testing.assert_allclose(entry.squares, first.imatrix.entries[name].squares +
                                   second.imatrix.entries[name].squares, rtol=1e-12)
    one = collect(source, tokens[:100], chunk_size=50, max_chunks=1)
    assert (one.n_tokens, one.imatrix.n_chunks, one.perplexity) == (50, 1, first.perplexity)


def test_chunks_begin_as_prompts_do(source, tokens):
    begun = tokens[:100].copy()
    begun[[0, 50]] = 7
    expected = collect(source, begun, chunk_size=50)
    given = tokens[:100].copy()
    found = collect(source, given, chunk_size=50, bos_id=7)
    assert found.perplexity == expected.perplexity
    np.testing.assert_array_equal(given, tokens[:100])


def test_experts_that_nobody_chose_are_named(source):
    found = collect(source, [5, 5], chunk_size=2)
    entry = found.imatrix.entries["blk.0.ffn_up_exps.weight"]
    unseen = tuple(e for e in range(4) if entry.counts[e] == 0)
    assert len(unseen) == 2   # layer 0 routes by token id
    assert found.without_data["blk.0.ffn_up_exps.weight"] == unseen


def test_stopping_keeps_whole_chunks(source, tokens):
    stop = StopRequest()
    done = []
    with dt.open_model(source) as model:
        found = dt.collect_imatrix(model, tokens, chunk_size=50, stop=stop,
                                   progress=lambda n: (done.append(n), stop.request(2)))
        assert model.weights.watch is None
    assert (found.imatrix.n_chunks, done) == (1, [50])


@pytest.mark.parametrize(("options", "message"), [
    ({"chunk_size": 1}, "--chunk-size: is 1, expected 2 or more"),
    ({"chunk_size": 200}, "tokens: found 180, expected a chunk of 200 at least; give more text"),
    ({"chunk_size": 50, "max_chunks": 0}, "--chunks: is 0"),
])
def test_refusals(options, message, source, tokens):
    with pytest.raises(UsageError, match=message):
        collect(source, tokens, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("Hello, world. The quick brown fox jumps over the lazy dog. " * 4, "utf-8")
    return path


class TestCommand:
    @pytest.mark.parametrize("ending", ["gguf", "dat"])
    def test_from_text_to_a_file(self, ending, source, text, tmp_path, dsv4tools):
        out = tmp_path / f"a.{ending}"
        ended = dsv4tools("imatrix", source, "--text", text, "-o", out, "--chunk-size", 32, "--json")
        tokenizer = load_tokenizer(source)
        ids = np.array([tokenizer.bos_id, *tokenizer.encode(text.read_text("utf-8"))])
        expected = collect(source, ids, chunk_size=32, bos_id=tokenizer.bos_id)
        n = len(ids) // 32
        assert ended.data == {
            "out": str(out), "n_bytes": out.stat().st_size, "n_entries": len(expected.imatrix.entries),
            "n_tokens": 32 * n, "n_chunks": n, "chunk_size": 32, "perplexity": expected.perplexity,
            "experts_without_data": {name: list(e) for name, e in expected.without_data.items()},
            "seconds": pytest.approx(5, abs=600)}
        if ending == "gguf":
            entries, *about = read_gguf(out)
            assert about == [n, 32, ["calibration.txt"]]
            for name, entry in expected.imatrix.entries.items():
                np.testing.assert_array_equal(entries[name][0], entry.squares.astype(np.float32))
                np.testing.assert_array_equal(entries[name][1].reshape(-1), entry.counts)
        else:
            entries, *about = read_dat(out.read_bytes())
            assert about == [n, "calibration.txt"]
            found = {name: values / np.float32(calls) for name, calls, values in entries}
            name = "blk.2.attn_kv.weight"
            np.testing.assert_allclose(found[name], expected.imatrix.entries[name].squares[0] / (32 * n), rtol=1e-6)

    def test_from_a_gguf_and_on_to_a_checked_conversion(self, source, text, tmp_path, dsv4tools):
        dt.convert(dt.plan(dt.open_checkpoint(source), policy="bf16"), tmp_path / "bf16.gguf")
        out, made = tmp_path / "a.gguf", tmp_path / "made.gguf"
        ended = dsv4tools("imatrix", tmp_path / "bf16.gguf", "--text", text, "-o", out, "--chunk-size", 32, "--no-bos",
                          "--chunks", 2)
        assert ended.code == 0
        assert f"wrote {out}: " in ended.out
        assert "measured on 64 tokens (2 chunks of 32)" in ended.out
        ended = dsv4tools("convert", source, made, "--policy", "q2", "--imatrix", out, "--imatrix-strict")
        assert "importance: a.gguf (2 chunks of calibration.txt), for 9 of the 9 tensors" in ended.out
        assert f"next: dsv4tools verify {made} --source {source} --imatrix {out}" in ended.out
        plain = tmp_path / "plain.gguf"
        dt.convert(dt.plan(dt.open_checkpoint(source), policy="q2"), plain)
        kinds = ("gate", "up", "down")
        assert different(made, plain) == {f"blk.{n}.ffn_{kind}_exps.weight" for n in range(3) for kind in kinds}
        ended = dsv4tools("verify", made, "--source", source, "--imatrix", out)
        assert "byte for byte" in ended.out
        assert ended.code == 0

    def test_tokens_from_a_file(self, source, tmp_path, dsv4tools):
        (tmp_path / "ids.txt").write_text(" ".join(map(str, range(20, 60))), "utf-8")
        ended = dsv4tools("imatrix", source, "--tokens-file", tmp_path / "ids.txt", "-o", tmp_path / "a.gguf",
                          "--chunk-size", 20, "--experts-per-token", 1, "--process-output")
        assert ended.code == 0
        assert "experts were never chosen" in ended.err or "next: dsv4tools convert" in ended.out
        entries, *about = read_gguf(tmp_path / "a.gguf")
        assert about == [2, 20, ["ids.txt"]]
        assert "output.weight" in entries
        assert entries["blk.2.ffn_up_exps.weight"][1].sum() == 40

    def test_ctrl_c_writes_what_there_is(self, source, text, tmp_path, dsv4tools, monkeypatch):
        real = dt.Model.run

        def run(self, *arguments, **options):
            signal.raise_signal(signal.SIGINT)
            return real(self, *arguments, **options)

        monkeypatch.setattr(dt.Model, "run", run)
        out = tmp_path / "a.gguf"
        message = dsv4tools("imatrix", source, "--text", text, "-o", out, "--chunk-size", 16, "--chunks", 3).failed(130)
        assert f"stopped after 1 chunks of 3; {out} holds what was measured until then" in message
        assert read_gguf(out)[1:] == (1, 16, ["calibration.txt"])

    @pytest.mark.parametrize(("arguments", "code", "message"), [
        (("--text", "{text}", "-o", "a.bin"), 2, "a.bin: ends in '.bin', expected .gguf or .dat"),
        (("-o", "a.gguf"), 2, "give one of --text and --tokens-file"),
        (("--text", "{text}", "--tokens-file", "x", "-o", "a.gguf"), 2, "give one of"),
        (("--text", "missing.txt", "-o", "a.gguf"), 3, "missing.txt: is missing"),
        (("--text", "{latin}", "-o", "a.gguf"), 3, "latin.dat: is not valid UTF-8 at byte 1"),
        (("--text", "{text}", "-o", "a.gguf", "--chunk-size", "4000"), 2, "expected a chunk of 4000 at least"),
        (("--text", "{text}", "-o", "a.gguf", "--chunk-size", "1"), 2, "1 is not in the range x>=2"),
        (("--text", "{latin}", "-o", "{latin}", "--overwrite"), 2, "latin.dat: is one of the inputs"),
        (("--text", "{text}", "-o", "{old}"), 2, "old.gguf: exists; --overwrite replaces it"),
        (("--text", "{text}", "-o", "nowhere/a.gguf"), 4, "nowhere: is no directory"),
    ])
    def test_wrong_input(self, arguments, code, message, source, text, tmp_path, dsv4tools, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "latin.dat").write_bytes(b"a\xe9")
        (tmp_path / "old.gguf").write_text("mine")
        given = [a.format(text=text, latin=tmp_path / "latin.dat", old=tmp_path / "old.gguf") for a in arguments]
        assert message in dsv4tools("imatrix", source, *given).failed(code)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["latin.dat", "old.gguf"]
        assert (tmp_path / "old.gguf").read_text() == "mine"

    def test_what_is_no_model(self, tmp_path, text, dsv4tools):
        for model, code, message in ((tmp_path / "none", 3, "no such file"), (text, 3, "calibration.txt"),
                                     ("hf://a/b", 2, "is on the Hub, and running a model reads its weights")):
            assert message in dsv4tools("imatrix", model, "--text", text, "-o", tmp_path / "a.gguf").failed(code)
        assert not list(tmp_path.iterdir())


def different(a, b) -> set[str]:
    """Names of the tensors whose bytes differ."""
    ours, theirs = ({t.name: t.data.tobytes() for t in GGUFReader(path).tensors} for path in (a, b))
    return {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
