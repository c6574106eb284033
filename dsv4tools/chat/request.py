"""The body of a chat API request as messages: tools and response format move to where the chat format has them."""

from __future__ import annotations

from typing import Any

from dsv4tools.checkpoint.strict_json import shown
from dsv4tools.errors import InputError

# Keys of a request that say nothing about its prompt. Any other unknown key is an error: it may be a mistyped one.
_WITHOUT_EFFECT = frozenset({
    "model", "stream", "stream_options", "n", "seed", "stop", "temperature", "top_p", "top_k", "min_p", "max_tokens",
    "max_completion_tokens", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs",
    "parallel_tool_calls", "metadata", "store", "user",
})  # fmt: skip
_REFUSED = {
    "reasoning_effort": "remove it, and choose thinking in the call",
    "thinking": "remove it, and choose thinking in the call",
    "tool_choice": "the chat format has no words for another choice than 'auto'",
    "functions": "write them as tools",
}
_ON_SYSTEM = ("tools", "response_format")


def messages_from_request(request: Any, where: object = "request") -> list[Any]:  # noqa: ANN401  - unchecked JSON
    """The messages of `request`: a list of messages, or an object with ``messages`` and perhaps ``tools``.

    ``tools`` and ``response_format`` of an object go to a copy of the first system message, or to a new one in front.
    A response format of OpenAI's type ``json_schema`` is its schema, ``text`` is none. The messages themselves are
    checked by `encode_messages`.

    Raises
    ------
    InputError
        Neither form; a key that is unknown or asks for what the chat format cannot say; tools given twice.
    """
    if isinstance(request, list):
        return request
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise InputError(where, "has no messages",
                         hint='expected a list of messages or {"messages": [...], "tools": [...]}')
    _check_keys(request, where)
    messages: list[Any] = list(request["messages"])
    extra = {"tools": request.get("tools"), "response_format": _schema(request.get("response_format"), where)}
    extra = {key: value for key, value in extra.items() if value}
    if not extra:
        return messages
    at = next((i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "system"), None)
    if at is None:
        return [{"role": "system", "content": "", **extra}, *messages]
    for key in extra:
        if messages[at].get(key):
            raise InputError(f"{where}: key {key!r}", "stands in the request and in its system message",
                             hint="remove one of the two")
    messages[at] = messages[at] | extra
    return messages


def _check_keys(request: dict[str, Any], where: object) -> None:
    for key, value in request.items():
        if key in {"messages", *_ON_SYSTEM, *_WITHOUT_EFFECT} or (key, value) == ("tool_choice", "auto"):
            continue
        if key in _REFUSED:
            raise InputError(f"{where}: key {key!r}", f"is {shown(value)}, which is not obeyed",
                             hint=_REFUSED[key])
        raise InputError(f"{where}: key {key!r}", "is unknown", hint="remove it, or mend its spelling")


def _schema(response_format: Any, where: object) -> Any:  # noqa: ANN401  - unchecked JSON
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    named = response_format.get("json_schema") if kind == "json_schema" else None
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict) or not schema:
        raise InputError(f"{where}: key 'response_format'", "has no schema", hint='expected {"type": "json_schema", '
                         '"json_schema": {"schema": {...}}}; a schema alone goes to the system message')
    return schema
