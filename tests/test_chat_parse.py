"""Completions: the published parser's own results, answers encoded and parsed back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4tools.chat import encode_messages, parse_message_from_completion_text
from dsv4tools.chat.protocol import DSML, EOS, SPECIAL_TOKENS
from dsv4tools.errors import InputError, UsageError

CASES = json.loads((Path(__file__).parent / "data" / "encoding_cases.json").read_text("utf-8"))["parse"]

# What we say where the published parser fails with an error of Python.
ERRORS = {
    "missing_eos": f"completion, at the end: expected {EOS} before it; was the completion cut off?",
    "tool_trailing": "completion, at the end: found text between the tool calls and the end-of-sentence token",
    "tool_dup_param": "completion, at character 163: found parameter 'a' twice in one call",
    "tool_one_newline": f"completion: found special token '{DSML}' in the content",
    "special_in_content": "completion: found special token '<think>' in the content",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_published_parser_reads_the_same(case):
    if "expected" in case:
        assert parse_message_from_completion_text(case["text"], case["thinking_mode"]) == case["expected"]
        return
    with pytest.raises(InputError) as caught:
        parse_message_from_completion_text(case["text"], case["thinking_mode"])
    assert str(caught.value) == ERRORS[case["name"]]


MODES = st.sampled_from(["chat", "thinking"])
PLAIN = st.text(max_size=20).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS))
NAMES = st.text(min_size=1, max_size=5).filter(lambda name: not set(name) & set('"｜'))
TEXTS = st.text(max_size=10).filter(lambda text: "｜" not in text)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3)


@settings(deadline=None, max_examples=100)
@given(PLAIN, PLAIN, CALLS, MODES)
def test_an_encoded_answer_is_parsed_back(content, reasoning, calls, mode):
    question = {"role": "user", "content": "q"}
    made = [{"function": {"name": name, "arguments": json.dumps(arguments)}} for name, arguments in calls]
    answer = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": made}
    text = encode_messages([question, answer], mode).removeprefix(encode_messages([question], mode))
    read = parse_message_from_completion_text(text, mode)
    assert (read["role"], read["content"]) == ("assistant", content)
    assert read["reasoning_content"] == (reasoning if mode == "thinking" else "")
    assert all(call["type"] == "function" for call in read["tool_calls"])
    functions = [call["function"] for call in read["tool_calls"]]
    assert [(f["name"], json.loads(f["arguments"])) for f in functions] == calls


BLOCK = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="a" string="true">v</{DSML}parameter>\n'
    f'<{DSML}parameter name="b" string="false">3</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>{EOS}'
)


def test_a_completion_that_was_cut_off_is_an_error():
    text = "why</think>so" + BLOCK
    for end in range(len(text)):
        with pytest.raises(InputError):
            parse_message_from_completion_text(text[:end], "thinking")


def test_nothing_may_follow_the_end():
    with pytest.raises(InputError, match="found text behind the end-of-sentence token"):
        parse_message_from_completion_text("x" + EOS + "y", "chat")


PIECES = st.sampled_from([
    *SPECIAL_TOKENS, f"\n\n<{DSML}tool_calls", f"<{DSML}invoke", f"<{DSML}parameter", f"</{DSML}invoke",
    f"</{DSML}parameter", f"</{DSML}tool_calls>", ' name="f"', ' string="true"', ">\n", ">", "\n", "x", BLOCK,
])


@st.composite
def damaged(draw):
    at = draw(st.integers(0, len(BLOCK)))
    return BLOCK[:at] + draw(PIECES) + BLOCK[at + draw(st.integers(0, 9)):]


@settings(deadline=None, max_examples=300)
@given(damaged() | st.lists(PIECES | st.text(max_size=3), max_size=8).map("".join), MODES)
def test_any_completion_gives_a_message_or_our_error(text, mode):
    try:
        message = parse_message_from_completion_text(text, mode)
    except InputError:
        return
    assert list(message) == ["role", "content", "reasoning_content", "tool_calls"]
    assert text.endswith(EOS)


PARAMETER = f'<{DSML}parameter name="a" string="true">v</{DSML}parameter>\n'


@pytest.mark.parametrize(("old", "new", "message"), [
    (">\n<｜DSML｜invoke", "> <｜DSML｜invoke", "at character 19: found '> ', expected '>' and a new line, then"),
    ('name="f">\n<', 'name="f"><', "at character 34: found tool name ' name=\"f\">', expected"),
    (' name="f"', " f", "at character 34: found tool name ' f>\\n', expected"),
    ('string="true"', 'string="yes"', "at character 61: found parameter ' name=\"a\" string=\"yes\">v', expected"),
    (PARAMETER, f"v{PARAMETER}", "at character 34: found tool name ' name=\"f\">\\nv', expected"),
    (f"3</{DSML}parameter>\n</", f"3</{DSML}parameter></", "found '>', expected '>' and a new line"),
    (f"3</{DSML}parameter>\n", "3", "found parameter ' name=\"b\" string=\"false\">3</｜DSML｜invoke>"),
    (f"</{DSML}tool_calls>", "", f"at the end: expected <{DSML}invoke or </{DSML}tool_calls> before it"),
    (f"</{DSML}invoke>\n", "", f"at the end: expected <{DSML}parameter or </{DSML}invoke before it"),
    (EOS, "", f"at the end: expected {EOS} before it; was the completion cut off?"),
    (EOS, "x", f"at the end: expected {EOS} before it; was the completion cut off?"),
])
def test_a_broken_tool_block_is_an_error_with_its_place(old, new, message):
    assert BLOCK.count(old) == 1
    with pytest.raises(InputError) as caught:
        parse_message_from_completion_text(BLOCK.replace(old, new), "chat")
    assert str(caught.value).startswith("completion, ")
    assert message in str(caught.value)


def test_a_call_without_parameters_may_have_an_empty_line():
    for empty in ("", "\n"):
        block = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n{empty}</{DSML}invoke>\n</{DSML}tool_calls>{EOS}'
        read = parse_message_from_completion_text(block, "chat")
        assert read["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_reasoning_must_end_before_a_tool_block():
    with pytest.raises(InputError, match="expected </think> before it"):
        parse_message_from_completion_text("thinking aloud" + BLOCK, "thinking")


def test_a_special_token_in_the_reasoning():
    with pytest.raises(InputError, match="completion: found special token '<think>' in the reasoning"):
        parse_message_from_completion_text(f"<think>so</think>x{EOS}", "thinking")


def test_unknown_thinking_mode():
    with pytest.raises(UsageError, match=r"^thinking_mode: is 'high', expected one of chat, thinking"):
        parse_message_from_completion_text(EOS, "high")
