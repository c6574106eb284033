"""config.json: every key that is missing, mistyped or contradictory stops with its name."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from bounds import cheap
from hypothesis import given, settings
from hypothesis import strategies as st
from tamper import REMOVED, edit_config, edit_json

from dsv4tools.checkpoint import Config, open_checkpoint
from dsv4tools.checkpoint.config import read_config
from dsv4tools.errors import InputError

FLASH = json.loads((Path(__file__).parent / "data" / "configs" / "flash.json").read_text("utf-8"))

POSITIVE = [
    "hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "num_attention_heads",
    "num_key_value_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank", "o_lora_rank", "o_groups", "index_n_heads",
    "index_head_dim", "index_topk", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "moe_intermediate_size", "hc_mult", "hc_sinkhorn_iters", "rope_scaling.original_max_position_embeddings",
]
FROM_ZERO = ["num_hash_layers", "sliding_window"]
NUMBERS = [
    "routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta",
    "rope_scaling.factor", "rope_scaling.beta_fast", "rope_scaling.beta_slow",
]
TEXTS = ["scoring_func", "rope_scaling.type"]
FLAGS = ["norm_topk_prob"]
LISTS = ["compress_ratios", "quantization_config.weight_block_size"]
OPTIONAL = ["num_nextn_predict_layers", "n_group", "topk_group", "intermediate_size"]
REQUIRED = [*POSITIVE, *FROM_ZERO, *NUMBERS, *TEXTS, *FLAGS, *LISTS]

HUGE = 10**400
NO_INTEGER = [None, "1", 1.0, 1.5, True, -1, [1], {"a": 1}, 1 << 31, HUGE]
NO_NUMBER = [None, "1", True, [1.0], {"a": 1}, 0, -1, -0.5, HUGE, 1e39, 1e-60]
NO_TEXT = [None, 1, True, ["yarn"], {"a": 1}, "other", "", "x" * 100_000]
NO_FLAG = [None, 0, 1, "true", [True], {"a": 1}]
NO_LIST = [None, 4, "4", [4.0], [True], [-1], ["4"], [[4]], {"0": 4}, [1 << 31]]


@pytest.fixture
def load(tmp_path):
    def load(*changes):
        raw = copy.deepcopy(FLASH)
        for key, value in changes:
            *parents, last = key.split(".")
            target = raw
            for parent in parents:
                target = target[parent]
            target[last] = value
            if value is REMOVED:
                del target[last]
        path = tmp_path / "config.json"
        path.write_text(json.dumps(raw), "utf-8")
        return read_config(path)

    return load


def expect(load, key, *changes):
    with cheap(), pytest.raises(InputError) as caught:
        load(*changes)
    message = str(caught.value)
    assert f"config.json: key {key!r}: " in message
    assert ", expected " in message
    assert len(message) < 600
    return message


def test_the_lists_above_are_complete():
    keys = {name.replace(".", "_") for name in (*POSITIVE, *FROM_ZERO, *NUMBERS, *TEXTS, *FLAGS, *OPTIONAL)}
    assert keys | {"compress_ratios", "weight_block_size"} == {f.name for f in fields(Config)}


def test_flash(data):
    config = read_config(data / "configs" / "flash.json")
    for key in (*POSITIVE, *FROM_ZERO, *NUMBERS, *TEXTS, *FLAGS):
        value = FLASH
        for part in key.split("."):
            value = value[part]
        assert config.value(key) == value
        assert type(config.value(key)) is (float if key in NUMBERS else type(value))
    assert config.compress_ratios == tuple(FLASH["compress_ratios"])
    assert config.weight_block_size == (128, 128)
    assert config.num_nextn_predict_layers == 1
    assert (config.n_group, config.topk_group, config.intermediate_size) == (None, None, None)
    assert [config.is_hash_layer(n) for n in (0, 2, 3, 42)] == [True, True, False, False]


def test_pro(data):
    config = read_config(data / "configs" / "pro.json")
    assert (config.hidden_size, config.n_routed_experts, config.num_hidden_layers) == (7168, 384, 61)


# Missing, mistyped


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(load, key):
    assert "is missing" in expect(load, key, (key, REMOVED))


@pytest.mark.parametrize("key", ["rope_scaling"])
@pytest.mark.parametrize("value", [REMOVED, None, [], "yarn", 1])
def test_a_missing_or_mistyped_object_is_named_by_its_first_key(load, key, value):
    with pytest.raises(InputError, match=rf"key '{key}\.type'"):
        load((key, value))


@pytest.mark.parametrize(("keys", "values"), [
    (POSITIVE, [*NO_INTEGER, 0]), (FROM_ZERO, NO_INTEGER), (NUMBERS, NO_NUMBER), (TEXTS, NO_TEXT), (FLAGS, NO_FLAG),
    (LISTS, NO_LIST), (OPTIONAL, NO_INTEGER[1:]),
], ids=["positive", "from zero", "numbers", "texts", "flags", "lists", "optional"])
def test_a_mistyped_key_is_named(load, keys, values):
    for key in keys:
        for value in values:
            if (key, value) != ("intermediate_size", None):
                expect(load, key, (key, value))


@pytest.mark.parametrize("key", OPTIONAL)
def test_an_optional_key_may_be_absent_or_null(load, key):
    for value in (REMOVED, None):
        assert load((key, value)).value(key) == (0 if key == "num_nextn_predict_layers" else None)


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_may_be_written_as_integers(load, key):
    assert load((key, 7)).value(key) == 7.0


@pytest.mark.parametrize("key", FROM_ZERO)
def test_what_may_be_zero(load, key):
    assert load((key, 0)).value(key) == 0


def test_a_vocabulary_that_would_fill_the_memory(load):
    expect(load, "vocab_size", ("vocab_size", 1 << 30))


@pytest.mark.parametrize("bad", [4.0, True, "4", None, [4], -1, 1 << 31])
def test_one_bad_item_in_a_list_that_is_right_otherwise(load, bad):
    expect(load, "compress_ratios", ("compress_ratios", [*FLASH["compress_ratios"][:42], bad, 0]))
    expect(load, "quantization_config.weight_block_size", ("quantization_config.weight_block_size", [128, bad]))


# Architecture


@pytest.mark.parametrize("value", [REMOVED, None, [], "DeepseekV4ForCausalLM", ["DeepseekV41ForCausalLM"], [1], {},
                                   ["DeepseekV3ForCausalLM", "LlamaForCausalLM"], ["x" * 100_000]])
def test_an_unknown_architecture(load, value):
    assert "DeepseekV4ForCausalLM" in expect(load, "architectures", ("architectures", value))


def test_the_architecture_is_asked_before_anything_else(load):
    expect(load, "architectures", ("architectures", ["LlamaForCausalLM"]), ("hidden_size", REMOVED))


# Contradictions


@pytest.mark.parametrize(("key", "value", "message"), [
    ("compress_ratios", [4] * 42, "has 42 entries, expected at least num_hidden_layers = 43"),
    ("compress_ratios", [], "has 0 entries"),
    ("compress_ratios", [4] * 44, "only zeros (draft blocks) behind num_hidden_layers = 43"),
    ("num_experts_per_tok", 257, "at most n_routed_experts = 256"),
    ("num_hash_layers", 44, "at most num_hidden_layers = 43"),
    ("num_key_value_heads", 2, "expected 1"),
    ("qk_rope_head_dim", 514, "even and at most head_dim = 512"),
    ("qk_rope_head_dim", 63, "even and at most head_dim = 512"),
    ("o_groups", 7, "a divisor of num_attention_heads = 64"),
    ("tie_word_embeddings", True, "a separate head"),
    ("quantization_config.weight_block_size", [128], "two positive integers"),
    ("quantization_config.weight_block_size", [128, 128, 128], "two positive integers"),
    ("quantization_config.weight_block_size", [0, 128], "two positive integers"),
    ("quantization_config.quant_method", "nvfp4", "one of fp8"),
    ("quantization_config.fmt", "e5m2", "one of e4m3"),
    ("quantization_config.scale_fmt", "float", "one of ue8m0"),
    ("quantization_config", [], "an object"),
    ("scoring_func", "relu", "one of sqrtsoftplus, sigmoid, softmax"),
    ("rope_scaling.type", "linear", "one of yarn"),
])
def test_a_contradiction_names_its_key_and_what_it_contradicts(load, key, value, message):
    assert message in expect(load, key, (key, value))


def test_longer_compress_ratios_are_those_of_draft_blocks(load):
    assert load(("compress_ratios", [4] * 43 + [0] * 3)).compress_ratios[43:] == (0, 0, 0)
    assert len(load(("compress_ratios", [4] * 43)).compress_ratios) == 43


def test_other_blocks_and_none(load):
    assert load(("quantization_config.weight_block_size", [32, 32])).weight_block_size == (32, 32)
    assert load(("quantization_config", REMOVED)).weight_block_size is None
    assert load(("quantization_config", None)).weight_block_size is None


def test_scoring_functions(load):
    for name in ("sqrtsoftplus", "sigmoid", "softmax"):
        assert load(("scoring_func", name)).scoring_func == name


def test_a_config_that_transformers_has_saved_again(load):
    expect(load, "compress_ratios", ("compress_ratios", REMOVED), ("num_hash_layers", REMOVED))


# The file


@pytest.mark.parametrize(("raw", "message"), [
    ("", "is not valid JSON"), ("[]", "JSON list"), ('{"a":1,"a":1}', "appears twice"),
    ('{"hidden_size":' + "[" * 100_000, "nested too deeply"), ('{"hc_eps":1e999}', "architectures"),
])
def test_a_file_that_is_none(tmp_path, raw, message):
    (tmp_path / "config.json").write_text(raw, "utf-8")
    with cheap(), pytest.raises(InputError, match=message):
        read_config(tmp_path / "config.json")


def test_infinity_written_as_a_large_number(load, tmp_path):
    load()
    path = tmp_path / "config.json"
    path.write_text(path.read_text("utf-8").replace('"hc_eps": 1e-06', '"hc_eps": 1e999'), "utf-8")
    with pytest.raises(InputError, match="key 'hc_eps': is inf"):
        read_config(path)


def test_a_missing_config(make_checkpoint):
    path = make_checkpoint()
    (path / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: is missing"):
        open_checkpoint(path)


def test_a_config_of_more_than_10_mb(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with cheap(), pytest.raises(InputError, match="is larger than 10,000,000 bytes"):
        read_config(tmp_path / "config.json")


# In a checkpoint


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8", None, REMOVED, 7])
def test_expert_dtype_decides_nothing(make_checkpoint, expert_dtype):
    path = make_checkpoint()
    edit_config(path, expert_dtype=expert_dtype)
    assert open_checkpoint(path).config == open_checkpoint(make_checkpoint("other")).config


def test_a_routing_table_of_another_width(make_checkpoint):
    path = make_checkpoint(experts_per_token=2)
    edit_config(path, num_experts_per_tok=1)
    with pytest.raises(InputError, match=r"tid2eid'.*num_experts_per_tok = 1") as caught:
        open_checkpoint(path)
    assert "[512, 2]" in str(caught.value)


def test_a_checkpoint_that_is_no_directory(tmp_path, make_checkpoint):
    path = make_checkpoint()
    for bad, message in ((path / "config.json", "is no directory"), (tmp_path / "nowhere", "is missing"),
                         (path / "config.json" / "below", "is missing")):
        with pytest.raises(InputError, match=message):
            open_checkpoint(bad)


def test_a_path_that_the_system_refuses(tmp_path):
    with pytest.raises((InputError,)) as caught:
        open_checkpoint("a\0b")
    assert "\0" not in str(caught.value)
    for error in (pytest.raises(Exception, match="cannot be opened"),):
        with error as caught:
            open_checkpoint(tmp_path / ("x" * 5000))
        assert caught.value.exit_code == 4


def test_a_relative_path_and_one_with_blanks_and_umlauts(make_checkpoint, tmp_path, monkeypatch):
    path = shutil.move(make_checkpoint(), tmp_path / "mein Modell ü 漢")
    monkeypatch.chdir(path)
    assert open_checkpoint(".").config == open_checkpoint(str(path)).config


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6)


@settings(deadline=None, max_examples=200)
@given(key=st.sampled_from(sorted(FLASH)), value=JSON_VALUES)
def test_any_value_for_any_key_is_read_or_refused_by_name(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(FLASH | {key: value}), "utf-8")
    try:
        read_config(path)
    except InputError as e:
        assert ": key '" in str(e)  # noqa: PT017  - not every value is refused


def test_a_file_edited_in_place(make_checkpoint):
    path = make_checkpoint()
    edit_json(path / "config.json", lambda config: config.update(hidden_size=255))
    checkpoint = open_checkpoint(path)   # what the tensors say is compared when a template is derived
    assert checkpoint.config.hidden_size == 255
