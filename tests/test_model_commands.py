"""The commands logits, generate and compare, from a checkpoint and from its GGUF."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SMALL

import dsv4tools as dt
from dsv4tools.chat import encode_messages
from dsv4tools.errors import printable
from dsv4tools.model import Sampling, open_model
from dsv4tools.model import generate as generate_tokens
from dsv4tools.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def source(_written):
    return _written(shape=SMALL, seed=0, shards=2, merges_form="strings")


@pytest.fixture(scope="module")
def q4k(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "q4k.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(source)), out)
    return out


@pytest.fixture(params=["checkpoint", "gguf"])
def model(request, source, q4k):
    return source if request.param == "checkpoint" else q4k


def run(path, tokens, **options):
    with open_model(path, **options) as model:
        return model.forward(tokens)


class TestLogits:
    def test_tokens(self, dsv4tools, model, tmp_path):
        ended = dsv4tools("logits", model, "--tokens", "1, 2,3", "--out", tmp_path / "a.npy")
        assert ended.code == 0
        assert "float32 [3, 512]" in ended.out
        found = np.load(tmp_path / "a.npy")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, run(model, [1, 2, 3]))

    def test_files_of_tokens(self, dsv4tools, source, tmp_path):
        (tmp_path / "a.txt").write_text("1 2\n3,\n", "utf-8")
        np.save(tmp_path / "b.npy", np.array([1, 2, 3], np.int32))
        for name in ("a.txt", "b.npy"):
            out = tmp_path / f"{name}.logits"
            assert dsv4tools("logits", source, "--tokens-file", tmp_path / name, "--out", out, "--json").data == \
                {"out": str(out), "shape": [3, 512], "tokens": [1, 2, 3], "seconds": pytest.approx(5, abs=600)}
        assert (tmp_path / "a.txt.logits").read_bytes() == (tmp_path / "b.npy.logits").read_bytes()

    def test_text(self, dsv4tools, model, tmp_path):
        tokenizer = load_tokenizer(model)
        ids = tokenizer.encode("Hello, world")
        for options, expected in (((), [tokenizer.bos_id, *ids]), (("--no-bos",), ids)):
            ended = dsv4tools("logits", model, "--text", "Hello, world", *options, "--out", tmp_path / "a.npy",
                              "--overwrite", "--json")
            assert ended.data["tokens"] == expected
        begun = tokenizer.decode([tokenizer.bos_id]) + "Hello, world"   # not twice
        ended = dsv4tools("logits", model, "--text", begun, "--out", tmp_path / "b.npy", "--json")
        assert ended.data["tokens"] == [tokenizer.bos_id, *ids]

    def test_fewer_experts_and_float64(self, dsv4tools, source, tmp_path):
        assert dsv4tools("logits", source, "--tokens", "1,2", "--experts-per-token", 1, "--float64",
                         "--out", tmp_path / "a.npy").code == 0
        found = np.load(tmp_path / "a.npy")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(
            found, run(source, [1, 2], experts_per_token=1, dtype=np.float64).astype(np.float32))

    @pytest.mark.parametrize(("arguments", "code", "message"), [
        (("--tokens", "1,x"), 2, "'x' is no token id"),
        (("--tokens", " , "), 2, "has no token ids"),
        (("--tokens", "512"), 2, "id 512 at position 0, expected 0 to 511"),
        (("--tokens-file", "missing.txt"), 3, "is missing"),
        (("--text", "\udc80"), 3, "not valid Unicode"),
    ])
    def test_tokens_that_are_none(self, dsv4tools, source, tmp_path, monkeypatch, arguments, code, message):
        monkeypatch.chdir(tmp_path)
        assert message in dsv4tools("logits", source, *arguments, "--out", "a.npy").failed(code)
        assert not (tmp_path / "a.npy").exists()

    @pytest.mark.parametrize("content", [b"1 2 \xff", b"\x93NUMPY", b"1 2 three", b""])
    def test_files_that_are_none(self, dsv4tools, source, tmp_path, content):
        (tmp_path / "ids").write_bytes(content)
        ended = dsv4tools("logits", source, "--tokens-file", tmp_path / "ids", "--out", tmp_path / "a.npy")
        assert str(tmp_path / "ids") in ended.failed(3 if b"\xff" in content or b"NUMPY" in content else 2)

    def test_arrays_that_are_none(self, dsv4tools, source, tmp_path):
        for array in (np.zeros((2, 2), int), np.zeros(3), np.array([], int), np.array(["1"])):
            np.save(tmp_path / "ids.npy", array)
            ended = dsv4tools("logits", source, "--tokens-file", tmp_path / "ids.npy", "--out", tmp_path / "a.npy")
            assert "expected a list of token ids" in ended.failed(3)

    def test_the_prompt_comes_from_one_place(self, dsv4tools, source, tmp_path):
        for arguments in ((), ("--tokens", "1", "--text", "a")):
            ended = dsv4tools("logits", source, *arguments, "--out", tmp_path / "a.npy")
            assert ended.code == 2
            assert "give one of --tokens, --tokens-file and --text" in ended.err

    def test_outputs_are_safe(self, dsv4tools, model, q4k, tmp_path):
        out = tmp_path / "a.npy"
        out.write_bytes(b"kept")
        assert "exists" in dsv4tools("logits", model, "--tokens", "1", "--out", out).failed(2)
        assert out.read_bytes() == b"kept"
        assert dsv4tools("logits", model, "--tokens", "1", "--out", out, "--overwrite").code == 0
        before = q4k.read_bytes()
        ended = dsv4tools("logits", q4k, "--tokens", "1", "--out", q4k, "--overwrite")
        assert "is one of the inputs" in ended.failed(2)
        assert q4k.read_bytes() == before
        assert list(tmp_path.iterdir()) == [out]

    def test_no_model(self, dsv4tools, tmp_path):
        (tmp_path / "no.gguf").write_bytes(b"no")
        out = ("--tokens", "1", "--out", tmp_path / "a.npy")
        assert "no.gguf" in dsv4tools("logits", tmp_path / "no.gguf", *out).failed(3)
        assert "absent" in dsv4tools("logits", tmp_path / "absent", *out).failed(3)


class TestGenerate:
    def test_greedy(self, dsv4tools, model):
        tokenizer = load_tokenizer(model)
        prompt = [tokenizer.bos_id, *tokenizer.encode("Once")]
        with open_model(model) as opened:
            expected = list(generate_tokens(opened, prompt, 7, stop=[tokenizer.eos_id]))
        ended = dsv4tools("generate", model, "-p", "Once", "-n", 7, "--json")
        assert ended.data["tokens"] == expected
        assert ended.data["text"] == tokenizer.decode(expected)
        assert ended.data["prompt_tokens"] == len(prompt)
        assert ended.data["routing"] is None

    def test_text_goes_to_stdout_and_the_rest_to_stderr(self, dsv4tools, q4k):
        text = dsv4tools("generate", q4k, "-p", "Once", "-n", 7, "--json").data["text"]
        ended = dsv4tools("generate", q4k, "-p", "Once", "-n", 7, "--routing")
        assert ended.out == printable(text, keep="\n\t") + "\n"
        assert "tokens/s" in ended.err
        lines = [line for line in ended.err.splitlines() if line.startswith("layer ")]
        assert len(lines) == 3

    def test_routing_counts(self, dsv4tools, source):
        ended = dsv4tools("generate", source, "-p", "Once", "-n", 4, "--routing", "--experts-per-token", 1, "--json")
        found = ended.data
        n_tokens = found["prompt_tokens"] + len(found["tokens"]) - 1   # the last one is not read again
        assert [sum(layer.values()) for layer in found["routing"].values()] == [n_tokens] * 3

    def test_sampling_follows_the_seed(self, dsv4tools, q4k):
        a, b, c = (dsv4tools("generate", q4k, "-p", "Once", "-n", 9, "--temp", 1, "--top-p", 0.9, "--min-p", 0.01,
                             "--seed", seed, "--json").data["tokens"] for seed in (1, 1, 2))
        assert a == b != c
        tokenizer = load_tokenizer(q4k)
        with open_model(q4k) as model:
            prompt = [tokenizer.bos_id, *tokenizer.encode("Once")]
            sampling, stop = Sampling(1.0, 0.9, 0.01), [tokenizer.eos_id]
            assert a == list(generate_tokens(model, prompt, 9, sampling=sampling, seed=1, stop=stop))

    @pytest.mark.parametrize(("thinking", "mode", "effort"), [
        (("--thinking", "off"), "chat", None), ((), "thinking", "high"), (("--thinking", "max"), "thinking", "max"),
    ])
    def test_chat(self, dsv4tools, source, thinking, mode, effort):
        options = ("--chat", "--system", "Be brief.", *thinking)
        ended = dsv4tools("generate", source, "-p", "Hi", "-n", 1, *options, "--json")
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        prompt = encode_messages(messages, mode, reasoning_effort=effort)
        assert ended.data["prompt_tokens"] == len(load_tokenizer(source).encode(prompt))

    def test_chat_options_need_chat(self, dsv4tools, source):
        for option in (("--thinking", "off"), ("--system", "x")):
            ended = dsv4tools("generate", source, "-p", "a", *option)
            assert ended.code == 2
            assert "need --chat" in ended.err

    def test_impossible_sampling(self, dsv4tools, source):
        assert "--top-p: is 0.0" in dsv4tools("generate", source, "-p", "a", "--top-p", 0).failed(2)


class TestCompare:
    def test_checkpoint_and_gguf(self, dsv4tools, source, q4k, tmp_path):
        plot = tmp_path / "kl.svg"
        found = dsv4tools("compare", source, q4k, "--text", "Hello, world", "--layers", "--plot", plot, "--json").data
        n = found["positions"]
        assert n == len(found["positions_by_prompt"][0]["kl"])
        assert 0 < found["mean_kl"] == pytest.approx(np.mean(found["positions_by_prompt"][0]["kl"]))
        assert found["first_different_layer"] == 0
        assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]
        assert found["perplexity_a"] != found["perplexity_b"]
        assert plot.read_text("utf-8").count("<polyline") == 1
        assert "exists" in dsv4tools("compare", source, q4k, "--tokens", "1", "--plot", plot).failed(2)

    def test_people_read_it(self, dsv4tools, source, q4k):
        tokens = ",".join(map(str, range(40)))
        ended = dsv4tools("compare", source, q4k, "--tokens", tokens, "--layers", "--max-kl", 100)
        assert ended.code == 0
        for text in ("the 16 positions that differ most, of 40", "KL divergence", "perplexity", "same top token",
                     "layer 0 is the first after which", "within --max-kl"):
            assert text in ended.out

    def test_limit(self, dsv4tools, source, q4k):
        arguments = ("compare", source, q4k, "--tokens", "1,2,3")
        assert dsv4tools(*arguments).code == 0
        assert dsv4tools(*arguments, "--max-kl", 1e-9).code == 5
        ended = dsv4tools(*arguments, "--max-kl", 1e-9, "--json")
        assert (ended.code, ended.data["within_max_kl"]) == (5, False)
        assert dsv4tools("compare", source, source, "--tokens", "1,2,3", "--max-kl", 0).code == 0

    def test_fewer_experts(self, dsv4tools, source):
        found = dsv4tools("compare", source, source, "--experts-per-token-b", 1, "--tokens", "1,2,3", "--json").data
        assert found["mean_kl"] > 0
        both = ("--experts-per-token-a", 1, "--experts-per-token-b", 1)
        assert dsv4tools("compare", source, source, *both, "--tokens", "1,2,3", "--json").data["mean_kl"] == 0

    def test_prompts(self, dsv4tools, source, q4k, tmp_path):
        (tmp_path / "p.txt").write_text("Hello\n\nOnce upon\n", "utf-8")
        found = dsv4tools("compare", source, q4k, "--prompts", tmp_path / "p.txt", "--json").data
        tokenizer = load_tokenizer(source)
        assert [p["tokens"] for p in found["positions_by_prompt"]] == \
            [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("Hello", "Once upon")]
        for content, code in ((b"\n", 3), (b"\xff", 3)):
            (tmp_path / "p.txt").write_bytes(content)
            dsv4tools("compare", source, q4k, "--prompts", tmp_path / "p.txt").failed(code)
        assert dsv4tools("compare", source, q4k, "--prompts", tmp_path / "p.txt", "--text", "a").code == 2
