"""What a checkpoint says of itself: model card, sampling defaults, origin; hostile YAML does no harm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from bounds import cheap
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.checkpoint.card import RECEIPT, ModelCard, read_card
from dsv4tools.errors import Dsv4Error, InputError
from dsv4tools.template import derive_template

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "Some-Model"
    path.mkdir()
    return path


def with_front(home, front, rest="\n# Title\n"):
    (home / "README.md").write_text(f"---\n{front}\n---\n{rest}", "utf-8")
    return read_card(home)


def with_generation(home, text):
    (home / "generation_config.json").write_text(text if isinstance(text, str) else json.dumps(text), "utf-8")
    return read_card(home)


def test_without_any_file_the_directory_gives_the_name(home):
    assert read_card(home) == ModelCard("Some-Model")
    (home.parent / "link").symlink_to(home)
    assert read_card(home.parent / "link").name == "Some-Model"


def test_a_relative_directory_has_a_name_too(home, monkeypatch):
    monkeypatch.chdir(home)
    assert read_card(Path()).name == "Some-Model"


# Front matter


def test_front_matter(home):
    card = with_front(home, "license: mit\nmodel_name: A Model\nbase_model: a/b-Base\ntags:\n- x")
    assert (card.name, card.license, card.base_models) == ("A Model", "mit", ("a/b-Base",))


def test_several_base_models_and_the_other_key_for_the_name(home):
    card = with_front(home, "name: Other\nbase_model:\n- a/b\n- c/d\n- 7\n- ''\n- [x]")
    assert (card.name, card.base_models) == ("Other", ("a/b", "c/d", "7"))


@pytest.mark.parametrize("front", ["license:", "license: null", "license: ~", "license: ''", "license: [mit]",
                                   "license: {a: b}", "{}", "[]", "plain", "", "# comment", "7"])
def test_what_says_nothing(home, front):
    card = with_front(home, front)
    assert (card.name, card.license, card.base_models) == ("Some-Model", None, ())


@pytest.mark.parametrize("text", [
    "", "# Title\n---\nlicense: mit\n---\n", "---\nlicense: mit\n", "--- \nlicense: mit\n---\n",
    " ---\nlicense: mit\n---\n", "---\nlicense: mit\n----\n", "----\nlicense: mit\n---\n",
])
def test_what_is_no_front_matter(home, text):
    (home / "README.md").write_text(text, "utf-8")
    assert read_card(home).license is None


@pytest.mark.parametrize("text", [
    "---\r\nlicense: mit\r\n---\r\ntext", "---\nlicense: mit\n---", "---\nlicense: mit\n---  \n",
    "---\nlicense: mit\n---\n---\nlicense: no\n---\n", "\ufeff---\nlicense: mit\n---\n",
])
def test_what_is_front_matter(home, text):
    (home / "README.md").write_bytes(text.encode())
    assert read_card(home).license == "mit"


def test_a_card_that_is_not_utf8_is_read_as_far_as_it_goes(home):
    (home / "README.md").write_bytes(b"---\nlicense: mit\nname: \xff\n---\n\xff\xfe")
    card = read_card(home)
    assert (card.license, card.name) == ("mit", "\ufffd")


@pytest.mark.parametrize("front", [
    "date: 2024-13-45", "date: 2024-99-99T99:99:99Z", "n: 0b_", "n: " + "9" * 5000, "n: 1e999", "n: .nan",
    "x: !!int abc", "x: !!bool maybe", "x: !!timestamp abc", "x: !!float x", "x: !!binary '==='", "x: !!null x",
    "x: !!python/object/apply:os.system ['touch x']", "x: !!set {a, b}", "x: !custom {a: b}", "12:30:45: x",
    "license: mit\nlicense: mit", "a: &a [*a]", "a: &a {b: *a}", "? [a, b]\n: c", "? {a: b}\n: c", "<<: 7", "<<: [7]",
])
def test_values_that_yaml_gives_a_meaning_have_none_here(home, front):
    try:
        card = with_front(home, f"{front}\nlicense: mit")
    except InputError as e:
        assert "front matter is not valid YAML" in str(e)  # noqa: PT017  - some are no YAML, none does any harm
        assert "\n" not in str(e)  # noqa: PT017
    else:
        assert card.license == "mit"
    assert sorted(p.name for p in home.iterdir()) == ["README.md"]


@pytest.mark.parametrize("front", ["a: [", "a: {", "a: 'x", 'a: "\\x"', "a: b: c", "\ta: b", "a: *b", "%TAG", "@x",
                                   "`x`", "a: \x07", "- a\nb: c", "a: !<", "--- a\n--- b", "a: |\n b\nc: ["])
def test_what_is_no_yaml_is_refused_in_one_line(home, front):
    with cheap(), pytest.raises(InputError, match=r"README\.md: front matter is not valid YAML") as caught:
        with_front(home, front)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


LAUGHS = "\n".join(["l0: &l0 [lol,lol,lol,lol,lol,lol,lol,lol,lol]",
                    *(f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 10)), "license: *l9"])
MERGES = "\n".join(["m0: &m0 {a: b}", *(f"m{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 10))])


@pytest.mark.parametrize("front", [
    LAUGHS, MERGES, "[]" * 45_000, ("[" * 90 + "]" * 90) * 500,
    "[" * 90_000, "a: " + "[" * 45_000 + "]" * 45_000, "{" * 90_000, "- " * 45_000, "? " * 45_000,
    "a: &x " * 1000, "'" * 90_000, "!" * 90_000, "&" * 90_000, "a: |" + "\n" * 90_000, " " * 90_000, "\n" * 90_000,
    "---\n" * 20_000, "a:\n" * 30_000, ": " * 45_000, "#" * 90_000, "%" * 90_000, "x" * 90_000 + ": y",
    "\n".join(f"k{i}: v" for i in range(7000)),
], ids=lambda front: front[:12])
def test_hostile_yaml_costs_little(home, front):
    with cheap(seconds=3.0, n_bytes=None):
        try:
            with_front(home, front)
        except InputError as e:
            assert len(str(e)) < 500  # noqa: PT017  - some of them are YAML


def test_front_matter_beyond_all_measure_is_passed_over(home):
    with cheap():
        assert with_front(home, "license: mit\nx: " + "y" * 200_000).license is None


def test_a_card_of_many_megabytes(home):
    with (home / "README.md").open("wb") as file:
        file.truncate(1 << 40)
    with cheap(), pytest.raises(InputError, match="is larger than"):
        read_card(home)


@settings(deadline=None, max_examples=150)
@given(st.text(alphabet="a: -[]{}&*!|>'\"%@`#,?\n\t~<7\\x.", max_size=60) | st.text(max_size=40))
def test_any_front_matter_is_read_or_refused_and_nothing_else(tmp_path_factory, front):
    home = tmp_path_factory.getbasetemp() / "card"
    home.mkdir(exist_ok=True)
    (home / "README.md").write_text(f"---\n{front}\n---\n", "utf-8", errors="replace")
    try:
        card = read_card(home)
    except InputError:
        return
    assert isinstance(card.name, str)
    assert card.name


# Sampling


def test_sampling(home):
    card = with_generation(home, {"top_k": 50, "top_p": 0.95, "min_p": 0, "temperature": 1, "do_sample": True})
    assert card.sampling == {"top_k": 50, "top_p": 0.95, "min_p": 0, "temp": 1}


def test_what_is_null_or_absent_says_nothing(home):
    assert with_generation(home, {"top_k": None, "other": 7}).sampling == {}


@pytest.mark.parametrize("key", ["top_k", "top_p", "min_p", "temperature"])
@pytest.mark.parametrize("value", ["1", True, [1], {"a": 1}, 10**400, -(10**400), 1e39, 0.5])
def test_sampling_values_that_no_gguf_holds_are_refused_by_key(home, key, value):
    if value == 0.5 and key != "top_k":
        assert with_generation(home, {key: value}).sampling == {{"temperature": "temp"}.get(key, key): 0.5}
        return
    with pytest.raises(InputError, match=rf"generation_config\.json: key '{key}': is "):
        with_generation(home, {key: value})


def test_infinity_written_as_a_large_number(home):
    with pytest.raises(InputError, match="key 'top_p': is inf"):
        with_generation(home, '{"top_p": 1e999}')


@pytest.mark.parametrize("raw", ["", "[]", '{"top_k":1,"top_k":1}', '{"top_p": NaN}'])
def test_a_generation_config_that_is_none(home, raw):
    with pytest.raises(InputError, match=r"generation_config\.json"):
        with_generation(home, raw)


# Origin


def snapshot(tmp_path, repo, revision=REVISION):
    path = tmp_path / "hub" / repo / "snapshots" / revision
    path.mkdir(parents=True)
    return path


def test_a_snapshot_of_the_hub_knows_where_it_comes_from(tmp_path):
    card = read_card(snapshot(tmp_path, "models--deepseek-ai--DeepSeek-V4-Flash"))
    assert (card.name, card.repository, card.revision) == (
        "DeepSeek-V4-Flash", "deepseek-ai/DeepSeek-V4-Flash", REVISION)


def test_an_owner_is_split_off_once(tmp_path):
    assert read_card(snapshot(tmp_path, "models--a--b--c")).repository == "a/b--c"


def test_a_snapshot_under_another_name_than_a_commit(tmp_path):
    card = read_card(snapshot(tmp_path, "models--a--b", "main"))
    assert (card.repository, card.revision) == ("a/b", None)


def test_what_only_looks_like_a_snapshot(tmp_path):
    path = tmp_path / "models--a--b" / "other" / REVISION
    path.mkdir(parents=True)
    assert read_card(path).repository is None
    for path in (snapshot(tmp_path, "datasets--a--b"), snapshot(tmp_path, "other")):
        assert read_card(path).repository is None


def test_the_card_names_the_model_before_the_repository(tmp_path):
    assert with_front(snapshot(tmp_path, "models--a--b"), "name: N").name == "N"


def test_a_directory_that_our_download_filled(home):
    receipt = home / RECEIPT
    receipt.parent.mkdir(parents=True)
    receipt.write_text(json.dumps({"repository": "a/b", "revision": REVISION}), "utf-8")
    card = read_card(home)
    assert (card.name, card.repository, card.revision) == ("b", "a/b", REVISION)
    for bad in ("main", 7, None, REVISION[:-1], REVISION + "\n"):
        receipt.write_text(json.dumps({"repository": bad, "revision": bad}), "utf-8")
        card = read_card(home)
        assert (card.repository, card.revision) == (bad if isinstance(bad, str) else None, None)


# Through to the metadata


def entries(path):
    return {kv.key: (kv.type, kv.value) for kv in derive_template(open_checkpoint(path)).kvs}


def test_what_the_card_says_is_written(make_checkpoint):
    path = make_checkpoint()
    (path / "README.md").write_text("---\nlicense: mit\nname: N\nbase_model: [a/b-Base, plain]\n---\n", "utf-8")
    (path / "generation_config.json").write_text('{"top_k": 5, "temperature": 1}', "utf-8")
    found = entries(path)
    assert {key: found[key] for key in found if key.startswith("general.") and "size_label" not in key} == {
        "general.architecture": ("str", "deepseek4"),
        "general.type": ("str", "model"),
        "general.name": ("str", "N"),
        "general.license": ("str", "mit"),
        "general.base_model.count": ("u32", 2),
        "general.base_model.0.name": ("str", "b Base"),
        "general.base_model.0.organization": ("str", "a"),
        "general.base_model.0.repo_url": ("str", "https://huggingface.co/a/b-Base"),
        "general.base_model.1.name": ("str", "plain"),
        "general.sampling.top_k": ("i32", 5),
        "general.sampling.temp": ("f32", 1.0),
    }


def test_a_directory_whose_name_is_no_unicode(make_checkpoint):
    path = Path(os.fsdecode(os.fsencode(make_checkpoint().parent) + b"/caf\xe9"))
    try:
        make_checkpoint().rename(path) if not path.exists() else None
    except (OSError, FileExistsError):   # macOS has no such names
        return
    assert entries(path)["general.name"] == ("str", "caf\ufffd")


def test_half_a_surrogate_in_the_card_does_not_reach_the_file(make_checkpoint):
    path = make_checkpoint()
    (path / "README.md").write_text('---\nname: "a\\ud800b"\nlicense: "\\udfff"\n---\n', "utf-8")
    try:
        found = entries(path)
    except Dsv4Error as e:
        assert "README.md" in str(e)  # noqa: PT017  - PyYAML may refuse it as well
        return
    for _, value in found.values():
        if isinstance(value, str):
            value.encode()
