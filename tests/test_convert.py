"""What a conversion writes: against the C quantizer's hashes, and against a derivation that shares no code with it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from independent import Weights, check_file, payload
from tamper import load_shard, read_tensor, replace_tensor, save_shard, shards, write_tensor

import dsv4tools as dt
from dsv4tools.errors import Dsv4Error
from dsv4tools.formats.table import FORMATS

RECIPES = ("q4k", "q8", "bf16", "f32")
GATE = "layers.{}.ffn.experts.{}.w1.weight"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensors(path) -> dict[str, bytes]:
    return {t.name: payload(t) for t in GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def converted(tiny_6e, tmp_path_factory):
    """The shared checkpoint in each recipe, by name."""
    directory = tmp_path_factory.mktemp("converted")
    checkpoint = dt.open_checkpoint(tiny_6e)
    for recipe in RECIPES:
        done = dt.convert(dt.plan(checkpoint, policy=recipe), directory / f"{recipe}.gguf", threads=2)
        assert done.zeroed == {}
        assert done.n_bytes == done.path.stat().st_size
    return {recipe: directory / f"{recipe}.gguf" for recipe in RECIPES}


def describe(path) -> dict[str, dict[str, object]]:
    return {
        t.name: {"type": t.tensor_type.name, "ne": list(map(int, t.shape)), "nbytes": int(t.n_bytes),
                 "sha256": sha256(payload(t))}
        for t in GGUFReader(path).tensors
    }  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_tensor_is_what_the_c_quantizer_writes(recipe, converted, data):
    expected = json.loads((data / "tiny-6e.tensors.json").read_text())[recipe]
    found = describe(converted[recipe])
    assert len(found) == len(expected) == 150
    assert found == expected


def test_the_published_flags_give_the_default_policy(tiny_6e, converted, tmp_path, dsv4tools):
    flags = ("--experts", "q4_k", "--attention-proj", "q8_0", "--shared", "q8_0", "--output", "q8_0", "--dense", "f16")
    out = tmp_path / "flags.gguf"
    assert dsv4tools("convert", tiny_6e, out, "--policy", "f32", *flags).code == 0
    assert describe(out) == describe(converted["q4k"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_gguf_py_dequantizes_is_what_we_dequantize(recipe, converted):
    seen = set()
    for tensor in GGUFReader(converted[recipe]).tensors:
        name = tensor.tensor_type.name
        if name == "I32":
            continue
        theirs = dequantize(tensor.data, tensor.tensor_type)
        rows = np.frombuffer(payload(tensor), np.uint8).reshape(-1, FORMATS[name].row_bytes(int(tensor.shape[0])))
        assert dt.dequantize(rows, name).tobytes() == theirs.tobytes(), tensor.name
        seen.add(name)
    assert seen == {"q4k": {"Q4_K", "Q8_0", "F16", "F32"}, "q8": {"Q8_0", "F16", "F32"},
                    "bf16": {"BF16", "F32"}, "f32": {"F32"}}[recipe]  # fmt: skip


# ------------------------------------------------------------------------ other shapes, by independent derivation

MIXED = """
[[rule]]
tensors = "blk.*.ffn_gate_exps.weight"
type = "Q4_K"
[[rule]]
tensors = "blk.*.ffn_up_exps.weight"
type = "Q8_0"
[[rule]]
tensors = "blk.*.ffn_down_exps.weight"
type = "BF16"
[[rule]]
tensors = ["blk.*.attn_q_?.weight", "output.weight"]
type = "Q4_K"
[[rule]]
tensors = ["blk.*.attn_kv.weight", "blk.*.attn_output_?.weight", "blk.*.hc_*_fn.weight"]
type = "Q8_0"
[[rule]]
tensors = ["blk.*.ffn_*_shexp.weight", "token_embd.weight"]
type = "F16"
[[rule]]
tensors = "blk.*.indexer*"
type = "F32"
[[rule]]
tensors = "*"
type = "BF16"
"""


@pytest.fixture
def mixed(tmp_path):
    """A policy that gives every type to FP4, FP8, BF16 and F32 sources."""
    path = tmp_path / "mixed.toml"
    path.write_text(MIXED)
    return path


VARIANTS = {
    "fp8-blocks-of-32": {"seed": 1, "fp8_block": (32, 32), "experts": 3},
    "fp8-experts": {"seed": 2, "expert_dtype": "fp8", "experts": 5, "experts_per_token": 3},
    # 320 rows of FP8 and 192 columns end in the middle of a block of 128; one expert more than a power of two.
    "edge-blocks": {
        "seed": 3, "head_dim": 320, "o_lora": 96, "experts": 9, "expert_hidden": 512, "fp8_block": (128, 64),
    },
    "one-file-and-pairs": {"seed": 4, "shards": 1, "merges_form": "pairs", "hash_layers": 2, "draft_blocks": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_what_its_numbers_say(variant, make_checkpoint, mixed, tmp_path):
    source = make_checkpoint(**VARIANTS[variant])
    out = tmp_path / "out.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(source), policy=mixed), out, threads=2)
    types = check_file(out, Weights(source))
    assert set(types.values()) == {"Q4_K", "Q8_0", "F16", "BF16", "F32", "I32"}
    assert dt.verify(out, source=source).ok


def test_experts_of_any_plain_type_convert(make_checkpoint, mixed, tmp_path):
    source = make_checkpoint(seed=5, layers=2, hash_layers=1)
    weights = Weights(source)
    for number, shard in enumerate(shards(source)):
        held = load_shard(shard)
        for name in [n for n in held if ".experts." in n and n.endswith(".weight")]:
            values = weights.source(name)
            bf16 = (values.view(np.uint32) >> 16).astype("<u2")   # FP4 times a power of two fits
            stored = {"w1": ("F16", values.astype("<f2")), "w2": ("BF16", bf16), "w3": ("F32", values)}
            dtype, array = stored[name.split(".")[-2]]
            held[name] = (dtype, list(values.shape), array.tobytes())
        save_shard(shard, held)
        assert number < 2
    drop_expert_scales(source)
    out = tmp_path / "out.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(source), policy=mixed), out)
    check_file(out, Weights(source))


def drop_expert_scales(source):
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    scales = [n for n in content["weight_map"] if ".experts." in n and n.endswith(".scale")]
    for shard in shards(source):
        save_shard(shard, {n: t for n, t in load_shard(shard).items() if n not in scales})
    for name in scales:
        del content["weight_map"][name]
    index.write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------- threads, units, order


def test_bytes_do_not_depend_on_threads_or_units(make_checkpoint, mixed, tmp_path, monkeypatch):
    source = make_checkpoint(seed=6, fp8_block=(32, 64))
    checkpoint = dt.open_checkpoint(source)
    whole = dt.convert(dt.plan(checkpoint, policy=mixed), tmp_path / "whole.gguf", threads=1).path.read_bytes()
    n_units = len(list(dt.plan(checkpoint, policy=mixed).units()))
    monkeypatch.setattr(sys.modules["dsv4tools.plan"], "MAX_UNIT_VALUES", 9000)
    plan = dt.plan(checkpoint, policy=mixed)
    assert len(list(plan.units())) > 4 * n_units
    for threads in (1, 8):
        out = tmp_path / f"{threads}.gguf"
        dt.convert(plan, out, threads=threads)
        assert out.read_bytes() == whole
    assert dt.verify(tmp_path / "whole.gguf", source=checkpoint, threads=8).ok


def test_progress_adds_up_and_the_header_comes_last(make_checkpoint, tmp_path):
    plan = dt.plan(dt.open_checkpoint(make_checkpoint(layers=1)))
    out, seen = tmp_path / "out.gguf", []

    def progress(n_bytes):
        seen.append(n_bytes)
        with (tmp_path / "out.gguf.partial").open("rb") as file:
            assert file.read(64) == bytes(64)
        assert not out.exists()

    dt.convert(plan, out, progress=progress)
    assert sum(seen) == sum(t.n_bytes for t in plan.tensors)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["out.gguf"]


def test_a_header_that_was_written_wrongly_never_gets_the_final_name(make_checkpoint, tmp_path, monkeypatch):
    module = sys.modules["dsv4tools.working"]
    write = module.pwrite_all

    def corrupt(fd, buffer, position):
        raw = bytearray(buffer)
        if position == 0:
            raw[raw.index(b"token_embd")] = ord("T")
        write(fd, memoryview(raw), position)

    monkeypatch.setattr(module, "pwrite_all", corrupt)
    plan = dt.plan(dt.open_checkpoint(make_checkpoint(layers=1)))
    with pytest.raises(Dsv4Error, match="written wrongly") as caught:
        dt.convert(plan, tmp_path / "out.gguf")
    assert caught.value.exit_code == 1
    assert not list(tmp_path.glob("out*"))


def test_the_mode_is_the_umasks(make_checkpoint, tmp_path):
    before = os.umask(0o027)
    try:
        dt.convert(dt.plan(dt.open_checkpoint(make_checkpoint(layers=1))), tmp_path / "out.gguf")
    finally:
        os.umask(before)
    assert (tmp_path / "out.gguf").stat().st_mode & 0o777 == 0o640


# ---------------------------------------------------------------------------------------------- fewer experts a token


def test_four_of_six_experts(tiny_6e, converted, tmp_path, dsv4tools):
    out = tmp_path / "four.gguf"
    assert dsv4tools("convert", tiny_6e, out, "--experts-per-token", 4).code == 0
    six, four = GGUFReader(converted["q4k"]), GGUFReader(out)
    assert four.get_field("deepseek4.expert_used_count").contents() == 4
    assert six.get_field("deepseek4.expert_used_count").contents() == 6
    weights = Weights(tiny_6e)
    before, after = tensors(converted["q4k"]), tensors(out)
    assert list(before) == list(after)
    tables = [name for name in before if name.endswith("tid2eid.weight")]
    assert len(tables) == 3
    for name in tables:
        table = weights.gguf(name)
        assert table.shape[1] == 6
        assert after[name] == table[:, :4].astype("<i4").tobytes()
    assert {n: d for n, d in before.items() if n not in tables} == {n: d for n, d in after.items() if n not in tables}
    keys = {k: f.contents() for k, f in six.fields.items() if not k.startswith("GGUF.")}
    other = {k: f.contents() for k, f in four.fields.items() if not k.startswith("GGUF.")}
    assert {k for k in keys if keys[k] != other[k]} == {"deepseek4.expert_used_count"}
    assert keys.keys() == other.keys()
    report = dt.verify(out, source=tiny_6e)   # against the checkpoint that routes to six
    assert report.ok
    assert len(report.tensors) == 150


# ------------------------------------------------------------------------------------------- values that are no numbers

NAN_BF16, INF_BF16 = b"\xc0\x7f", b"\x80\xff"
NAN_F32 = np.float32("nan").tobytes()


def spoil(source, kind) -> tuple[str, str, set[int]]:
    """Put a value that is no number into a checkpoint.

    Returns what the error must say, the GGUF tensor, and which of its values are hit.
    """
    if kind == "scale":         # row 5 of expert 1, columns 64 to 95
        name = GATE.format(1, 1).replace("weight", "scale")
        write_tensor(source, name, b"\xff", at=5 * 8 + 2)
        where = f"{name!r}: the value at row 5 column 64 is under a NaN scale byte (255) (and 31 more"
        return where, "blk.1.ffn_gate_exps.weight", {(256 + 5) * 256 + c for c in range(64, 96)}
    if kind == "code":
        name = "layers.2.attn.wkv.weight"
        write_tensor(source, name, b"\x7f", at=3 * 256 + 7)
        write_tensor(source, name, b"\xff", at=100 * 256 + 9)
        where = f"{name!r}: the value at row 3 column 7 is a NaN FP8 code (and 1 more"
        return where, "blk.2.attn_kv.weight", {3 * 256 + 7, 100 * 256 + 9}
    if kind in {"nan", "inf"}:
        name = "head.weight"
        write_tensor(source, name, NAN_BF16 if kind == "nan" else INF_BF16, at=2 * (500 * 256 + 255))
        return f"{name!r}: the value at row 500 column 255 is NaN or infinite;", "output.weight", {500 * 256 + 255}
    name = "layers.1.ffn.gate.bias"     # a vector
    write_tensor(source, name, NAN_F32, at=4 * 2)
    return f"{name!r}: the value at row 0 column 2 is NaN or infinite;", "blk.1.exp_probs_b.bias", {2}


KINDS = ("scale", "code", "nan", "inf", "vector")


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_no_number_is_refused(kind, make_checkpoint, tmp_path, dsv4tools):
    source = make_checkpoint()
    where, _, _ = spoil(source, kind)
    out = tmp_path / "out.gguf"
    message = dsv4tools("convert", source, out).failed(3)
    assert where in message
    assert "--nan zero" in message
    assert ".safetensors: tensor" in message
    assert not out.exists()


def test_the_row_is_counted_from_the_tensors_first(make_checkpoint, tmp_path, monkeypatch, dsv4tools):
    """And not from that of the unit, of which there are many here."""
    monkeypatch.setattr(sys.modules["dsv4tools.plan"], "MAX_UNIT_VALUES", 2048)
    source = make_checkpoint(fp8_block=(8, 64))
    write_tensor(source, "layers.2.attn.wkv.weight", b"\xff", at=100 * 256 + 9)
    message = dsv4tools("convert", source, tmp_path / "out.gguf").failed(3)
    assert "'layers.2.attn.wkv.weight': the value at row 100 column 9 is a NaN FP8 code;" in message
    source = make_checkpoint("scale", fp8_block=(8, 64))
    write_tensor(source, "layers.2.attn.wkv.scale", b"\xff", at=(96 // 8) * 4 + 3)
    message = dsv4tools("convert", source, tmp_path / "other.gguf").failed(3)
    assert "'layers.2.attn.wkv.scale': the value at row 96 column 192 is under a NaN scale byte" in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_no_number_becomes_zero(kind, make_checkpoint, tmp_path, dsv4tools):
    source = make_checkpoint()
    _, name, hit = spoil(source, kind)
    out, manifest = tmp_path / "out.gguf", tmp_path / "out.sha256"
    arguments = ("convert", source, out, "--policy", "f32", "--nan", "zero", "--manifest", manifest)
    ended = dsv4tools(*arguments, "--json")
    assert ended.code == 0
    assert ended.data["zeroed"] == {name: len(hit)}
    assert ended.data["nan"] == "zero"
    found = next(t for t in GGUFReader(out).tensors if t.name == name).data.reshape(-1)
    with np.errstate(invalid="ignore"):
        expected = Weights(source).gguf(name).reshape(-1).copy()
    assert set(np.flatnonzero(~np.isfinite(expected)).tolist()) == hit
    expected[list(hit)] = 0
    assert found.tobytes() == expected.tobytes()
    line = f"# {len(hit)} values that are not finite were converted to 0 in {name}"
    assert [text for text in manifest.read_text().splitlines() if text.startswith("# ")][1:] == [line]
    assert GGUFReader(out).get_field("dsv4tools.nan").contents() == "zero"
    verified = dsv4tools("verify", out, "--source", source)
    assert verified.code == 0
    printed = dsv4tools(*arguments, "--overwrite").out
    assert f"{len(hit)} values that are not finite were converted to 0 in {name}" in printed


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_zeroed_values_that_does_not_say_so_is_a_source_fault(kind, make_checkpoint, tmp_path, dsv4tools):
    """Without the entry `dsv4tools.nan` a verification must not zero anything by itself."""
    clean = make_checkpoint()
    out = tmp_path / "out.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(clean)), out)
    spoil(clean, kind)
    assert "the value at row" in dsv4tools("verify", out, "--source", clean).failed(3)


@pytest.mark.parametrize("nan", ["refuse", "zero"])
def test_a_value_beyond_f16_is_refused_either_way(nan, make_checkpoint, tmp_path, dsv4tools):
    source = make_checkpoint()
    big = (np.array([1e5], np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    write_tensor(source, "embed.weight", big, at=2 * (7 * 256 + 3))
    message = dsv4tools("convert", source, tmp_path / "out.gguf", "--nan", nan).failed(3)
    assert "tensor 'embed.weight': the value at row 7 column 3 is beyond the range of F16" in message
    assert not (tmp_path / "out.gguf").exists()
    assert dsv4tools("convert", source, tmp_path / "other.gguf", "--embedding", "bf16").code == 0


@pytest.mark.parametrize("expert", [-1, 4, 2**40])
def test_a_routing_table_names_only_experts_that_there_are(expert, make_checkpoint, tmp_path, dsv4tools):
    source = make_checkpoint()
    at = 8 * (9 * 2 + 1)
    write_tensor(source, "layers.0.ffn.gate.tid2eid", expert.to_bytes(8, "little", signed=True), at=at)
    for options in (("--nan", "refuse"), ("--nan", "zero")):
        message = dsv4tools("convert", source, tmp_path / f"{options[1]}.gguf", *options).failed(3)
        assert f"'layers.0.ffn.gate.tid2eid': row 9 column 1 routes to expert {expert}, expected 0 to 3" in message
    # In a column that re-routing leaves out it does no harm.
    assert dsv4tools("convert", source, tmp_path / "out.gguf", "--experts-per-token", 1).code == 0


def test_an_i32_routing_table_converts_as_an_i64_one(make_checkpoint, tmp_path):
    source = make_checkpoint()
    name = "layers.0.ffn.gate.tid2eid"
    ids = np.frombuffer(read_tensor(source, name), "<i8").astype("<i4")
    dt.convert(dt.plan(dt.open_checkpoint(source)), tmp_path / "wide.gguf")
    replace_tensor(source, name, "I32", [512, 2], ids.tobytes())
    dt.convert(dt.plan(dt.open_checkpoint(source)), tmp_path / "narrow.gguf")
    assert tensors(tmp_path / "wide.gguf") == tensors(tmp_path / "narrow.gguf")


# ------------------------------------------------------------------------------------------------ the public functions


def test_python_interface_as_documented(make_checkpoint, tmp_path):
    source = make_checkpoint(experts_per_token=3)
    checkpoint = dt.open_checkpoint(source)
    plan = dt.plan(checkpoint, policy="q4k")
    done = dt.convert(plan, str(tmp_path / "out.gguf"), threads=8)
    assert plan.total_bytes == done.n_bytes == (tmp_path / "out.gguf").stat().st_size
    assert {t.name for t in plan.tensors} == Weights(source).names()
    assert dt.verify(str(tmp_path / "out.gguf"), source=checkpoint).ok
    assert dt.verify(tmp_path / "out.gguf", source=str(source)).ok
    two = dt.reroute(checkpoint, experts_per_token=2)
    assert two.config.num_experts_per_tok == 2
    assert checkpoint.config.num_experts_per_tok == 3
    dt.convert(dt.plan(two), tmp_path / "two.gguf")
    assert dt.verify(tmp_path / "two.gguf", source=checkpoint).ok
    x = np.random.default_rng(0).standard_normal((3, 2, 512)).astype(np.float32)
    for name, row_bytes in (("Q4_K", 288), ("Q8_0", 544), ("BF16", 1024)):
        packed = dt.quantize(x, name, importance=None, threads=1)
        assert packed.shape == (3, 2, row_bytes)
        assert np.abs(dt.dequantize(packed, name) - x).max() < 0.2
    assert {p.name for p in dt.list_policies()} >= {"q4k", "q8", "bf16", "f32"}


@pytest.mark.parametrize(
    "first", ["dsv4tools", "dsv4tools.plan", "dsv4tools.convert", "dsv4tools.verify.run", "dsv4tools.reroute"]
)
def test_functions_that_share_a_modules_name_stay_functions(first):
    code = f"""
import {first}
import dsv4tools as dt
import dsv4tools.plan, dsv4tools.convert, dsv4tools.verify, dsv4tools.reroute
print([callable(f) for f in (dt.plan, dt.convert, dt.verify, dt.reroute)])
from dsv4tools.plan import Plan
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[True, True, True, True]\n"
