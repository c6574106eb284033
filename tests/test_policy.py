"""Policies: what the shipped ones decide, and every rule of the policy file."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
from bounds import cheap
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.checkpoint.matrix import Matrix
from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.codecs import ENCODABLE
from dsv4tools.formats.source import SourceKind
from dsv4tools.formats.table import FORMATS
from dsv4tools.plan import make_plan
from dsv4tools.policy import Policy, Rule, check_glob, decide_formats, list_policies, load_policy, read_policy
from dsv4tools.template import TemplateTensor, derive_template


def tensor(name, ne=(256, 4), layer=None, kind=SourceKind.BF16):
    if name.startswith("blk."):
        layer = int(name.split(".")[1])
    return TemplateTensor(name, ne, (Matrix(None, None, kind, 1, 1),), layer)


MODEL = [
    tensor("token_embd.weight"), tensor("output.weight"), tensor("output_norm.weight", (256,)),
    *(tensor(f"blk.{n}.attn_kv.weight") for n in range(12)),
    *(tensor(f"blk.{n}.attn_norm.weight", (256,)) for n in range(12)),
    tensor("blk.0.ffn_gate_tid2eid.weight", (6, 512), kind=None),
]


@pytest.fixture
def policy_file(tmp_path):
    def policy_file(text, name="mine.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return policy_file


def rule(tensors, kind, **more):
    lines = [f"tensors = {json.dumps(tensors)}", f'type = "{kind}"']
    lines += [f"{key} = {json.dumps(value)}" for key, value in more.items()]
    return "[[rule]]\n" + "\n".join(lines) + "\n"


REST = rule("*", "F16")


def decide(policy_file, *rules, tensors=MODEL):
    decisions = decide_formats(read_policy(policy_file("".join(rules))), tensors, {})
    return {name: (d.format.name, d.rule) for name, d in decisions.items()}


def types(policy_file, *rules, tensors=MODEL):
    return {name: kind for name, (kind, _) in decide(policy_file, *rules, tensors=tensors).items()}


def refuse(policy_file, message, *rules, error=InputError):
    with cheap(), pytest.raises(error) as caught:
        decide(policy_file, *rules)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The shipped ones


@pytest.mark.parametrize("name", ["q4k", "q2", "q8", "bf16", "f32"])
def test_shipped_policies_give_the_types_of_the_c_tools_recipes(tiny_6e, data, name):
    expected = json.loads((data / "tiny-6e.tensors.json").read_text("utf-8"))[name]
    found = decide_formats(load_policy(name), derive_template(open_checkpoint(tiny_6e)).tensors, {})
    assert {tensor: d.format.name for tensor, d in found.items()} == {n: t["type"] for n, t in expected.items()}


def test_q4k_gives_the_types_that_both_engines_load_at_full_size(flash_plan, data):
    expected = json.loads((data / "flash_one_file.json").read_text("utf-8"))["tensors"]
    found = decide_formats(load_policy("q4k"), flash_plan.template.tensors, {})
    assert {tensor: d.format.name for tensor, d in found.items()} == {name: kind for name, kind, _ in expected}


def test_q2_is_q4k_but_for_the_experts(flash_plan):
    tensors = flash_plan.template.tensors
    found, q4k = (decide_formats(load_policy(name), tensors, {}) for name in ("q2", "q4k"))
    types = {"ffn_gate_exps": "IQ2_XXS", "ffn_up_exps": "IQ2_XXS", "ffn_down_exps": "Q2_K"}
    expected = {name: types.get(name.split(".")[-2], d.format.name) for name, d in q4k.items()}
    assert {name: d.format.name for name, d in found.items()} == expected
    n_bytes = sum(found[t.name].format.n_bytes(t.ne) for t in tensors)
    assert n_bytes / 2**30 == pytest.approx(80.76, abs=0.01)   # ds4's published file of this recipe


def test_mxfp4_is_q4k_but_for_the_experts(flash_plan):
    tensors = flash_plan.template.tensors
    found, q4k = (decide_formats(load_policy(name), tensors, {}) for name in ("mxfp4", "q4k"))
    expected = {name: "MXFP4" if "_exps." in name else d.format.name for name, d in q4k.items()}
    assert {name: d.format.name for name, d in found.items()} == expected
    assert sum(kind == "MXFP4" for kind in expected.values()) == 3 * 43


def test_every_shipped_policy_decides_every_model(make_checkpoint):
    paths = [make_checkpoint("with"), make_checkpoint("without", lead_ratios=(0, 0, 128), hash_layers=0)]
    assert next(p.name for p in list_policies()) == "q4k"
    for policy in list_policies():
        assert policy.description
        assert policy.rules[-1].tensors == ("*",)
        assert policy.file_type == FORMATS[policy.rules[0].format.name].file_type
        for path in paths:
            decide_formats(policy, derive_template(open_checkpoint(path)).tensors, {})


def test_a_name_is_a_shipped_policy_before_it_is_a_file(policy_file, monkeypatch, tmp_path):
    policy_file(REST, "q4k")
    monkeypatch.chdir(tmp_path)
    assert load_policy("q4k").file_type == 14
    assert load_policy("./q4k").file_type is None
    assert load_policy(Path("q4k").resolve()).file_type is None


@pytest.mark.parametrize("name", ["", "q5", "Q4K", "q4k.toml", "../q4k", "a\0b", "x" * 5000, "/", "policies"])
def test_a_policy_that_is_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"is neither a shipped policy \(.*q4k.*\) nor a file") as caught:
        load_policy(name)
    assert len(str(caught.value)) < 500


# Deciding


def test_the_first_match_wins_and_says_so(policy_file):
    found = decide(policy_file, rule("blk.3.*", "Q8_0"), rule("blk.*", "BF16"), REST)
    assert found["blk.3.attn_kv.weight"] == ("Q8_0", "mine rule 1: blk.3.*")
    assert found["blk.4.attn_kv.weight"] == ("BF16", "mine rule 2: blk.*")
    assert found["output.weight"] == ("F16", "mine rule 3: *")


def test_vectors_and_routing_tables_are_nobodys(policy_file):
    found = decide(policy_file, REST)
    assert found["output_norm.weight"] == ("F32", "vector")
    assert found["blk.7.attn_norm.weight"] == ("F32", "vector")
    assert found["blk.0.ffn_gate_tid2eid.weight"] == ("I32", "routing table")


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.7.attn_norm.weight", "blk.0.ffn_gate_tid2eid.weight"])
@pytest.mark.parametrize("more", [{}, {"optional": True}, {"layers": "3"}])
def test_a_literal_name_of_one_is_an_error(policy_file, name, more):
    kind = "routing table, which is always I32" if "tid2eid" in name else "vector, which is always F32"
    found = refuse(policy_file, f"'{name}' is a {kind}", rule(["output.weight", name], "F32", **more), REST)
    assert "mine rule 1" in found


def test_a_glob_that_only_finds_vectors_decides_nothing(policy_file):
    refuse(policy_file, "mine rule 1: *norm.weight: decides no tensor", rule("*norm.weight", "F32"), REST)
    assert types(policy_file, rule("*norm.weight", "Q8_0", optional=True), REST)["output_norm.weight"] == "F32"


@pytest.mark.parametrize("rules", [
    (rule("output.wieght", "F16"), REST),
    (rule("blk.12.*", "F16"), REST),
    (rule("blk.*", "F16", layers="12-99"), REST),
    (REST, rule("output.weight", "Q8_0")),
    (REST, REST),
    (rule("blk.?.attn_kv.weight", "F16"), rule("blk.3.*", "Q8_0"), REST),
])
def test_a_rule_that_decides_no_tensor_is_an_error_unless_it_is_optional(policy_file, rules):
    refuse(policy_file, "decides no tensor", *rules)
    optional = [text + "optional = true\n" for text in rules]
    assert set(types(policy_file, *optional).values()) >= {"F16", "F32", "I32"}


def test_all_rules_that_decide_something_are_used_once_is_enough(policy_file):
    assert types(policy_file, rule(["output.weight", "nothing"], "Q8_0"), REST)["output.weight"] == "Q8_0"


def test_a_tensor_that_no_rule_matches(policy_file):
    found = refuse(policy_file, "no rule matches tensor 'token_embd.weight'", rule("blk.*", "F16"))
    assert 'end the policy with a rule for "*"' in found


@pytest.mark.parametrize(("layers", "expected"), [
    ("0", {0}), ("11", {11}), (3, {3}), (0, {0}), ("0-2", {0, 1, 2}), ("0-2,5", {0, 1, 2, 5}),
    (" 1 , 3 - 4 ", {1, 3, 4}), ("5-5", {5}), ("2,2", {2}), ("0-9999", set(range(12))),
])
def test_layers(policy_file, layers, expected):
    found = types(policy_file, rule("blk.*", "Q8_0", layers=layers), REST)
    assert {n for n in range(12) if found[f"blk.{n}.attn_kv.weight"] == "Q8_0"} == expected


@pytest.mark.parametrize("layers", [
    "", "a", "-1", "1-", "-", "2-1", "1..3", "0x1", "1,,2", ",", "1;2", "1.0", "1 2", "12345", "9" * 10_000, "1-2-3",
    "\u00b2", -1, 1.5, True, [1], ["1"], {"a": 1},
])
def test_layers_that_are_none(policy_file, layers):
    text = f"[[rule]]\ntensors = 'blk.*'\ntype = 'F16'\nlayers = {json.dumps(layers)}\n".replace('{"a": 1}', "{a = 1}")
    assert "mine.toml: rule 1 (" in refuse(policy_file, "layers is ", text)


def test_a_rule_for_layers_leaves_tensors_of_no_layer_alone(policy_file):
    assert types(policy_file, rule("*", "Q8_0", layers="0-11"), REST)["output.weight"] == "F16"


def test_globs(policy_file):
    found = types(policy_file, rule("blk.[13].*", "Q8_0"), rule("blk.?.*", "BF16"), rule("blk.1[!0].*", "F32"), REST)
    kinds = [found[f"blk.{n}.attn_kv.weight"] for n in range(12)]
    assert kinds == ["BF16", "Q8_0", "BF16", "Q8_0", *["BF16"] * 6, "F16", "F32"]


def test_a_glob_is_for_the_whole_name_and_in_its_case(policy_file):
    for glob in ("output", "utput.weight", "OUTPUT.WEIGHT", "output.weigh", "blk.1.attn_kv"):
        refuse(policy_file, "decides no tensor", rule(glob, "F16"), REST)


def test_a_glob_is_no_regular_expression(policy_file):
    for glob in ("output.weigh.", "(output.weight)", "output.weight|x", "^output.weight$", "outpu+t.weight"):
        refuse(policy_file, "decides no tensor", rule(glob, "F16"), REST)


# Types


@pytest.mark.parametrize("name", ["Q8_0", "q8_0", "q80", "Q8-0"])
def test_types_are_read_in_any_spelling(policy_file, name):
    assert types(policy_file, rule("*", name))["output.weight"] == "Q8_0"


@pytest.mark.parametrize("name", ["Q9_K", "", "int8", "Q8_0 ", "Q4_K_M", "x" * 100_000])
def test_an_unknown_type(policy_file, name):
    found = refuse(policy_file, "unknown type", rule("*", name))
    assert "mine.toml: rule 1 ('*')" in found
    assert "known are F32, F16" in found


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ENCODABLE])
def test_a_type_that_cannot_be_written(policy_file, name):
    found = refuse(policy_file, f"type {name} cannot be written", rule("output.weight", name), REST)
    assert "mine rule 1" in found
    assert "'output.weight'" in found


def test_a_row_that_is_no_whole_number_of_blocks(policy_file):
    narrow = [*MODEL, tensor("blk.2.odd.weight", (96, 4))]
    with pytest.raises(InputError) as caught:
        types(policy_file, rule("*", "Q4_K"), tensors=narrow)
    for part in ("mine rule 1", "'blk.2.odd.weight'", "96 columns are not a whole number of Q4_K blocks of 256"):
        assert part in str(caught.value)
    assert types(policy_file, rule("*", "Q8_0"), tensors=narrow)["blk.2.odd.weight"] == "Q8_0"


def test_a_type_for_a_vector_may_be_anything_as_it_does_not_count(policy_file):
    assert types(policy_file, rule("*", "Q4_K"), tensors=[tensor("x"), tensor("y", (7,))]) == {"x": "Q4_K", "y": "F32"}


def test_template_as_a_type(policy_file):
    policy = read_policy(policy_file(rule("output.weight", "Template") + REST))
    found = decide_formats(policy, MODEL, {"output.weight": FORMATS["BF16"]})
    assert found["output.weight"].format.name == "BF16"
    with pytest.raises(InputError, match="give a template file"):
        decide_formats(policy, MODEL, {})


# The file


def test_what_a_policy_says_of_itself(policy_file):
    text = 'description = "Mine"\nfile_type = 7\n' + rule("*", "Q8_0", layers="1", optional=True)
    policy = read_policy(policy_file(text))
    assert (policy.name, policy.description, policy.file_type) == ("mine", "Mine", 7)
    assert policy.rules == (Rule(("*",), FORMATS["Q8_0"], frozenset({1}), True, "mine rule 1: *"),)
    assert read_policy(policy_file(REST)).description == ""


@pytest.mark.parametrize("raw", [
    b"\xef\xbb\xbf" + REST.encode(), REST.replace("\n", "\r\n").encode(), REST.rstrip("\n").encode(),
    b"\xef\xbb\xbf" + REST.replace("\n", "\r\n").encode(), b"# comment\r\n\r\n" + REST.encode(),
    b"# \xf0\x9f\x98\x80\n" + REST.encode(),
])
def test_byte_order_marks_and_line_ends_of_other_systems(policy_file, raw):
    assert types(policy_file, raw.decode())["output.weight"] == "F16"


@pytest.mark.parametrize(("text", "line"), [
    ("[[rule]]\ntensors = *\n", 2), ("[[rule]]\ntensors = '*'\ntype = 'F16\n", 3), ("\n\n[[rule]\n", 3), ("x\n", 1),
    ("[[rule]]\ntype = 'F16'\ntensors = '*'\ntype = 'F32'\n", 4), ("description = ''\n\ndescription = ''\n", 3),
    ("[[rule]]\ntensors = ['*'\n'x']\n", 3), ("[rule]\n[[rule]]\n", 2), ("[[rule]]\nlayers = 2024-13-45\n", 2),
    ("[[rule]]\n\ttensors = 'a\x07b'\n", 2), ("[[rule]]\rtensors = '*'\n", 1),
])
def test_syntax_errors_name_the_line(policy_file, text, line):
    found = refuse(policy_file, "is not valid TOML", text)
    assert f"line {line}" in found or "end of document" in found
    assert "mine.toml" in found


@pytest.mark.parametrize(("text", "message"), [
    ("", "has no [[rule]] tables"), ("description = 'x'\n", "has no [[rule]] tables"),
    ("rule = []\n", "has no [[rule]]"), ("rule = [1]\n", "has no [[rule]] tables"),
    ("rule = 'x'\n", "has no [[rule]] tables"), ("rule = 7\n", "has no [[rule]] tables"),
    ("[rule]\ntensors = '*'\n", "has no [[rule]] tables"), ("rules = 1\n" + REST, "unknown key 'rules'"),
    (REST + "typ = 'F16'\n", "rule 1 ('*'): unknown key 'typ'"),
    ("file_type = nan\n" + REST, "key 'file_type': is nan"), ("file_type = 1.0\n" + REST, "is 1.0"),
    ("file_type = -1\n" + REST, "is -1"), ("file_type = true\n" + REST, "is True"),
    ("file_type = inf\n" + REST, "is inf"), (f"file_type = {1 << 31}\n" + REST, "is 2147483648"),
    ("file_type = " + "9" * 5000 + "\n" + REST, "is not valid TOML"),
    ("description = 7\n" + REST, "is 7, expected text"), ("description = nan\n" + REST, "is nan, expected text"),
    ("[[rule]]\ntype = 'F16'\n", "rule 1 (None): needs tensors"),
    ("[[rule]]\ntensors = 7\ntype = 'F16'\n", "rule 1 (7): needs tensors"),
    ("[[rule]]\ntensors = []\ntype = 'F16'\n", "rule 1 ([]): needs tensors"),
    ("[[rule]]\ntensors = ['*', 7]\ntype = 'F16'\n", "needs tensors"),
    ("[[rule]]\ntensors = [['*']]\ntype = 'F16'\n", "needs tensors"),
    ("[[rule]]\ntensors = nan\ntype = 'F16'\n", "rule 1 (nan): needs tensors"),
    ("[[rule]]\ntensors = '*'\n", "rule 1 ('*'): needs a type, has None"),
    ("[[rule]]\ntensors = '*'\ntype = 7\n", "needs a type, has 7"),
    ("[[rule]]\ntensors = '*'\ntype = nan\n", "needs a type, has nan"),
    ("[[rule]]\ntensors = '*'\ntype = ['F16']\n", "needs a type, has ['F16']"),
    ("[[rule]]\ntensors = '*'\ntype = 'F16'\noptional = 1\n", "optional is 1, expected true or false"),
    ("[[rule]]\ntensors = '*'\ntype = 'F16'\noptional = nan\n", "optional is nan"),
    ("[[rule]]\ntensors = '*'\ntype = 'F16'\nlayers = nan\n", "layers is nan"),
    (REST + REST + "[[rule]]\ntensors = ['a', 'b']\n", "rule 3 (['a', 'b']): needs a type"),
])
def test_faults_name_file_rule_and_tensors(policy_file, text, message):
    assert "mine.toml" in refuse(policy_file, message, text)


@pytest.mark.parametrize("glob", [
    "", "a" * 201, "ä", "a\nb", "a\tb", "\x00", "a*b*c*d*e*f", "*****", "[a", "a]", "[[a]", "\u202e",
])
def test_globs_that_are_none(policy_file, glob):
    assert "rule 1 (" in refuse(policy_file, "", rule(["output.weight", glob], "F16"), REST)


def test_not_utf8(policy_file):
    with pytest.raises(InputError, match=r"mine\.toml: is not valid UTF-8 at byte 2"):
        read_policy(policy_file(b"# \xff\n"))
    with pytest.raises(InputError, match=r"mine\.toml"):
        read_policy(policy_file(REST.encode("utf-16")))


def test_too_large_too_many(policy_file, tmp_path):
    with pytest.raises(InputError, match="is larger than 1,000,000 bytes"):
        read_policy(policy_file(b"#" * 1_000_001))
    with (tmp_path / "hole.toml").open("wb") as file:
        file.truncate(1 << 40)
    with cheap(), pytest.raises(InputError, match="is larger than"):
        read_policy(tmp_path / "hole.toml")
    many = [f"blk.{n}.x" for n in range(10_001)]
    with pytest.raises(InputError, match="has more than 10,000 globs"):
        read_policy(policy_file(rule(many, "F16", optional=True)))
    assert len(read_policy(policy_file(rule(many[:-1], "F16", optional=True))).rules[0].tensors) == 10_000


@pytest.mark.parametrize("text", [
    "a." * 400_000 + "a = 1\n", "[" + "a." * 400_000 + "a]\n", "'a'." * 200_000 + "a = 1\n",
    '"a" . ' * 150_000 + "a = 1\n", "x = {" + "a." * 400_000 + "a = 1}\n", "x = " + "[" * 900_000,
    "x = " + "{a=" * 300_000, '"""' * 300_000, "'" * 900_000, '"' * 900_001, "\\" * 900_000, "#" * 900_000,
    "\n" * 900_000, " " * 900_000, "x" * 900_000, "x = 0." + "1" * 900_000,
    "[[rule]]\n" * 100_000, "".join(f"k{n} = 1\n" for n in range(70_000)), "x = '" + "." * 900_000 + "'\n",
], ids=lambda text: text[:8])
def test_hostile_toml_costs_little(policy_file, text):
    with cheap(seconds=4.0, n_bytes=None), pytest.raises(InputError) as caught:
        read_policy(policy_file(text))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["description = '{}'\n", "# {}\n", 'description = """\n{}\n"""\n',
                                  "description = '''\n{}\n'''\n"])
def test_dots_in_texts_and_comments_do_not_count(policy_file, text):
    text = text.format("a." * 40)
    assert read_policy(policy_file(text + rule([f"blk.{n}.x.y" for n in range(40)], "F16") + REST)).rules


NAMES = ["blk.42.indexer_compressor_gate.weight", "blk." + "0" * 50 + ".weight", "a" * 63, "output.weight"]


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="ab*?[]!-.^\\(+|&~", min_size=1, max_size=30) | st.text(max_size=20))
@example("*a*a*a*a")
@example("[" * 10 + "]" * 10)
@example("[a[b]]")
@example("[!" + "a-" * 90 + "]")
@example("[z-a]")
def test_any_glob_is_matched_in_no_time_or_refused(glob):
    try:
        check_glob(glob, "rule")
    except InputError:
        return
    rule = Rule((glob,), None)
    with warnings.catch_warnings(), cheap(seconds=0.5, n_bytes=None):
        warnings.simplefilter("error")
        for name in NAMES:
            rule.matches(tensor(name, layer=0) if not name.startswith("blk.") else TemplateTensor(name, (1, 1), (), 0))


@settings(deadline=None, max_examples=150)
@given(st.text(alphabet="[]rule \n='\"F16*tensorypl.0-9{},#", max_size=80))
def test_any_text_is_a_policy_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(text, "utf-8", newline="")
    with suppress(InputError):
        assert read_policy(path).rules


def test_a_policy_of_one_rule_for_each_tensor_of_the_largest_model_is_quick(policy_file):
    model = [tensor(f"blk.{n % 61}.t{n}.weight") for n in range(1900)]
    with cheap(seconds=5.0, n_bytes=None):
        found = types(policy_file, *(rule(t.name, "Q8_0") for t in model), tensors=model)
    assert set(found.values()) == {"Q8_0"}


# Identity


def test_the_hash_is_of_what_the_rules_say(policy_file):
    one = read_policy(policy_file(rule(["a", "b"], "Q8_0") + REST))
    text = "# comment\ndescription = 'x'\nfile_type = 7\n" + rule(["a", "b"], "q8-0") + REST
    same = read_policy(policy_file(text, "other.toml"))
    assert one.sha256 == same.sha256
    others = [rule(["b", "a"], "Q8_0") + REST, rule(["a", "b"], "F16") + REST, REST, REST + rule(["a", "b"], "Q8_0"),
              rule(["a", "b"], "Q8_0", layers="1") + REST, rule(["a", "b"], "template") + REST]
    hashes = {read_policy(policy_file(text)).sha256 for text in others} | {one.sha256}
    assert len(hashes) == 7


def test_flags_change_name_and_hash_and_drop_the_file_type():
    policy = load_policy("q4k")
    assert policy.with_flags([]) is policy
    flagged = policy.with_flags([Rule(("output.weight",), FORMATS["F16"], label="--output")])
    assert (flagged.name, flagged.file_type, flagged.rules) == ("q4k with flags", None, policy.rules)
    assert flagged.sha256 != policy.sha256


def test_a_policy_made_in_python(make_checkpoint):
    policy = Policy("mine", "", (Rule(("*",), FORMATS["F32"], label="all"),))
    plan = make_plan(open_checkpoint(make_checkpoint()), policy=policy)
    assert {t.format.name for t in plan.tensors} == {"F32", "I32"}
    assert {kv.key: kv.value for kv in plan.kvs}["dsv4tools.policy_sha256"] == policy.sha256
