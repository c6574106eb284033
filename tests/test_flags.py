"""The C quantizer's family flags: which tensors each takes, and which flag goes before which."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.errors import InputError, UsageError
from dsv4tools.flags import FAMILIES, rules_from_flags
from dsv4tools.plan import make_plan
from dsv4tools.policy import load_policy

LAYER = {
    "routed-w1": ["ffn_gate_exps"],
    "routed-w2": ["ffn_down_exps"],
    "routed-w3": ["ffn_up_exps"],
    "experts": ["ffn_gate_exps", "ffn_down_exps", "ffn_up_exps"],
    "attention-proj": ["attn_q_a", "attn_q_b", "attn_kv", "attn_output_a", "attn_output_b"],
    "shared": ["ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"],
    "output": [],
    "embedding": [],
}
LAYER["attention"] = LAYER["attention-proj"] + [
    "attn_compressor_ape", "attn_compressor_kv", "attn_compressor_gate", "indexer.attn_q_b", "indexer.proj",
    "indexer_compressor_ape", "indexer_compressor_kv", "indexer_compressor_gate"]
LAYER["dense"] = LAYER["attention"] + LAYER["shared"] + ["hc_attn_fn", "hc_ffn_fn", "ffn_gate_inp"]
"""Family -> what it takes in a layer, from a run of the C tool with one flag at a time; where it differs: there
attention-proj also takes the indexer's attn_q_b, and attention takes hc_attn_fn."""
WHOLE = {"output": {"output.weight"}, "embedding": {"token_embd.weight"},
         "dense": {"output.weight", "token_embd.weight", "output_hc_fn.weight"}}
DOCUMENTED = {"experts": "q4_k", "attention-proj": "q8_0", "shared": "q8_0", "output": "q8_0", "embedding": "f16",
              "dense": "f16"}


@pytest.fixture
def types(tiny_6e):
    """Flags -> tensor -> type, over a policy of one rule."""
    checkpoint = open_checkpoint(tiny_6e)

    def types(policy="f32", tensor_types=(), **families):
        families = {name.replace("_", "-"): kind for name, kind in families.items()}
        plan = make_plan(checkpoint, policy=policy, families=families, tensor_types=tensor_types)
        return {t.name: t.format.name for t in plan.tensors}

    return types


def expected(names, family):
    in_layers = [rf"blk\.\d+\.{re.escape(part)}\.weight" for part in LAYER[family]]
    return {n for n in names if any(re.fullmatch(p, n) for p in in_layers)} | WHOLE.get(family, set())


def test_the_families_are_the_c_tools():
    assert FAMILIES.keys() == LAYER.keys()


@pytest.mark.parametrize("family", LAYER)
def test_members_of_a_family(types, family):
    plain = types()
    found = types(**{family: "bf16"})
    assert {name for name in found if found[name] == "BF16"} == expected(plain, family)
    assert {name: kind for name, kind in found.items() if kind != "BF16"} == {
        name: kind for name, kind in plain.items() if found[name] != "BF16"}


def test_the_families_together_take_every_matrix(types):
    found = types(experts="bf16", dense="bf16")
    assert {name for name, kind in types(policy="bf16").items() if kind == "BF16"} == {
        name for name, kind in found.items() if kind == "BF16"}


def test_the_published_command_line_gives_the_types_of_q4k(types, data):
    recipes = json.loads((data / "tiny-6e.tensors.json").read_text("utf-8"))
    for policy in ("f32", "q4k"):
        found = types(policy=policy, **DOCUMENTED)
        assert found == {name: t["type"] for name, t in recipes["q4k"].items()}
    # What the C tool made of it, and ds4 then refused to load.
    theirs = {name: t["type"] for name, t in recipes["flags-documented"].items()}
    assert {name for name in found if found[name] != theirs[name]} == {
        name for name in found if name.endswith("indexer.attn_q_b.weight")}


# Precedence


def test_the_specific_goes_before_the_general_in_any_order(types):
    families = {"dense": "f16", "attention": "bf16", "attention-proj": "q8_0", "experts": "q4_k", "routed-w2": "q8_0",
                "output": "f32", "embedding": "bf16", "shared": "q4_k"}
    first = types(**families)
    for order in itertools.islice(itertools.permutations(families.items()), 0, 40_000, 5_003):
        assert types(**dict(order)) == first
    layer = {name.removeprefix("blk.2.").removesuffix(".weight"): kind for name, kind in first.items()
             if name.startswith("blk.2.")}
    assert (layer["ffn_down_exps"], layer["ffn_up_exps"], layer["ffn_gate_exps"]) == ("Q8_0", "Q4_K", "Q4_K")
    assert (layer["attn_kv"], layer["indexer.attn_q_b"], layer["attn_compressor_kv"]) == ("Q8_0", "BF16", "BF16")
    assert (layer["hc_attn_fn"], layer["ffn_gate_inp"], layer["ffn_up_shexp"]) == ("F16", "F16", "Q4_K")
    assert (first["output.weight"], first["token_embd.weight"], first["output_hc_fn.weight"]) == ("F32", "BF16", "F16")


def test_a_tensor_goes_before_its_family(types):
    found = types(tensor_types=["blk.3.ffn_up_exps.weight=bf16"], experts="q4_k", **{"routed-w3": "q8_0"})
    assert found["blk.3.ffn_up_exps.weight"] == "BF16"
    assert found["blk.2.ffn_up_exps.weight"] == "Q8_0"
    assert found["blk.2.ffn_down_exps.weight"] == "Q4_K"


def test_names_go_before_globs_and_longer_ones_before_shorter_ones(types):
    entries = ["blk.*=f16", "blk.3=q8_0", "blk.3.attn_kv.weight=bf16", "*.attn_kv.weight=q4_k"]
    for order in itertools.permutations(entries):
        found = types(tensor_types=order)
        assert found["blk.3.attn_kv.weight"] == "BF16"
        assert found["blk.3.attn_q_a.weight"] == "Q8_0"
        assert found["blk.2.attn_kv.weight"] == "Q4_K"
        assert found["blk.2.attn_q_a.weight"] == "F16"


def test_of_two_globs_of_one_length_the_first_counts(types):
    entries = ["blk.2.ffn_*.weight=f16", "blk.?.ffn_u*weight=bf16"]
    assert types(tensor_types=entries)["blk.2.ffn_up_exps.weight"] == "F16"
    assert types(tensor_types=entries[::-1])["blk.2.ffn_up_exps.weight"] == "BF16"


def test_flags_go_before_the_policy(types):
    found = types(policy="q4k", output="bf16")
    plain = types(policy="q4k")
    assert {name for name in found if found[name] != plain[name]} == {"output.weight"}


def test_rules_that_flags_override_have_still_found_their_tensors(types):
    assert "Q4_K" not in types(policy="q4k", experts="bf16").values()


# --tensor-type


def test_the_beginning_of_a_name_ends_at_a_dot(types):
    found = types(tensor_types=["blk.1=bf16"])
    assert {name.split(".")[1] for name, kind in found.items() if kind == "BF16"} == {"1"}
    assert {n for n, kind in types(tensor_types=["output=bf16"]).items() if kind == "BF16"} == {"output.weight"}
    assert types(tensor_types=["blk.1.=bf16"]) == found
    assert types(tensor_types=["blk.4.indexer=f16"])["blk.4.indexer_compressor_kv.weight"] == "F32"


def test_an_entry_that_finds_nothing(types):
    for entry in ("blk.9=f16", "outpu=f16", "blk.0.attn_norm=f16", "blk.*.nothing=f16"):
        with pytest.raises(InputError, match=rf"--tensor-type {re.escape(entry[:-4])}: decides no tensor"):
            types(tensor_types=[entry])


def test_an_entry_that_names_a_vector_or_a_routing_table(types):
    with pytest.raises(InputError, match="vector, which is always F32"):
        types(tensor_types=["blk.0.attn_norm.weight=f16"])
    with pytest.raises(InputError, match="routing table, which is always I32"):
        types(tensor_types=["blk.0.ffn_gate_tid2eid.weight=f16"])


def test_a_family_that_finds_nothing_is_fine(make_checkpoint):
    checkpoint = open_checkpoint(make_checkpoint(lead_ratios=(0, 0, 0)))
    assert make_plan(checkpoint, families={"attention": "f16", "shared": None})


@pytest.mark.parametrize("entry", ["", "=", "=f16", "blk.1", "f16", "a b\x00=f16", "ä=f16", "a*b*c*d*e*f=f16", "[=f16",
                                   "x" * 201 + "=f16", "blk.1=", "blk.1=f17", "blk.1==f16x"])
def test_an_entry_that_is_none(entry):
    with pytest.raises(UsageError, match="--tensor-type") as caught:
        rules_from_flags({}, [entry])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert ("is not NAME=TYPE; for example" in str(caught.value)) == ("=" not in entry[1:])


@pytest.mark.parametrize("name", ["q4_k", "Q4-K", "q4K", "Q4_K"])
def test_types_in_any_spelling(name):
    assert rules_from_flags({"experts": name})[0].format.name == "Q4_K"


@pytest.mark.parametrize("name", ["", "q4", "int8", "none"])
def test_an_unknown_type(name):
    with pytest.raises(UsageError, match="--experts: unknown ggml type"):
        rules_from_flags({"experts": name})


@pytest.mark.parametrize("name", ["copy", "template", "Template", "COPY"])
def test_the_type_of_the_template_file(name):
    assert rules_from_flags({"experts": name})[0].format is None


def test_an_unknown_family():
    with pytest.raises(UsageError, match="unknown tensor family 'expert', known are routed-w1"):
        rules_from_flags({"expert": "f16"})


def test_no_flags_no_rules():
    assert rules_from_flags({}) == []
    assert rules_from_flags(dict.fromkeys(FAMILIES)) == []
    assert load_policy("q4k").with_flags([]).name == "q4k"
