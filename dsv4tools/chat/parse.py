"""What the model wrote, as a message.

Grammar (published encoder, ``parse_message_from_completion_text``), after the generation prefix of the prompt:
``[reasoning </think>] content [tool calls] EOS``. Unlike the published parser this one takes no tool calls that
were cut off: without its closing tags and EOS a completion is incomplete.
"""

from __future__ import annotations

import json
import re
from typing import Any

from dsv4tools.chat.protocol import (
    BOS,
    CALLS_END,
    CALLS_START,
    DSML,
    EOS,
    INVOKE_END,
    INVOKE_START,
    PARAMETER_END,
    PARAMETER_START,
    THINK_END,
    THINK_START,
    THINKING_MODES,
    ThinkingMode,
)
from dsv4tools.errors import InputError, UsageError

_CALLS = "\n\n" + CALLS_START
_FORBIDDEN = (BOS, EOS, THINK_START, THINK_END, DSML)
_INVOKE_HEAD = re.compile(r'\s*name="(?P<name>.*?)">\n\n?', re.DOTALL)   # an empty line stands for no parameters
_PARAMETER = re.compile(r' name="(?P<name>.*?)" string="(?P<is_string>true|false)">(?P<value>.*)', re.DOTALL)


def parse_message_from_completion_text(text: str, thinking_mode: ThinkingMode) -> dict[str, Any]:
    """The assistant's message in `text`, which begins behind the prompt and ends with the end-of-sentence token.

    Returns
    -------
    dict
        ``role``, ``content``, ``reasoning_content`` (empty in chat mode) and ``tool_calls``: a list in OpenAI's form,
        without ids. The ``arguments`` of a call are JSON text as far as the model wrote JSON: values that it did not
        mark as strings are passed on unread.

    Raises
    ------
    InputError
        The text does not follow the grammar; the error gives the character where it leaves it.
    UsageError
        `thinking_mode` is none of the known.
    """
    if thinking_mode not in THINKING_MODES:
        raise UsageError("thinking_mode", f"is {thinking_mode!r}, expected one of {', '.join(THINKING_MODES)}")
    scanner = _Scanner(text)
    reasoning = ""
    if thinking_mode == "thinking":
        reasoning, mark = scanner.read_until(THINK_END, _CALLS)
        if mark != THINK_END:
            raise scanner.error(f"expected {THINK_END} before it", "was the completion cut off, or made in chat mode?")
    content, mark = scanner.read_until(EOS, _CALLS)
    calls = _read_calls(scanner) if mark == _CALLS else []
    _read_end(scanner, mark)
    for name, part in (("content", content), ("reasoning", reasoning)):
        token = next((token for token in _FORBIDDEN if token in part), None)
        if token:
            raise InputError("completion", f"found special token {token!r} in the {name}")
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}


def _read_end(scanner: _Scanner, mark: str) -> None:
    between = ""
    if mark == _CALLS:
        between, mark = scanner.read_until(EOS)
    if not mark:
        raise scanner.error(f"expected {EOS} before it", "was the completion cut off?")
    if between:
        raise scanner.error("found text between the tool calls and the end-of-sentence token")
    if scanner.at != len(scanner.text):
        raise scanner.error("found text behind the end-of-sentence token")


class _Scanner:
    """A place in the text, moved on by reading up to marks."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def read_until(self, *marks: str) -> tuple[str, str]:
        """The text before the nearest of `marks`, and that mark; the rest of the text and "" if there is none."""
        found = re.compile("|".join(map(re.escape, marks))).search(self.text, self.at)
        start, end = found.span() if found else (len(self.text), len(self.text))
        before, self.at = self.text[self.at:start], end
        return before, self.text[start:end]

    def read_tag_end(self, *marks: str) -> str:
        """The next of `marks`, with nothing before it but the end of the tag just read."""
        start = self.at
        before, mark = self.read_until(*marks)
        if not mark:
            raise self.error(f"expected {' or '.join(marks)} before it", "was the completion cut off?")
        if before != ">\n":
            self.at = start
            raise self.error(f"found {_shown(before)}, expected '>' and a new line, then {' or '.join(marks)}")
        return mark

    def error(self, what: str, hint: str = "") -> InputError:
        place = "the end" if self.at == len(self.text) else f"character {self.at}"
        return InputError(f"completion, at {place}", what, hint=hint)


def _read_calls(scanner: _Scanner) -> list[dict[str, Any]]:
    calls = []
    while scanner.read_tag_end(INVOKE_START, CALLS_END) == INVOKE_START:
        start = scanner.at
        head, mark = scanner.read_until(PARAMETER_START, INVOKE_END)
        match = _INVOKE_HEAD.fullmatch(head)
        if match is None:
            scanner.at = start
            raise scanner.error(f'found tool name {_shown(head)}, expected \' name="..."\', ">" and a new line')
        arguments: dict[str, str] = {}
        while mark == PARAMETER_START:
            name, value = _read_parameter(scanner)
            if name in arguments:
                raise scanner.error(f"found parameter {name!r} twice in one call")
            arguments[name] = value
            mark = scanner.read_tag_end(PARAMETER_START, INVOKE_END)
        if not mark:
            raise scanner.error(f"expected {INVOKE_END}> before it", "was the completion cut off?")
        body = ", ".join(f"{json.dumps(name, ensure_ascii=False)}: {value}" for name, value in arguments.items())
        calls.append({"type": "function", "function": {"name": match["name"], "arguments": f"{{{body}}}"}})
    return calls


def _read_parameter(scanner: _Scanner) -> tuple[str, str]:
    start = scanner.at
    text, mark = scanner.read_until(PARAMETER_END)
    match = _PARAMETER.fullmatch(text)
    if not mark or match is None:
        scanner.at = start
        raise scanner.error(f'found parameter {_shown(text)}, expected \' name="..." string="true|false">\', a value '
                            f"and {PARAMETER_END}>")
    value = match["value"]
    return match["name"], json.dumps(value, ensure_ascii=False) if match["is_string"] == "true" else value


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
