"""Templates derived from checkpoints: tensors and metadata against other tools' files, faults listed in full."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from bounds import cheap
from tamper import (
    add_tensor,
    drop_tensor,
    edit_config,
    load_shard,
    replace_tensor,
    save_shard,
    shards,
)

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.errors import InputError
from dsv4tools.formats.source import SourceKind
from dsv4tools.synthetic import FLASH_0731, TINY, write_checkpoint
from dsv4tools.template import derive_template
from dsv4tools.template import tables as tables_module
from dsv4tools.template.metadata import size_label
from dsv4tools.template.symbols import SYMBOLS, layer_sizes, model_sizes
from dsv4tools.template.tables import load_tables
from dsv4tools.template.tensors import TemplateTensor, derive_tensors

KINDS = {"STRING": "str", "UINT32": "u32", "FLOAT32": "f32", "BOOL": "bool", "INT32": "i32"}


def derive(path):
    return derive_template(open_checkpoint(path))


def said(kv):
    """A metadata entry as the expected values are written: types and plain value."""
    kind = ["arr", kv.item_type] if kv.type == "arr" else [kv.type]
    value = kv.value
    if kv.type == "f32":
        value = float(np.float32(value))
    if kv.item_type == "f32":
        value = [float(np.float32(v)) for v in value]
    return kind, value


def expected_entries(path):
    raw = json.loads(path.read_text("utf-8"))
    metadata = raw.get("metadata", raw)
    return {key: (["arr" if k == "ARRAY" else KINDS[k] for k in entry["type"]], entry["value"])
            for key, entry in metadata.items()}


def refusal(path):
    checkpoint = open_checkpoint(path)
    with cheap(seconds=3.0), pytest.raises(InputError) as caught:
        derive_template(checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Against other tools


def test_metadata_of_tiny_6e_is_what_llama_cpp_writes_and_the_vocabulary_size(tiny_6e, data):
    expected = expected_entries(data / "tiny-6e.mainline_kv.json")
    found = {kv.key: said(kv) for kv in derive(tiny_6e).kvs}
    model = {key for key in expected if key.startswith(("deepseek4.", "tokenizer."))} - {"tokenizer.chat_template"}
    assert {key for key in found if not key.startswith("general.")} == model | {"deepseek4.vocab_size"}
    assert found["deepseek4.vocab_size"] == (["u32"], 512)
    for key in model:
        (kind, value), (our_kind, ours) = expected[key], found[key]
        assert our_kind == kind, key
        if isinstance(value, dict):
            assert len(ours) == value["len"], key
            ours = hashlib.sha256(json.dumps(ours, ensure_ascii=False).encode()).hexdigest()
            value = value["sha256_json"]   # the expected value of a long list is its hash
        assert ours == value, key


def test_general_entries_of_tiny_6e(tiny_6e, data):
    expected = expected_entries(data / "tiny-6e.mainline_kv.json")
    found = {kv.key: said(kv) for kv in derive(tiny_6e).kvs if kv.key.startswith("general.")}
    for key in ("general.architecture", "general.type", "general.size_label", "general.sampling.top_p",
                "general.sampling.temp"):
        assert found.pop(key) == expected[key]
    assert found == {"general.name": (["str"], "tiny-6e")}


def test_tensors_of_tiny_6e_are_those_that_the_c_tool_wrote(tiny_6e, data):
    expected = json.loads((data / "tiny-6e.tensors.json").read_text("utf-8"))["q4k"]
    found = derive(tiny_6e)
    assert {t.name: list(t.ne) for t in found.tensors} == {name: t["ne"] for name, t in expected.items()}
    assert found.alignment == 32


def test_flash_is_what_both_engines_load(flash_plan, data):
    expected = json.loads((data / "flash_one_file.json").read_text("utf-8"))
    found = flash_plan.template
    assert {t.name: list(t.ne) for t in found.tensors} == {name: ne for name, _, ne in expected["tensors"]}
    entries = {kv.key: said(kv) for kv in found.kvs}
    model = {key: entry for key, entry in expected_entries(data / "flash_one_file.json").items()
             if key.startswith("deepseek4.")}
    ours = {key: entry for key, entry in entries.items() if key.startswith("deepseek4.")}
    assert ours.pop("deepseek4.swiglu_clamp_shexp") == model["deepseek4.swiglu_clamp_exp"]   # llama.cpp has it too
    assert ours == model
    assert entries["general.size_label"] == (["str"], "256x8.4B")
    assert len(entries["tokenizer.ggml.tokens"][1]) == 129_280
    assert len(entries["tokenizer.ggml.merges"][1]) == 127_741


def test_the_same_checkpoint_gives_the_same_template(tiny_6e):
    first, second = derive(tiny_6e), derive(tiny_6e)
    assert (first.kvs, [t.name for t in first.tensors]) == (second.kvs, [t.name for t in second.tensors])


def test_no_path_no_host_and_no_time_is_written(make_checkpoint):
    path = make_checkpoint("model")
    text = " ".join(str(kv.value) for kv in derive(path).kvs)
    assert str(path.parent) not in text


# Sources


def test_experts_are_stacked_in_order(tiny_6e):
    tensors = {t.name: t for t in derive(tiny_6e).tensors}
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        names = [m.weight.name for m in tensors[f"blk.3.ffn_{ours}_exps.weight"].sources]
        assert names == [f"layers.3.ffn.experts.{e}.{theirs}.weight" for e in range(12)]
        assert [m.scale.name for m in tensors[f"blk.3.ffn_{ours}_exps.weight"].sources] == [
            name.replace("weight", "scale") for name in names]


def test_what_is_a_matrix_and_what_is_not(tiny_6e):
    tensors = {t.name: t for t in derive(tiny_6e).tensors}
    assert tensors["blk.0.ffn_gate_tid2eid.weight"].holds_integers
    for name in ("blk.0.ffn_gate_tid2eid.weight", "output_norm.weight", "blk.0.attn_sinks.weight",
                 "blk.3.exp_probs_b.bias"):
        assert not tensors[name].is_matrix
    for name in ("output_hc_fn.weight", "blk.2.attn_compressor_ape.weight", "blk.0.ffn_down_exps.weight"):
        assert tensors[name].is_matrix
    assert tensors["blk.4.attn_norm.weight"].layer == 4
    assert tensors["output.weight"].layer is None


def test_source_bytes_count_scales(make_checkpoint):
    tensors = {t.name: t for t in derive(make_checkpoint()).tensors}
    assert tensors["blk.0.ffn_gate_exps.weight"].source_bytes == 4 * (256 * 128 + 256 * 8)
    assert tensors["blk.0.attn_kv.weight"].source_bytes == 128 * 256 + 2


def test_every_source_byte_is_used_or_left_out(tiny_6e):
    checkpoint = open_checkpoint(tiny_6e)
    found = derive_template(checkpoint)
    left_out = sum(t.n_bytes for name, t in checkpoint.tensors.items() if name.startswith("mtp."))
    assert left_out
    assert sum(t.source_bytes for t in found.tensors) + left_out == sum(t.n_bytes for t in checkpoint.tensors.values())
    assert dict(found.left_out) == {"mtp.*": sum(name.startswith("mtp.") for name in checkpoint.tensors)}


VARIANTS = {
    "hash layers everywhere": {"hash_layers": 3},
    "no hash layer": {"hash_layers": 0},
    "32x32 blocks": {"fp8_block": (32, 32)},
    "edge tiles": {"hidden": 160, "q_lora": 96, "head_dim": 72, "expert_hidden": 96},
    "experts in FP8": {"expert_dtype": "fp8"},
    "expert_dtype absent": {"expert_dtype": None},
    "draft of two blocks": {"draft_blocks": 2, "hidden": 128},
    "dspark draft": {"draft": "dspark", "draft_blocks": 3, "draft_rank": 16, "hidden": 128},
    "one layer": {"layers": 1},
    "other ratios": {"lead_ratios": (128, 4, 0)},
    "one expert": {"experts": 1, "experts_per_token": 1},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_variants_of_the_published_layout(make_checkpoint, fields):
    path = make_checkpoint(**fields)
    checkpoint = open_checkpoint(path)
    found = derive_template(checkpoint)
    used = {m.weight.name for t in found.tensors for m in t.sources} | {
        m.scale.name for t in found.tensors for m in t.sources if m.scale}
    assert used == {name for name in checkpoint.tensors if not name.startswith("mtp.")}
    values = {kv.key: kv.value for kv in found.kvs}
    assert list(values["deepseek4.attention.compress_ratios"]) == list(checkpoint.config.compress_ratios)
    assert len(values["deepseek4.swiglu_clamp_exp"]) == checkpoint.config.num_hidden_layers
    kinds = {m.kind for t in found.tensors if "_exps." in t.name for m in t.sources}
    assert kinds == {SourceKind.FP8 if fields.get("expert_dtype") == "fp8" else SourceKind.FP4}


def test_a_release_of_july_31_leaves_its_draft_out(tmp_path):
    shape = replace(FLASH_0731, layers=2, hidden=128, vocab=512, heads=4, head_dim=64, q_lora=64, o_groups=2, o_lora=64,
                    experts=4, experts_per_token=2, expert_hidden=64, index_heads=4, index_head_dim=64, hash_layers=1,
                    merges=None, draft_rank=16)
    found = derive(write_checkpoint(tmp_path / "x", shape))
    assert next(iter(found.left_out.values())) > 50
    assert not any("mtp" in t.name for t in found.tensors)


def test_optional_keys(make_checkpoint):
    path = make_checkpoint()
    edit_config(path, n_group=1, topk_group=1, intermediate_size=512)
    values = {kv.key: kv.value for kv in derive(path).kvs}
    assert values["deepseek4.expert_group_count"] == 1
    assert values["deepseek4.expert_group_used_count"] == 1
    assert values["deepseek4.feed_forward_length"] == 512


@pytest.mark.parametrize(("name", "number"), [("softmax", 1), ("sigmoid", 2), ("sqrtsoftplus", 4)])
def test_scoring_functions(make_checkpoint, name, number):
    path = make_checkpoint()
    edit_config(path, scoring_func=name)
    assert {kv.key: kv.value for kv in derive(path).kvs}["deepseek4.expert_gating_func"] == number


# Another dtype than published


EXPERT = "layers.1.ffn.experts.2.w1"


def plain(path, name, dtype, shape, n_bytes):
    """Make a scaled matrix a plain one, as tools that dequantize do."""
    replace_tensor(path, f"{name}.weight", dtype, shape, bytes(n_bytes))
    drop_tensor(path, f"{name}.scale")


@pytest.mark.parametrize(("dtype", "kind", "size"), [("BF16", SourceKind.BF16, 2), ("F16", SourceKind.F16, 2),
                                                     ("F32", SourceKind.F32, 4)])
@pytest.mark.parametrize("name", [EXPERT, "layers.1.attn.wkv", "layers.0.ffn.shared_experts.w2"])
def test_a_dequantized_matrix_is_read_by_its_dtype(make_checkpoint, name, dtype, kind, size):
    path = make_checkpoint()
    shape = {"wkv": [128, 256]}.get(name.rpartition(".")[2], [256, 256])
    plain(path, name, dtype, shape, shape[0] * shape[1] * size)
    sources = {m.weight.name: m for t in derive(path).tensors for m in t.sources}
    assert (sources[f"{name}.weight"].kind, sources[f"{name}.weight"].scale) == (kind, None)


def test_an_expert_in_fp8(make_checkpoint):
    path = make_checkpoint()
    replace_tensor(path, f"{EXPERT}.weight", "F8_E4M3", [256, 256], bytes(65536))
    replace_tensor(path, f"{EXPERT}.scale", "F8_E8M0", [2, 2], bytes(4))
    sources = {m.weight.name: m.kind for t in derive(path).tensors for m in t.sources}
    assert sources[f"{EXPERT}.weight"] == SourceKind.FP8
    assert sources["layers.1.ffn.experts.3.w1.weight"] == SourceKind.FP4


@pytest.mark.parametrize("name", ["attn_norm.weight", "hc_attn_base", "attn.compressor.ape", "hc_attn_fn"])
def test_norms_and_hyper_connections_may_be_of_any_plain_dtype(make_checkpoint, name):
    path = make_checkpoint()
    name = f"layers.1.{name}"
    shape = next(load_shard(s)[name][1] for s in shards(path) if name in load_shard(s))
    replace_tensor(path, name, "F16", shape, bytes(2 * int(np.prod(shape))))
    assert SourceKind.F16 in {m.kind for t in derive(path).tensors for m in t.sources}


def test_a_scale_that_nothing_needs_is_not_passed_over(make_checkpoint):
    path = make_checkpoint()
    replace_tensor(path, f"{EXPERT}.weight", "BF16", [256, 256], bytes(131072))
    assert f"that nothing uses: {EXPERT}.scale" in refusal(path)


def test_a_quantized_norm(make_checkpoint):
    path = make_checkpoint()
    replace_tensor(path, "layers.1.attn_norm.weight", "F8_E4M3", [256], bytes(256))
    assert "missing: layers.1.attn_norm.scale" in refusal(path)
    add_tensor(path, "layers.1.attn_norm.scale", "F8_E8M0", [2], bytes(2))
    assert "'layers.1.attn_norm.weight': is a vector of F8_E4M3" in refusal(path)


def test_a_quantized_tensor_whose_name_leaves_no_room_for_a_scale(make_checkpoint):
    path = make_checkpoint()
    replace_tensor(path, "layers.1.hc_attn_fn", "F8_E4M3", [24, 1024], bytes(24 * 1024))
    assert "missing: layers.1.hc_attn_fnscale" in refusal(path)


def test_weights_in_place_of_a_routing_table_and_the_reverse(make_checkpoint):
    path = make_checkpoint()
    replace_tensor(path, "layers.0.ffn.gate.tid2eid", "BF16", [512, 2], bytes(2048))
    assert "tid2eid': has dtype BF16, expected I64 expert ids" in refusal(path)
    other = make_checkpoint("other")
    replace_tensor(other, "layers.0.ffn.gate.weight", "I64", [4, 256], bytes(8192))
    assert "'layers.0.ffn.gate.weight': has dtype I64, expected weights" in refusal(other)


# What does not fit


def test_missing_and_unclaimed_tensors_are_all_listed(make_checkpoint):
    path = make_checkpoint()
    missing = ["norm.weight", "layers.0.ffn.experts.3.w2.weight", "layers.1.ffn.experts.0.w1.scale", "hc_head_fn",
               "layers.2.attn.compressor.ape", "layers.0.ffn.gate.tid2eid"]
    for name in missing:
        drop_tensor(path, name)
    extra = ["layers.3.attn_norm.weight", "vision.patch", "layers.1.attn.wkv.weight_scale_inv",
             "layers.0.ffn.experts.4.w1.weight", "xmtp.0.norm.weight", "embed.scale", "layers.0.ffn.gate.bias",
             "layers.0.ffn.experts.3.w2.bias"]
    for name in extra:
        add_tensor(path, name, "BF16", [1], bytes(2))
    found = refusal(path)
    listed = found.split("missing: ")[1].split("; that nothing uses: ")
    assert set(listed[0].split(", ")) == set(missing)
    assert set(listed[1].split("; ")[0].split(", ")) == {*extra, "layers.0.ffn.experts.3.w2.scale"}


@pytest.mark.parametrize(("changes", "expected"), [
    ({"n_routed_experts": 5}, "missing: layers.0.ffn.experts.4.w1.weight"),
    ({"n_routed_experts": 3}, "that nothing uses: layers.0.ffn.experts.3.w1.weight"),
    ({"num_hidden_layers": 2, "compress_ratios": [0, 4]}, "that nothing uses: layers.2.hc_attn_fn"),
    ({"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4]}, "missing: layers.3.hc_attn_base"),
    ({"num_hash_layers": 2}, "missing: layers.1.ffn.gate.tid2eid; that nothing uses: layers.1.ffn.gate.bias"),
    ({"num_hash_layers": 0}, "missing: layers.0.ffn.gate.bias; that nothing uses: layers.0.ffn.gate.tid2eid"),
    ({"compress_ratios": [0, 128, 128]}, "that nothing uses: layers.1.attn.indexer.wq_b.weight"),
    ({"compress_ratios": [0, 0, 128]}, "that nothing uses: layers.1.attn.compressor.ape"),
])
def test_a_config_of_another_model_is_named_with_its_counts(make_checkpoint, changes, expected):
    path = make_checkpoint()
    edit_config(path, **changes)
    found = refusal(path)
    assert expected in found
    counts = {"num_hidden_layers": 3, "n_routed_experts": 4, "num_hash_layers": 1} | changes
    for key in ("num_hidden_layers", "n_routed_experts", "num_hash_layers"):
        assert f"{key} = {counts[key]}" in found


@pytest.mark.parametrize(("changes", "tensor"), [
    ({"hidden_size": 288}, "embed.weight"), ({"vocab_size": 513}, "embed.weight"), ({"head_dim": 64}, "wq_b.weight"),
    ({"num_attention_heads": 4}, "attn_sink"), ({"q_lora_rank": 128}, "wq_a.weight"),
    ({"o_lora_rank": 64}, "wo_a.weight"), ({"o_groups": 2}, "wo_a.weight"),
    ({"index_n_heads": 8}, "indexer.wq_b.weight"), ({"hc_mult": 2}, "hc_head_base"),
    ({"index_head_dim": 64}, "indexer.wq_b.weight"), ({"moe_intermediate_size": 128}, "shared_experts.w1.weight"),
    ({"n_shared_experts": 2}, "shared_experts.w1.weight"),
])
def test_a_size_that_contradicts_a_shape_names_tensor_and_both_shapes(make_checkpoint, changes, tensor):
    path = make_checkpoint()
    edit_config(path, **changes)
    found = refusal(path)
    assert tensor in found
    assert "config.json" in found


def test_a_scale_of_the_wrong_shape(make_checkpoint):
    path = make_checkpoint()
    replace_tensor(path, f"{EXPERT}.scale", "F8_E8M0", [256, 4], bytes(1024))
    assert f"'{EXPERT}.scale': is F8_E8M0 [256, 4], expected F8_E8M0 [256, 8]" in refusal(path)


def test_scales_of_another_block_size(make_checkpoint):
    path = make_checkpoint(fp8_block=(32, 32))
    edit_config(path, quantization_config={"weight_block_size": [128, 128]})
    assert "expected F8_E8M0 [2, 2] for a weight of [256, 256] in blocks of [128, 128]" in refusal(path)


def test_no_declared_block_size(make_checkpoint):
    path = make_checkpoint()
    edit_config(path, quantization_config=None)
    assert "weight_block_size" in refusal(path)


def test_fp4_columns_that_are_no_multiple_of_32(make_checkpoint):
    path = make_checkpoint()
    edit_config(path, moe_intermediate_size=48)
    for shard in shards(path):
        tensors = load_shard(shard)
        for name, (dtype, shape, _) in tensors.items():
            if ".ffn.shared_experts." in name or ".ffn.experts." in name:
                new = [48 if n == 256 and (axis == 0) == ("w2" not in name) else n for axis, n in enumerate(shape)]
                new = [24 if n == 128 and "w2" in name else n for n in new] if ".ffn.experts." in name else new
                new = [1 if n == 2 and (axis == 0) == ("w2" not in name) else n for axis, n in enumerate(new)]
                tensors[name] = (dtype, new, bytes(int(np.prod(new))))
        save_shard(shard, tensors)
    assert "is packed FP4 with 48 columns, expected a multiple of 32" in refusal(path)


@pytest.mark.parametrize("ratio", [1, 2, 64, 256, (1 << 31) - 1])
def test_an_unknown_layer_kind(make_checkpoint, ratio):
    path = make_checkpoint()
    edit_config(path, compress_ratios=[0, 4, ratio, 0])
    found = refusal(path)
    assert f"key 'compress_ratios': layer 2 has ratio {ratio}, an unknown layer kind; known are 0, 4, 128" in found


@pytest.mark.parametrize("changes", [
    {"n_routed_experts": (1 << 31) - 1},
    {"num_hidden_layers": 200_000, "compress_ratios": [4] * 200_000},
    {"num_hidden_layers": 200_000, "compress_ratios": [0] * 200_000, "n_routed_experts": (1 << 31) - 1},
    {"hidden_size": (1 << 31) - 1, "head_dim": (1 << 31) - 2},
])
def test_false_sizes_cost_little(make_checkpoint, changes):
    path = make_checkpoint()
    edit_config(path, **changes)
    found = refusal(path)
    assert len(found) < 100_000


def test_more_unclaimed_tensors_than_a_message_holds(make_checkpoint):
    path = make_checkpoint()
    shard = shards(path)[0]
    extra = {f"vision.blocks.{i}.weight": ("I8", [1], b"x") for i in range(1500)}
    for name in ("model.safetensors.index.json",):
        index = json.loads((path / name).read_text("utf-8"))
        index["weight_map"] |= dict.fromkeys(extra, shard.name)
        (path / name).write_text(json.dumps(index), "utf-8")
    save_shard(shard, load_shard(shard) | extra)
    found = refusal(path)
    assert "vision.blocks.999.weight and 500 more" in found


# Size labels


@pytest.mark.parametrize(("ne", "label"), [
    ([("a", (10, 10))], "0.1K"), ([("a", (1000, 7))], "7.0K"), ([("a", (1000, 42))], "42K"),
    ([("a", (1000, 1234))], "1.2M"), ([("a", (10**6, 9_949))], "9.9B"), ([("a", (10**6, 9_951))], "10B"),
    ([("a", (10**6, 10**6))], "1.0T"), ([("a", (10**6, 671_026))], "671B"),
    ([("a", (10**6, 8)), ("b_exps.c", (10**6, 1, 256)), ("d_exps.e", (1, 10**6, 256))], "256x10M"),
])
def test_size_labels(ne, label):
    assert size_label([TemplateTensor(name, shape, (), None) for name, shape in ne]) == label


# The tables


def test_every_symbol_has_a_size_and_every_size_a_symbol(data):
    from dsv4tools.checkpoint.config import read_config  # noqa: PLC0415

    config = read_config(data / "configs" / "flash.json")
    sizes = model_sizes(config) | layer_sizes(config, 2, load_tables().overlaps)
    assert sizes.keys() == SYMBOLS
    used = {s for row in load_tables().tensors for s in row.shape} | {
        row.symbol for row in load_tables().metadata if row.symbol}
    assert used == SYMBOLS   # none is there for nobody


def test_every_layer_kind_is_used(data):
    tables = load_tables()
    assert {row.layers for row in tables.tensors if row.layers} == set(tables.layer_kinds)


def test_names_are_unique_on_both_sides():
    for names in ([row.name for row in load_tables().tensors], [row.source for row in load_tables().tensors],
                  [row.key for row in load_tables().metadata]):
        assert len(set(names)) == len(names)


def test_names_fit_into_a_gguf_at_any_depth():
    assert all(len(row.name.format(layer=9999)) < 64 for row in load_tables().tensors)


@pytest.mark.parametrize(("old", "new", "message"), [
    ('architecture = "deepseek4"', "architecture = ", "is not valid TOML"),
    ('architecture = "deepseek4"', "", "has a malformed entry"),
    ('shape = ["vocab", "hidden"]', 'shape = ["vocab", "hiden"]', r"unknown symbol or layer kind \['hiden'\]"),
    ('layers = "scored"', 'layers = "score"', "unknown symbol or layer kind score"),
    ('symbol = "streams_hidden"', 'symbol = "stream"', "needs exactly one of config and a known symbol"),
    ('symbol = "streams_hidden"', 'symbol = "streams_hidden"\nconfig = "x"', "needs exactly one of config"),
    ('symbol = "streams_hidden"', 'symbl = "streams_hidden"', "has a malformed entry"),
    ("4 = { overlap = 2 }", "x = { overlap = 2 }", "has a malformed entry"),
    ("4 = { overlap = 2 }", "4 = { }", "has a malformed entry"),
])
def test_a_malformed_table_names_the_entry(tmp_path, monkeypatch, old, new, message):
    text = (tables_module.data_directory("templates") / "deepseek4.toml").read_text("utf-8")
    assert old in text
    (tmp_path / "broken.toml").write_text(text.replace(old, new, 1), "utf-8")
    monkeypatch.setattr(tables_module, "data_directory", lambda name: tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_tables("broken")
    assert "broken.toml" in str(caught.value)
    load_tables.cache_clear()


def test_tables_are_data(tmp_path, monkeypatch, make_checkpoint):
    """A row more in the file is a tensor more in the GGUF: no code knows the list."""
    text = (tables_module.data_directory("templates") / "deepseek4.toml").read_text("utf-8")
    more = ("[[tensor]]", 'name = "blk.{layer}.more.weight"', 'source = "layers.{layer}.more"', 'shape = ["heads"]',
            'layers = "scored"')
    (tmp_path / "longer.toml").write_text("\n".join((text, *more)), "utf-8")
    monkeypatch.setattr(tables_module, "data_directory", lambda name: tmp_path)
    path = make_checkpoint()
    for layer in (1, 2):
        add_tensor(path, f"layers.{layer}.more", "F32", [8], bytes(32))
    tensors, _ = derive_tensors(open_checkpoint(path), load_tables("longer"))
    assert [t.name for t in tensors if "more" in t.name] == ["blk.1.more.weight", "blk.2.more.weight"]
    load_tables.cache_clear()


def test_tiny_has_layers_of_every_kind():
    assert set(TINY.ratios) == {int(ratio) for ratio in load_tables().overlaps}
