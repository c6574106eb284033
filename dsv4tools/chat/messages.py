"""Messages as callers have them, checked once and turned into values that can be rendered without a further doubt.

The form is that of OpenAI's chat API with DeepSeek's additions (``reasoning_content``, ``task``, ``latest_reminder``).
Nothing of the caller's is kept or changed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4tools.chat.protocol import TASKS
from dsv4tools.checkpoint.strict_json import shown
from dsv4tools.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a tool call: `text` is the string itself, or the JSON of any other value."""

    name: str
    text: str
    is_string: bool


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant made; `call_id` may be empty."""

    call_id: str
    name: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool answered to the call `call_id`."""

    call_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message, checked.

    Attributes
    ----------
    role:
        One of `ROLES`; after merging never ``tool``.
    content, reasoning:
        Texts; empty where the caller has none.
    blocks:
        Parts of a user turn: its texts and the tool results, in order.
    tools:
        The JSON of each tool's schema.
    response_format:
        The JSON of the schema that answers must follow, or empty.
    tool_calls:
        An assistant's calls.
    task:
        Key in the table of task tokens, or None.
    ends:
        Whether an assistant's message is complete, so that an end-of-sentence token follows.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    blocks: tuple[str | ToolResult, ...] = ()
    tools: tuple[str, ...] = ()
    response_format: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    task: str | None = None
    ends: bool = True


def read_messages(messages: object, where: str) -> list[Message]:
    """The checked form of `messages`.

    Raises
    ------
    InputError
        A message is not what it must be; the place is given as ``where[3].tool_calls[0].function.name``.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InputError(where, f"is {_kind(messages)}, expected a list of messages")
    return [_read_message(message, f"{where}[{i}]") for i, message in enumerate(messages)]


def to_json(value: object, where: str) -> str:
    """`value` as the JSON text that the model was trained on: one line, not escaped to ASCII, keys in their order."""
    try:
        return _check_unicode(json.dumps(value, ensure_ascii=False), where)
    except RecursionError:
        raise InputError(where, "is nested too deeply") from None
    except (TypeError, ValueError) as e:
        raise InputError(where, f"has no JSON form: {e}") from None


def _read_message(message: object, where: str) -> Message:
    fields = _mapping(message, where)
    role = fields.get("role")
    if role not in ROLES:
        raise InputError(f"{where}.role", f"is {shown(role)}, expected one of {', '.join(ROLES)}")
    task = fields.get("task")
    if task is not None and (not isinstance(task, str) or task not in TASKS):
        raise InputError(f"{where}.task", f"is {shown(task)}, expected one of {', '.join(TASKS)}")
    if role == "tool":
        return Message(role, blocks=(_read_tool_result(fields, where),))
    if role == "user":
        # The published encoder copies nothing else of a user's message.
        return Message(role, blocks=(_text(fields, "content", where, required=True),), task=task)
    content = _text(fields, "content", where, required=role in ("developer", "latest_reminder"))
    if role == "developer" and not content:
        raise InputError(f"{where}.content", "is empty, expected what the developer asks")
    response_format = fields.get("response_format")
    return Message(
        role, content,
        reasoning=_text(fields, "reasoning_content", where) if role == "assistant" else "",
        tools=_read_tools(fields.get("tools"), f"{where}.tools"),
        response_format=to_json(response_format, f"{where}.response_format") if response_format else "",
        tool_calls=_read_tool_calls(fields.get("tool_calls"), f"{where}.tool_calls") if role == "assistant" else (),
        task=task,
        ends=not fields.get("wo_eos"),
    )


def _read_tool_result(fields: Mapping[str, Any], where: str) -> ToolResult:
    content = fields.get("content", "")
    if isinstance(content, list):
        parts = [_read_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        text = "\n\n".join(parts)
    else:
        text = _text(fields, "content", where, required=True)
    return ToolResult(_text(fields, "tool_call_id", where), text)


def _read_part(part: object, where: str) -> str:
    fields = _mapping(part, where)
    kind = _text(fields, "type", where, required=True)
    return _text(fields, "text", where, required=True) if kind == "text" else f"[Unsupported {kind}]"


def _read_tools(tools: object, where: str) -> tuple[str, ...]:
    if not tools:
        return ()
    if not isinstance(tools, list):
        raise InputError(where, f"is {_kind(tools)}, expected a list of tools")
    schemas = []
    for i, tool in enumerate(tools):
        function = _mapping(tool, f"{where}[{i}]").get("function")
        if not isinstance(function, Mapping):
            raise InputError(f"{where}[{i}]", "has no function",
                             hint='write it as {"type": "function", "function": {"name": ...}}')
        schemas.append(to_json(function, f"{where}[{i}].function"))
    return tuple(schemas)


def _read_tool_calls(calls: object, where: str) -> tuple[ToolCall, ...]:
    if not calls:
        return ()
    if not isinstance(calls, list):
        raise InputError(where, f"is {_kind(calls)}, expected a list of tool calls")
    return tuple(_read_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls))


def _read_tool_call(call: object, where: str) -> ToolCall:
    fields = _mapping(call, where)
    place = f"{where}.function"
    function = _mapping(fields.get("function"), place)
    name = _text(function, "name", place)
    if not name:
        raise InputError(f"{place}.name", "is missing or empty, expected the tool's name")
    if "arguments" not in function:
        raise InputError(f"{place}.arguments", "is missing", hint='a call without arguments has "{}"')
    call_id = _text(fields, "id", where) or _text(function, "id", place)
    return ToolCall(call_id, name, _read_parameters(function["arguments"], f"{place}.arguments"))


def _read_parameters(arguments: object, where: str) -> tuple[Parameter, ...]:
    """The parameters of a call. Arguments are a JSON object in a string; any other text or value is one parameter."""
    values: object = {"arguments": arguments}
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):   # text that is no JSON is handed on as it is
            values = json.loads(arguments)
        if not isinstance(values, dict):
            raise InputError(where, f"is JSON of {_kind(values)}, expected an object")
    return tuple(
        Parameter(_check_unicode(k, where), _check_unicode(v, where), is_string=True) if isinstance(v, str)
        else Parameter(_check_unicode(k, where), to_json(v, where), is_string=False)
        for k, v in values.items()   # type: ignore[attr-defined]  # a dict on either way
    )


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(where, f"is {_kind(value)}, expected an object")
    return value


def _text(fields: Mapping[str, Any], key: str, where: str, *, required: bool = False) -> str:
    """The text under `key`; empty if the key is missing, or null where the text is not `required`."""
    value = fields.get(key, "")
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        hint = "join the parts into one text" if isinstance(value, list) else ""
        raise InputError(f"{where}.{key}", f"is {_kind(value)}, expected text", hint=hint)
    return _check_unicode(value, f"{where}.{key}")


def _check_unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(where, f"is not valid Unicode: half a surrogate pair at character {e.start}") from None
    return text


def _kind(value: object) -> str:
    """What messages call the JSON type of `value`."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list",
             dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
