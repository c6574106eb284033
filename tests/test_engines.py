"""Engine profiles: the header that engines were seen to load loads, each way to break it is refused with their words.

Expected values and messages are written here from the engines' sources and runs, not read from the profiles.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
from bounds import cheap
from hypothesis import strategies as st

import dsv4tools as dt
from dsv4tools.checkpoint.config import read_config
from dsv4tools.engines import (
    Header,
    check_plan,
    choose_engines,
    find_profile,
    header_of_file,
    header_of_plan,
    judge,
    list_profiles,
)
from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.table import find_format
from dsv4tools.gguf.header import TensorInfo, encode_header, lay_out
from dsv4tools.gguf.reader import GgufFile, open_gguf
from dsv4tools.gguf.splits import split_kvs, split_name
from dsv4tools.gguf.values import KV
from dsv4tools.resources import data_directory
from dsv4tools.template.metadata import model_entries
from dsv4tools.template.symbols import model_sizes
from dsv4tools.template.tables import load_tables
from dsv4tools.template.tensors import expand_rows
from dsv4tools.template_file import write_template

DS4, MAY, FOUR, LLAMA = "ds4", "ds4-may2026", "ds4-4expert", "llama.cpp"
ALL = (DS4, FOUR, MAY, LLAMA)
DS4S = (DS4, FOUR, MAY)
P = "deepseek4."
CHAT_TOKENS = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>",
    "｜DSML｜",
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ headers

TYPE_NAMES = {"STRING": "str", "UINT32": "u32", "INT32": "i32", "FLOAT32": "f32", "BOOL": "bool", "ARRAY": "arr"}


@pytest.fixture(scope="module")
def seen(data) -> Header:
    """The full-size Flash header that llama.cpp and ds4 were both seen to load (its tokenizer's texts are made up)."""
    raw = json.loads((data / "flash_one_file.json").read_text("utf-8"))
    tokens = [*CHAT_TOKENS, *(f"t{i}" for i in range(129280 - len(CHAT_TOKENS)))]
    arrays = {"tokens": tokens, "token_type": [1] * 129280, "merges": ["a b"] * 6}
    kvs = {}
    for key, entry in raw["metadata"].items():
        kind, *item = (TYPE_NAMES[t] for t in entry["type"])
        value = arrays[key.rpartition(".")[2]] if isinstance(entry["value"], dict) else entry["value"]
        kvs[key] = KV(key, kind, value, item[0] if item else None)
    formats = [find_format(name) for _, name, _ in raw["tensors"]]
    offsets, _ = lay_out([f.n_bytes(ne) for f, (_, _, ne) in zip(formats, raw["tensors"], strict=True)])
    tensors = {name: TensorInfo(name, tuple(ne), f, o)
               for (name, _, ne), f, o in zip(raw["tensors"], formats, offsets, strict=True)}
    return Header(kvs, tensors)


@pytest.fixture(scope="module")
def flash_checkpoint(flash_sparse):
    return dt.open_checkpoint(flash_sparse)


@pytest.fixture(scope="module")
def flash_plan(flash_checkpoint):
    return dt.plan(flash_checkpoint)


@pytest.fixture(scope="module")
def flash_file(flash_plan, tmp_path_factory):
    """A full-size file as a conversion would write it, with a hole for its weights."""
    path = tmp_path_factory.mktemp("engines") / "flash.gguf"
    write_template(flash_plan, path, sparse=True)
    return path


def changed(header, key, value=..., kind=None, item=...):
    """With another value or type of one key; the key is new or gone (value None) otherwise."""
    kvs = dict(header.kvs)
    if value is None:
        del kvs[key]
    else:
        old = kvs.get(key, KV(key, "u32", 0))
        kvs[key] = KV(key, kind or old.type, old.value if value is ... else value,
                      old.item_type if item is ... else item)
    return replace(header, kvs=kvs)


def retyped(header, names, type_name):
    """With the tensors whose name matches a regular expression in another type."""
    tensors = {n: replace(t, format=find_format(type_name)) if re.fullmatch(names, n) else t
               for n, t in header.tensors.items()}
    assert any(re.fullmatch(names, n) for n in tensors), names
    return replace(header, tensors=tensors)


def reshaped(header, name, ne):
    return replace(header, tensors=header.tensors | {name: replace(header.tensors[name], ne=ne)})


def without(header, *names):
    return replace(header, tensors={n: t for n, t in header.tensors.items() if n not in names})


def with_tensor(header, name, ne, type_name="F32"):
    return replace(header, tensors=header.tensors | {name: TensorInfo(name, ne, find_format(type_name), 0)})


def with_experts(header, n):
    """With `n` experts per token, in the metadata and in the routing tables."""
    header = changed(header, P + "expert_used_count", n)
    for layer in range(3):
        header = reshaped(header, f"blk.{layer}.ffn_gate_tid2eid.weight", (n, 129280))
    return header


_verdicts = {}


def verdict(engine, header):
    """`judge`, asked once per header; the header is kept, so that its id stays its own."""
    key = engine, id(header)
    if key not in _verdicts:
        _verdicts[key] = header, judge(find_profile(engine), header)
    return _verdicts[key][1]


def refusal(engine, header):
    """The first reason to refuse; there must be one."""
    found = verdict(engine, header)
    assert not found.loads, found.summary
    return found.of("refuse")[0]


def trap(engine, header):
    """The first reason why a file that loads computes wrongly; there must be one."""
    found = verdict(engine, header)
    assert found.loads, found.summary
    assert not found.ok, found.summary
    return found.of("wrong-numbers")[0]


def write_file(header, path):
    """A sparse file of full size with this header."""
    offsets, n_bytes = lay_out([t.n_bytes for t in header.tensors.values()])
    infos = [replace(t, offset=o) for t, o in zip(header.tensors.values(), offsets, strict=True)]
    raw = encode_header(list(header.kvs.values()), infos)
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + n_bytes)
    return path


# ------------------------------------------------------------------------------------------------------ what is right

@pytest.mark.parametrize("engine", ALL)
def test_the_header_that_engines_were_seen_to_load(engine, seen):
    found = verdict(engine, seen)
    assert found.ok, found.summary
    assert found.summary.endswith(": would load")


@pytest.mark.parametrize("engine", ALL)
def test_the_plan_and_its_file_are_judged_alike(engine, flash_plan, flash_file):
    with open_gguf(flash_file) as file:
        of_file = verdict(engine, header_of_file(file))
    assert of_file == verdict(engine, header_of_plan(flash_plan))
    assert of_file.ok


def test_a_full_size_file_takes_seconds_and_no_weights(flash_file, dsv4tools, monkeypatch):
    def fail(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(GgufFile, "read_tensor_into", fail)
    with cheap(5, None):
        ended = dsv4tools("verify", flash_file, *(word for name in ALL for word in ("--engine", name)))
    assert (ended.code, ended.err) == (0, "")
    assert "1328 tensors" in ended.out
    for name in ALL:
        assert re.search(rf"^{re.escape(name)} \(commit [0-9a-f]{{7}}.*\): would load:?$", ended.out, re.MULTILINE)


def test_what_was_only_read_says_so():
    by_name = {p.name: p for p in list_profiles()}
    assert list(by_name) == [DS4, FOUR, MAY, LLAMA]
    assert {name: p.evidence for name, p in by_name.items()} == {DS4: "read", MAY: "run", FOUR: "run", LLAMA: "run"}
    assert {name: p.commit[:7] for name, p in by_name.items()} == \
        {DS4: "30ac654", MAY: "8d57664", FOUR: "d1be04d", LLAMA: "0c1e570"}


def test_four_experts_per_token(seen):
    header = with_experts(seen, 4)
    assert verdict(FOUR, header).ok
    assert verdict(LLAMA, header).ok
    newer, older = refusal(DS4, header), refusal(MAY, header)
    assert newer.where == older.where == P + "expert_used_count"
    assert newer.found == "not a Flash or Pro shape"
    assert "expert_used_count 6 (is 4)" in newer.expected
    assert newer.message == ("unsupported DeepSeek4 shape: layers=43 embd=4096 heads=64 q_lora=1024 out_groups=8 "
                             "experts=256 ff_exp=2048 indexer_top_k=512")
    assert older.message == "expected expert_used_count=6 for DeepSeek4 Flash, got 4"


def test_a_pro(data, seen):
    """DeepSeek-V4-Pro, from its published config.json, in the types of the Flash header."""
    config, tables = read_config(data / "configs" / "pro.json"), load_tables()
    kvs = {kv.key: kv for kv in model_entries(config, tables, model_sizes(config))}
    types = {re.sub(r"\d+", "N", n, count=1): t.format for n, t in seen.tensors.items()}
    tensors = {}
    for row, layer, shape in expand_rows(config, tables):
        name = row.name.format(layer=layer)
        tensors[name] = TensorInfo(name, shape[::-1], types[re.sub(r"\d+", "N", name, count=1)], 0)
    header = Header(dict(seen.kvs) | kvs, tensors)
    assert len(tensors) == 1894
    assert all(verdict(name, header).ok for name in (DS4, FOUR, LLAMA))
    found = refusal(MAY, header)
    assert (found.found, found.message) == (
        "not a Flash shape", "expected embedding_length=4096 for DeepSeek4 Flash, got 7168")
    # four experts per token are for Flash alone
    assert refusal(FOUR, with_experts(header, 4)).where == P + "expert_used_count"


def test_a_tiny_model_is_for_llama_cpp(make_checkpoint):
    header = header_of_plan(dt.plan(dt.open_checkpoint(make_checkpoint())))
    assert verdict(LLAMA, header).ok
    for name in DS4S:
        found = verdict(name, header)
        assert [f.severity for f in found.findings] == ["refuse"]   # one finding, and none about types
        assert found.findings[0].where == "model shape"
    assert refusal(DS4, header).found == refusal(FOUR, header).found == "not a Flash or Pro shape"
    # the same with types that ds4 takes nowhere: still not a fault of the policy
    assert [f.where for f in verdict(DS4, retyped(header, ".*_exps.weight", "BF16")).findings] == ["model shape"]


# ----------------------------------------------------------------------------------------------- metadata, one by one

# Flash values that ds4 requires as u32: config.json of DeepSeek-V4-Flash.
DS4_U32 = {
    "block_count": 43, "embedding_length": 4096, "vocab_size": 129280, "attention.head_count": 64,
    "attention.head_count_kv": 1, "attention.key_length": 512, "attention.value_length": 512,
    "rope.dimension_count": 64, "attention.q_lora_rank": 1024, "attention.output_lora_rank": 1024,
    "attention.output_group_count": 8, "expert_count": 256, "expert_used_count": 6, "expert_feed_forward_length": 2048,
    "expert_shared_count": 1, "hash_layer_count": 3, "attention.sliding_window": 128,
    "attention.indexer.head_count": 64, "attention.indexer.key_length": 128, "attention.indexer.top_k": 512,
    "hyper_connection.count": 4, "hyper_connection.sinkhorn_iterations": 20,
}
DS4_F32 = {
    "rope.freq_base": 10000, "attention.compress_rope_freq_base": 160000, "expert_weights_scale": 1.5,
    "attention.layer_norm_rms_epsilon": 1e-6, "hyper_connection.epsilon": 1e-6,
}
DS4_SCALING = {"rope.scaling.factor": 16, "rope.scaling.yarn_beta_fast": 32, "rope.scaling.yarn_beta_slow": 1}
MISSING = "required metadata key is missing: {key}"
DS4_OTHERS = {
    P + "attention.compress_ratios": "required int32/uint32 array metadata key is missing: {key}",
    P + "swiglu_clamp_exp": "required float array metadata key is missing: {key}",
    P + "expert_weights_norm": MISSING,
    "tokenizer.ggml.tokens": "GGUF tokenizer token table is missing or invalid",
    "tokenizer.ggml.merges": "GGUF tokenizer merge table is missing or invalid",
}
DS4_REQUIRED = {P + key: MISSING for key in (*DS4_U32, *DS4_F32)} | DS4_OTHERS
MAY_ONLY = {P + key: MISSING for key in (*DS4_SCALING, "rope.scaling.original_context_length")}


@pytest.mark.parametrize("key", [*DS4_REQUIRED, *MAY_ONLY])
def test_each_key_that_ds4_requires(key, seen):
    gone = changed(seen, key, None)
    # a type that none of ds4's readers takes for anything
    other = changed(seen, key, b"x".decode(), "str", None)
    for engine in DS4S:
        if key in MAY_ONLY and engine != MAY:
            assert verdict(engine, gone).ok
            assert [f.where for f in verdict(engine, other).of("note") if f.where == key] == [key]
            assert verdict(engine, other).ok
            continue
        message = (DS4_REQUIRED | MAY_ONLY)[key].format(key=key)
        assert (refusal(engine, gone).where, refusal(engine, gone).found) == (key, "missing")
        assert refusal(engine, gone).message == message
        if engine == MAY and key.removeprefix(P) in {*DS4_F32, *DS4_SCALING}:
            message = f"metadata key has a non-float type: {key}"
        elif engine == MAY and key in MAY_ONLY:
            message = f"metadata key has a non-integer type: {key}"
        assert (refusal(engine, other).where, refusal(engine, other).message) == (key, message)


@pytest.mark.parametrize("key", DS4_U32)
def test_ds4_takes_no_other_integer_type(key, seen):
    for kind in ("u64", "i32"):
        for engine in DS4S:
            found = refusal(engine, changed(seen, P + key, kind=kind))
            assert (found.where, found.found, found.message) == (P + key, kind, MISSING.format(key=P + key))


@pytest.mark.parametrize(("key", "value"), DS4_U32.items())
def test_ds4_takes_no_other_shape(key, value, seen):
    header = changed(seen, P + key, value + 1)
    assert refusal(MAY, header).message == f"expected {key}={value} for DeepSeek4 Flash, got {value + 1}"
    for engine in (DS4, FOUR):
        found = refusal(engine, header)
        assert found.message.startswith("unsupported DeepSeek4 shape: layers=")
        assert (found.where, found.found) == (P + key, "not a Flash or Pro shape")
        assert f"{key} {'4 or 6' if (engine, key) == (FOUR, 'expert_used_count') else value} (is {value + 1})" \
            in found.expected


@pytest.mark.parametrize(("key", "value"), [*DS4_F32.items(), *DS4_SCALING.items()])
def test_ds4_compares_floats(key, value, seen):
    for kind in ("f64", "u32") if isinstance(value, int) else ("f64",):
        assert all(verdict(engine, changed(seen, P + key, value, kind)).ok for engine in DS4S)
    beyond = value + 3e-6 * max(1, value)
    for engine in DS4S:
        name = "DeepSeek4 Flash" if engine == MAY else "DeepSeek V4 Flash"
        found = refusal(engine, changed(seen, P + key, beyond))
        assert found.where == P + key
        assert re.fullmatch(rf"expected {key}=\S+ for {name}, got \S+", found.message)


def test_an_epsilon_that_passes_is_not_what_is_computed(seen):
    """The comparison is absolute: ds4 takes 1e-20 for 1e-6 and goes on with its own value."""
    key = P + "hyper_connection.epsilon"
    for engine in DS4S:
        assert trap(engine, changed(seen, key, 1e-20)).where == key
    key = P + "attention.layer_norm_rms_epsilon"
    assert trap(MAY, changed(seen, key, 1e-20)).where == key
    assert trap(FOUR, changed(seen, key, 1e-20)).effect == "it computes with its own value"
    assert refusal(DS4, changed(seen, key, 1e-20)).message == \
        "expected attention.layer_norm_rms_epsilon=9.99999997e-07 for DeepSeek V4 Flash, got 9.99999968e-21"


def test_ds4_compares_every_layer(seen):
    ratios = list(seen.values[P + "attention.compress_ratios"])
    for engine in DS4S:
        name = "" if engine == MAY else " for DeepSeek V4 Flash"
        wrong = changed(seen, P + "attention.compress_ratios", [*ratios[:5], 4, *ratios[6:]])
        assert refusal(engine, wrong).message == \
            f"unexpected DeepSeek4 compression ratio at layer 5{name}: got 4, expected 128"
        assert refusal(engine, wrong).where == P + "attention.compress_ratios[5]"
        short = changed(seen, P + "attention.compress_ratios", ratios[:42])
        assert refusal(engine, short).message == \
            "deepseek4.attention.compress_ratios is shorter than the layer count"
        assert verdict(engine, changed(seen, P + "attention.compress_ratios", [*ratios[:43], 9, 9], item="u32")).ok
        clamps = [10.0] * 42
        assert refusal(engine, changed(seen, P + "swiglu_clamp_exp", clamps)).message == \
            "deepseek4.swiglu_clamp_exp is shorter than the layer count"
        found = refusal(engine, changed(seen, P + "swiglu_clamp_exp", [*clamps, 7.0]))
        assert found.where == P + "swiglu_clamp_exp[42]"
        assert found.message.startswith("expected swiglu_clamp_exp=10 for ")
        # a scalar, which llama.cpp takes
        assert refusal(engine, changed(seen, P + "swiglu_clamp_exp", 10.0, "f32", None)).where == P + "swiglu_clamp_exp"
        assert verdict(engine, changed(seen, P + "swiglu_clamp_exp", [10.0] * 44, item="f64")).ok


@pytest.mark.parametrize("token", CHAT_TOKENS)
def test_ds4_finds_its_tokens_by_text(token, seen):
    tokens = [t if t != token else "x" for t in seen.values["tokenizer.ggml.tokens"]]
    for engine in DS4S:
        assert refusal(engine, changed(seen, "tokenizer.ggml.tokens", tokens)).message == \
            f"required tokenizer token is missing: {token}"
    assert verdict(LLAMA, changed(seen, "tokenizer.ggml.tokens", tokens)).ok


@pytest.mark.parametrize(("key", "value", "message"), [
    ("expert_group_count", 8, "expected expert_group_count=0 for DeepSeek V4 Flash, got 8"),
    ("expert_weights_norm", False, "expected expert_weights_norm=true for DeepSeek V4 Flash, got false"),
    ("rope.scaling.original_context_length", 4096,
     "expected rope.scaling.original_context_length=65536 for DeepSeek V4 Flash, got 4096"),
])  # fmt: skip
def test_other_values_that_ds4_fixes(key, value, message, seen):
    header = changed(seen, P + key, value)
    assert [refusal(e, header).message for e in (DS4, FOUR)] == [message] * 2
    assert refusal(MAY, header).message == message.replace("DeepSeek V4 Flash", "DeepSeek4 Flash")


def test_the_vision_variant_is_for_the_newest_ds4(seen):
    vision = changed(seen, P + "checkpoint_variant", "vision-exp", "str")
    assert refusal(DS4, vision).message == MISSING.format(key=P + "vision.sidecar_required")
    vision = changed(vision, P + "vision.sidecar_required", value=True, kind="bool")
    vision = changed(vision, "general.source.revision", "e46e16bf6035c6f317eb2ac7458eb0362926d402", "str")
    assert refusal(DS4, vision).where == P + "attention.layer_norm_rms_epsilon"
    assert verdict(DS4, changed(vision, P + "attention.layer_norm_rms_epsilon", 1e-20)).ok
    assert refusal(DS4, changed(seen, P + "checkpoint_variant", "other", "str")).message == \
        "unsupported deepseek4.checkpoint_variant"


NOT_FOUND = "key not found in model: {key}"
LLAMA_REQUIRED = dict.fromkeys([
    P + key for key in (
        "block_count", "context_length", "embedding_length", "attention.layer_norm_rms_epsilon",
        "attention.q_lora_rank", "attention.sliding_window", "attention.output_group_count",
        "attention.output_lora_rank", "attention.compress_ratios", "attention.compress_rope_freq_base",
        "attention.indexer.head_count", "attention.indexer.key_length", "attention.indexer.top_k",
        "hyper_connection.count", "hyper_connection.sinkhorn_iterations", "hyper_connection.epsilon",
        "hash_layer_count", "expert_shared_count", "expert_feed_forward_length", "expert_weights_scale",
        "expert_weights_norm", "expert_gating_func", "swiglu_clamp_exp")
] + ["tokenizer.ggml.model"], NOT_FOUND) | {
    "general.architecture": "unknown model architecture: ''",
    P + "attention.head_count": "check_tensor_dims: tensor 'blk.0.attn_sinks.weight' has wrong shape",
    P + "attention.key_length": "check_tensor_dims: tensor 'blk.0.attn_q_b.weight' has wrong shape",
    P + "expert_count": "GGML_ASSERT(n_expert_used_max <= hparams.n_expert) failed",
    P + "expert_used_count": "GGML_ASSERT(n_expert_used_max > 0) failed",
    "tokenizer.ggml.tokens": "cannot find tokenizer vocab in model file",
    "tokenizer.ggml.merges": "cannot find tokenizer merges in model file",
}  # fmt: skip
LLAMA_TRAPS = (
    *(P + key for key in ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
                          "attention.head_count_kv", "attention.value_length", "rope.dimension_count")),
    *("tokenizer.ggml." + key for key in ("pre", "token_type", "bos_token_id", "eos_token_id")),
)
LLAMA_FREE = (
    *(P + key for key in ("vocab_size", "embedding_length_out", "rope.freq_base", "rope.scaling.yarn_beta_fast",
                          "rope.scaling.yarn_beta_slow")),
    *("tokenizer.ggml." + key for key in ("padding_token_id", "add_bos_token", "add_eos_token")),
    "general.file_type", "general.quantization_version", "general.name",
)


def test_every_key_of_the_header_is_in_a_table(seen):
    assert {*LLAMA_REQUIRED, *LLAMA_TRAPS, *LLAMA_FREE} >= set(seen.kvs)


@pytest.mark.parametrize(("key", "message"), LLAMA_REQUIRED.items())
def test_each_key_that_llama_cpp_requires(key, message, seen):
    found = refusal(LLAMA, changed(seen, key, None))
    assert (found.where, found.found, found.message) == (key, "missing", message.format(key=key))


@pytest.mark.parametrize("key", LLAMA_TRAPS)
def test_each_key_without_which_llama_cpp_computes_wrongly(key, seen):
    found = trap(LLAMA, changed(seen, key, None))
    assert (found.where, found.found) == (key, "missing")
    assert found.effect


@pytest.mark.parametrize("key", LLAMA_FREE)
def test_each_key_that_llama_cpp_does_without(key, seen):
    if key in seen.kvs:
        assert verdict(LLAMA, changed(seen, key, None)).ok


@pytest.mark.parametrize("key", sorted({*LLAMA_REQUIRED, *LLAMA_TRAPS} | {
    P + "rope.freq_base", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.padding_token_id"}))
def test_llama_cpp_takes_each_key_in_one_type(key, seen):
    kv = seen.kvs[key]
    if kv.type == "arr":
        wider = {"i32": "i64", "f32": "f64", "str": "u32"}[kv.item_type]
        other = changed(seen, key, [1] * len(kv.value) if wider == "u32" else ..., item=wider)
        expected = f"invalid gguf type for {key}" if key.startswith("tokenizer") else \
            f"{key} is not a string/float32/uint32/int32/uint64 array"
        assert refusal(LLAMA, other).found == f"arr[{wider}]"
    else:
        kind = {"u32": "u64", "f32": "f64", "bool": "u32", "str": "u32"}[kv.type]
        other = changed(seen, key, 1 if kind == "u32" else ..., kind)
        expected = f"key {key} has wrong type {kind} but expected type {kv.type}"
        assert refusal(LLAMA, other).found == kind
    assert (refusal(LLAMA, other).where, refusal(LLAMA, other).message) == (key, expected)


@pytest.mark.parametrize(("key", "value", "message"), [
    (P + "expert_gating_func", 2, "DeepSeek-V4 loader currently expects sqrtsoftplus MoE scoring"),
    (P + "attention.compress_ratios", [0] * 42, "DeepSeek-V4 compress_ratios is shorter than block_count"),
    (P + "attention.compress_ratios", [0, 0, 4, 64, *[0] * 39],
     "DeepSeek-V4 loader only supports compression ratios 0, 4, and 128"),
    (P + "swiglu_clamp_exp", [10.0] * 44,
     "key deepseek4.swiglu_clamp_exp has wrong array length; expected 43, got 44"),
    (P + "expert_used_count", 257, "GGML_ASSERT(n_expert_used_max <= hparams.n_expert) failed"),
    (P + "expert_group_count", 256, "GGML_ASSERT(hparams.n_expert_groups < hparams.n_expert) failed"),
    (P + "block_count", 513, "GGML_ASSERT(hparams.n_layer_all > 0 && hparams.n_layer_all <= LLAMA_MAX_LAYERS) failed"),
    (P + "rope.scaling.type", "bogus",
     "GGML_ASSERT(hparams.rope_scaling_type_train != LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED) failed"),
    ("tokenizer.ggml.model", "bpe", "unknown tokenizer: 'bpe'"),
    ("tokenizer.ggml.pre", "deepseek-v4", "unknown pre-tokenizer type: 'deepseek-v4'"),
    ("tokenizer.ggml.tokens", ["a"] * 129280, "GGML_ASSERT(id_to_token.size() == token_to_id.size()) failed"),
    ("tokenizer.ggml.token_type", [1] * 500, "Index out of array bounds for toktypes (500 < 129280)"),
    ("general.architecture", "deepseek41", "unknown model architecture: 'deepseek41'"),
    (P + "attention.compress_ratios", [0, 0, 4] * 200, "GGML_ASSERT(n_compress_ratios <= LLAMA_MAX_LAYERS) failed"),
    (P + "expert_count", 1025, "GGML_ASSERT(hparams.n_expert <= LLAMA_MAX_EXPERTS) failed"),
    (P + "nextn_predict_layers", 44, "GGML_ASSERT(hparams.n_layer_nextn <= hparams.n_layer_all) failed"),
])  # fmt: skip
def test_values_that_llama_cpp_refuses(key, value, message, seen):
    found = refusal(LLAMA, changed(seen, key, value))
    assert found.where.startswith(key)
    assert found.message == message


@pytest.mark.parametrize(("key", "value"), [
    (P + "rope.scaling.type", "linear"), ("tokenizer.ggml.pre", "llama-bpe"), (P + "attention.head_count_kv", 64),
    (P + "rope.dimension_count", 256), (P + "rope.dimension_count", 63), (P + "attention.value_length", 256),
    ("tokenizer.ggml.model", "llama"), (P + "hyper_connection.sinkhorn_iterations", 0),
])  # fmt: skip
def test_values_with_which_llama_cpp_computes_wrongly(key, value, seen):
    assert trap(LLAMA, changed(seen, key, value)).where == key


def test_models_that_llama_cpp_cannot_run(make_checkpoint):
    """They load and then stop; not one of them is refused by the loader."""
    for fields, key in (({"lead_ratios": (0, 0, 128)}, "attention.compress_ratios"),
                        ({"hc_mult": 2}, "hyper_connection.count"),
                        ({"index_head_dim": 192}, "attention.indexer.key_length")):
        name = "-".join(fields)
        header = header_of_plan(dt.plan(dt.open_checkpoint(make_checkpoint(name, **fields))))
        assert trap(LLAMA, header).where == P + key


@pytest.mark.parametrize(("key", "kind", "item", "message"), [
    ("attention.head_count", "arr", "u64", "{key} has wrong array element type u64"),
    ("attention.compress_ratios", "arr", "f32", "{key} has wrong array element type f32"),
    ("attention.compress_ratios", "arr", "i16", "{key} is not a string/float32/uint32/int32/uint64 array"),
    ("swiglu_clamp_exp", "arr", "i32", "{key} has wrong array element type i32"),
    ("expert_feed_forward_length", "u64", None, "key {key} has wrong type u64 but expected type u32"),
    ("feed_forward_length", "f32", None, "key {key} has wrong type f32 but expected type u32"),
    ("rope.scaling.finetuned", "u32", None, "key {key} has wrong type u32 but expected type bool"),
    ("rope.scaling.attn_factor", "f64", None, "key {key} has wrong type f64 but expected type f32"),
    ("general.name", "u32", None, "key {key} has wrong type u32 but expected type str"),
    ("general.file_type", "i32", None, "key {key} has wrong type i32 but expected type u32"),
    ("tokenizer.ggml.eot_token_id", "i32", None, "key {key} has wrong type i32 but expected type u32"),
    ("tokenizer.ggml.scores", "arr", "f64", "invalid gguf type for {key}"),
])  # fmt: skip
def test_what_llama_cpp_says_of_a_type(key, kind, item, message, seen):
    """Messages that release v0.5.0 was seen to print."""
    key = key if key.startswith(("general", "tokenizer")) else P + key
    value = [1] * 43 if item else 1
    found = refusal(LLAMA, changed(seen, key, value, kind, item))
    assert (found.where, found.message) == (key, message.format(key=key))


def test_keys_that_llama_cpp_takes_for_each_layer(seen):
    for key, value in (("expert_feed_forward_length", 2048), ("attention.head_count", 64), ("expert_used_count", 6)):
        assert verdict(LLAMA, changed(seen, P + key, [value] * 43, "arr", "i32")).ok
        assert refusal(LLAMA, changed(seen, P + key, [value] * 42, "arr", "i32")).message == \
            f"key {P + key} has wrong array length; expected 43, got 42"


def test_tokens_that_llama_cpp_replaces(seen):
    assert trap(LLAMA, changed(seen, "tokenizer.ggml.bos_token_id", 129280)).where == "tokenizer.ggml.bos_token_id"
    assert trap(LLAMA, changed(seen, "tokenizer.ggml.pre", "")).where == "tokenizer.ggml.pre"
    scores = changed(seen, "tokenizer.ggml.scores", [0.0] * 7, "arr", "f32")
    assert refusal(LLAMA, scores).message == "Index out of array bounds for scores (7 < 129280)"


def test_llama_cpp_divides_by_the_number_of_groups(seen):
    found = refusal(LLAMA, changed(seen, P + "attention.output_group_count", 0))
    assert (found.found, found.effect) == ("0", "it divides by it: the process ends")


def test_a_draft_model_is_not_judged_by_the_tensors_of_a_whole_one(seen):
    """As llama.cpp's converter makes it: one layer behind the others, with or without these."""
    header = changed(changed(seen, P + "nextn_predict_layers", 1), P + "block_count", 44)
    for key, item in (("attention.compress_ratios", 0), ("swiglu_clamp_exp", 10.0)):
        header = changed(header, P + key, [*seen.values[P + key][:43], item])
    alone = replace(header, tensors={n: t for n, t in header.tensors.items() if not n.startswith("blk.")})
    for tensors in (header, alone):
        judged = verdict(LLAMA, with_tensor(tensors, "blk.43.nextn.eh_proj.weight", (8192, 4096), "Q8_0"))
        assert judged.ok
        assert [f.where for f in judged.findings] == ["blk.43.nextn.eh_proj.weight"]
    assert refusal(LLAMA, header).where.startswith("blk.43.")   # without such a layer the key counts for nothing


def test_a_pre_tokenizer_of_the_same_rules(seen):
    assert verdict(LLAMA, changed(seen, "tokenizer.ggml.pre", "deepseek-v3")).ok


def test_what_the_template_script_of_ds4_writes(seen):
    """Its metadata suit every ds4 and no llama.cpp: u64, f64, "bpe", u32 token types, no gating function."""
    header = changed(seen, P + "context_length", 65536, "u64")
    header = changed(header, P + "rope.scaling.original_context_length", kind="u64")
    for key in ("rope.freq_base", "rope.scaling.factor", "attention.compress_rope_freq_base"):
        header = changed(header, P + key, kind="f64")
    header = changed(header, "tokenizer.ggml.model", "bpe")
    header = changed(header, "tokenizer.ggml.token_type", [0] * 129280, item="u32")
    header = changed(header, P + "expert_gating_func", None)
    header = changed(header, P + "rope.scaling.type", None)
    assert all(verdict(engine, header).ok for engine in DS4S)
    found = verdict(LLAMA, header)
    assert {f.where.removeprefix(P) for f in found.of("refuse")} == {
        "context_length", "rope.scaling.original_context_length", "rope.freq_base", "rope.scaling.factor",
        "attention.compress_rope_freq_base", "tokenizer.ggml.model", "tokenizer.ggml.token_type", "expert_gating_func"}
    assert [f.where for f in found.of("wrong-numbers")] == [P + "rope.scaling.type"]


# ------------------------------------------------------------------------------------------------------------- tensors

ROUTED = {"Q4_K", "IQ2_XXS", "Q2_K"}
DENSE = r"output\.weight|blk\.\d+\.(attn_q_a|attn_q_b|attn_kv|attn_output_[ab]|ffn_(gate|up|down)_shexp)\.weight"
# Role -> the types that each engine takes, and one tensor of it. Everything in BF16 is one of llama.cpp's files.
ROLES = {
    "token_embd.weight": ({"F16"},) * 3,
    "output.weight": ({"Q8_0", "Q4_K", "Q4_0"}, {"Q8_0"}, {"Q8_0"}),
    "output_norm.weight": ({"F32"},) * 3,
    "output_hc_base.weight": ({"F32"},) * 3,
    "output_hc_scale.weight": ({"F32"},) * 3,
    "output_hc_fn.weight": ({"F16"},) * 3,
    "blk.7.hc_attn_fn.weight": ({"F16"},) * 3,
    "blk.7.hc_ffn_scale.weight": ({"F32"},) * 3,
    "blk.7.attn_norm.weight": ({"F32"},) * 3,
    "blk.7.attn_q_b.weight": ({"Q8_0", "Q4_K", "Q4_0"}, {"Q8_0"}, {"Q8_0"}),
    "blk.7.attn_kv_a_norm.weight": ({"F32"},) * 3,
    "blk.7.attn_sinks.weight": ({"F32"},) * 3,
    "blk.7.attn_output_a.weight": ({"Q8_0", "Q4_K", "Q4_0"}, {"Q8_0"}, {"Q8_0"}),
    "blk.8.attn_compressor_ape.weight": ({"F16"},) * 3,
    "blk.8.attn_compressor_kv.weight": ({"F16"},) * 3,
    "blk.8.indexer.attn_q_b.weight": ({"F16", "Q8_0", "Q4_K"}, {"F16", "Q8_0"}, {"F16"}),
    "blk.8.indexer.proj.weight": ({"F16"},) * 3,
    "blk.8.indexer_compressor_gate.weight": ({"F16"},) * 3,
    "blk.8.indexer_compressor_norm.weight": ({"F32"},) * 3,
    "blk.7.ffn_gate_inp.weight": ({"F16"},) * 3,
    "blk.7.exp_probs_b.bias": ({"F32"},) * 3,
    "blk.0.ffn_gate_tid2eid.weight": ({"I32"},) * 3,
    "blk.7.ffn_down_exps.weight": (ROUTED | {"Q8_0", "Q5_K", "Q6_K", "MXFP4"}, ROUTED, ROUTED),
    "blk.7.ffn_up_shexp.weight": ({"Q8_0", "Q4_K", "Q4_0"}, {"Q8_0"}, {"Q8_0"}),
}
SAYS = {
    frozenset({"Q8_0", "Q4_K", "Q4_0"}): "q8_0, q4_K, or q4_0",
    frozenset({"F16", "Q8_0", "Q4_K"}): "f16, q8_0, or q4_K",
    frozenset({"F16", "Q8_0"}): "f16 or q8_0",
}


NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q2_K": 10, "Q4_K": 12, "Q6_K": 14, "I32": 26, "BF16": 30, "MXFP4": 39,
}  # fmt: skip


@pytest.mark.parametrize("type_name", NUMBERS)
@pytest.mark.parametrize("engine", DS4S)
def test_types_by_role(engine, type_name, seen):
    """One tensor of each role in this type: it is refused where the engine takes another, in its words."""
    header = retyped(seen, "|".join(map(re.escape, ROLES)), type_name)
    found = {f.where: f for f in verdict(engine, header).of("refuse")}
    called = "unknown" if type_name == "MXFP4" and engine != DS4 else type_name.lower()
    for name, accepted in ROLES.items():
        types = accepted[DS4S.index(engine)]
        if type_name in types:
            assert name not in found
            continue
        if "_exps" in name:
            expected = f"type {NUMBERS[type_name]} ({called}), expected a routed expert quant type"
        else:
            expected = f"type {called}, expected {SAYS.get(frozenset(types), min(types).lower())}"
        assert found[name].message == f"tensor {name} has {expected}"
        assert found[name].found == type_name
        assert "--tensor-type" in found[name].remedy
    assert verdict(LLAMA, header).loads   # it checks no types while loading


@pytest.mark.parametrize(("name", "type_name"), [
    ("blk.7.attn_norm.weight", "F16"), ("blk.0.ffn_gate_tid2eid.weight", "F32"), ("blk.7.exp_probs_b.bias", "BF16"),
    ("blk.7.attn_kv.weight", "I32"),
])  # fmt: skip
def test_types_that_llama_cpp_loads_and_cannot_compute(name, type_name, seen):
    assert trap(LLAMA, retyped(seen, re.escape(name), type_name)).where == name


def test_what_is_wrong_in_every_layer_is_one_finding(seen):
    header = retyped(seen, DENSE, "BF16")
    found = verdict(DS4, header).of("refuse")
    assert [(f.where, f.n) for f in found[:2]] == [("output.weight", 1), ("blk.0.attn_q_a.weight", 43)]
    assert len(found) == 9
    assert "blk.0.attn_q_a.weight (and 42 more like it): BF16, expected Q8_0, Q4_K or Q4_0" in found[1].text


@pytest.mark.parametrize("name", [*(n for n in ROLES if n != "blk.7.exp_probs_b.bias")])
def test_a_missing_tensor(name, seen):
    header = without(seen, name)
    for engine in DS4S:
        assert refusal(engine, header).message == f"required tensor is missing: {name}"
    assert refusal(LLAMA, header).message == f"check_tensor_dims: tensor '{name}' not found"


def test_the_routers_bias(seen):
    """ds4 loads a file without and chooses other experts; llama.cpp wants it in scored layers and in no others."""
    name = "blk.7.exp_probs_b.bias"
    assert all(trap(engine, without(seen, name)).where == name for engine in DS4S)
    assert refusal(LLAMA, without(seen, name)).where == name
    more = with_tensor(seen, "blk.1.exp_probs_b.bias", (256,))
    assert all(verdict(engine, more).ok for engine in DS4S)
    assert refusal(LLAMA, more).message == "done_getting_tensors: wrong number of tensors; expected 1329, got 1328"
    wrong = with_tensor(seen, "blk.1.exp_probs_b.bias", (256,), "F16")
    assert refusal(MAY, wrong).message == "tensor blk.1.exp_probs_b.bias has type f16, expected f32"
    assert verdict(LLAMA, with_tensor(seen, "blk.1.exp_probs_b_vl.bias", (256,))).ok


def test_an_extra_tensor(seen):
    header = with_tensor(seen, "blk.43.attn_norm.weight", (4096,))
    found = refusal(LLAMA, header)
    assert found.where == "blk.43.attn_norm.weight"
    assert found.message == "done_getting_tensors: wrong number of tensors; expected 1329, got 1328"
    for engine in DS4S:
        assert verdict(engine, header).ok
        assert "blk.43.attn_norm.weight" in {f.where for f in verdict(engine, header).of("note")}


@pytest.mark.parametrize(("name", "ne", "message"), [
    ("blk.7.attn_q_a.weight", (4096, 1536), "has dim[1]=1536, expected 1024"),
    ("token_embd.weight", (4096, 129281), "has dim[1]=129281, expected 129280"),
    ("blk.7.ffn_down_exps.weight", (2048, 4096, 255), "has dim[2]=255, expected 256"),
    ("blk.7.attn_norm.weight", (4096, 2), "has 2 dimensions, expected 1"),
])  # fmt: skip
def test_dimensions(name, ne, message, seen):
    header = reshaped(seen, name, ne)
    for engine in DS4S:
        assert refusal(engine, header).message == f"tensor {name} {message}"
    got, expected = (", ".join(f"{n:6}" for n in t) for t in ((*ne, 1, 1, 1)[:4], seen.tensors[name].ne))
    assert refusal(LLAMA, header).message == \
        f"check_tensor_dims: tensor '{name}' has wrong shape; expected {expected}, got {got}"


def test_dimensions_that_only_llama_cpp_overlooks(seen):
    ones = reshaped(seen, "blk.7.attn_norm.weight", (4096, 1))
    assert verdict(LLAMA, ones).ok
    assert refusal(MAY, ones).message == "tensor blk.7.attn_norm.weight has 2 dimensions, expected 1"
    groups = reshaped(seen, "blk.7.attn_output_a.weight", (4096, 1024, 8))
    assert verdict(LLAMA, groups).ok
    assert refusal(DS4, groups).message == "tensor blk.7.attn_output_a.weight has 3 dimensions, expected 2"


@pytest.mark.parametrize(("stated", "columns", "engines"), [(6, 4, ALL), (4, 6, (FOUR, LLAMA))])
def test_columns_must_be_the_experts_per_token(stated, columns, engines, seen):
    header = changed(with_experts(seen, columns), P + "expert_used_count", stated)
    name = "blk.0.ffn_gate_tid2eid.weight"
    for engine in engines:
        found = refusal(engine, header)
        assert (found.where, found.n) == (name, 3)
        assert found.message == (
            f"tensor {name} has dim[0]={columns}, expected {stated}" if engine != LLAMA else
            f"check_tensor_dims: tensor '{name}' has wrong shape; expected      {stated}, 129280, got      {columns}, "
            "129280,      1,      1")


def pairs_of(engine, seen, gate, down, severity):
    header = retyped(retyped(seen, r".*ffn_(gate|up)_exps.*", gate), r".*ffn_down_exps.*", down)
    found = verdict(engine, header)
    assert found.loads
    return [f.where for f in found.of(severity)]


@pytest.mark.parametrize("gate", sorted(ROUTED))
@pytest.mark.parametrize("down", sorted(ROUTED))
def test_pairs_of_expert_types(gate, down, seen):
    """What each backend computes, from the kernels of the two states of ds4 that were run."""
    where = ["blk.0.ffn_*_exps.weight"]
    cuda = [] if (gate, down) in {("IQ2_XXS", "Q2_K"), ("Q4_K", "Q4_K")} else where
    assert pairs_of(MAY, seen, gate, down, "wrong-numbers") == cuda
    assert pairs_of(FOUR, seen, gate, down, "wrong-numbers") == cuda
    assert pairs_of(MAY, seen, gate, down, "note") == ([] if (gate, down) == ("IQ2_XXS", "Q2_K") else where)
    assert pairs_of(FOUR, seen, gate, down, "note") == (
        [] if gate in {"IQ2_XXS", "Q4_K"} and down in {"Q2_K", "Q4_K"} else where)
    assert pairs_of(DS4, seen, gate, down, "wrong-numbers") == []
    assert pairs_of(LLAMA, seen, gate, down, "wrong-numbers") == []


def test_gate_and_up_must_share_a_type(seen):
    header = retyped(seen, r"blk\.5\.ffn_up_exps\.weight", "Q2_K")
    for engine in DS4S:
        found = refusal(engine, header)
        assert found.where == "blk.5.ffn_up_exps.weight"
        assert found.message == "routed gate/up experts use different quant types in layer 5"
    assert verdict(LLAMA, header).ok


def test_layers_may_differ(seen):
    header = retyped(seen, r"blk\.[0-9]\.ffn_(gate|up)_exps.*", "IQ2_XXS")
    assert all(verdict(e, retyped(header, r"blk\.[0-9]\.ffn_down_exps.*", "Q2_K")).ok for e in ALL)


# ------------------------------------------------------------------------------------------------- files, other files

@pytest.mark.parametrize(("engine", "change", "where", "message"), [
    (MAY, lambda h: retyped(h, ".*indexer.attn_q_b.weight", "Q8_0"), "blk.2.indexer.attn_q_b.weight",
     "tensor blk.2.indexer.attn_q_b.weight has type q8_0, expected f16"),
    (DS4, lambda h: retyped(h, ".*ffn_gate_inp.weight", "BF16"), "blk.0.ffn_gate_inp.weight",
     "tensor blk.0.ffn_gate_inp.weight has type bf16, expected f16"),
    (LLAMA, lambda h: changed(h, P + "context_length", kind="u64"), P + "context_length",
     "key deepseek4.context_length has wrong type u64 but expected type u32"),
    (LLAMA, lambda h: changed(h, P + "rope.freq_base", kind="f64"), P + "rope.freq_base",
     "key deepseek4.rope.freq_base has wrong type f64 but expected type f32"),
    (LLAMA, lambda h: changed(h, "tokenizer.ggml.model", "bpe"), "tokenizer.ggml.model", "unknown tokenizer: 'bpe'"),
    (LLAMA, lambda h: changed(h, P + "expert_gating_func", None), P + "expert_gating_func",
     "key not found in model: deepseek4.expert_gating_func"),
    (MAY, lambda h: changed(with_experts(h, 4), P + "expert_used_count", 6), "blk.0.ffn_gate_tid2eid.weight",
     "tensor blk.0.ffn_gate_tid2eid.weight has dim[0]=4, expected 6"),
    (LLAMA, lambda h: with_tensor(h, "blk.0.extra.weight", (32,)), "blk.0.extra.weight",
     "done_getting_tensors: wrong number of tensors; expected 1329, got 1328"),
], ids=["indexer", "router", "u64", "f64", "bpe", "gating", "columns", "extra"])  # fmt: skip
def test_known_bad_files(engine, change, where, message, flash_plan, tmp_path, dsv4tools):
    """Each written out, checked by the command line: the engine that was asked for decides."""
    path = write_file(change(header_of_plan(flash_plan)), tmp_path / "bad.gguf")
    ended = dsv4tools("verify", path, "--engine", engine)
    assert (ended.code, ended.err) == (5, "")
    assert f'"{message}"' in ended.out
    assert f"    refuse: {where}" in ended.out
    assert ended.out.endswith("bad.gguf: NOT right: 1 error\n")
    ended = dsv4tools("verify", path, "--json")
    assert ended.code == 0                       # without --engine only the structure decides
    found = {v["engine"]: v for v in ended.data["engines"]}
    assert list(found) == list(ALL)
    assert found[engine]["loads"] is False
    assert found[engine]["findings"][0]["message"] == message
    assert dsv4tools("verify", path, "--engine", "none", "--json").data["engines"] == []


def test_what_computes_wrongly_is_not_right_either(flash_plan, tmp_path, dsv4tools):
    path = write_file(changed(header_of_plan(flash_plan), P + "rope.scaling.type", None), tmp_path / "yarn.gguf")
    ended = dsv4tools("verify", path, "--engine", "llama.cpp")
    assert ended.code == 5
    assert "would load, and not compute what the file says" in ended.out
    assert dsv4tools("verify", path, "--engine", "ds4").code == 0


def test_other_architectures_are_none_of_our_business(tmp_path, dsv4tools):
    header = Header({"general.architecture": KV("general.architecture", "str", "llama")}, {})
    path = write_file(header, tmp_path / "llama.gguf")
    ended = dsv4tools("verify", path)
    assert ended.code == 0
    assert "engine" not in ended.out
    assert "ds4" not in ended.out
    ended = dsv4tools("verify", path, "--engine", "llama.cpp")
    assert ended.code == 5
    assert "this profile describes deepseek4 only" in ended.out


def test_a_file_of_gguf_version_2(seen):
    header = replace(seen, version=2)
    assert all(refusal(engine, header).message == "only GGUF v3 is supported" for engine in DS4S)
    assert verdict(LLAMA, header).ok


def test_a_split_set(seen, tmp_path, dsv4tools):
    """llama.cpp is asked about the whole set, whichever part is named; ds4 reads single files only."""
    names = list(seen.tensors)
    bounds = [0, 600, len(names)]
    paths = []
    for i, (a, b) in enumerate(pairwise(bounds)):
        kvs = {kv.key: kv for kv in split_kvs(i, 2, len(names))}
        part = Header((dict(seen.kvs) if i == 0 else {}) | kvs, {n: seen.tensors[n] for n in names[a:b]})
        paths.append(write_file(part, tmp_path / split_name("flash", i, 2)))
    for path in paths:
        assert dsv4tools("verify", path, "--engine", LLAMA).code == 0
        ended = dsv4tools("verify", path, "--engine", DS4)
        assert ended.code == 5
        assert "split.count: 2, expected a single file" in ended.out
    paths[1].unlink()
    ended = dsv4tools("verify", paths[0], "--engine", LLAMA)
    assert ended.code == 5
    assert "parts are missing: flash-00002-of-00002.gguf" in ended.out


def test_an_impossible_number_of_layers_takes_no_time(seen):
    ratios = [4] * 2_000_000
    header = changed(changed(seen, P + "attention.compress_ratios", ratios), P + "block_count", len(ratios))
    with cheap(10, None):
        for engine in ALL:
            assert not verdict(engine, header).loads


ANY_VALUE = st.one_of(
    st.tuples(st.just("u32"), st.integers(0, 2**32 - 1), st.none()),
    st.tuples(st.just("i64"), st.integers(-2**63, 2**63 - 1), st.none()),
    st.tuples(st.just("f64"), st.floats(), st.none()),
    st.tuples(st.just("str"), st.text(max_size=20), st.none()),
    st.tuples(st.just("bool"), st.booleans(), st.none()),
    st.tuples(st.just("arr"), st.lists(st.integers(-5, 200), max_size=50), st.just("i32")),
    st.tuples(st.just("arr"), st.lists(st.floats(width=32), max_size=50), st.just("f32")),
    st.tuples(st.just("arr"), st.lists(st.text(max_size=3), max_size=9), st.just("str")),
)


# -------------------------------------------------------------------------------------------------------- the preflight

def test_convert_refuses_before_the_first_byte(flash_sparse, tmp_path, dsv4tools, monkeypatch):
    monkeypatch.setattr("dsv4tools.outfile.free_bytes", lambda _: 1 << 50)
    out = tmp_path / "out.gguf"
    words = ("convert", flash_sparse, out, "--engine", "DS4-MAY2026", "--tensor-type",
             "blk.4.indexer.attn_q_b.weight=q8_0")
    ended = dsv4tools(*words)
    message = ended.failed(3)
    assert "blk.4.indexer.attn_q_b.weight: ds4-may2026 would refuse the file: Q8_0 (by --tensor-type blk.4." in message
    assert '"tensor blk.4.indexer.attn_q_b.weight has type q8_0, expected f16"' in message
    assert "--tensor-type 'blk.*.indexer.attn_q_b.weight=f16'" in message
    assert message.rstrip().endswith("--engine none skips this check")
    assert list(tmp_path.iterdir()) == []
    lines = ended.out.splitlines()
    assert [line.split()[:2] for line in lines] == [["engine", name] for name in ALL]
    assert [line.endswith(": would load") for line in lines] == [True, True, False, True]


def test_convert_names_the_policys_rule(flash_checkpoint):
    plan = dt.plan(flash_checkpoint, policy="bf16")
    with pytest.raises(InputError, match=re.escape(
            "token_embd.weight: ds4 would refuse the file: BF16 (by bf16 rule 1: *), expected F16")):
        check_plan(plan, ["ds4"])
    # llama.cpp takes it: without a name that is enough, and with its name too
    for names in ((), (LLAMA,)):
        assert [v.engine for v in check_plan(plan, names) if v.loads] == [LLAMA]


def test_four_experts_planned_from_six(flash_checkpoint):
    plan = dt.plan(dt.reroute(flash_checkpoint, experts_per_token=4))
    assert [v.loads for v in check_plan(plan, ("DS4-4Expert", LLAMA))] == [False, True, False, True]
    with pytest.raises(InputError, match=r"expert_used_count: ds4 would refuse the file: not a Flash or Pro shape"):
        check_plan(plan, ("ds4-4expert", "ds4"))


def test_a_dry_run_says_the_same(tiny_6e, tmp_path, dsv4tools):
    words = ("convert", tiny_6e, tmp_path / "o.gguf", "--dry-run")
    ended = dsv4tools(*words)
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"^engine +ds4 \(commit 30ac654, read, not run\): would refuse: model shape: not a Flash or Pro "
                     "shape", ended.out, re.MULTILINE)
    assert re.search(r"^engine +llama\.cpp \(commit 0c1e570\): would load$", ended.out, re.MULTILINE)
    ended = dsv4tools(*words, "--json", "--engine", "ds4")
    assert [v["engine"] for v in ended.data["engines"] if v["loads"]] == [LLAMA]
    assert "model shape: ds4 would refuse the file: not a Flash or Pro shape" in ended.failed(3)


def test_a_file_that_no_engine_takes(make_checkpoint, tmp_path, dsv4tools):
    source = make_checkpoint()
    config = json.loads((source / "config.json").read_text("utf-8")) | {"scoring_func": "sigmoid"}
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    out = tmp_path / "out.gguf"
    message = dsv4tools("convert", source, out).failed(3)
    assert message.startswith("error: deepseek4.expert_gating_func: no engine (ds4, ds4-4expert, ds4-may2026, "
                              'llama.cpp) would load the file; llama.cpp comes closest: 2, expected 4: "DeepSeek-V4 ')
    assert not out.exists()
    with pytest.raises(InputError, match="no engine"):
        dt.convert(dt.plan(dt.open_checkpoint(source)), out)
    ended = dsv4tools("convert", source, out, "--engine", "none", "--json")
    assert (ended.code, ended.data["engines"]) == (0, [])
    assert out.exists()


def test_a_tiny_model_converts(make_checkpoint, tmp_path, dsv4tools):
    source, out = make_checkpoint(), tmp_path / "out.gguf"
    assert "not a Flash or Pro shape" in dsv4tools("convert", source, out, "--engine", "ds4").failed(3)
    assert dsv4tools("convert", source, out, "--engine", "Llama.CPP").code == 0
    assert dsv4tools("verify", out, "--engine", "llama.cpp").code == 0


def test_names_of_engines(tmp_path, make_checkpoint, dsv4tools):
    source, out = make_checkpoint(), tmp_path / "o.gguf"
    message = dsv4tools("convert", source, out, "--engine", "vllm").failed(2)
    assert "'vllm' is neither a known engine (ds4, ds4-4expert, ds4-may2026, llama.cpp) nor a profile file" in message
    assert "vllm" in dsv4tools("verify", out, "--engine", "vllm").failed(2)
    assert "together" in dsv4tools("convert", source, out, "--engine", "none", "--engine", "ds4").failed(2)
    assert choose_engines(("NONE",)).profiles == ()
    with pytest.raises(UsageError):
        find_profile(str(tmp_path))


# --------------------------------------------------------------------------------------------------------- own profiles

def shipped(name):
    return data_directory("templates") / "engines" / f"{name}.toml"


def test_a_profile_of_ones_own(tmp_path, make_checkpoint, dsv4tools):
    """A copy of llama.cpp's that also wants the embedding in F32."""
    mine = tmp_path / "mine.toml"
    mine.write_text(shipped(LLAMA).read_text("utf-8") + "\n", "utf-8")
    text = mine.read_text("utf-8").replace(
        "[[tensor]]", '[[tensor]]\ntensors = ["token_embd.weight"]\ntypes = ["F32"]\n'
                      'message = "no {tensor} in {found}"\n\n[[tensor]]', 1)
    mine.write_text(text, "utf-8")
    words = ("convert", make_checkpoint(), tmp_path / "o.gguf", "--dry-run", "--engine", mine)
    message = dsv4tools(*words).failed(3)
    assert "token_embd.weight: mine would refuse the file: F16 (by q4k rule 6: *), expected F32: " in message
    assert '"no token_embd.weight in f16"' in message
    assert dsv4tools(*words, "--embedding", "f32").code == 0


@pytest.mark.parametrize(("old", "new", "message"), [
    ("[[tensor]]", "[[tensor", "is not valid TOML"),
    ('evidence = "run"', "", "missing 1 required positional argument: 'evidence'"),
    ('evidence = "run"', 'evidence = "hearsay"', "unknown evidence 'hearsay', known are 'run', 'read'"),
    ("splits = true", "splits = 1", "splits is 1, expected bool"),
    ("splits = true", "spilts = true", "unknown entry 'spilts', known are name"),
    ('reader = "u32"', 'reader = "u33"', "unknown reader 'u33'"),
    ('types = ["I32"]', 'types = ["I33"]', "unknown ggml type 'I33'"),
    ('types = ["I32"]', "types = []", "[[tensor]] 1: types is [], expected tuple[str, ...]"),
    ('check = "one_of"', 'check = "one_off"', "unknown check 'one_off', known are 'one_of', 'equal'"),
    ('severity = "wrong-numbers"', 'severity = "grave"', "severity is grave, expected Severity"),
    ('absent = "wrong-numbers"', 'absent = "grave"', "unknown absent 'grave'"),
    ("not found in model: {key}", "not found in model: {kez}", "uses {kez}, known are"),
    ("not found in model: {key}", "not found in model: {key", "message 'key not found in model: {key': expected '}'"),
    ("not found in model: {key}", "{key.__class__}", "uses {key.__class__}, known are"),
    ('shape = ["experts"]', 'shape = ["expertz"]', "unknown symbol 'expertz'"),
    ("[messages]", "[massages]", "[messages]: is missing"),
    ("gguf_versions = [2, 3]", 'gguf_versions = ["3"]', "gguf_versions is ['3'], expected tuple[int, ...]"),
    ('description = "ggml-org', 'tables = "gpt2"\ndescription = "ggml-org', "unknown tables 'gpt2', known"),
])  # fmt: skip
def test_a_profile_that_is_wrong(old, new, message, tmp_path):
    text = shipped(LLAMA).read_text("utf-8")
    assert old in text
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(old, new, 1), "utf-8")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        find_profile(str(path))
    assert str(path) in str(error.value)


def test_a_profile_that_compares_what_cannot_be_compared(tmp_path, seen):
    path = tmp_path / "wrong.toml"
    text = shipped(LLAMA).read_text("utf-8").replace("of = 512", 'of = ["x"]', 1)
    path.write_text(text, "utf-8")
    with pytest.raises(InputError, match="cannot compare 43 with x"):
        judge(find_profile(str(path)), seen)


@pytest.mark.parametrize("name", ALL)
def test_no_rule_of_a_profile_is_dead(name, seen):
    """Every tensor rule finds a tensor, every check's keys are read, every reader is used."""
    profile = find_profile(name)
    text = shipped(name).read_text("utf-8")
    for rule in profile.tensor:
        for glob in rule.tensors:
            pattern = re.escape(glob).replace(r"\*", ".*")
            assert any(re.fullmatch(pattern, n) for n in seen.tensors), glob
    read = {key for rule in profile.metadata for key in rule.keys}
    assert {key for check in profile.check for key in check.keys} <= read
    assert {rule.reader for rule in profile.metadata} == set(profile.readers)
    assert profile.commit in text


def test_a_user_may_edit_a_shipped_profile(tmp_path):
    """A copy reads the same."""
    for name in ALL:
        copy = shutil.copy(shipped(name), tmp_path / f"{name}.toml")
        assert replace(find_profile(str(copy))) == find_profile(name)
