"""README.md of a re-routed checkpoint: the original's, with its base model and a line on what was changed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dsv4tools.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FRONT_MATTER = re.compile(r"\A(---\r?\n)(.*?)((?:\r?\n|(?<=\n))---[ \t]*(?:\r?\n|\Z))", re.DOTALL)
REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")


def edit_readme(text: str, base_model: str | None, before: int, after: int, where: object) -> str:
    """`text` (empty where the original has no README) with `base_model` in its front matter and a line on top.

    `base_model` is the Hub's name of the checkpoint that was re-routed; None leaves the front matter as it is. Every
    other key keeps its text. InputError if the front matter is not YAML.
    """
    text = text.removeprefix("\ufeff")   # behind it nobody but us would find the front matter
    match = _FRONT_MATTER.match(text)
    newline = "\r\n" if "\r\n" in text else "\n"
    head, body = (match[0], text[match.end():]) if match else ("", text)
    if base_model is not None:
        head = match[1] + _set_base_model(match[2], base_model, newline, where) + match[3] if match else \
            newline.join(("---", f"base_model: {base_model}", "---", ""))
    if head and not head.endswith("\n"):
        head += newline
    origin = f" from [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    note = (f"> **Re-routed{origin} with dsv4tools: {after} experts per token instead of {before}.** "
            f"Changed are `num_experts_per_tok` and the tables `ffn.gate.tid2eid`, which keep their first {after} "
            f"columns; every other weight is as it was.")
    above = head + newline if head else ""
    below = newline + body.lstrip("\r\n") if body.strip() else ""
    return above + note + newline + below


def _set_base_model(front: str, base_model: str, newline: str, where: object) -> str:
    import yaml  # noqa: PLC0415  - only checkpoints with a model card need it

    try:
        node = yaml.compose(front, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as e:
        problem = str(e).splitlines()[0]
        raise InputError(where, f"front matter is not valid YAML: {problem}", hint="mend or remove it") from None
    line = f"base_model: {base_model}"
    if node is None:
        return front + newline + line if front else line + newline
    if not isinstance(node, yaml.MappingNode) or node.flow_style:
        raise InputError(where, "front matter is no list of 'key: value' lines", hint="mend or remove it")
    for begin, end in _spans(node, "base_model"):
        kept = front[begin:end]
        return front[:begin] + line + kept[len(kept.rstrip()):] + front[end:]   # blank lines and the next key stay
    return front.rstrip("\r\n") + newline + line


def _spans(node: Any, key: str) -> Iterator[tuple[int, int]]:  # noqa: ANN401  - a node, yaml is imported late
    """Where the entries of `key` begin and end in the text of a YAML mapping."""
    for name, value in node.value:
        if name.value == key:
            yield name.start_mark.index, _end(value)


def _end(node: Any) -> int:  # noqa: ANN401  - a node, yaml is imported late
    """Where the text of a YAML node ends. A block's own mark is at the next token, behind comments that are not its."""
    if isinstance(node.value, list) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)
