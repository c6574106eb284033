"""The fixed texts of the chat format: special tokens, task tokens, DSML tags, instructions.

Each is a constant of the protocol that the model was trained on. Source: ``encoding/encoding_dsv4.py`` as published
with DeepSeek-V4-Flash and -Pro.
"""

from __future__ import annotations

from typing import Literal

ThinkingMode = Literal["chat", "thinking"]
ReasoningEffort = Literal["high", "max"]

THINKING_MODES = ("chat", "thinking")
REASONING_EFFORTS = ("high", "max")   # "high" is the model's own level and adds no text

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"   # without angle brackets: the tags of tool calls are spelled around this token

TASKS = {
    "action": "<｜action｜>",
    "query": "<｜query｜>",
    "authority": "<｜authority｜>",
    "domain": "<｜domain｜>",
    "title": "<｜title｜>",
    "read_url": "<｜read_url｜>",
}

SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT, LATEST_REMINDER, THINK_START, THINK_END, DSML, *TASKS.values())

CALLS_START, CALLS_END = f"<{DSML}tool_calls", f"</{DSML}tool_calls>"   # a tag's first line ends with ">" and a newline
INVOKE_START, INVOKE_END = f"<{DSML}invoke", f"</{DSML}invoke"
PARAMETER_START, PARAMETER_END = f"<{DSML}parameter", f"</{DSML}parameter"
RESULT_START, RESULT_END = "<tool_result>", "</tool_result>"

MAX_EFFORT_TEXT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)

TOOLS_BEFORE_SCHEMAS = (
    "## Tools\n\n"
    "You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "
    f'"{CALLS_START}>" block like the following:\n\n'
    f"{CALLS_START}>\n"
    f'{INVOKE_START} name="$TOOL_NAME">\n'
    f'{PARAMETER_START} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{PARAMETER_END}>\n'
    "...\n"
    f"{INVOKE_END}>\n"
    f'{INVOKE_START} name="$TOOL_NAME2">\n'
    "...\n"
    f"{INVOKE_END}>\n"
    f"{CALLS_END}\n\n"
    'String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, '
    'arrays, objects), pass the value in JSON format and set `string="false"`.\n\n'
    f"If thinking_mode is enabled (triggered by {THINK_START}), you MUST output your complete reasoning inside "
    f"{THINK_START}...{THINK_END} BEFORE any tool calls or final response.\n\n"
    f"Otherwise, output directly after {THINK_END} with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n"
)
TOOLS_AFTER_SCHEMAS = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
)

RESPONSE_FORMAT_BEFORE_SCHEMA = (
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)
