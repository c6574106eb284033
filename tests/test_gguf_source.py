"""A GGUF as the source of a conversion: what is copied, what is encoded again, what is refused, and both dialects."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
from conftest import SMALL
from gguf.quants import quantize
from gguf_edit import Edit
from independent import Weights
from mainline import mainline_entries, write_mainline
from test_engines import CHAT_TOKENS
from test_reroute_gguf import rewrite

import dsv4tools as dt
from dsv4tools.engines import choose_engines, find_profile, judge, judge_file
from dsv4tools.engines.header import header_of_plan
from dsv4tools.errors import InputError, UsageError, VerifyError
from dsv4tools.formats.codecs import DECODABLE
from dsv4tools.formats.table import FORMATS
from dsv4tools.gguf.header import TensorInfo, encode_header, lay_out
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.gguf.splits import split_kvs, split_name
from dsv4tools.gguf.values import KV
from dsv4tools.model import open_model
from dsv4tools.template_file import write_template

GATE = "blk.1.ffn_gate_exps.weight"
KEY = "deepseek4.vocab_size"


@pytest.fixture(scope="module")
def mainline(tiny_6e, data, tmp_path_factory):
    """The shared checkpoint in llama.cpp's dialect. Not to be changed."""
    return write_mainline(tiny_6e, mainline_entries(data), tmp_path_factory.mktemp("mainline") / "mainline.gguf")


@pytest.fixture(scope="module")
def made(_written, tmp_path_factory):
    """A small checkpoint and its GGUF under four policies. Not to be changed."""
    source = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    directory = tmp_path_factory.mktemp("made")
    for policy in ("q4k", "mxfp4", "bf16", "q8"):
        dt.convert(dt.plan(dt.open_checkpoint(source), policy=policy), directory / f"{policy}.gguf")
    return source, directory


def convert(source, out, **options):
    return dt.convert(dt.plan(dt.open_source(source), **options), out)


def hashes(path):
    """Type and sha256 of each tensor, as gguf-py reads it."""
    return {t.name: (t.tensor_type.name, hashlib.sha256(t.data.tobytes()).hexdigest())
            for t in gguf.GGUFReader(path).tensors}


# ----------------------------------------------------------------------------------------------------------- dialects


def test_a_file_of_llama_cpp_becomes_what_the_c_quantizer_makes_of_the_checkpoint(mainline, tiny_6e, data, tmp_path):
    """BF16 holds every FP8 value and MXFP4 every FP4 value, so the way through llama.cpp's file loses nothing."""
    done = convert(mainline, tmp_path / "q4k.gguf")
    expected = json.loads((data / "tiny-6e.tensors.json").read_text("utf-8"))["q4k"]
    assert hashes(tmp_path / "q4k.gguf") == {name: (t["type"], t["sha256"]) for name, t in expected.items()}
    assert {(loss.stored.name, loss.target.name) for loss in done.losses} >= {("MXFP4", "Q4_K"), ("BF16", "Q8_0")}
    assert dt.verify(tmp_path / "q4k.gguf", source=tiny_6e).ok


def test_its_metadata_are_mended_and_kept(mainline, tmp_path):
    convert(mainline, tmp_path / "out.gguf", policy="mxfp4")
    old, new = (gguf.GGUFReader(path) for path in (mainline, tmp_path / "out.gguf"))
    before, after = ({k: (f.types, f.contents()) for k, f in r.fields.items() if not k.startswith("GGUF.")}
                     for r in (old, new))
    assert KEY not in before
    assert after.pop(KEY) == ([gguf.GGUFValueType.UINT32], 512)
    added = {k for k in after if k not in before}
    assert added == {"general.quantized_by", "dsv4tools.policy", "dsv4tools.policy_sha256"}
    assert {k: v for k, v in after.items() if k in before} == before
    assert [t.name for t in new.tensors] == [t.name for t in old.tensors]


def test_predictions_stay_within_the_error_of_the_types(mainline, data, tmp_path):
    """Logits of transformers, of the checkpoint and of the weights that the C quantizer makes of it."""
    tokens = np.random.default_rng(0).integers(0, 512, 8)
    convert(mainline, tmp_path / "mxfp4.gguf", policy="mxfp4")
    convert(mainline, tmp_path / "q4k.gguf", policy="q4k")

    def run(path):
        with open_model(path) as model:
            return model.forward(tokens)

    exact = np.load(data / "logits" / "tiny-6e.hf_8.npy")
    of_q4k = np.load(data / "logits" / "tiny-6e.q4k.hf_8.npy")
    step = -(-8 // len(exact))
    rows = np.arange(7, -1, -step)[::-1]
    assert np.abs(run(mainline)[rows] - exact).max() <= 3e-4      # that file holds the checkpoint's values
    assert np.abs(run(tmp_path / "q4k.gguf")[rows] - of_q4k).max() <= 3e-4
    # Only what is Q8_0 and F16 is off where the experts are kept.
    kept, rounded = (np.sqrt(((run(tmp_path / f"{p}.gguf")[rows] - exact) ** 2).mean()) for p in ("mxfp4", "q4k"))
    assert 0 < kept < rounded / 1.5, (kept, rounded)


def full_size(seen, path, *, experts="MXFP4"):
    """A hole with the header that llama.cpp writes for Flash: BF16 and F32, `experts`, no vocab_size."""
    vectors = {n for n, (_, ne) in seen["tensors"].items() if len(ne) == 1}
    tensors = {}
    for name, (kind, ne) in seen["tensors"].items():
        held = kind if name in vectors or kind == "I32" else experts if "_exps" in name else "BF16"
        tensors[name] = ("F32" if "hc_" in name or "_ape" in name else held), ne
    offsets, n_bytes = lay_out([FORMATS[kind].n_bytes(ne) for kind, ne in tensors.values()])
    infos = [TensorInfo(n, tuple(ne), FORMATS[kind], o)
             for (n, (kind, ne)), o in zip(tensors.items(), offsets, strict=True)]
    header = encode_header([kv for kv in seen["kvs"] if kv.key != KEY and not kv.key.startswith("dsv4tools.")], infos)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + n_bytes)
    return path


@pytest.fixture(scope="module")
def seen(data):
    """Metadata and tensors of the full-size header that both engines were seen to load."""
    raw = json.loads((data / "flash_one_file.json").read_text("utf-8"))
    names = {"STRING": "str", "UINT32": "u32", "INT32": "i32", "FLOAT32": "f32", "BOOL": "bool", "ARRAY": "arr"}
    special = CHAT_TOKENS
    arrays = {"tokens": [*special, *(f"t{i}" for i in range(129280 - len(special)))], "token_type": [1] * 129280,
              "merges": ["a b"] * 6}
    kvs = []
    for key, entry in raw["metadata"].items():
        kind, *item = (names[t] for t in entry["type"])
        value = arrays[key.rpartition(".")[2]] if isinstance(entry["value"], dict) else entry["value"]
        kvs.append(KV(key, kind, value, *item))
    return {"kvs": kvs, "tensors": {name: (kind, ne) for name, kind, ne in raw["tensors"]}}


def test_engines_take_what_becomes_of_llama_cpps_full_size_file(seen, tmp_path):
    path = full_size(seen, tmp_path / "flash.gguf")
    with open_gguf(path) as file:
        assert [v.engine for v in judge_file(file, choose_engines([])) if v.loads] == ["llama.cpp"]
    source = dt.open_source(path)
    for policy, experts, engines in (("q4k", "Q4_K", ("ds4-may2026", "ds4", "llama.cpp")),
                                     ("mxfp4", "MXFP4", ("ds4", "llama.cpp")), ("keep", "MXFP4", ("llama.cpp",))):
        plan = dt.plan(source, policy=policy)
        assert {t.format.name for t in plan.tensors if "_exps" in t.name} == {experts}
        for engine in engines:
            verdict = judge(find_profile(engine), header_of_plan(plan))
            assert verdict.ok, verdict.summary
        assert plan.notes == tuple(f"{key} added, the source lacks it"
                                   for key in (KEY, "deepseek4.swiglu_clamp_shexp"))


def test_and_back_from_ds4_to_llama_cpp(made, tmp_path):
    """A file without what llama.cpp asks for, with wider types, is written with its exact types."""
    source, directory = made
    path = tmp_path / "ds4.gguf"
    path.write_bytes((directory / "q4k.gguf").read_bytes())
    wide = "deepseek4.embedding_length"
    # What ds4 never reads: a file that was made for it alone need not say these.
    lacking = {f"deepseek4.{key}" for key in ("embedding_length_out", "expert_gating_func", "rope.scaling.type",
                                              "swiglu_clamp_shexp")}
    rewrite(path, kvs=lambda kvs: {k: replace(kv, type="u64") if k == wide else kv for k, kv in kvs.items()
                                   if k not in lacking})
    plan = dt.plan(dt.open_source(path), policy="keep")
    assert set(plan.notes) == {"deepseek4.embedding_length written as u32, the source has u64",
                               *(f"{key} added, the source lacks it" for key in lacking)}
    dt.convert(plan, tmp_path / "out.gguf", engines=["llama.cpp"])
    types = {k: f.types for k, f in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert types[wide] == types["deepseek4.embedding_length_out"] == [gguf.GGUFValueType.UINT32]
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["deepseek4.expert_gating_func"].contents() == 4   # sqrtsoftplus, the only one that ds4 has
    assert fields["deepseek4.rope.scaling.type"].contents() == "yarn"
    assert dt.verify(tmp_path / "out.gguf", source=source).ok


# ---------------------------------------------------------------------------------------------------- copy and encode


def test_the_way_does_not_matter_where_nothing_was_lost(made, tmp_path):
    """The same file, byte for byte, from the checkpoint and from a file that holds all of its values."""
    _, directory = made
    convert(directory / "mxfp4.gguf", tmp_path / "q4k.gguf", policy="q4k")
    assert (tmp_path / "q4k.gguf").read_bytes() == (directory / "q4k.gguf").read_bytes()


@pytest.mark.parametrize("policy", ["q4k", "bf16"])
def test_keep_copies_the_file(made, tmp_path, policy):
    _, directory = made
    done = convert(directory / f"{policy}.gguf", tmp_path / "out.gguf", policy="keep")
    assert (tmp_path / "out.gguf").read_bytes() == (directory / f"{policy}.gguf").read_bytes()
    assert done.losses == ()


def test_types_without_an_encoder_are_copied(made, tmp_path, dsv4tools):
    """Here IQ1_S, made of nothing: its blocks are as large as a tensor of this shape has."""
    _, directory = made
    path = tmp_path / "in.gguf"
    path.write_bytes((directory / "q4k.gguf").read_bytes())
    form = FORMATS["IQ1_S"]

    def to_iq1(tensors):
        _, ne, _ = tensors[GATE]
        noise = np.random.default_rng(0).integers(0, 60, form.n_bytes(ne), np.uint8)   # 60: no scale that is not finite
        return tensors | {f"blk.{i}.ffn_gate_exps.weight": (form, ne, noise.tobytes()) for i in range(3)}

    rewrite(path, tensors=to_iq1)
    convert(path, tmp_path / "out.gguf", policy="q4k", tensor_types=["blk.*.ffn_gate_exps.weight=keep"])
    assert hashes(tmp_path / "out.gguf")[GATE] == hashes(path)[GATE]
    arguments = ("policy", "explain", path, "--compare", "keep")
    roles = {role["role"]: role for role in dsv4tools(*arguments, "--json").data["policies"][0]["roles"]}
    assert roles["ffn_gate_exps"]["types"] == {"IQ1_S": 3}
    assert (roles["ffn_gate_exps"]["n_sampled"], roles["ffn_gate_exps"]["relative_rmse"]) == (0, None)
    assert roles["ffn_up_exps"]["relative_rmse"] == 0
    (line,) = [line.split() for line in dsv4tools(*arguments).out.splitlines() if line.startswith("ffn_gate_exps")]
    assert line[-1] == "-"
    assert dt.verify(tmp_path / "out.gguf", source=path).ok
    with pytest.raises(InputError, match=r"gate_exps\.weight': is IQ1_S, which cannot be decoded to become Q4_K"):
        dt.plan(dt.open_source(path), allow_requantize=True)


def test_every_type_that_can_be_decoded_is_decoded_like_ggml(made, tmp_path):
    """To F32 exactly, and from there on as F32 is: gguf-py decodes here."""
    source, directory = made
    for policy in ("q4k", "q8", "mxfp4"):
        out = tmp_path / f"{policy}.gguf"
        done = convert(directory / f"{policy}.gguf", out, policy="f32")
        assert done.losses == ()   # nothing is lost
        held = {t.name: gguf.quants.dequantize(t.data, t.tensor_type)
                for t in gguf.GGUFReader(directory / f"{policy}.gguf").tensors if t.tensor_type.name != "I32"}
        for t in gguf.GGUFReader(out).tensors:
            if t.name in held:
                np.testing.assert_array_equal(t.data.reshape(held[t.name].shape), held[t.name], t.name)
    assert Weights(source).names() == {t.name for t in gguf.GGUFReader(out).tensors}


def test_each_type_is_a_source(made, tmp_path):
    """Every type that we decode, one tensor in each: to F32 as gguf-py decodes it, and from there on to Q4_K."""
    _, directory = made
    path = tmp_path / "in.gguf"
    path.write_bytes((directory / "q8.gguf").read_bytes())
    types = sorted(DECODABLE)
    made_of = {}

    def vary(held):
        matrices = [n for n, (_, ne, _) in held.items() if len(ne) > 1 and ne[0] % 256 == 0 and "exps" not in n]
        assert len([n for n in matrices if held[n][0].name == "Q8_0"]) >= len(types)
        for name, kind in zip([n for n in matrices if held[n][0].name == "Q8_0"], types, strict=False):
            _, ne, data = held[name]
            x = gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape(ne[1], -1),
                                       gguf.GGMLQuantizationType.Q8_0)
            importance = np.ones(ne[0], np.float32)
            held[name] = FORMATS[kind], ne, dt.quantize(x, kind, importance).tobytes()
            made_of[name] = kind
        return held

    rewrite(path, tensors=vary)
    assert sorted(made_of.values()) == types
    convert(path, tmp_path / "f32.gguf", policy="keep", tensor_types=[f"{name}=f32" for name in made_of])
    convert(path, tmp_path / "q4k.gguf", policy="keep", allow_requantize=True,
            tensor_types=[f"{name}=q4_k" for name in made_of])
    held = {t.name: t for t in gguf.GGUFReader(path).tensors}
    wide, narrow = ({t.name: t for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors} for name in ("f32", "q4k"))
    for name, kind in made_of.items():
        values = gguf.quants.dequantize(held[name].data, held[name].tensor_type).reshape(wide[name].data.shape)
        np.testing.assert_array_equal(wide[name].data, values, kind)
        expected = held[name].data if kind == "Q4_K" else dt.quantize(np.ascontiguousarray(values, np.float32), "Q4_K")
        assert narrow[name].data.tobytes() == expected.tobytes(), kind


def test_rounding_again_needs_a_word(made, tmp_path, dsv4tools):
    _, directory = made
    source, out = directory / "q8.gguf", tmp_path / "out.gguf"
    said = dsv4tools("convert", source, out, "--policy", "q4k").failed(3)
    assert "q8.gguf: tensor 'blk.0.ffn_gate_exps.weight': is Q8_0, rounded already, and would be rounded " in said
    assert "more tensors like it; --allow-requantize does it; --policy keep" in said
    assert not out.exists()
    ended = dsv4tools("convert", source, out, "--policy", "q4k", "--allow-requantize", "--json")
    assert ended.code == 0
    losses = {(e["family"], e["from"], e["to"]): e for e in ended.data["losses"]}
    assert 0.02 < losses["routed experts", "Q8_0", "Q4_K"]["relative_rmse"] < 0.1
    fields = gguf.GGUFReader(out).fields
    assert fields["dsv4tools.requantized"].contents() == ["Q8_0"]
    assert dt.verify(out, source=source).ok
    # What stands in the file of that stays true of what is made of it.
    convert(out, tmp_path / "again.gguf", policy="keep")
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()
    x = gguf.GGUFReader(source)
    held = next(t for t in x.tensors if t.name == GATE)
    values = gguf.quants.dequantize(held.data, held.tensor_type)
    again = next(t for t in gguf.GGUFReader(out).tensors if t.name == GATE)
    assert again.data.tobytes() == dt.quantize(values, "Q4_K").tobytes()


def test_the_loss_is_that_of_the_values(made, tmp_path):
    """Against gguf-py's decoding of both files, over all values of one tensor: the sample is of the same kind."""
    _, directory = made
    done = convert(directory / "mxfp4.gguf", tmp_path / "out.gguf", policy="q4k")
    (loss,) = done.losses
    assert (loss.family, loss.n_tensors) == ("routed experts", 9)

    def values(path):
        return np.concatenate([gguf.quants.dequantize(t.data, t.tensor_type).ravel()
                               for t in gguf.GGUFReader(path).tensors if "_exps" in t.name]).astype(np.float64)

    a, b = values(directory / "mxfp4.gguf"), values(tmp_path / "out.gguf")
    assert loss.errors.relative_rmse == pytest.approx(np.sqrt(((b - a) ** 2).sum() / (a**2).sum()), rel=0.1)


def test_the_dry_run_says_what_happens_to_what(made, tmp_path, dsv4tools):
    _, directory = made
    ended = dsv4tools("convert", directory / "mxfp4.gguf", tmp_path / "x.gguf", "--dry-run", "--json")
    changes = {(c["change"], c["from"], c["to"]): c["n_tensors"] for c in ended.data["changes"]}
    assert changes["encoded", "MXFP4", "Q4_K"] == 9
    assert changes["copied", "Q8_0", "Q8_0"] > 9
    assert sum(changes.values()) == ended.data["n_tensors"]
    text = dsv4tools("convert", directory / "mxfp4.gguf", tmp_path / "x.gguf", "--dry-run").out
    assert "  encoded      9 tensors, MXFP4 to Q4_K, " in text
    assert not (tmp_path / "x.gguf").exists()


def test_fewer_experts_per_token(made, tmp_path):
    source, directory = made
    convert_plan = dt.plan(dt.reroute(dt.open_source(directory / "q4k.gguf"), 1), policy="keep")
    dt.convert(convert_plan, tmp_path / "out.gguf")
    dt.reroute_gguf(directory / "q4k.gguf", tmp_path / "rerouted.gguf", 1)
    assert hashes(tmp_path / "out.gguf") == hashes(tmp_path / "rerouted.gguf")
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["deepseek4.expert_used_count"].contents() == 1
    assert dt.verify(tmp_path / "out.gguf", source=source).ok
    with pytest.raises(UsageError, match="experts-per-token"):
        dt.reroute(dt.open_source(directory / "q4k.gguf"), 3)


def test_imatrix_entries_stay_while_their_blocks_do(made, tmp_path):
    _, directory = made
    path = tmp_path / "in.gguf"
    path.write_bytes((directory / "q4k.gguf").read_bytes())
    note = KV("quantize.imatrix.file", "str", "calibration.dat")
    rewrite(path, kvs=lambda kvs: kvs | {note.key: note})
    for policy, stays in (("keep", True), ("f32", False)):
        convert(path, tmp_path / f"{policy}.gguf", policy=policy)
        assert (note.key in gguf.GGUFReader(tmp_path / f"{policy}.gguf").fields) is stays


# ------------------------------------------------------------------------------------------------- the rest of convert


def test_parts_and_threads_give_the_same_file(made, tmp_path, dsv4tools):
    _, directory = made
    expected = tmp_path / "expected.gguf"
    dt.convert(dt.plan(dt.open_source(directory / "mxfp4.gguf"), policy="q4k"), expected, threads=1)
    out = tmp_path / "out.gguf"
    for part in ("2/2", "1/2"):
        assert dsv4tools("convert", directory / "mxfp4.gguf", out, "--part", part, "--threads", 3).code == 0
    assert dsv4tools("assemble", out).code == 0
    assert out.read_bytes() == expected.read_bytes()


def test_an_interrupted_conversion_goes_on_and_knows_its_source(made, tmp_path):
    from test_resume import interrupt, resume  # noqa: PLC0415  - its fixtures are not wanted here

    _, directory = made
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    source.write_bytes((directory / "mxfp4.gguf").read_bytes())
    done = interrupt(dt.plan(dt.open_source(source), policy="q4k"), out)
    n, notes = resume(dt.plan(dt.open_source(source), policy="q4k"), out)
    assert n == dt.plan(dt.open_source(source)).n_units - done
    assert any(note.startswith("continuing ") for note in notes)
    assert out.read_bytes() == (directory / "q4k.gguf").read_bytes()
    out.unlink()
    interrupt(dt.plan(dt.open_source(source), policy="q4k"), out)
    rewrite(source, kvs=lambda kvs: kvs | {"general.name": KV("general.name", "str", "another")})
    with pytest.raises(UsageError, match=r"belongs to another conversion: .*shard in\.gguf is \d+ bytes, header "):
        dt.convert(dt.plan(dt.open_source(source), policy="q4k"), out)


def test_a_source_that_changes_meanwhile(made, tmp_path):
    _, directory = made
    path = tmp_path / "in.gguf"
    path.write_bytes((directory / "mxfp4.gguf").read_bytes())
    plan = dt.plan(dt.open_source(path))
    path.write_bytes((directory / "mxfp4.gguf").read_bytes())
    with pytest.raises(VerifyError, match=r"in\.gguf: source changed since the plan was made"):
        dt.convert(plan, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(("name", "data", "message"), [
    ("output.weight", b"\x00\x7e", r"'output.weight': the Q8_0 block at row 1 column 32 is not finite: d is NaN"),
    (GATE, b"\xff", r"'blk.1.ffn_gate_exps.weight' expert 0: the value at row 1 column 32 is under a NaN scale"),
    ("token_embd.weight", b"\x00\x7c", r"tensor 'token_embd.weight': the value at row 1 column 0 is NaN or infinite"),
])
def test_values_that_are_not_finite(made, tmp_path, name, data, message):
    """In a block that is copied, in one that is encoded, in a plain number; and all zero with ``--nan zero``."""
    _, directory = made
    edit = Edit(directory / "mxfp4.gguf")
    row, block = {"Q8_0": (34 * 8, 34), "MXFP4": (17 * 8, 17), "F16": (512, 0)}[edit.types[name]]
    source = edit.put(name, data, row + block).write(tmp_path / "in.gguf")
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "refused.gguf", policy="q4k")
    done = convert(source, tmp_path / "out.gguf", policy="q4k", nan="zero")
    n = 32 if block else 1
    assert done.zeroed == {name: n}
    t = next(t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name == name)
    values = gguf.quants.dequantize(t.data, t.tensor_type).reshape(-1)[256 + 32 * bool(block) :][:n]
    assert not values.any()
    assert dt.verify(tmp_path / "out.gguf", source=source).ok
    convert(tmp_path / "out.gguf", tmp_path / "again.gguf", policy="keep")   # the note of that stays
    assert gguf.GGUFReader(tmp_path / "again.gguf").fields["dsv4tools.nan"].contents() == "zero"


def test_verify_finds_what_differs_from_a_gguf(made, tmp_path, dsv4tools):
    _, directory = made
    wrong = Edit(directory / "q4k.gguf").flip(GATE, 144 * 300 + 77, 2).write(tmp_path / "wrong.gguf")
    ended = dsv4tools("verify", wrong, "--source", directory / "mxfp4.gguf", "--engine", "none")
    assert (ended.code, ended.err) == (5, "")
    assert f"error: tensor {GATE} (Q4_K): 1 of " in ended.out
    ended = dsv4tools("verify", directory / "q4k.gguf", "--source", directory / "mxfp4.gguf", "--engine", "none",
                      "--forward", "--sample", "5")
    assert ended.code == 0, ended
    assert "predictions on 4 prompts" in ended.out


def test_a_split_set_is_a_source(made, tmp_path):
    _, directory = made
    with open_gguf(directory / "mxfp4.gguf") as file:
        names = list(file.tensors)
        halves = [names[:40], names[40:]]
        for i, mine in enumerate(halves):
            infos = [file.tensors[n] for n in mine]
            offsets, n_bytes = lay_out([t.n_bytes for t in infos])
            kvs = [*(file.kvs.values() if i == 0 else ()), *split_kvs(i, 2, len(names))]
            data = bytearray(n_bytes)
            for info, offset in zip(infos, offsets, strict=True):
                data[offset : offset + info.n_bytes] = file.read_tensor_bytes(info.name).tobytes()
            header = encode_header(kvs, [replace(t, offset=o) for t, o in zip(infos, offsets, strict=True)])
            (tmp_path / split_name("set", i, 2)).write_bytes(header + data)
    for part in (1, 2):
        path = tmp_path / split_name("set", part - 1, 2)
        convert(path, tmp_path / f"{part}.gguf", policy="q4k")
        assert (tmp_path / f"{part}.gguf").read_bytes() == (directory / "q4k.gguf").read_bytes()
        assert dt.verify(directory / "q4k.gguf", source=path).ok
        with pytest.raises(UsageError, match="is one of the inputs"):
            convert(path, tmp_path / split_name("set", 1, 2))


def test_a_template_on_top(made, tmp_path):
    """Another file's order and types for the source's values."""
    _, directory = made
    done = convert(directory / "mxfp4.gguf", tmp_path / "out.gguf", policy="template",
                   template_file=directory / "q4k.gguf")
    assert hashes(done.path) == hashes(directory / "q4k.gguf")


# --------------------------------------------------------------------------------------------------------- wrong input


def test_what_is_no_source(made, tmp_path, dsv4tools):
    source, directory = made
    out = tmp_path / "out.gguf"
    template = tmp_path / "template.gguf"
    write_template(dt.plan(dt.open_checkpoint(source)), template, sparse=True)
    assert "is a template: it holds no weights" in dsv4tools("convert", template, out).failed(3)
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"no gguf at all, but long enough")
    assert "junk.gguf: " in dsv4tools("convert", junk, out).failed(3)
    assert "is missing" in dsv4tools("convert", tmp_path / "none.gguf", out).failed(3)
    whole = (directory / "q4k.gguf").read_bytes()
    junk.write_bytes(whole[: len(whole) // 2])
    assert "junk.gguf: " in dsv4tools("convert", junk, out).failed(3)
    assert "is one of the inputs" in dsv4tools("convert", directory / "q4k.gguf", directory / "q4k.gguf").failed(2)
    assert "is to keep its type and has none yet" in dsv4tools("convert", source, out, "--policy", "keep").failed(3)
    assert not out.exists()


def strange(name, *entry):
    key = f"deepseek4.{name}"
    return {"kvs": lambda kvs: kvs | {key: KV(key, *entry)}}


@pytest.mark.parametrize(("change", "message"), [
    ({"kvs": lambda kvs: {k: v for k, v in kvs.items() if k != "deepseek4.expert_count"}},
     "key 'deepseek4.expert_count': is missing"),
    ({"kvs": lambda kvs: kvs | {"general.architecture": KV("general.architecture", "str", "llama")}},
     "key 'general.architecture': is 'llama', expected 'deepseek4'"),
    ({"tensors": lambda held: {k: v for k, v in held.items() if k not in {GATE, "output.weight"}}},
     r"lacks 2 tensors: output\.weight, blk\.1\.ffn_gate_exps\.weight; metadata and tensors are not of one"),
    ({"tensors": lambda held: held | {"blk.9.x.weight": held["output_norm.weight"]}},
     r"has 1 tensors that nothing uses: blk\.9\.x\.weight"),
    ({"tensors": lambda held: held | {"output_norm.weight": held["output_hc_base.weight"]}},
     r"tensor 'output_norm\.weight' is \[4\], the metadata imply \[256\]"),
    (strange("embedding_length_out", "arr", [1, 2], "i32"), "embedding_length_out': is an array, expected u32"),
    (strange("expert_gating_func", "arr", [4, 4], "u32"), "expert_gating_func': is an array, expected u32"),
    (strange("expert_gating_func", "arr", ["a"], "str"), "expert_gating_func': is an array, expected u32"),
    (strange("expert_gating_func", "bool", True), "expert_gating_func': is True, expected one of 1, 2, 4"),
    (strange("expert_gating_func", "u32", 3), "expert_gating_func': is 3, expected one of 1, 2, 4"),
    (strange("swiglu_clamp_exp", "f32", 10.0), r"swiglu_clamp_exp': is a single value, expected arr\[f32\]"),
    (strange("swiglu_clamp_exp", "arr", [10.0, 7.0], "f32"), r"is \[10\.0, 7\.0\], expected one and the same value"),
    (strange("embedding_length_out", "u32", 7), "embedding_length_out': is 7, the other keys imply 1024"),
])
def test_sources_that_do_not_fit_together(made, tmp_path, change, message):
    _, directory = made
    path = tmp_path / "in.gguf"
    path.write_bytes((directory / "q4k.gguf").read_bytes())
    rewrite(path, **change)
    with pytest.raises(InputError, match=message):
        dt.open_source(path)


def test_dimensions_of_one_and_split_rows_are_the_same_matrix(made, tmp_path):
    """llama.cpp takes attn_output_a in three dimensions too."""
    _, directory = made
    path = tmp_path / "in.gguf"
    path.write_bytes((directory / "q4k.gguf").read_bytes())
    name = "blk.0.attn_output_a.weight"

    def cut(held):
        form, ne, data = held[name]
        return held | {name: (form, (ne[0], ne[1] // 4, 4), data)}

    rewrite(path, tensors=cut)
    convert(path, tmp_path / "out.gguf", policy="keep")
    assert (tmp_path / "out.gguf").read_bytes() == (directory / "q4k.gguf").read_bytes()


def test_values_of_a_source_are_read_where_they_lie(made):
    """Unit by unit against gguf-py's quantize of what an independent reader finds in the checkpoint."""
    source, directory = made
    weights = Weights(source)
    model = dt.open_source(directory / "bf16.gguf")
    plan = dt.plan(model, policy="q8")
    from dsv4tools.derive import UnitDeriver  # noqa: PLC0415  - only here

    deriver = UnitDeriver(model.config.n_routed_experts)
    for name in (GATE, "blk.2.attn_q_b.weight"):
        planned = next(t for t in plan.tensors if t.name == name)
        expected = quantize(weights.gguf(name), gguf.GGMLQuantizationType.Q8_0).tobytes()
        from dsv4tools.plan import tensor_units  # noqa: PLC0415

        found = b"".join(deriver.encode(u, deriver.read(u))[0].tobytes() for u in tensor_units(planned))
        assert found == expected
