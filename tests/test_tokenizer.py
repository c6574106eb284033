"""Ids and texts: equal from a checkpoint, its GGUF and the library that reads tokenizer.json itself; and refusals."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.checkpoint.vocabulary import read_vocabulary
from dsv4tools.errors import InputError, ResourceError, UsageError
from dsv4tools.gguf.header import encode_header
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.gguf.values import KV
from dsv4tools.synthetic.tokenizer import ADDED_TOKENS, SPECIAL_TOKENS, make_tokenizer, make_tokenizer_config
from dsv4tools.template.metadata import tokenizer_entries
from dsv4tools.tokenizer import load_tokenizer
from dsv4tools.tokenizer.tokenizer import byte_letters

VOCAB_SIZES = {"small": (512, None), "large": (20_000, 15_000)}


def write_tokenizer(directory, vocab_size, merges=None, config=None, **changes):
    """The tokenizer's files of a checkpoint, with keys of tokenizer.json changed."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = make_tokenizer(vocab_size, merges=merges) | changes
    (directory / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(make_tokenizer_config()), "utf-8")
    if config:
        (directory / "config.json").write_text(json.dumps(config | {"vocab_size": vocab_size}), "utf-8")
    return directory


def write_gguf(path, entries):
    path.write_bytes(encode_header([KV("general.architecture", "str", "deepseek4"), *entries], []))
    return path


@pytest.fixture(scope="module")
def config(data):
    return json.loads((data / "configs" / "flash.json").read_text("utf-8"))


@pytest.fixture(scope="module", params=VOCAB_SIZES)
def sides(request, tmp_path_factory, config):
    """The tokenizer by three ways: the library itself, ours from the checkpoint, ours from the GGUF."""
    vocab_size, merges = VOCAB_SIZES[request.param]
    directory = write_tokenizer(tmp_path_factory.mktemp(request.param), vocab_size, merges, config)
    file = write_gguf(directory / "x.gguf", tokenizer_entries(read_vocabulary(directory, vocab_size)))
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return library, load_tokenizer(directory), load_tokenizer(file)


TEXTS = st.lists(
    st.text(max_size=12) | st.sampled_from([*SPECIAL_TOKENS, *ADDED_TOKENS])
    | st.sampled_from(["<", "<｜", "｜>", "｜", "DSML", "think", ">", "｜DSML"])
    | st.sampled_from(["\r\n", "  ", " the", "12345", "漢字かな", "🙂", "é", "e\u0301"])
    | st.text("abcdefghijklmnopqrstuvwxyz ", max_size=20), max_size=6).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=TEXTS)
def test_ids_are_the_librarys_and_give_the_text_back(sides, text):
    library, from_checkpoint, from_gguf = sides
    ids = from_checkpoint.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert ids == from_gguf.encode(text)
    assert from_checkpoint.decode(ids) == text
    assert from_gguf.decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_stream_says_in_pieces_what_decode_says_at_once(sides, data):
    _, tokenizer, other = sides
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_tokens - 1), max_size=12))
    stream = tokenizer.stream()
    pieces = [stream.feed(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids) == other.decode(ids)
    raw = b"".join(map(tokenizer.token_bytes, ids))
    assert tokenizer.decode(ids) == raw.decode("utf-8", "replace")


@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
def test_a_stream_never_shows_half_a_character(sides, text):
    assume("\ufffd" not in text)
    stream = sides[1].stream()
    shown = ""
    for i in sides[1].encode(text):
        shown += stream.feed(i)
        assert text.startswith(shown)
    assert (shown, stream.finish()) == (text, "")


def test_a_stream_can_be_used_again(sides):
    stream = sides[1].stream()
    first, *rest = sides[1].encode("🙂")
    assert (stream.feed(first), stream.finish()) == ("", "\ufffd")
    assert "".join(map(stream.feed, [first, *rest])) == "🙂"


def test_ids_that_can_be_counted(sides):
    # By make_tokenizer: three special tokens, the bytes in the order of their letters, merges; then added tokens.
    _, tokenizer, _ = sides
    letters = byte_letters()
    assert tokenizer.encode("<｜begin▁of▁sentence｜>") == [0] == [tokenizer.bos_id]
    assert tokenizer.encode("<｜end▁of▁sentence｜>") == [1] == [tokenizer.eos_id]
    assert tokenizer.encode("!~") == [3, 3 + 93]
    assert tokenizer.encode("\x00") == [3 + list(letters).index(0)]
    assert tokenizer.token_id("<think>") == tokenizer.token_id("<｜User｜>") + 2
    assert tokenizer.decode([]) == ""


def test_an_opened_checkpoint_and_an_opened_gguf(make_checkpoint, tmp_path):
    checkpoint = open_checkpoint(make_checkpoint())
    text = "Hello, <｜User｜> the tokens of 2026"
    ids = load_tokenizer(checkpoint.directory).encode(text)
    assert load_tokenizer(checkpoint).encode(text) == ids
    with open_gguf(write_gguf(tmp_path / "x.gguf", tokenizer_entries(checkpoint.vocabulary)), template=True) as file:
        assert load_tokenizer(file).encode(text) == ids


def test_letters_are_the_librarys():
    assert sorted(byte_letters().values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("\x00 ~", "é\n", "\xad\x7f", "漢🙂"):
        letters = "".join(byte_letters()[byte] for byte in text.encode())
        assert letters == "".join(piece for piece, _ in pre.pre_tokenize_str(text))


def test_an_added_token_is_its_text_even_if_it_looks_like_bytes(tmp_path, config):
    added = make_tokenizer(512)["added_tokens"]
    added[5] |= {"content": "<é>"}   # the letter é stands for the byte 0xE9 in other tokens
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, 512, config=config, added_tokens=added))
    assert tokenizer.encode("é<é>")[-1] == tokenizer.token_id("<é>")
    assert tokenizer.decode(tokenizer.encode("é<é>")) == "é<é>"


def test_unused_ids_say_nothing(sides):
    library, tokenizer, _ = sides
    unused = [i for i in range(tokenizer.n_tokens) if library.id_to_token(i) is None]
    assert tokenizer.decode(unused) == ""


def test_half_a_surrogate_pair_is_no_text(sides):
    with pytest.raises(InputError, match="text: is not valid Unicode: half a surrogate pair at character 1"):
        sides[1].encode("a\udc00")


@pytest.mark.parametrize(("token_id", "message"), [
    (-1, "token id: is -1, expected 0 to 511"), (512, "token id: is 512, expected 0 to 511"),
    (True, "token id: is True, expected an integer"), (1.0, "token id: is 1.0, expected an integer"),
])
def test_ids_outside_the_vocabulary(tmp_path, config, token_id, message):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, 512, config=config))
    for call in (lambda: tokenizer.decode([token_id]), lambda: tokenizer.stream().feed(token_id)):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(caught.value) == message
    assert tokenizer.decode(np.array([3, 4])) == '!"'


def test_special_tokens_by_name(sides):
    for tokenizer in sides[1:]:
        for name in ("!", "nothing of the kind"):
            with pytest.raises(InputError, match=f"has no special token '{name}'; is it a DeepSeek-V4"):
                tokenizer.token_id(name)


# --- the pre-tokenizer of tokenizer.json

SPLITS = make_tokenizer(512)["pre_tokenizer"]["pretokenizers"]
LONG = SPLITS[2]["pattern"]["Regex"]


def chain(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def split(at, regex, **more):
    """The published pre-tokenizer with another expression in one place."""
    return chain(*(part | {"pattern": {"Regex": regex}} | more if i == at else part for i, part in enumerate(SPLITS)))


BYTES = SPLITS[3]
OTHERS = {
    "nothing": None,
    "no digits": chain(*SPLITS[1:]),
    "two digits": split(0, r"\p{N}{1,2}"),
    "decimal digits": split(0, r"\p{Nd}{1,3}"),
    "ASCII digits": split(0, r"[0-9]{1,3}"),
    "no Chinese": chain(SPLITS[0], *SPLITS[2:]),
    "no kana": split(1, "[一-龥]+"),
    "no katakana": split(1, "[一-龥぀-ゟ]+"),
    "more Chinese": split(1, "[一-鿿぀-ゟ゠-ヿ]+"),
    "no words": chain(*SPLITS[:2], BYTES),
    "no marks": split(2, LONG.replace(r"[\p{L}\p{M}]+", r"\p{L}+")),
    "no line ends": split(2, LONG.replace(r"|\s*[\r\n]+", "")),
    "no line ends behind punctuation": split(2, LONG.replace(r"+[\r\n]*|", "+|")),
    "no spaces before words": split(2, LONG.replace(r"[^\r\n\p{L}\p{P}\p{S}]?", "")),
    "no space before punctuation": split(2, LONG.replace(r"| ?[\p{P}", r"|[\p{P}")),
    "no symbols": split(2, LONG.replace(r" ?[\p{P}\p{S}]+", r" ?\p{P}+")),
    "no last space": split(2, LONG.replace(r"|\s+(?!\S)", "")),
    "no punctuation before words": split(2, LONG[LONG.index("|[^") + 1 :]),
    "removed": split(2, LONG, behavior="Removed"),
    "merged": split(2, LONG, behavior="MergedWithPrevious"),
    "a space in front": chain(*SPLITS[:3], BYTES | {"add_prefix_space": True}),
    "GPT-2": BYTES | {"use_regex": True},
    "no bytes": chain(*SPLITS[:3]),
}


@pytest.mark.parametrize("pre_tokenizer", OTHERS.values(), ids=OTHERS)
def test_another_way_to_cut_text_is_refused(tmp_path, config, pre_tokenizer):
    assert pre_tokenizer != make_tokenizer(512)["pre_tokenizer"]
    directory = write_tokenizer(tmp_path, 512, config=config, pre_tokenizer=pre_tokenizer)
    with pytest.raises(InputError, match=r"key 'pre_tokenizer': cuts text in another way than DeepSeek-V4's; a GGUF"):
        load_tokenizer(directory)


@pytest.mark.parametrize("normalizer", [
    {"type": "NFC"}, {"type": "NFD"}, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"},
    {"type": "Strip", "strip_left": False, "strip_right": True}, {"type": "StripAccents"},
    {"type": "Replace", "pattern": {"Regex": r"\r\n"}, "content": "\n"},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
], ids=json.dumps)
def test_a_normalizer_that_changes_text_is_refused(tmp_path, config, normalizer):
    with pytest.raises(InputError, match="key 'normalizer': changes text, expected one that changes nothing"):
        load_tokenizer(write_tokenizer(tmp_path, 512, config=config, normalizer=normalizer))


@pytest.mark.parametrize("changes", [
    {"normalizer": None},
    {"pre_tokenizer": split(2, LONG.replace(r"\r", "\r").replace(r"\n", "\n"))},
    {"pre_tokenizer": chain(chain(*SPLITS[:3]), BYTES)},
    {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
    {"post_processor": None, "decoder": None},
], ids=["no normalizer", "literal line ends", "nested", "truncation", "no decoder"])
def test_what_makes_no_difference_is_taken(tmp_path, config, changes):
    text = "three 123456 words\r\n\r\n and more"
    expected = load_tokenizer(write_tokenizer(tmp_path / "a", 512, config=config)).encode(text)
    assert load_tokenizer(write_tokenizer(tmp_path / "b", 512, config=config, **changes)).encode(text) == expected


@pytest.mark.parametrize("changes", [
    {"pre_tokenizer": {"type": "Nope"}}, {"normalizer": 3}, {"pre_tokenizer": split(0, "([")},
])
def test_settings_that_the_library_does_not_know(tmp_path, config, changes):
    with pytest.raises(InputError, match="keys 'normalizer' and 'pre_tokenizer': are not understood"):
        load_tokenizer(write_tokenizer(tmp_path, 512, config=config, **changes))


@pytest.mark.parametrize(("key", "value"), [
    ("dropout", 0.1), ("unk_token", "!"), ("continuing_subword_prefix", "##"), ("end_of_word_suffix", "</w>"),
    ("fuse_unk", True), ("byte_fallback", True), ("ignore_merges", True),
])
def test_a_model_that_a_gguf_cannot_describe(tmp_path, config, key, value):
    model = make_tokenizer(512)["model"] | {key: value}
    with pytest.raises(InputError, match=f"key 'model': has '{key}' set to .*; a GGUF cannot say this"):
        load_tokenizer(write_tokenizer(tmp_path, 512, config=config, model=model))


@pytest.mark.parametrize("key", ["single_word", "lstrip", "rstrip"])
def test_an_added_token_that_a_gguf_cannot_describe(tmp_path, config, key):
    added = make_tokenizer(512)["added_tokens"]
    added[5] |= {key: True}
    with pytest.raises(InputError, match=f"added token '<think>': has '{key}' set to True; a GGUF cannot say this"):
        load_tokenizer(write_tokenizer(tmp_path, 512, config=config, added_tokens=added))


def test_a_vocabulary_without_a_byte(tmp_path, config):
    model = make_tokenizer(512)["model"]
    model["vocab"]["xx"] = model["vocab"].pop("Ā")   # the letter of the byte 0
    with pytest.raises(InputError, match="has no token for the byte 0x00, expected one for each of the 256 bytes"):
        load_tokenizer(write_tokenizer(tmp_path, 512, config=config, model=model))


def test_a_directory_without_tokenizer_or_config(tmp_path, config):
    with pytest.raises(InputError, match=r"config\.json: is missing"):
        load_tokenizer(tmp_path)
    (write_tokenizer(tmp_path, 512, config=config) / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: is missing"):
        load_tokenizer(tmp_path)


# --- a GGUF that is not right

@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    return tokenizer_entries(read_vocabulary(write_tokenizer(tmp_path_factory.mktemp("entries"), 512), 512))


def changed(entries, name, kind=None, item_type=None, **change):
    """The entries with one of them left out, replaced, or one item of it replaced."""
    key = "tokenizer.ggml." + name
    old = next(kv for kv in entries if kv.key == key)
    if not change:
        return [kv for kv in entries if kv.key != key]
    value = change.get("value", old.value)
    if "at" in change:
        value = list(old.value)
        value[change["at"]] = change["to"]
    new = KV(key, kind or old.type, value, item_type if kind else old.item_type)
    return [new if kv.key == key else kv for kv in entries]


WRONG = {
    "model": [("model", {}, "model: is missing, expected 'gpt2'"),
              ("model", {"value": "bpe"}, "model: is 'bpe', expected 'gpt2' (byte-level BPE)")],
    "pre": [("pre", {}, "pre: is missing, expected 'joyai-llm' or 'deepseek-v3'"),
            ("pre", {"value": "deepseek-v4"}, "pre: is 'deepseek-v4', expected 'joyai-llm' or 'deepseek-v3'"),
            ("pre", {"value": 3, "kind": "u32"}, "pre: is 3, expected")],
    "tokens": [("tokens", {}, "tokens: is missing, expected a list of str"),
               ("tokens", {"value": [], "kind": "arr", "item_type": "str"}, "tokens: is 0 of str, expected a list"),
               ("tokens", {"value": "x", "kind": "str"}, "tokens: is str, expected a list of str"),
               ("tokens", {"at": 5, "to": ""}, "tokens: token 5 is empty, expected a text of its own"),
               ("tokens", {"at": 5, "to": "!"}, "tokens: token 5 is '!' like token 3, expected a text of its own"),
               ("tokens", {"at": 3, "to": "??"}, "has no token for the byte 0x21")],
    "types": [("token_type", {}, "token_type: is missing, expected a list of i32"),
              ("token_type", {"value": [1.0] * 512, "kind": "arr", "item_type": "f32"}, "token_type: is 512 of f32"),
              ("token_type", {"value": [1] * 511}, "token_type: has 511 entries, there are 512 tokens"),
              ("token_type", {"at": 7, "to": 6}, "token_type: says 6 of token 7, expected 1, 3, 4, 5"),
              ("token_type", {"at": 7, "to": 5}, "has no token for the byte 0x25")],
    "merges": [("merges", {}, "merges: is missing, expected a list of str"),
               ("merges", {"at": 2, "to": "ab"}, "merge 2: is 'ab', expected two tokens that make a third"),
               ("merges", {"at": 2, "to": '! "'}, "merge 2: is '! \"', expected two tokens that make a third"),
               ("merges", {"at": 2, "to": " "}, "merge 2: is ' ', expected two tokens that make a third")],
    "ids": [("bos_token_id", {"value": 512}, "bos_token_id: is 512, expected 0 to 511"),
            ("eos_token_id", {"value": True, "kind": "bool"}, "eos_token_id: is True, expected 0 to 511"),
            ("eos_token_id", {"value": "1", "kind": "str"}, "eos_token_id: is '1', expected 0 to 511")],
}


@pytest.mark.parametrize(("name", "change", "message"), [case for group in WRONG.values() for case in group])
def test_a_gguf_whose_tokenizer_is_not_right(tmp_path, entries, name, change, message):
    file = write_gguf(tmp_path / "x.gguf", changed(entries, name, **change))
    with pytest.raises(InputError) as caught:
        load_tokenizer(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_a_gguf_without_special_ids_and_with_the_other_names(tmp_path, entries):
    for name in ("bos_token_id", "eos_token_id"):
        entries = changed(entries, name)
    entries = changed(entries, "pre", value="deepseek-v3")
    entries = changed(entries, "token_type", value=next(kv.value for kv in entries if kv.key.endswith("_type")),
                      kind="arr", item_type="u32")
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", entries))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    assert tokenizer.decode(tokenizer.encode(" the <think>")) == " the <think>"


def test_unused_ids_of_a_gguf_may_have_any_text(tmp_path, entries):
    tokens = next(kv.value for kv in entries if kv.key.endswith("tokens"))
    first, second, *_ = (i for i, token in enumerate(tokens) if token.startswith("[PAD"))
    tokenizer = load_tokenizer(write_gguf(
        tmp_path / "x.gguf", changed(changed(entries, "tokens", at=first, to=""), "tokens", at=second, to="!")))
    assert tokenizer.decode([first, second, *tokenizer.encode("!")]) == "!"


def test_a_later_part_of_a_split_set(tmp_path):
    file = write_gguf(tmp_path / "x-00002-of-00002.gguf", [KV("split.no", "u16", 1)])
    with pytest.raises(InputError, match=r"model: is missing, expected 'gpt2' .*; give the first file of a split set"):
        load_tokenizer(file)


def test_random_tokenizers_of_a_gguf_raise_our_errors_only(tmp_path, entries):
    rng = random.Random(1)
    for i in range(60):
        name = rng.choice(["tokens", "token_type", "merges"])
        value = next(kv.value for kv in entries if kv.key == "tokenizer.ggml." + name)
        texts = ["", "a", "a b", "b a", "Ġ t", "th e", "<think> <think>", "a  b"]
        to = rng.randrange(7) if name == "token_type" else rng.choice(texts)
        change = changed(entries, name, at=rng.randrange(len(value)), to=to)
        try:
            tokenizer = load_tokenizer(write_gguf(tmp_path / f"{i}.gguf", change))
        except InputError:
            continue
        assert tokenizer.decode(tokenizer.encode("the ab <think>")) == "the ab <think>"


# --- the library

def test_without_the_library_text_cannot_be_encoded(tmp_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    directory = write_tokenizer(tmp_path, 512, config=config)
    with pytest.raises(ResourceError, match=r"tokenizers: the library cannot be imported: .*; pip install tokenizers"):
        load_tokenizer(directory)


def test_the_library_is_imported_late():
    code = "import sys, dsv4tools.tokenizer, dsv4tools.cli.encode; sys.exit('tokenizers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
