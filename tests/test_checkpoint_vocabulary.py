"""The tokenizer files: tokens by id, types, merges, special ids and the chat template, or a refusal that says why."""

from __future__ import annotations

import hashlib
import json

import pytest
from bounds import cheap
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4tools.checkpoint.vocabulary import TokenType, _assign_ids, read_vocabulary
from dsv4tools.errors import InputError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5   # llama.h
VOCAB = {"<｜s｜>": 0, "a": 1, "b": 2, "ab": 3}
MERGES = ["a b"]


def added(token_id, content, special=True):
    return {"id": token_id, "content": content, "special": special}


@pytest.fixture
def load(tmp_path):
    """Write tokenizer files and read them; None leaves a key away, a str is the file's text."""

    def load(vocab=VOCAB, merges=MERGES, added_tokens=(), *, size=4, settings=None, config=None, jinja=None, **model):
        whole = {"added_tokens": list(added_tokens) if isinstance(added_tokens, tuple) else added_tokens,
                 "model": {"type": "BPE", "vocab": vocab, "merges": merges} | model}
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
        (tmp_path / "config.json").write_text(json.dumps(config or {}), "utf-8")
        for name, content in (("tokenizer_config.json", settings), ("chat_template.jinja", jinja)):
            (tmp_path / name).unlink(missing_ok=True)
            if content is not None:
                text = content if isinstance(content, (str, bytes)) else json.dumps(content)
                (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return read_vocabulary(tmp_path, size)

    return load


def refuse(load, message, **arguments):
    with cheap(), pytest.raises(InputError) as caught:
        load(**arguments)
    found = str(caught.value)
    assert message in found
    assert len(found) < 700
    assert "\n" not in found
    return found


# Tokens


def test_the_types_are_llama_cpps():
    assert {t.name: int(t) for t in TokenType} == {"NORMAL": 1, "CONTROL": 3, "USER_DEFINED": 4, "UNUSED": 5}


def test_tokens_stand_at_their_ids_and_holes_are_padded(load):
    found = load({"b": 5, "a": 1, "ab": 3}, size=7)
    assert found.tokens == ["[PAD0]", "a", "[PAD2]", "ab", "[PAD4]", "b", "[PAD6]"]
    assert found.types == [UNUSED, NORMAL, UNUSED, NORMAL, UNUSED, NORMAL, UNUSED]


def test_types_of_added_tokens(load):
    tokens = (added(0, "<｜s｜>"), added(4, "<think>", special=False), added(5, "<|x|>", special=False),
              added(6, "<｜y｜>", special=False), added(7, "｜DSML｜", special=False), added(8, "plain"))
    found = load(added_tokens=tokens, size=9)
    assert found.tokens[4:] == ["<think>", "<|x|>", "<｜y｜>", "｜DSML｜", "plain"]
    assert found.types == [CONTROL, NORMAL, NORMAL, NORMAL, USER_DEFINED, CONTROL, CONTROL, USER_DEFINED, CONTROL]


def test_a_token_that_only_looks_like_control_text_is_normal(load):
    assert load().types[0] == NORMAL


def test_special_is_true_or_it_is_not(load):
    assert load(added_tokens=(added(4, "x", special="yes"), {"id": 5, "content": "y"}), size=6).types[4:] == [
        USER_DEFINED, USER_DEFINED]


# What the tokenizers library 0.23.3 assigned to added tokens whose `id` leaves a gap (content -> id).
LIBRARY = [
    ({"a": 0, "b": 1}, [("<x>", 5), ("<y>", 7)], {"<x>": 2, "<y>": 3}),
    ({"a": 0, "b": 1, "<x>": 9}, [("<x>", 9), ("<y>", 10)], {"<x>": 9, "<y>": 3}),
    ({"a": 0, "b": 1, "<x>": 9}, [("<y>", 3), ("<x>", 9)], {"<y>": 3, "<x>": 9}),
    ({"a": 0, "b": 4}, [("<y>", 5), ("<z>", 6)], {"<y>": 2, "<z>": 3}),
    ({"a": 0, "b": 1}, [("<x>", 3), ("<y>", 2)], {"<x>": 2, "<y>": 3}),
]


@pytest.mark.parametrize(("vocab", "declared", "expected"), LIBRARY)
def test_added_tokens_have_the_ids_that_the_tokenizers_library_gives_them(vocab, declared, expected):
    assert _assign_ids(vocab, {text: (i, True) for text, i in declared}) == expected


def test_the_assigned_ids_are_where_the_tokens_stand(load):
    found = load(added_tokens=(added(6, "<x>"), added(7, "<y>")), size=8)
    assert found.tokens[4:] == ["<x>", "<y>", "[PAD6]", "[PAD7]"]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"vocab": {"a": 0, "b": 0, "ab": 1}}, "id 0 belongs to 'a' and to 'b'"),
    ({"vocab": {"": 0, "a": 1, "b": 2, "ab": 3}}, "a token is '', expected text"),
    ({"vocab": VOCAB | {"c": 4}}, "token 'c' has id 4, expected 0 to 3 (config.json's vocab_size)"),
    ({"vocab": VOCAB | {"c": -1}}, "token 'c' has id -1"),
    ({"vocab": VOCAB | {"c": 10**400}}, "token 'c' has id 1000"),
    ({"vocab": {"a": True, "b": 0, "ab": 2}}, "token 'a' has id True"),
    ({"vocab": {"a": 1.0, "b": 0, "ab": 2}}, "token 'a' has id 1.0"),
    ({"vocab": {"a": "1", "b": 0, "ab": 2}}, "token 'a' has id '1'"),
    ({"vocab": {"a": None, "b": 0, "ab": 2}}, "token 'a' has id None"),
    ({"vocab": {"\ud800": 0}}, "is not valid Unicode"),
    ({"vocab": {"x" * 100_000: 7}}, "has id 7"),
    ({"vocab": []}, "no BPE model with a vocab"),
    ({"vocab": None}, "no BPE model with a vocab"),
    ({"type": "Unigram"}, "expected a byte-level BPE"),
    ({"type": None}, "expected a byte-level BPE"),
    ({"vocab": VOCAB | {"[PAD4]": 5}, "size": 6}, "'[PAD4]' has the name that fills an unused id"),
    ({"added_tokens": None}, "'added_tokens': is not a list of objects"),
    ({"added_tokens": {}}, "'added_tokens': is not a list of objects"),
    ({"added_tokens": ("x",)}, "'added_tokens': is not a list of objects"),
    ({"added_tokens": (added(4, ""),), "size": 5}, "an added token is '', expected text"),
    ({"added_tokens": (added(4, 7),), "size": 5}, "an added token is 7, expected text"),
    ({"added_tokens": ({"id": 4},), "size": 5}, "an added token is None, expected text"),
    ({"added_tokens": (added(4, "\udcff"),), "size": 5}, "is not valid Unicode"),
    ({"added_tokens": (added(4, "x"), added(5, "x")), "size": 6}, "added token 'x' appears twice"),
    ({"added_tokens": (added(4, "x"),)}, "has id 4, expected 0 to 3"),
    ({"added_tokens": (added(9, "x"),), "size": 5}, "added token 'x' has id 9, expected 0 to 4"),
    ({"added_tokens": (added(None, "x"),), "size": 5}, "added token 'x' has id None"),
    ({"added_tokens": (added(2, "a"),)}, "token 'a' has id 1 in the vocab, 2 among the added tokens"),
    ({"vocab": VOCAB | {"y": 5}, "added_tokens": (added(6, "x"),), "size": 7}, "id 5 belongs to 'y' and to 'x'"),
])
def test_what_is_wrong_with_tokens(load, arguments, message):
    refuse(load, message, **arguments)


def test_a_token_twice_in_the_vocab(load, tmp_path):
    load()
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"b": 2', '"a": 2'), "utf-8")
    with pytest.raises(InputError, match="key 'a' appears twice"):
        read_vocabulary(tmp_path, 4)


def test_more_embedding_rows_than_tokens_are_padded_fewer_are_refused(load):
    assert load(size=6).tokens[4:] == ["[PAD4]", "[PAD5]"]
    refuse(load, "expected 0 to 2 (config.json's vocab_size)", size=3)


def test_tokens_keep_their_bytes(load):
    odd = {"\x00": 0, "e\u0301": 1, "\u00e9": 2, "\u2028": 3, "Ġ": 4, "𐍈": 5, "a": 6, "b": 7, "ab": 8}
    assert load(odd, size=9).tokens == list(odd)


# Merges


@pytest.mark.parametrize("merges", [["a b", "ab a"], [["a", "b"], ["ab", "a"]], ["a b", ["ab", "a"]]])
def test_both_forms_of_merges(load, merges):
    assert load(VOCAB | {"aba": 4}, merges, size=5).merges == ["a b", "ab a"]


def test_a_space_inside_a_part_is_written_as_byte_level_text(load):
    assert load({"a b": 0, " ": 1, "a b ": 2}, [["a b", " "]], size=3).merges == ["aĠb Ġ"]


@pytest.mark.parametrize(("merges", "message"), [
    (None, "'model.merges': is missing or empty"), ([], "is missing or empty"), ({"a": "b"}, "is missing or empty"),
    ("a b", "is missing or empty"), (["a"], "merge 0: is 'a', expected two tokens"), (["a b c"], "expected two tokens"),
    (["a b", "a  b"], "merge 1: is 'a  b', expected two tokens"), ([["a"]], "expected two tokens"),
    ([["a", "b", "c"]], "expected two tokens"), ([7], "is 7, expected two tokens"), ([None], "expected two tokens"),
    ([["a", 7]], "merge 0 is 7, expected text"), ([["a", ""]], "merge 0 is '', expected text"),
    ([" ab"], "merge 0 is '', expected text"), ([["a", "\ud800"]], "is not valid Unicode"),
    (["b a"], "merge 0: makes 'ba', which is no token"), (["x" * 100_000], "expected two tokens"),
    (["x " + "y" * 100_000], "which is no token"),
])
def test_what_is_wrong_with_merges(load, merges, message):
    refuse(load, message, merges=merges)


def test_missing_merges(load, tmp_path):
    load()
    whole = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    del whole["model"]["merges"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
    with pytest.raises(InputError, match=r"'model\.merges': is missing or empty"):
        read_vocabulary(tmp_path, 4)


# Special ids and flags


def test_special_ids_come_from_the_tokenizer_then_from_config_json(load):
    settings = {"bos_token": "a", "eos_token": {"content": "b"}, "pad_token": {"__type": "AddedToken", "content": "ab"}}
    config = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    assert load(settings=settings, config=config).special_ids == {"bos": 1, "eos": 2, "padding": 3}
    assert load(config=config | {"eos_token_id": 3}).special_ids == {"bos": 0, "eos": 3, "padding": 0}
    assert load(settings={"eos_token": "b"}, config={"bos_token_id": 3}).special_ids == {"eos": 2, "bos": 3}
    assert load().special_ids == {}
    nothing = {"bos_token": None, "eos_token": {"content": None}, "pad_token": {}}
    assert load(settings=nothing, config={"eos_token_id": None}).special_ids == {}


@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize("value", ["c", "", 7, ["a"], {"content": 7}, {"content": ["a"]}, {"content": "c"}, True])
def test_a_special_token_that_is_none(load, key, value):
    refuse(load, f"key '{key}': is ", settings={key: value})


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [4, -1, "0", 0.0, False, [0, 1]])
def test_a_special_id_that_is_none(load, key, value):
    assert "config.json" in refuse(load, f"{key} has id {value!r}", config={key: value})


def test_flags(load):
    assert (load().add_bos, load().add_eos) == (False, False)
    found = load(settings={"add_bos_token": True, "add_eos_token": None})
    assert (found.add_bos, found.add_eos) == (True, False)
    assert load(settings={"add_eos_token": True}).add_eos is True


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("value", [1, 0, "true", [], {}])
def test_a_flag_that_is_none(load, key, value):
    refuse(load, f"key '{key}': is {value!r}, expected true or false", settings={key: value})


# Chat template

HOSTILE = "{{ cycler.__init__.__globals__.os.popen('touch x').read() }}{% for i in range(10**9) %}x{% endfor %}"


def test_no_template(load):
    assert load().chat_template is None
    assert load(settings={"chat_template": None}).chat_template is None


def test_a_template_is_copied_and_never_looked_into(load, tmp_path):
    with cheap():
        assert load(settings={"chat_template": HOSTILE}).chat_template == HOSTILE
        assert load(jinja=HOSTILE + "\r\n\ufeff ").chat_template == HOSTILE + "\r\n\ufeff "
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat_template.jinja", "config.json", "tokenizer.json"]


def test_the_tokenizer_config_goes_before_the_file(load):
    assert load(settings={"chat_template": "one"}, jinja="two").chat_template == "one"
    assert load(settings={}, jinja="two").chat_template == "two"


def test_the_default_of_several_templates(load):
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    assert load(settings={"chat_template": several}).chat_template == "yes"
    assert load(settings={"chat_template": several[:1]}).chat_template is None
    assert load(settings={"chat_template": several[:1]}, jinja="file").chat_template == "file"
    assert load(settings={"chat_template": []}).chat_template is None


@pytest.mark.parametrize(("arguments", "message"), [
    ({"settings": {"chat_template": 7}}, "chat_template is 7, expected text"),
    ({"settings": {"chat_template": {"a": 1}}}, "expected text"),
    ({"settings": {"chat_template": [{"name": "default", "template": 7}]}}, "chat_template is 7, expected text"),
    ({"settings": {"chat_template": "\ud800"}}, "is not valid Unicode"),
    ({"settings": {"chat_template": "\ud800" * 500_000}}, "is not valid Unicode"),
    ({"settings": {"chat_template": "x" * 1_000_001}}, "is larger than 1,000,000 bytes"),
    ({"settings": {"chat_template": "ü" * 500_001}}, "is larger than 1,000,000 bytes"),
    ({"jinja": b"x" * 1_000_001}, "is larger than 1,000,000 bytes"),
    ({"jinja": b"abc\xff"}, "is not valid UTF-8 at byte 3"),
])
def test_a_template_that_is_none(load, arguments, message):
    refuse(load, message, **arguments)


@pytest.mark.parametrize("entry", [{"name": [], "template": "x"}, {"name": {}, "template": "x"}, 7, None, [], {}])
def test_odd_entries_among_several_templates_are_passed_over(load, entry):
    found = load(settings={"chat_template": [entry, {"name": "default", "template": "yes"}]})
    assert found.chat_template == "yes"


# Files


def test_missing_files(load, tmp_path):
    load()
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: is missing"):   # asked for, as no special token is named
        read_vocabulary(tmp_path, 4)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: is missing"):
        read_vocabulary(tmp_path, 4)


@pytest.mark.parametrize("raw", ["", "[]", '{"model":1}', "{}", '{"model":{"vocab":{"a":0,"a":1}}}', "[" * 100_000])
def test_a_tokenizer_that_is_none(tmp_path, raw):
    (tmp_path / "tokenizer.json").write_text(raw, "utf-8")
    with cheap(), pytest.raises(InputError, match=r"tokenizer\.json"):
        read_vocabulary(tmp_path, 4)


def test_a_tokenizer_config_that_is_none(load):
    refuse(load, "tokenizer_config.json: holds a JSON list", settings="[]")
    refuse(load, "tokenizer_config.json: is not valid JSON", settings="{")


# Against what llama.cpp's converter wrote for the same checkpoint


def test_tiny_6e_as_llama_cpp_reads_it(tiny_6e, data):
    expected = json.loads((data / "tiny-6e.mainline_kv.json").read_text("utf-8"))
    found = read_vocabulary(tiny_6e, 512)

    def digest(value):
        return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()

    assert digest(found.tokens) == expected["tokenizer.ggml.tokens"]["value"]["sha256_json"]
    assert digest([int(t) for t in found.types]) == expected["tokenizer.ggml.token_type"]["value"]["sha256_json"]
    assert found.merges == expected["tokenizer.ggml.merges"]["value"]
    assert found.special_ids == {
        name: expected[f"tokenizer.ggml.{name}_token_id"]["value"] for name in ("bos", "eos", "padding")}


def test_both_forms_of_merges_give_the_same_vocabulary(make_checkpoint):
    one, two = (read_vocabulary(make_checkpoint(form, merges_form=form), 512) for form in ("strings", "pairs"))
    assert one == two


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused_and_nothing_else(tmp_path_factory, draw):
    path = tmp_path_factory.getbasetemp() / "vocabulary"
    path.mkdir(exist_ok=True)
    whole = {"added_tokens": [added(4, "x")], "model": {"type": "BPE", "vocab": VOCAB, "merges": MERGES}}
    config = {"bos_token": "a", "eos_token": {"content": "b"}, "add_bos_token": False, "chat_template": "x"}
    value = draw.draw(JSON_VALUES)
    where = draw.draw(st.sampled_from(["added_tokens", "added", "model", "vocab", "token", "merges", "merge", *config]))
    if where in config:
        config[where] = value
    elif where in ("added_tokens", "model"):
        whole[where] = value
    elif where == "added":
        whole["added_tokens"][0] = draw.draw(st.sampled_from([value, {"id": 4, "content": value}, added(value, "x")]))
    else:
        key = {"vocab": "vocab", "token": "vocab", "merges": "merges", "merge": "merges"}[where]
        whole["model"][key] = {"vocab": value, "token": VOCAB | {"ab": value}, "merges": value, "merge": [value]}[where]
    (path / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (path / "config.json").write_text("{}", "utf-8")
    try:
        found = read_vocabulary(path, 8)
    except InputError:
        return
    assert len(found.tokens) == len(found.types) == 8
    assert len(set(found.tokens)) == 8
