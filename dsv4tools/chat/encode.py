"""A conversation as the text that the model reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dsv4tools.chat.messages import Message, ToolResult, read_messages
from dsv4tools.chat.protocol import (
    ASSISTANT,
    BOS,
    CALLS_END,
    CALLS_START,
    EOS,
    INVOKE_END,
    INVOKE_START,
    LATEST_REMINDER,
    MAX_EFFORT_TEXT,
    PARAMETER_END,
    PARAMETER_START,
    REASONING_EFFORTS,
    RESPONSE_FORMAT_BEFORE_SCHEMA,
    RESULT_END,
    RESULT_START,
    TASKS,
    THINK_END,
    THINK_START,
    THINKING_MODES,
    TOOLS_AFTER_SCHEMAS,
    TOOLS_BEFORE_SCHEMAS,
    USER,
    ReasoningEffort,
    ThinkingMode,
)
from dsv4tools.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dsv4tools.chat.messages import ToolCall


def encode_messages(  # noqa: PLR0917  - the published order of arguments
    messages: Sequence[Mapping[str, Any]],
    thinking_mode: ThinkingMode,
    context: Sequence[Mapping[str, Any]] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: ReasoningEffort | None = None,
) -> str:
    """The prompt of a conversation, as the published encoder writes it. Nothing of the caller's is changed.

    Text is never escaped: a special token in a message is one in the prompt, as with the published encoder.

    Parameters
    ----------
    messages:
        The conversation, in the form of OpenAI's chat API.
    thinking_mode:
        ``chat``: answer at once. ``thinking``: reason first.
    context:
        Messages that the model has read already: they decide about tools, order and thinking, and are not rendered.
    drop_thinking:
        In thinking mode, leave out the reasoning before the last user message, and the developer messages before it.
        Has no effect if any message has tools.
    add_default_bos_token:
        Begin with the begin-of-sentence token, if there is no context.
    reasoning_effort:
        ``max`` asks for it in words, in thinking mode; ``high`` and None add nothing.

    Raises
    ------
    InputError
        A message is not what it must be; the error gives its place.
    UsageError
        `thinking_mode` or `reasoning_effort` is none of the known.
    """
    if thinking_mode not in THINKING_MODES:
        raise UsageError("thinking_mode", f"is {thinking_mode!r}, expected one of {', '.join(THINKING_MODES)}")
    if reasoning_effort is not None and reasoning_effort not in REASONING_EFFORTS:
        raise UsageError("reasoning_effort",
                         f"is {reasoning_effort!r}, expected none or one of {', '.join(REASONING_EFFORTS)}")
    before = _merge(read_messages(context or (), "context"))
    turns = _sort_results([*before, *_merge(read_messages(messages, "messages"))])
    thinking = thinking_mode == "thinking"
    drops = thinking and drop_thinking and not any(turn.tools for turn in turns)
    shown = _without_old_developers(turns) if drops else range(len(turns))
    conversation = _Conversation([turns[i] for i in shown], thinking, drops)
    first = sum(i < len(before) for i in shown)
    pieces = [BOS] if add_default_bos_token and not context else []
    if first == 0 and conversation.turns and thinking and reasoning_effort == "max":
        pieces.append(MAX_EFFORT_TEXT)
    for i in range(first, len(conversation.turns)):
        pieces += [conversation.turn_text(i), conversation.transition(i)]
    return "".join(pieces)


def _merge(messages: Iterable[Message]) -> list[Message]:
    """Turns: user messages and tool results that follow each other become one, but text starts anew after a task."""
    turns: list[Message] = []
    for message in messages:
        if message.role not in ("user", "tool"):
            turns.append(message)
        elif turns and turns[-1].role == "user" and (message.role == "tool" or turns[-1].task is None):
            turns[-1] = replace(turns[-1], blocks=turns[-1].blocks + message.blocks)
        else:
            turns.append(replace(message, role="user"))
    return turns


def _sort_results(turns: Iterable[Message]) -> list[Message]:
    """The same turns, each one's tool results in the order of the calls; texts keep their places."""
    order: dict[str, int] = {}
    ordered = []
    for turn in turns:
        if turn.tool_calls:
            order = {call.call_id: i for i, call in enumerate(turn.tool_calls) if call.call_id}
        results = [block for block in turn.blocks if isinstance(block, ToolResult)]
        if order and len(results) > 1:
            # An unknown id counts as that of the first call: so the published encoder has it.
            following = iter(sorted(results, key=lambda result: order.get(result.call_id, 0)))
            blocks = tuple(next(following) if isinstance(block, ToolResult) else block for block in turn.blocks)
            turn = replace(turn, blocks=blocks)  # noqa: PLW2901  - the turn itself, in another order
        ordered.append(turn)
    return ordered


def _last_user(turns: Sequence[Message]) -> int:
    """Index of the last turn that asks for an answer, -1 if there is none."""
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _without_old_developers(turns: Sequence[Message]) -> list[int]:
    last = _last_user(turns)
    return [i for i, turn in enumerate(turns) if i >= last or turn.role != "developer"]


@dataclass(frozen=True)
class _Conversation:
    """Turns to render; `drops` says that reasoning before the last user turn is left out."""

    turns: list[Message]
    thinking: bool
    drops: bool

    def turn_text(self, i: int) -> str:
        """The text of one turn, without what leads to the next."""
        turn = self.turns[i]
        match turn.role:
            case "user":
                return USER + "\n\n".join(_block(block) for block in turn.blocks)
            case "assistant":
                return self._assistant(i)
            case "latest_reminder":
                return LATEST_REMINDER + turn.content
            case _:   # system and developer
                return (USER if turn.role == "developer" else "") + turn.content + _instructions(turn)

    def transition(self, i: int) -> str:
        """What follows a turn if the model, or a reminder to it, comes next: whose turn it is, and how it begins."""
        turn = self.turns[i]
        if i + 1 < len(self.turns) and self.turns[i + 1].role not in ("assistant", "latest_reminder"):
            return ""
        if turn.task is not None:
            if turn.task != "action":
                return TASKS[turn.task]
            return ASSISTANT + (THINK_START if self.thinking else THINK_END) + TASKS[turn.task]
        if turn.role in ("user", "developer"):
            reasons = self.thinking and (not self.drops or i >= _last_user(self.turns))
            return ASSISTANT + (THINK_START if reasons else THINK_END)
        return ""

    def _assistant(self, i: int) -> str:
        turn = self.turns[i]
        after_task = i > 0 and self.turns[i - 1].task is not None
        reasons = self.thinking and not after_task and (not self.drops or i > _last_user(self.turns))
        reasoning = turn.reasoning + THINK_END if reasons else ""
        return reasoning + turn.content + _tool_calls(turn.tool_calls) + (EOS if turn.ends else "")


def _block(block: str | ToolResult) -> str:
    return f"{RESULT_START}{block.text}{RESULT_END}" if isinstance(block, ToolResult) else block


def _instructions(turn: Message) -> str:
    """The tools and the response format that a system or developer message brings."""
    text = ""
    if turn.tools:
        text += "\n\n" + TOOLS_BEFORE_SCHEMAS + "\n".join(turn.tools) + TOOLS_AFTER_SCHEMAS
    if turn.response_format:
        text += "\n\n" + RESPONSE_FORMAT_BEFORE_SCHEMA + turn.response_format
    return text


def _tool_calls(calls: Sequence[ToolCall]) -> str:
    if not calls:
        return ""
    return "\n".join([f"\n\n{CALLS_START}>", *map(_invoke, calls), CALLS_END])


def _invoke(call: ToolCall) -> str:
    parameters = "\n".join(
        f'{PARAMETER_START} name="{p.name}" string="{"true" if p.is_string else "false"}">{p.text}{PARAMETER_END}>'
        for p in call.parameters
    )
    return f'{INVOKE_START} name="{call.name}">\n{parameters}\n{INVOKE_END}>'
