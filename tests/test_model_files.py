"""Models that cannot be opened or run: each error names what is wrong. And what a GGUF's metadata say."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import SMALL
from tamper import drop_tensor, edit_config, find_tensor, replace_tensor, write_tensor

import dsv4tools as dt
from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.checkpoint.config import read_config
from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.table import FORMATS
from dsv4tools.gguf.header import TensorInfo, encode_header, lay_out
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.gguf.splits import split_kvs, split_name
from dsv4tools.gguf.values import KV
from dsv4tools.model import open_model
from dsv4tools.template.gguf_config import read_gguf_config

TOKENS = np.random.default_rng(0).integers(0, 512, 9)


def run(source, **options):
    with open_model(source, **options) as model:
        return model.forward(TOKENS)


@pytest.fixture(scope="module")
def source(_written):
    return _written(shape=SMALL, seed=0, shards=2, merges_form="strings")


@pytest.fixture(scope="module")
def right(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "right.gguf"
    dt.convert(dt.plan(open_checkpoint(source)), out)
    return out


def rewrite(path, out, *, change=None, tensors=None):
    """Write a GGUF again: `change` edits the list of entries, `tensors` is name -> (format, ne, bytes) or None."""
    with open_gguf(path) as file:
        kvs = list(file.kvs.values())
        content = {n: (t.format.name, t.ne, file.read_tensor_bytes(n).tobytes()) for n, t in file.tensors.items()}
    if change:
        kvs = change(kvs)
    content = {name: t for name, t in (content | (tensors or {})).items() if t is not None}
    offsets, n_bytes = lay_out([len(raw) for _, _, raw in content.values()])
    infos = [TensorInfo(name, content[name][1], FORMATS[content[name][0]], at)
             for name, at in zip(content, offsets, strict=True)]
    data = bytearray(n_bytes)
    for (_, _, raw), at in zip(content.values(), offsets, strict=True):
        data[at : at + len(raw)] = raw
    out.write_bytes(encode_header(kvs, infos) + data)
    return out


def entry(key, value):
    """Set ``deepseek4.key`` to a value of the same type; None takes it away."""
    def change(kvs):
        found = [replace(kv, value=value) if kv.key == f"deepseek4.{key}" else kv for kv in kvs]
        return [kv for kv in found if kv.value is not None]

    return change


class TestGguf:
    def test_config_is_the_checkpoints(self, source, right):
        with open_gguf(right) as file:
            found = read_gguf_config(file)
        expected = open_checkpoint(source).config
        for name in ("rms_norm_eps", "hc_eps"):   # float32 in the file
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-7)
        # What a GGUF does not say: draft blocks and how the source was quantized.
        assert replace(found, rms_norm_eps=1e-6, hc_eps=1e-6) == replace(
            expected, weight_block_size=None, num_nextn_predict_layers=0, rms_norm_eps=1e-6, hc_eps=1e-6)

    @pytest.mark.parametrize(("name", "n_vocab"), [("tiny-6e.mainline_kv.json", 512), ("flash_one_file.json", 129_280)])
    def test_metadata_of_other_writers(self, data, tiny_6e, tmp_path, name, n_vocab):
        entries = json.loads((data / name).read_text("utf-8"))
        entries = entries.get("metadata", entries)
        types = {"UINT32": "u32", "INT32": "i32", "FLOAT32": "f32", "BOOL": "bool", "STRING": "str", "ARRAY": "arr"}
        kvs = []
        for key, entry in entries.items():
            if key == "general.architecture" or key.startswith("deepseek4."):
                kind, *item = (types[t] for t in entry["type"])
                kvs.append(KV(key, kind, entry["value"], *item))
        embedding = TensorInfo("token_embd.weight", (8, n_vocab), FORMATS["F32"], 0)
        path = tmp_path / "other.gguf"
        path.write_bytes(encode_header(kvs, [embedding]))
        with open_gguf(path, template=True) as file:
            found = read_gguf_config(file)
        directory = tiny_6e / "config.json" if n_vocab == 512 else data / "configs" / "flash.json"
        assert replace(found, rms_norm_eps=1e-6, hc_eps=1e-6) == replace(
            read_config(directory), weight_block_size=None, num_nextn_predict_layers=0)

    def test_vocab_size_may_be_missing(self, right, tmp_path):
        """llama.cpp's converter does not write it."""
        path = rewrite(right, tmp_path / "a.gguf", change=entry("vocab_size", None))
        np.testing.assert_array_equal(run(path), run(right))

    @pytest.mark.parametrize(("key", "value", "message"), [
        ("embedding_length", None, r"'deepseek4.embedding_length': is missing"),
        ("attention.key_length", None, None),   # value_length says the same
        ("attention.value_length", 64, r"value_length': is 64, deepseek4.attention.key_length is 128"),
        ("embedding_length_out", 5, r"'deepseek4.embedding_length_out': is 5, the other keys imply 1024"),
        ("expert_used_count", 9, r"'deepseek4.expert_used_count': is 9, expected at most n_routed_experts = 4"),
        ("attention.compress_ratios", [0, 4, 7], r"ratios': layer 2 has ratio 7, an unknown layer kind.*0, 4, 128"),
        ("attention.compress_ratios", [0, 4], r"'deepseek4.attention.compress_ratios': has 2 entries"),
        ("swiglu_clamp_exp", [10.0, 10.0, 9.0], r"'deepseek4.swiglu_clamp_exp': is \[10.0, 10.0, 9.0\], expected one"),
        ("swiglu_clamp_shexp", [9.0] * 3, r"swiglu_clamp_shexp': is 9.0, deepseek4.swiglu_clamp_exp is 10.0"),
        ("expert_gating_func", 3, r"'deepseek4.expert_gating_func': is 3, expected one of 1, 2, 4"),
        ("rope.freq_base", float("nan"), r"'deepseek4.rope.freq_base': is nan, expected a positive number"),
        ("hash_layer_count", 4, r"'deepseek4.hash_layer_count': is 4, expected at most"),
        ("expert_group_count", None, None),
    ])
    def test_metadata(self, right, tmp_path, key, value, message):
        path = rewrite(right, tmp_path / "a.gguf", change=entry(key, value))
        if message is None:   # an entry that the file need not have
            np.testing.assert_array_equal(run(path), run(right))
            return
        with pytest.raises(InputError, match=message):
            open_model(path)

    def test_split_sets(self, right, tmp_path):
        with open_gguf(right) as file:
            names = list(file.tensors)
        for i, kept in enumerate((names[:20], names[20:])):
            extra = split_kvs(i, 2, len(names))
            rewrite(right, tmp_path / split_name("set", i, 2), tensors=dict.fromkeys(set(names) - set(kept)),
                    change=lambda kvs, i=i, extra=extra: [*([] if i else kvs), *extra])
        with open_model(tmp_path / split_name("set", 1, 2)) as model:
            assert [path.name for path in model.weights.paths] == [split_name("set", i, 2) for i in range(2)]
            np.testing.assert_array_equal(model.forward(TOKENS), run(right))

    def test_groups_of_experts_are_refused(self, right, tmp_path):
        groups = KV("deepseek4.expert_group_count", "u32", 8)
        path = rewrite(right, tmp_path / "a.gguf", change=lambda kvs: [*kvs, groups])
        with pytest.raises(InputError, match="8 groups"):
            open_model(path)

    def test_mistyped(self, right, tmp_path):
        def change(kvs):
            return [KV(kv.key, "str", "many") if kv.key == "deepseek4.block_count" else kv for kv in kvs]

        with pytest.raises(InputError, match=r"'deepseek4.block_count': is 'many', expected an integer"):
            open_model(rewrite(right, tmp_path / "a.gguf", change=change))

    def test_another_architecture(self, right, tmp_path):
        def change(kvs):
            return [replace(kv, value="llama") if kv.key == "general.architecture" else kv for kv in kvs]

        with pytest.raises(InputError, match=r"general.architecture.*'llama', expected 'deepseek4'"):
            open_model(rewrite(right, tmp_path / "a.gguf", change=change))

    def test_missing_tensors_are_all_listed(self, right, tmp_path):
        gone = {"blk.1.indexer.proj.weight": None, "output_norm.weight": None}
        with pytest.raises(InputError, match=r"2 tensors missing: output_norm.weight, blk.1.indexer.proj.weight"):
            open_model(rewrite(right, tmp_path / "a.gguf", tensors=gone))

    def test_wrong_shape_and_type(self, right, tmp_path):
        wrong = {
            "blk.0.attn_norm.weight": ("F32", (128,), bytes(512)),
            "blk.0.ffn_gate_tid2eid.weight": ("F32", (2, 512), bytes(4096)),
            "blk.2.ffn_norm.weight": ("I32", (256,), bytes(1024)),
        }
        with pytest.raises(InputError) as error:
            open_model(rewrite(right, tmp_path / "a.gguf", tensors=wrong))
        for text in ("tensor blk.0.attn_norm.weight is [128], the metadata imply [256]",
                     "tensor blk.0.ffn_gate_tid2eid.weight is F32, expected I32",
                     "tensor blk.2.ffn_norm.weight is I32, expected "):
            assert text in str(error.value)

    @pytest.mark.parametrize(("name", "at", "raw", "place"), [
        ("blk.0.attn_norm.weight", 4 * 7, np.float32(np.nan).tobytes(), r"row 0: column 7 is nan"),
        ("token_embd.weight", 2 * (256 * int(TOKENS[3]) + 5), b"\0\x7c", rf"row {TOKENS[3]}: column 5 is inf"),
        ("blk.1.attn_q_b.weight", 34 * 8 * 33, b"\0\x7e", r"row 33: column 0 is nan"),                    # Q8_0: d
        ("blk.2.ffn_gate_shexp.weight", 34 * 8 * 2 + 34, b"\0\xfc", r"row 2: column 32 is -?(inf|nan)"),  # infinite d
    ])
    def test_values_that_are_not_finite(self, right, tmp_path, name, at, raw, place):
        with pytest.raises(InputError, match=rf"tensor {name}: {place}, expected a finite weight"):
            run(_patched(right, tmp_path, name, at, raw))

    def test_nan_in_an_expert(self, right, tmp_path):
        """The dmin of a Q4_K block, seen as soon as a token is routed there."""
        for expert in range(4):
            path = _patched(right, tmp_path, "blk.2.ffn_up_exps.weight", 144 * (256 * expert + 17) + 2, b"\1\x7c")
            with pytest.raises(InputError, match=rf"blk.2.ffn_up_exps.weight: expert {expert} row 17: column 0 is nan"):
                run(path)

    def test_expert_id_out_of_range(self, right, tmp_path):
        path = _patched(right, tmp_path, "blk.0.ffn_gate_tid2eid.weight", 8 * int(TOKENS[2]) + 4, b"\4\0\0\0")
        message = rf"tid2eid.weight: row {TOKENS[2]}: column 1 routes to expert 4, expected 0 to 3"
        with pytest.raises(InputError, match=message):
            run(path)

    def test_templates_are_no_models(self, source, tmp_path):
        plan = dt.plan(open_checkpoint(source))
        (tmp_path / "header.gguf").write_bytes(plan.header)
        with pytest.raises(InputError, match="is a template: it holds no weights"):
            open_model(tmp_path / "header.gguf")

    def test_experts_per_token_is_for_checkpoints(self, right):
        with pytest.raises(UsageError, match="--experts-per-token: is for checkpoints"):
            open_model(right, experts_per_token=1)

    @pytest.mark.parametrize("policy", ["q8", "bf16", "f32"])
    def test_other_types(self, source, tmp_path, policy):
        dt.convert(dt.plan(open_checkpoint(source), policy=policy), tmp_path / "other.gguf")
        difference = np.abs(run(tmp_path / "other.gguf") - run(source)).max()
        assert (difference == 0) == (policy == "f32")
        assert difference < 2


def _patched(right, tmp_path, name, at, raw):
    path = tmp_path / "patched.gguf"
    data = bytearray(right.read_bytes())
    with open_gguf(right) as file:
        start = file.data_offset + file.tensors[name].offset + at
    data[start : start + len(raw)] = raw
    path.write_bytes(data)
    return path


class TestCheckpoint:
    def test_missing_tensor(self, make_checkpoint):
        path = make_checkpoint()
        drop_tensor(path, "layers.1.attn.indexer.wq_b.scale")
        drop_tensor(path, "layers.2.ffn.experts.3.w2.weight")
        message = r"missing: .*layers.2.ffn.experts.3.w2.weight.*layers.1.attn.indexer.wq_b.scale"
        with pytest.raises(InputError, match=message):
            open_model(path)

    def test_wrong_shape(self, make_checkpoint):
        path = make_checkpoint()
        replace_tensor(path, "layers.0.attn.attn_sink", "F32", [4], bytes(16))
        message = r"'layers.0.attn.attn_sink': has shape \[4\] \(F32\), config.json implies \[8\]"
        with pytest.raises(InputError, match=message):
            open_model(path)

    def test_unknown_layer_kind(self, make_checkpoint):
        path = make_checkpoint()
        edit_config(path, compress_ratios=[0, 5, 128])
        message = r"'compress_ratios': layer 1 has ratio 5, an unknown layer kind.*0, 4, 128"
        with pytest.raises(InputError, match=message):
            open_model(path)

    @pytest.mark.parametrize(("name", "at", "raw", "where"), [
        ("layers.0.ffn.gate.weight", 2 * (256 * 2 + 9), b"\xc0\x7f", "'layers.0.ffn.gate.weight': row 2: column 9"),
        ("layers.1.attn.wkv.weight", 256 * 3 + 4, b"\x7f", "'layers.1.attn.wkv.weight': row 3: column 4 is nan"),
        ("layers.1.ffn.shared_experts.w2.scale", 1, b"\xff", "shared_experts.w2.weight': row 0: column 128"),
        ("layers.2.hc_ffn_scale", 8, b"\0\0\x80\xff", "'layers.2.hc_ffn_scale': row 0: column 2 is -inf"),
    ])
    def test_values_that_are_not_finite(self, make_checkpoint, name, at, raw, where):
        path = make_checkpoint()
        write_tensor(path, name, raw, at)
        with pytest.raises(InputError, match=f"{where}.*expected a finite weight"):
            run(path)

    def test_nan_in_an_expert(self, make_checkpoint):
        path = make_checkpoint()
        _, _, n_bytes = find_tensor(path, "layers.1.ffn.experts.2.w1.scale")
        write_tensor(path, "layers.1.ffn.experts.2.w1.scale", b"\xff" * 8, n_bytes - 8)
        with pytest.raises(InputError, match=r"'layers.1.ffn.experts.2.w1.weight': row 255: column 0 is nan"):
            run(path)

    def test_expert_id_out_of_range(self, make_checkpoint):
        path = make_checkpoint()
        write_tensor(path, "layers.0.ffn.gate.tid2eid", b"\xff" * 8, 16 * int(TOKENS[0]))
        message = rf"tid2eid': row {TOKENS[0]} column 0 routes to expert -1, expected 0 to 3"
        with pytest.raises(InputError, match=message):
            run(path)

    def test_more_experts_than_the_tables_have(self, make_checkpoint):
        with pytest.raises(UsageError, match="--experts-per-token: is 3"):
            open_model(make_checkpoint(), experts_per_token=3)

    def test_overflow_names_the_tensor(self, make_checkpoint):
        """Finite weights whose product is beyond float32."""
        path = make_checkpoint()
        huge = np.full(256, 3e38, np.float32)
        replace_tensor(path, "layers.0.attn_norm.weight", "F32", [256], huge.tobytes())
        with pytest.raises(InputError, match=r"layers.0.attn.*beyond float32"):
            run(path)

    def test_streams_that_overflow_name_the_layer(self, source):
        with open_model(source) as model:
            model.layers[1].experts = lambda x, tokens, observe: np.full_like(x, 3e38)
            with pytest.raises(InputError, match=r"layer 1: the residual streams grow beyond float32"):
                model.forward(TOKENS)
