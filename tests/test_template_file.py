"""Template files: written, read back, taken from elsewhere; what contradicts the checkpoint names both values."""

from __future__ import annotations

from dataclasses import replace

import gguf
import gguf_bytes
import pytest
from tamper import edit_json

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.errors import InputError, ResourceError, UsageError
from dsv4tools.formats.table import FORMATS
from dsv4tools.gguf.header import TensorInfo, encode_header, lay_out
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.gguf.values import KV, VALUE_TYPES, encode_value
from dsv4tools.plan import make_plan
from dsv4tools.reroute import reroute
from dsv4tools.synthetic import FLASH, write_sparse
from dsv4tools.template_file import write_template


@pytest.fixture
def checkpoint(make_checkpoint):
    return open_checkpoint(make_checkpoint())


@pytest.fixture
def own(checkpoint, tmp_path):
    """The checkpoint's own template file."""
    path = tmp_path / "own.gguf"
    write_template(make_plan(checkpoint), path)
    return path


def rewrite(path, *, change=None, order=None, drop=(), add=(), formats=None, shapes=None, alignment=32, data=False):
    """Write the header of `path` again: metadata changed, tensors in another order, missing, added, of other types."""
    with open_gguf(path, template=True) as file:
        kvs = dict(file.kvs)
        tensors = {name: (t.ne, t.format) for name, t in file.tensors.items()}
    if change is not None:
        change(kvs)
    for name in drop:
        del tensors[name]
    tensors |= dict(add)
    shapes, formats = shapes or {}, formats or {}
    tensors = {n: (shapes.get(n, ne), FORMATS[formats.get(n, f.name)]) for n, (ne, f) in tensors.items()}
    names = order(list(tensors)) if order else list(tensors)
    sizes = [tensors[n][1].n_bytes(tensors[n][0]) for n in names]
    offsets, n_data = lay_out(sizes, alignment)
    infos = [TensorInfo(n, *tensors[n], offset) for n, offset in zip(names, offsets, strict=True)]
    header = encode_header(list(kvs.values()), infos, alignment)
    path.write_bytes(header + bytes(n_data if data else 0))
    return path


def set_kv(key, kind, value, item_type=None):
    return lambda kvs: kvs.update({key: KV(key, kind, value, item_type)})


def entries(plan):
    return [(kv.key, kv.type, kv.item_type, list(kv.value) if kv.type == "arr" else kv.value) for kv in plan.kvs]


def layout(plan):
    return [(t.name, t.tensor.ne, t.format.name, t.offset, t.n_bytes) for t in plan.tensors]


# Writing


def test_a_template_is_the_header_and_says_so(checkpoint, tmp_path):
    plan = make_plan(checkpoint)
    path = tmp_path / "t.gguf"
    assert write_template(plan, path) == path.stat().st_size
    with open_gguf(path, template=True) as file:
        assert file.template
        assert file.value("dsv4tools.template") is True
        kvs = [kv for kv in file.kvs.values() if kv.key != "dsv4tools.template"]
        assert [(kv.key, kv.type, kv.item_type) for kv in kvs] == [(kv.key, kv.type, kv.item_type) for kv in plan.kvs]
        assert [(t.name, t.ne, t.format, t.offset) for t in file.tensors.values()] == [
            (t.name, t.tensor.ne, t.format, t.offset) for t in plan.tensors]
    with pytest.raises(InputError, match="looks like a template"):   # it must never be taken for a model
        open_gguf(path)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["t.gguf"]


@pytest.mark.parametrize(("policy", "experts_per_token"), [("q4k", 2), ("q8", 1), ("bf16", 2), ("f32", 1)])
def test_a_sparse_template_is_a_whole_file_for_every_reader(checkpoint, tmp_path, policy, experts_per_token):
    plan = make_plan(reroute(checkpoint, experts_per_token), policy=policy)
    path = tmp_path / "t.gguf"
    n_bytes = write_template(plan, path, sparse=True)
    assert path.stat().st_size == n_bytes
    with open_gguf(path) as file:
        assert not file.template
        assert file.ok
    reader = gguf.GGUFReader(path)
    assert {t.name: (tuple(int(n) for n in t.shape), t.tensor_type.name) for t in reader.tensors} == {
        t.name: (t.tensor.ne, t.format.name) for t in plan.tensors}
    field = reader.fields["deepseek4.attention.compress_ratios"]
    assert [int(n) for n in field.contents()] == [0, 4, 128]


def test_a_sparse_template_of_full_size_takes_little_disk(tmp_path):
    path = tmp_path / "flash.gguf"
    shape = replace(FLASH, vocab=1024, merges=None)   # gguf-py takes 10 seconds for 130,000 tokens
    plan = make_plan(open_checkpoint(write_sparse(tmp_path / "x", shape)))
    assert write_template(plan, path, sparse=True) == plan.data_bytes + len(plan.header) + 32
    status = path.stat()
    assert status.st_size > 163_000_000_000
    assert status.st_blocks * 512 < 50_000_000
    assert len(gguf.GGUFReader(path).tensors) == 1328
    path.unlink()


def test_an_output_that_exists_is_kept(checkpoint, tmp_path):
    path = tmp_path / "t.gguf"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists; --overwrite replaces it"):
        write_template(make_plan(checkpoint), path)
    assert path.read_text() == "mine"
    write_template(make_plan(checkpoint), path, overwrite=True)
    assert path.read_bytes()[:4] == b"GGUF"


def test_places_where_no_template_can_be(checkpoint, tmp_path):
    plan = make_plan(checkpoint)
    shard = next(iter(checkpoint.shards.values())).path
    before = shard.read_bytes()
    for path, error in ((shard, UsageError), (checkpoint.directory / "t.gguf", UsageError), (tmp_path, UsageError),
                        (tmp_path / "no" / "t.gguf", ResourceError), (tmp_path / ("x" * 5000), ResourceError)):
        with pytest.raises(error):
            write_template(plan, path, overwrite=True)
    assert shard.read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises((UsageError, ResourceError)):
        write_template(plan, tmp_path / "file" / "t.gguf")


# Reading one's own back


@pytest.mark.parametrize("sparse", [False, True])
def test_the_own_template_changes_nothing(checkpoint, tmp_path, sparse):
    plan = make_plan(checkpoint)
    path = tmp_path / "t.gguf"
    write_template(plan, path, sparse=sparse)
    again = make_plan(checkpoint, template_file=path)
    assert again.header == plan.header
    assert again.notes == ()


def test_the_own_template_of_a_re_routed_view(checkpoint, tmp_path):
    view = reroute(checkpoint, 1)
    path = tmp_path / "t.gguf"
    write_template(make_plan(view), path)
    assert make_plan(view, template_file=path).header == make_plan(view).header
    with pytest.raises(InputError, match=r"tid2eid\.weight' is \[1, 512\], the checkpoint gives \[2, 512\]"):
        make_plan(checkpoint, template_file=path)


def test_a_whole_gguf_serves_as_a_template(checkpoint, own):
    rewrite(own, data=True)
    with open_gguf(own) as file:
        assert not file.template
    assert make_plan(checkpoint, template_file=own).header == make_plan(checkpoint).header


def test_the_types_of_the_file_are_the_policys_business(checkpoint, own):
    rewrite(own, formats={"output.weight": "F16", "blk.0.ffn_up_exps.weight": "Q2_K"})
    assert layout(make_plan(checkpoint, template_file=own)) == layout(make_plan(checkpoint))


def test_policy_template_keeps_the_types_of_the_file(checkpoint, own):
    rewrite(own, formats={"output.weight": "F16", "blk.0.ffn_up_exps.weight": "Q8_0"})
    found = {t.name: t for t in make_plan(checkpoint, policy="template", template_file=own).tensors}
    plain = {t.name: t for t in make_plan(checkpoint).tensors}
    assert found["output.weight"].format.name == "F16"
    assert found["blk.0.ffn_up_exps.weight"].format.name == "Q8_0"
    assert found["output.weight"].rule == "type kept"
    assert {n: t.format for n, t in found.items() if n not in ("output.weight", "blk.0.ffn_up_exps.weight")} == {
        n: t.format for n, t in plain.items() if n not in ("output.weight", "blk.0.ffn_up_exps.weight")}


def test_policy_template_without_a_file(checkpoint):
    with pytest.raises(InputError, match="give a template file"):
        make_plan(checkpoint, policy="template")


def test_policy_template_with_a_type_that_cannot_be_written(checkpoint, own):
    rewrite(own, formats={"output.weight": "I16"})   # no encoder ever writes weights as integers
    with pytest.raises(InputError, match=r"'output\.weight': type I16 cannot be written"):
        make_plan(checkpoint, policy="template", template_file=own)


# Order, alignment, metadata


def test_tensors_stand_in_the_order_of_the_file(checkpoint, own):
    rewrite(own, order=lambda names: names[::-1])
    plan = make_plan(checkpoint, template_file=own)
    straight = make_plan(checkpoint)
    assert [t.name for t in plan.tensors] == [t.name for t in straight.tensors][::-1]
    assert {t.name: t.format for t in plan.tensors} == {t.name: t.format for t in straight.tensors}
    assert plan.tensors[0].offset == 0


def test_metadata_stand_in_the_order_of_the_file(checkpoint, own):
    def backwards(kvs):
        turned = dict(reversed(kvs.items()))
        kvs.clear()
        kvs.update(turned)

    rewrite(own, change=backwards)
    plan = make_plan(checkpoint, template_file=own)
    keys = [kv.key for kv in plan.kvs]
    order = ("tokenizer.ggml.tokens", "deepseek4.block_count", "general.architecture")
    assert [key for key in keys if key in order] == list(order)
    assert sorted(keys) == sorted(kv.key for kv in make_plan(checkpoint).kvs)


@pytest.mark.parametrize("alignment", [64, 4096])
def test_alignment_is_that_of_the_file(checkpoint, own, alignment):
    rewrite(own, change=set_kv("general.alignment", "u32", alignment), alignment=alignment)
    plan = make_plan(checkpoint, template_file=own)
    assert plan.template.alignment == alignment
    assert all(t.offset % alignment == 0 for t in plan.tensors)
    assert plan.data_offset % alignment == 0


def test_foreign_entries_are_kept_and_what_a_conversion_decides_is_not(checkpoint, own):
    def change(kvs):
        for key, kind, value in (("general.name", "str", "Mine"), ("general.author", "str", "me"), ("my.key", "u64", 7),
                                 ("deepseek4.nextn_predict_layers", "u32", 1), ("general.file_type", "u32", 99),
                                 ("general.quantization_version", "u32", 1), ("general.quantized_by", "str", "other"),
                                 ("quantize.imatrix.file", "str", "/home/me/x"), ("dsv4tools.policy", "str", "old"),
                                 ("split.count", "u16", 1), ("split.no", "u16", 0),
                                 ("tokenizer.chat_template", "str", "{{ x }}")):
            set_kv(key, kind, value)(kvs)

    rewrite(own, change=change)
    values = {kv.key: kv.value for kv in make_plan(checkpoint, template_file=own).kvs}
    assert [values[k] for k in ("general.name", "general.author", "my.key", "deepseek4.nextn_predict_layers")] == [
        "Mine", "me", 7, 1]
    assert values["tokenizer.chat_template"] == "{{ x }}"
    assert (values["general.file_type"], values["general.quantization_version"]) == (14, 2)
    assert values["general.quantized_by"].startswith("dsv4tools ")
    assert values["dsv4tools.policy"] == "q4k"
    for key in ("quantize.imatrix.file", "dsv4tools.template", "split.count", "split.no"):
        assert key not in values


# What contradicts


@pytest.mark.parametrize(("key", "kind", "value", "item", "shown"), [
    ("block_count", "u32", 4, None, ("is 4", "says 3")),
    ("expert_used_count", "u32", 6, None, ("is 6", "says 2")),
    ("rope.freq_base", "f32", 10001.0, None, ("is 10001.0", "says 10000.0")),
    ("rope.freq_base", "f64", 1e300, None, ("is 1e+300", "says 10000.0")),
    ("rope.freq_base", "f32", float("nan"), None, ("is nan", "says 10000.0")),
    ("rope.freq_base", "f64", float("-inf"), None, ("is -inf", "says 10000.0")),
    ("rope.freq_base", "str", "10000", None, ("is 10000", "says 10000.0")),
    ("rope.scaling.type", "str", "linear", None, ("is linear", "says yarn")),
    ("rope.scaling.type", "u32", 7, None, ("is 7", "says yarn")),
    ("expert_weights_norm", "bool", False, None, ("is False", "says True")),
    ("expert_weights_norm", "u32", 1, None, ("is 1", "says True")),
    ("block_count", "bool", True, None, ("is True", "says 3")),
    ("attention.head_count_kv", "bool", True, None, ("is True", "says 1")),
    ("rope.scaling.type", "str", "x" * 10_000, None, ("is xxx", "x..., the checkpoint says yarn")),
    ("block_count", "str", "3", None, ("is 3", "says 3")),
    ("block_count", "arr", [3, 3], "u32", ("is [3, 3]", "says 3")),
    ("block_count", "arr", [3], "u32", ("is [3]", "says 3")),
    ("block_count", "arr", [], "u32", ("is []", "says 3")),
    ("rope.scaling.type", "arr", ["yarn"], "str", ("is ['yarn']", "says yarn")),
    ("rope.freq_base", "arr", [10000.0], "f32", ("is [10000.0]", "says 10000.0")),
    ("attention.compress_ratios", "arr", [0, 4, 4], "i32", ("is [0, 4, 4]", "says [0, 4, 128]")),
    ("attention.compress_ratios", "arr", [0, 4], "i32", ("is [0, 4]", "says [0, 4, 128]")),
    ("attention.compress_ratios", "arr", ["0", "4", "128"], "str", ("is ['0'", "says [0, 4, 128]")),
    ("attention.compress_ratios", "u32", 4, None, ("is 4", "says [0, 4, 128]")),
    ("swiglu_clamp_exp", "arr", [10.0, 10.0], "f32", ("is [10.0, 10.0]", "says [10.0, 10.0, 10.0]")),
    ("swiglu_clamp_exp", "f32", 10.0, None, ("is 10.0", "says [10.0, 10.0, 10.0]")),
])
def test_a_contradicting_value_names_both(checkpoint, own, key, kind, value, item, shown):
    rewrite(own, change=set_kv(f"deepseek4.{key}", kind, value, item))
    with pytest.raises(InputError) as caught:
        make_plan(checkpoint, template_file=own)
    for part in (f"own.gguf: key 'deepseek4.{key}'", *shown):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("key", "kind", "value", "item", "own_kind"), [
    ("context_length", "u64", 1_048_576, None, "u32"),
    ("rope.freq_base", "f64", 10000.0, None, "f32"),
    ("rope.freq_base", "u32", 10000, None, "f32"),
    ("attention.layer_norm_rms_epsilon", "f64", 1e-6, None, "f32"),
    ("block_count", "i32", 3, None, "u32"),
    ("attention.compress_ratios", "arr", [0, 4, 128], "u32", "i32"),
    ("swiglu_clamp_exp", "arr", [10.0, 10.0, 10.0], "f64", "f32"),
])
def test_a_type_that_llama_cpp_refuses_is_noted_and_written_right(checkpoint, own, key, kind, value, item, own_kind):
    rewrite(own, change=set_kv(f"deepseek4.{key}", kind, value, item))
    plan = make_plan(checkpoint, template_file=own)
    assert plan.notes == (f"deepseek4.{key} written as {own_kind}, the template file has {item or kind}",)
    assert entries(plan) == entries(make_plan(checkpoint))


def test_large_integers_are_compared_exactly(make_checkpoint, tmp_path):
    path = make_checkpoint()
    edit_json(path / "config.json", lambda config: config.update(max_position_embeddings=(1 << 24) + 1))
    write_template(make_plan(open_checkpoint(path)), tmp_path / "t.gguf")
    edit_json(path / "config.json", lambda config: config.update(max_position_embeddings=1 << 24))
    with pytest.raises(InputError, match=r"context_length': is 16777217, the checkpoint says 16777216"):
        make_plan(open_checkpoint(path), template_file=tmp_path / "t.gguf")


def test_compress_ratios_may_lack_the_zeros_of_draft_blocks(make_checkpoint, tmp_path):
    checkpoint = open_checkpoint(make_checkpoint(draft_blocks=1))
    path = tmp_path / "t.gguf"
    write_template(make_plan(checkpoint), path)
    rewrite(path, change=set_kv("deepseek4.attention.compress_ratios", "arr", [0, 4, 128], "i32"))
    plan = make_plan(checkpoint, template_file=path)
    assert list({kv.key: kv.value for kv in plan.kvs}["deepseek4.attention.compress_ratios"]) == [0, 4, 128, 0]


def test_keys_that_the_file_lacks_are_added_and_noted(checkpoint, own):
    def change(kvs):
        for key in ("deepseek4.vocab_size", "deepseek4.rope.scaling.type", "deepseek4.expert_gating_func"):
            del kvs[key]

    rewrite(own, change=change)
    plan = make_plan(checkpoint, template_file=own)
    assert set(plan.notes) == {f"deepseek4.{key} added, the template file lacks it"
                               for key in ("vocab_size", "rope.scaling.type", "expert_gating_func")}
    assert sorted(entries(plan)) == sorted(entries(make_plan(checkpoint)))


def without_tokenizer(kvs):
    for key in [k for k in kvs if k.startswith("tokenizer.")]:
        del kvs[key]


def test_a_file_without_tokenizer_gets_the_checkpoints(checkpoint, own):
    rewrite(own, change=without_tokenizer)
    plan = make_plan(checkpoint, template_file=own)
    assert sorted(entries(plan)) == sorted(entries(make_plan(checkpoint)))
    assert sum("tokenizer." in note for note in plan.notes) == 10


def test_tokenizer_keys_that_are_missing_beside_the_same_tokens_are_added(checkpoint, own):
    def change(kvs):
        for key in ("merges", "token_type", "padding_token_id"):
            del kvs[f"tokenizer.ggml.{key}"]

    rewrite(own, change=change)
    rewrite_model = set_kv("tokenizer.ggml.model", "str", "bpe")
    rewrite(own, change=rewrite_model)
    plan = make_plan(checkpoint, template_file=own)
    expected = [entry if entry[0] != "tokenizer.ggml.model" else (*entry[:3], "bpe")
                for entry in entries(make_plan(checkpoint))]
    assert sorted(entries(plan)) == sorted(expected)
    assert len(plan.notes) == 3


def test_the_tokenizer_of_the_file_is_kept_where_it_differs(checkpoint, own):
    def change(kvs):
        tokens = list(kvs["tokenizer.ggml.tokens"].value)
        tokens[300] = "other"
        set_kv("tokenizer.ggml.tokens", "arr", tokens, "str")(kvs)
        del kvs["tokenizer.ggml.merges"]

    rewrite(own, change=change)
    values = {kv.key: kv.value for kv in make_plan(checkpoint, template_file=own).kvs}
    assert values["tokenizer.ggml.tokens"][300] == "other"
    assert "tokenizer.ggml.merges" not in values   # merges of another vocabulary would be worse than none


@pytest.mark.parametrize(("value", "item", "message"), [
    ([str(n) for n in range(511)], "str", "has 511 tokens, the checkpoint's vocabulary has 512"),
    ([str(n) for n in range(513)], "str", "has 513 tokens"),
    ([], "str", "has 0 tokens"),
    (list(range(512)), "u32", "is no list of strings"),
    (512, None, "is no list of strings"),
    ("x" * 512, None, "is no list of strings"),
])
def test_another_vocabulary_is_refused(checkpoint, own, value, item, message):
    kind = "arr" if item else "str" if isinstance(value, str) else "u32"
    rewrite(own, change=set_kv("tokenizer.ggml.tokens", kind, value, item))
    with pytest.raises(InputError, match=rf"key 'tokenizer\.ggml\.tokens'.*{message}"):
        make_plan(checkpoint, template_file=own)


@pytest.mark.parametrize(("kind", "value", "item"), [("str", "llama", None), ("u32", 7, None), ("str", "", None),
                                                     ("arr", ["deepseek4"], "str"), ("arr", [1, 2], "u32")])
def test_another_architecture(checkpoint, own, kind, value, item):
    rewrite(own, change=set_kv("general.architecture", kind, value, item))
    with pytest.raises(InputError, match=r"key 'general\.architecture'.*the checkpoint is 'deepseek4'"):
        make_plan(checkpoint, template_file=own)


def test_no_architecture(checkpoint, own):
    rewrite(own, change=lambda kvs: kvs.pop("general.architecture"))
    with pytest.raises(InputError, match=r"general\.architecture"):
        make_plan(checkpoint, template_file=own)


def test_missing_extra_and_misshapen_tensors_are_all_listed(checkpoint, own):
    rewrite(own, drop=["blk.1.attn_kv.weight", "output.weight"],
            add={"blk.3.attn_kv.weight": ((256, 128), FORMATS["F16"]), "mtp.0.x": ((32,), FORMATS["F32"])}.items(),
            shapes={"output_norm.weight": (128,), "blk.0.ffn_up_exps.weight": (256, 256, 3)})
    with pytest.raises(InputError) as caught:
        make_plan(checkpoint, template_file=own)
    found = str(caught.value)
    for part in ("lacks 2 tensors of the checkpoint: output.weight, blk.1.attn_kv.weight",
                 "has 2 tensors that the checkpoint does not give: blk.3.attn_kv.weight, mtp.0.x",
                 "tensor 'output_norm.weight' is [128], the checkpoint gives [256]",
                 "tensor 'blk.0.ffn_up_exps.weight' is [256, 256, 3], the checkpoint gives [256, 256, 4]"):
        assert part in found


@pytest.mark.parametrize("raw", [b"", b"GGUF", b"GGML" + bytes(100), b"\0" * 1000])
def test_a_file_that_is_no_gguf(checkpoint, tmp_path, raw):
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(InputError, match=r"bad\.gguf"):
        make_plan(checkpoint, template_file=tmp_path / "bad.gguf")
    with pytest.raises(InputError, match="no such file"):
        make_plan(checkpoint, template_file=tmp_path / "missing.gguf")


# The dialect of the first generator of templates for 4-expert models


def dialect(checkpoint, path):
    """Offsets 0, some floats as f64, a length as u64, lists as u32, the tokenizer called bpe, no vocab_size."""
    plan = make_plan(checkpoint, policy="f32")
    other = {
        "deepseek4.rope.freq_base": ("f64", None, 10000.0),
        "deepseek4.rope.scaling.factor": ("f64", None, 16.0),
        "deepseek4.context_length": ("u64", None, 1_048_576),
        "deepseek4.attention.compress_ratios": ("arr", "u32", [0, 4, 128]),
        "tokenizer.ggml.token_type": ("arr", "u32", [0] * 512),
        "tokenizer.ggml.model": ("str", None, "bpe"),
    }
    kvs = []
    for kv in plan.kvs:
        kind, item_type, value = other.get(kv.key, (kv.type, kv.item_type, kv.value))
        if kv.key != "deepseek4.vocab_size":
            payload = encode_value(KV(kv.key, kind, value, item_type))
            kvs.append(gguf_bytes.kv(kv.key, VALUE_TYPES[kind].type_id, payload))
    tensors = [gguf_bytes.tensor(t.name, t.tensor.ne, t.format.type_id, 0) for t in plan.tensors]
    path.write_bytes(gguf_bytes.gguf(kvs, tensors, b""))
    return path


def test_a_template_whose_offsets_are_all_zero(checkpoint, tmp_path):
    plan = make_plan(checkpoint, template_file=dialect(checkpoint, tmp_path / "t.gguf"))
    assert layout(plan) == layout(make_plan(checkpoint))
    values = {kv.key: (kv.item_type or kv.type, kv.value) for kv in plan.kvs}
    assert values["deepseek4.rope.freq_base"] == ("f32", 10000.0)
    assert values["deepseek4.vocab_size"] == ("u32", 512)
    assert values["tokenizer.ggml.model"] == ("str", "bpe")   # the tokenizer is the file's
    assert {note.split()[0] for note in plan.notes} == {
        "deepseek4.context_length", "deepseek4.rope.freq_base", "deepseek4.rope.scaling.factor",
        "deepseek4.attention.compress_ratios", "deepseek4.vocab_size"}


def test_policy_template_after_it(checkpoint, tmp_path):
    path = dialect(checkpoint, tmp_path / "t.gguf")
    formats = {t.format.name for t in make_plan(checkpoint, policy="template", template_file=path).tensors}
    assert formats == {"F32", "I32"}


def test_a_template_of_another_checkpoint_of_the_same_shape(make_checkpoint, own, tmp_path):
    path = make_checkpoint("other", seed=9)
    edit_json(path / "config.json", lambda config: config.update(rms_norm_eps=2e-6))
    with pytest.raises(InputError, match=r"attention\.layer_norm_rms_epsilon'.*says 2e-06"):
        make_plan(open_checkpoint(path), template_file=own)


def test_a_plan_says_what_it_was_made_with(checkpoint, own):
    plan = make_plan(checkpoint, template_file=own)
    assert replace(plan.template, notes=()).file_formats.keys() == {t.name for t in plan.tensors}
