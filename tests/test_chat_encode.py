"""Prompts: the published encoder's own results, the rules one by one, what is refused, and properties."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4tools.chat import encode_messages, messages_from_request, protocol
from dsv4tools.chat.protocol import ASSISTANT, BOS, DSML, EOS, MAX_EFFORT_TEXT, THINK_END, THINK_START, USER
from dsv4tools.errors import InputError, UsageError

CASES = json.loads((Path(__file__).parent / "data" / "encoding_cases.json").read_text("utf-8"))["encode"]

# What we say where the published encoder fails with an error of Python.
ERRORS = {
    "effort_bad": (UsageError, "reasoning_effort: is 'low', expected none or one of high, max"),
    "args_json_list": (
        InputError, "messages[1].tool_calls[0].function.arguments: is JSON of a list, expected an object"),
    "developer_empty": (InputError, "messages[0].content: is empty, expected what the developer asks"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_published_encoder_writes_the_same(case):
    before = copy.deepcopy(case)
    if "expected" in case:
        assert encode_messages(case["messages"], **case["kwargs"]) == case["expected"]
    else:
        kind, message = ERRORS[case["name"]]
        with pytest.raises(kind) as caught:
            encode_messages(case["messages"], **case["kwargs"])
        assert str(caught.value) == message
    assert case == before


def test_the_fixed_texts_are_the_published_ones(data):
    published = json.loads((data / "encoding_constants.json").read_text("utf-8"))
    tools = published["tools_block"].replace("{dsml_token}", DSML).replace("{thinking_start_token}", THINK_START)
    before, after = tools.replace("{thinking_end_token}", THINK_END).split("{tool_schemas}")
    assert before == protocol.TOOLS_BEFORE_SCHEMAS
    assert after == protocol.TOOLS_AFTER_SCHEMAS
    assert published["reasoning_effort_max_prefix"] == MAX_EFFORT_TEXT
    assert published["response_format_block"] == protocol.RESPONSE_FORMAT_BEFORE_SCHEMA + "{schema}"


def user(text="q", **more):
    return {"role": "user", "content": text, **more}


def assistant(text="a", **more):
    return {"role": "assistant", "content": text, **more}


def tool(text, call_id=None):
    return {"role": "tool", "content": text} | ({"tool_call_id": call_id} if call_id is not None else {})


def calls(*ids, name="f", arguments="{}"):
    return [{"id": i, "type": "function", "function": {"name": name, "arguments": arguments}} for i in ids]


TOOLS = [{"type": "function", "function": {"name": "f"}}]


def results(*texts):
    return USER + "\n\n".join(f"<tool_result>{text}</tool_result>" for text in texts)


# --- order of tool results

def last_turn(messages, **options):
    prompt = encode_messages(messages, "chat", **options)
    return prompt[prompt.rindex(USER) : prompt.rindex(ASSISTANT)]


def test_results_follow_the_order_of_the_calls():
    messages = [user(), assistant(tool_calls=calls("x", "y", "z")), tool("3", "z"), tool("1", "x"), tool("2", "y")]
    assert last_turn(messages) == results("1", "2", "3")


def test_texts_between_results_keep_their_places():
    answers = [tool("2", "y"), user("between"), tool("1", "x"), user("end")]
    assert last_turn([user(), assistant(tool_calls=calls("x", "y")), *answers]) == (
        f"{USER}<tool_result>1</tool_result>\n\nbetween\n\n<tool_result>2</tool_result>\n\nend"
    )


def test_an_unknown_id_counts_as_the_first():
    messages = [user(), assistant(tool_calls=calls("x", "y")), tool("2", "y"), tool("?", "who"), tool("1", "x")]
    assert last_turn(messages) == results("?", "1", "2")


def test_without_ids_results_stay_as_they_came():
    messages = [user(), assistant(tool_calls=calls("", None)), tool("2", "y"), tool("1", "x")]
    assert last_turn(messages) == results("2", "1")


def test_a_call_without_id_is_nobodys():
    messages = [user(), assistant(tool_calls=calls("x", "")), tool("n", ""), tool("1", "x")]
    assert last_turn(messages) == results("n", "1")


def test_an_id_may_stand_in_the_function():
    made = [{"function": {"name": "f", "arguments": "{}", "id": i}} for i in "xy"]
    assert last_turn([user(), assistant(tool_calls=made), tool("2", "y"), tool("1", "x")]) == results("1", "2")


def test_the_order_may_stand_in_the_context():
    context = [user(), assistant(tool_calls=calls("x", "y"))]
    assert last_turn([tool("2", "y"), tool("1", "x")], context=context) == results("1", "2")


# --- what is one turn

def test_a_task_ends_a_turn_for_texts_but_not_for_results():
    assert encode_messages([user("a", task="query"), tool("r")], "chat") == (
        f"{BOS}{USER}a\n\n<tool_result>r</tool_result><｜query｜>"
    )


def test_a_task_on_a_later_part_of_a_turn_is_not_said():
    assert encode_messages([user("a"), user("b", task="query")], "chat") == f"{BOS}{USER}a\n\nb{ASSISTANT}</think>"


def test_the_answer_to_a_task_has_no_reasoning():
    messages = [user("a", task="title"), assistant("T", reasoning_content="never said"), user("b")]
    assert encode_messages(messages, "thinking", drop_thinking=False) == (
        f"{BOS}{USER}a<｜title｜>T{EOS}{USER}b{ASSISTANT}<think>"
    )


def test_action_is_asked_of_the_assistant():
    assert encode_messages([user("a", task="action")], "thinking").endswith(f"a{ASSISTANT}<think><｜action｜>")


# --- thinking

THOUGHT = [user("a"), assistant("b", reasoning_content="r"), user("c"), assistant("d", reasoning_content="s")]


def test_old_reasoning_is_dropped_and_the_last_kept():
    assert encode_messages(THOUGHT, "thinking") == (
        f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}{USER}c{ASSISTANT}<think>s</think>d{EOS}"
    )


@pytest.mark.parametrize("role", ["system", "developer", "assistant"])
def test_tools_anywhere_keep_all_reasoning(role):
    prompt = encode_messages([*THOUGHT, user("e"), {"role": role, "content": "x", "tools": TOOLS}], "thinking")
    assert "<think>r</think>" in prompt
    assert "<think>s</think>" in prompt


def developer(text):
    return {"role": "developer", "content": text}


def test_a_developer_is_dropped_only_before_the_last_question_and_only_with_the_reasoning():
    messages = [developer("x"), developer("y")]
    assert encode_messages(messages, "thinking") == f"{BOS}{USER}y{ASSISTANT}<think>"
    assert encode_messages(messages, "thinking", drop_thinking=False) == f"{BOS}{USER}x{USER}y{ASSISTANT}<think>"
    assert encode_messages(messages, "chat") == f"{BOS}{USER}x{USER}y{ASSISTANT}</think>"


def test_tools_in_the_context_keep_all_reasoning():
    context = [{"role": "system", "content": "", "tools": TOOLS}]
    assert "<think>r</think>" in encode_messages(THOUGHT, "thinking", context=context)


def test_tools_of_a_user_say_nothing():
    assert encode_messages([user("a", tools=TOOLS)], "chat") == f"{BOS}{USER}a{ASSISTANT}</think>"


def test_a_developer_of_the_context_takes_no_message_with_it():
    # The published encoder counts the context's turns by its own last question, and renders none of the messages here.
    context = [developer("d"), assistant("x")]
    assert encode_messages([user("b")], "thinking", context=context) == f"{USER}b{ASSISTANT}<think>"


def test_effort_is_asked_for_once_at_the_very_beginning():
    prompt = encode_messages(THOUGHT, "thinking", reasoning_effort="max")
    assert prompt.startswith(BOS + MAX_EFFORT_TEXT + USER)
    assert prompt.count(MAX_EFFORT_TEXT) == 1
    assert MAX_EFFORT_TEXT not in encode_messages([user()], "thinking", context=THOUGHT, reasoning_effort="max")
    assert encode_messages([], "thinking", reasoning_effort="max") == BOS


def test_without_bos():
    assert encode_messages([user("a")], "chat", add_default_bos_token=False) == f"{USER}a{ASSISTANT}</think>"


# --- arguments of tool calls

def parameter(name, is_string, text):
    return f'<{DSML}parameter name="{name}" string="{is_string}">{text}</{DSML}parameter>'


@pytest.mark.parametrize(("arguments", "expected"), [
    ('{"a": "é\\n", "b": [1, {"ü": null}]}',
     parameter("a", "true", "é\n") + "\n" + parameter("b", "false", '[1, {"ü": null}]')),
    ('{"c": true}', parameter("c", "false", "true")),
    ("{}", ""),
    ("not JSON", parameter("arguments", "true", "not JSON")),
    ("", parameter("arguments", "true", "")),
    ({"a": 1}, parameter("arguments", "false", '{"a": 1}')),
    ("[" * 100_000, parameter("arguments", "true", "[" * 100_000)),
], ids=["object", "boolean", "none", "text", "empty", "no text", "too deep"])
def test_arguments(arguments, expected):
    message = assistant("", tool_calls=calls("1", arguments=arguments))
    assert encode_messages([message], "chat", add_default_bos_token=False) == (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n{expected}\n</{DSML}invoke>\n</{DSML}tool_calls>{EOS}'
    )


# --- what is refused

CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)
CALL = "messages[0].tool_calls[0]"
ARGUMENTS = CALL + ".function.arguments"


def called(arguments):
    return assistant(tool_calls=calls("1", arguments=arguments))


def system(**more):
    return {"role": "system", **more}


@pytest.mark.parametrize(("message", "where", "what"), [
    ("text", "messages[0]", "is text, expected an object"),
    ({}, "messages[0].role", "is None, expected one of system,"),
    ({"role": ["user"]}, "messages[0].role", "is ['user'], expected"),
    ({"role": "direct_search_results", "content": "x"}, "messages[0].role", "is 'direct_search_results', expected"),
    (user(None), "messages[0].content", "is null, expected text"),
    (user([{"type": "text", "text": "x"}]), "messages[0].content", "is a list, expected text"),
    (user(7), "messages[0].content", "is a number, expected text"),
    (user("\ud800"), "messages[0].content", "is not valid Unicode: half a surrogate pair at character 0"),
    (user(task="sing"), "messages[0].task", "is 'sing', expected one of action,"),
    (user(task={}), "messages[0].task", "is {}, expected one of action,"),
    ({"role": "latest_reminder", "content": None}, "messages[0].content", "is null, expected text"),
    (tool(None), "messages[0].content", "is null, expected text"),
    (tool({"x": 1}), "messages[0].content", "is an object, expected text"),
    (tool(["x"]), "messages[0].content[0]", "is text, expected an object"),
    (tool([{"type": "text", "text": None}]), "messages[0].content[0].text", "is null, expected text"),
    (tool([{"type": 3}]), "messages[0].content[0].type", "is a number, expected text"),
    (tool("x", 3), "messages[0].tool_call_id", "is a number, expected text"),
    (assistant(True), "messages[0].content", "is a boolean, expected text"),
    (assistant(reasoning_content=1.5), "messages[0].reasoning_content", "is a number, expected text"),
    (assistant(tool_calls={"x": 1}), "messages[0].tool_calls", "is an object, expected a list of tool calls"),
    (assistant(tool_calls=[None]), CALL, "is null, expected an object"),
    (assistant(tool_calls=[{}]), CALL + ".function", "is null, expected an object"),
    (assistant(tool_calls=[{"function": {"arguments": "{}"}}]), CALL + ".function.name", "is missing or empty"),
    (assistant(tool_calls=[{"function": {"name": "f"}}]), ARGUMENTS, "is missing"),
    (assistant(tool_calls=calls(1)), CALL + ".id", "is a number, expected text"),
    (called("3"), ARGUMENTS, "is JSON of a number, expected an object"),
    (called('"s"'), ARGUMENTS, "is JSON of text, expected an object"),
    (called(r'{"\ud800": 1}'), ARGUMENTS, "is not valid Unicode"),
    (called({1, 2}), ARGUMENTS, "has no JSON form: Object of type set"),
    (system(tools={"f": 1}), "messages[0].tools", "is an object, expected a list of tools"),
    (system(tools=[{"name": "f"}]), "messages[0].tools[0]", "has no function"),
    (system(tools=[{"function": {"x": b"y"}}]), "messages[0].tools[0].function", "has no JSON form"),
    (system(response_format={"x": CIRCLE}), "messages[0].response_format", "has no JSON form: Circular"),
    (system(response_format="\udfff"), "messages[0].response_format", "is not valid Unicode"),
])
def test_a_wrong_message_is_an_error_with_its_place(message, where, what):
    with pytest.raises(InputError) as caught:
        encode_messages([message], "chat")
    assert caught.value.where == where
    assert caught.value.what.startswith(what)


@pytest.mark.parametrize("messages", ["text", b"x", None, {"role": "user"}, 3, {1}])
def test_messages_must_be_a_list(messages):
    with pytest.raises(InputError, match=r"^messages: is .*, expected a list of messages"):
        encode_messages(messages, "chat")


def test_a_wrong_message_of_the_context_is_an_error_too():
    with pytest.raises(InputError, match=r"^context\[1\]\.content: is null"):
        encode_messages([user()], "chat", context=[user(), user(None)])


@pytest.mark.parametrize("mode", ["", "Chat", None, ["chat"]])
def test_unknown_thinking_modes(mode):
    with pytest.raises(UsageError, match=r"^thinking_mode: is .*, expected one of chat, thinking"):
        encode_messages([], mode)


# --- properties

MODES = st.sampled_from(["chat", "thinking"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4)
KEYS = ("role", "content", "tools", "tool_calls", "function", "name", "arguments", "id", "task", "type", "text",
        "tool_call_id", "reasoning_content", "response_format", "wo_eos")
ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


def fields(values):
    return st.dictionaries(st.sampled_from(KEYS), values, max_size=4)


ANY_MESSAGE = JSON | st.builds(
    lambda message, role: message | {"role": role},
    fields(JSON | st.lists(fields(JSON | fields(JSON)), max_size=2)), st.sampled_from(ROLES))


@settings(deadline=None, max_examples=150)
@given(st.lists(ANY_MESSAGE, max_size=3), MODES)
def test_any_messages_give_a_prompt_or_our_error(messages, mode):
    before = repr(messages)
    try:
        prompt = encode_messages(messages, mode)
    except InputError as e:
        prompt = BOS + str(e)
    assert prompt.encode().startswith(BOS.encode())
    assert repr(messages) == before


@st.composite
def exchanges(draw):
    """A question, perhaps behind tool results, and its answer."""
    ids = draw(st.lists(st.sampled_from("xyz"), max_size=3))
    answer = assistant(draw(st.text(max_size=3)), reasoning_content=draw(st.text(max_size=3)),
                       tool_calls=calls(*draw(st.permutations("xyz"))))
    return [*(tool(i, i) for i in ids), user(draw(st.text(max_size=3))), answer]


@settings(deadline=None, max_examples=100)
@given(st.lists(exchanges(), min_size=2, max_size=5), st.data(), MODES)
def test_a_context_stands_for_the_beginning_of_the_prompt(conversation, data, mode):
    cut = data.draw(st.integers(1, len(conversation) - 1))
    first, rest = (list(itertools.chain(*part)) for part in (conversation[:cut], conversation[cut:]))
    beginning = encode_messages(first, mode, drop_thinking=False)
    whole = encode_messages(first + rest, mode, drop_thinking=False)
    assert whole == beginning + encode_messages(rest, mode, context=first, drop_thinking=False)


# --- requests

SYSTEM = {"role": "system", "content": "s"}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


@pytest.mark.parametrize(("request_", "expected"), [
    ([user()], [user()]),
    ({"messages": [user()], "model": "m", "temperature": 0.5, "tools": [], "tool_choice": "auto"}, [user()]),
    ({"messages": [SYSTEM, user()], "tools": TOOLS}, [SYSTEM | {"tools": TOOLS}, user()]),
    ({"messages": [user(), SYSTEM], "tools": TOOLS}, [user(), SYSTEM | {"tools": TOOLS}]),
    ({"messages": [user()], "tools": TOOLS}, [{"role": "system", "content": "", "tools": TOOLS}, user()]),
    ({"messages": [SYSTEM], "response_format": FORMAT}, [SYSTEM | {"response_format": {"type": "object"}}]),
    ({"messages": [SYSTEM], "response_format": {"type": "text"}}, [SYSTEM]),
    ({"messages": [3]}, [3]),   # messages are judged when they are encoded
])
def test_requests(request_, expected):
    before = copy.deepcopy(request_)
    assert messages_from_request(request_) == expected
    assert request_ == before


@pytest.mark.parametrize(("request_", "message"), [
    (3, "request: has no messages"),
    ({"message": []}, "request: has no messages"),
    ({"messages": {}}, "request: has no messages"),
    ({"messages": [], "tool": []}, "request: key 'tool': is unknown"),
    ({"messages": [], "tool_choice": "none"}, "request: key 'tool_choice': is 'none', which is not obeyed"),
    ({"messages": [], "reasoning_effort": "max"}, "request: key 'reasoning_effort': is 'max', which is not obeyed"),
    ({"messages": [], "response_format": {"type": "json_object"}}, "request: key 'response_format': has no schema"),
    ({"messages": [], "response_format": "json"}, "request: key 'response_format': has no schema"),
    ({"messages": [SYSTEM | {"tools": TOOLS}], "tools": TOOLS}, "request: key 'tools': stands in the request and in"),
])
def test_wrong_requests(request_, message):
    with pytest.raises(InputError) as caught:
        messages_from_request(request_)
    assert str(caught.value).startswith(message)
