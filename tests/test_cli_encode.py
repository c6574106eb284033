"""The command `encode`, from the shell's side."""

from __future__ import annotations

import io
import json
import sys

import pytest
import tokenizers

from dsv4tools.chat.protocol import MAX_EFFORT_TEXT
from dsv4tools.checkpoint.vocabulary import read_vocabulary
from dsv4tools.gguf.header import encode_header
from dsv4tools.gguf.values import KV
from dsv4tools.template.metadata import tokenizer_entries

CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "r"},
    {"role": "user", "content": "c"},
]
HIGH = (
    "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜></think>b<｜end▁of▁sentence｜>"
    "<｜User｜>c<｜Assistant｜><think>"
)


@pytest.fixture
def chat(tmp_path):
    return write(tmp_path, CHAT)


def write(directory, value):
    path = directory / "chat.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


@pytest.mark.parametrize(("options", "expected"), [
    ([], HIGH),
    (["--thinking", "high"], HIGH),
    (["--thinking", "off"], HIGH.replace("<think>", "</think>")),
    (["--thinking", "max"], HIGH.replace("<｜User｜>a", f"{MAX_EFFORT_TEXT}<｜User｜>a")),
    (["--keep-thinking"], HIGH.replace("</think>b", "<think>r</think>b")),
    (["--no-bos"], HIGH.removeprefix("<｜begin▁of▁sentence｜>")),
], ids=" ".join)
def test_a_pipe_gets_the_prompt_and_nothing_else(dsv4tools, chat, options, expected):
    outcome = dsv4tools("encode", chat, *options)
    assert (outcome.code, outcome.out, outcome.err) == (0, expected, "")
    assert dsv4tools("encode", chat, *options, "--json").data == {"prompt": expected}


def test_a_terminal_gets_lines_without_control_characters(dsv4tools, tmp_path, monkeypatch):
    path = write(tmp_path, [{"role": "user", "content": "red \x1b[31m\tand\nmore"}])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    prompt = "<｜begin▁of▁sentence｜><｜User｜>red \\x1b[31m\tand\nmore<｜Assistant｜><think>\n"
    assert dsv4tools("encode", path).out == prompt


def test_standard_input(dsv4tools, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps({"messages": CHAT}).encode())))
    assert dsv4tools("encode", "-").out == HIGH
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"[")))
    assert "error: standard input: is not valid JSON" in dsv4tools("encode", "-").failed(3)


def test_tools_of_a_request(dsv4tools, tmp_path):
    tools = [{"type": "function", "function": {"name": "look_up", "description": "é"}}]
    prompt = dsv4tools("encode", write(tmp_path, {"model": "x", "messages": CHAT, "tools": tools})).out
    assert '### Available Tool Schemas\n\n{"name": "look_up", "description": "é"}\n\n' in prompt
    assert "<think>r</think>b" in prompt


def test_ids_from_a_checkpoint_and_from_a_gguf(dsv4tools, chat, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    vocabulary = read_vocabulary(checkpoint, json.loads((checkpoint / "config.json").read_text())["vocab_size"])
    file = tmp_path / "x.gguf"
    entries = [KV("general.architecture", "str", "deepseek4"), *tokenizer_entries(vocabulary)]
    file.write_bytes(encode_header(entries, []))
    library = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    expected = library.encode(HIGH, add_special_tokens=False).ids
    for model in (checkpoint, file):
        assert dsv4tools("encode", chat, "--ids", "--model", model).out == ",".join(map(str, expected)) + "\n"
        data = dsv4tools("encode", chat, "--ids", "--model", model, "--json").data
        assert data == {"prompt": HIGH, "ids": expected, "n_tokens": len(expected)}


def test_a_model_without_the_special_tokens(dsv4tools, chat, make_checkpoint):
    checkpoint = make_checkpoint()
    path = checkpoint / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace("<｜Assistant｜>", "<｜Helper｜>"), "utf-8")
    message = dsv4tools("encode", chat, "--ids", "--model", checkpoint).failed(3)
    assert "tokenizer.json: has no special token '<｜Assistant｜>'; is it a DeepSeek-V4?" in message


@pytest.mark.parametrize(("content", "message"), [
    ("", "is not valid JSON"),
    ("3", "has no messages"),
    ('{"messages": [], "messages": []}', "key 'messages' appears twice in one JSON object"),
    ('[{"role": "user", "content": NaN}]', "NaN is not a JSON number"),
    ('[{"role": "user", "content": null}]', "messages[0].content: is null, expected text"),
    (r'[{"role": "user", "content": "\ud800"}]', "messages[0].content: is not valid Unicode"),
    ('[{"role": "\x7f", "content": "x"}]', r"messages[0].role: is '\x7f', expected one of system"),
    ('{"messages": [], "tool": []}', "key 'tool': is unknown; remove it, or mend its spelling"),
])
def test_wrong_messages(dsv4tools, tmp_path, content, message):
    path = write(tmp_path, content)
    error = dsv4tools("encode", path).failed(3)
    assert str(path) in error
    assert message in error


def test_wrong_usage(dsv4tools, chat, tmp_path):
    assert "--ids and --model belong together" in dsv4tools("encode", chat, "--ids").failed(2)
    assert "--ids and --model belong together" in dsv4tools("encode", chat, "--model", tmp_path).failed(2)
    assert "'low' is not one of 'off', 'high', 'max'" in dsv4tools("encode", chat, "--thinking", "low").failed(2)
    assert "is missing" in dsv4tools("encode", tmp_path / "none.json").failed(3)
    assert "is not a regular file" in dsv4tools("encode", tmp_path).failed(3)
    assert "config.json: is missing" in dsv4tools("encode", chat, "--ids", "--model", tmp_path).failed(3)


def test_help_has_examples_and_exit_codes(dsv4tools):
    text = dsv4tools("encode", "--help").out
    assert "dsv4tools encode chat.json --thinking off > prompt.txt" in text
    assert "Exit codes: 0 fine" in text
    assert "encode      Write a conversation as the prompt" in dsv4tools("--help").out
