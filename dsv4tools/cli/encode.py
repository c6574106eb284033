"""``dsv4tools encode``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from dsv4tools.chat import encode_messages, messages_from_request
from dsv4tools.chat.protocol import SPECIAL_TOKENS
from dsv4tools.checkpoint.strict_json import MAX_JSON_BYTES, parse_json, read_small_file
from dsv4tools.cli.output import EPILOG, json_option, show, show_json
from dsv4tools.cli.sources import local_files, source_argument
from dsv4tools.errors import InputError

if TYPE_CHECKING:
    from dsv4tools.hub import HubReference

_EFFORTS: dict[str, Literal["high", "max"]] = {"high": "high", "max": "max"}


@click.command(epilog=EPILOG)
@click.argument("path", metavar="MESSAGES.json", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--thinking", type=click.Choice(["off", *_EFFORTS]), default="high", show_default=True,
              help="Whether the model reasons before it answers; max asks it in words to spare no effort.")
@click.option("--keep-thinking", is_flag=True,
              help="Keep the reasoning of earlier turns, as a conversation with tools does anyway.")
@click.option("--no-bos", is_flag=True, help="Begin without the begin-of-sentence token.")
@click.option("--ids", "as_ids", is_flag=True, help="Print token ids, by the tokenizer of --model.")
@click.option("--model", type=source_argument, metavar="MODEL",
              help="A checkpoint (directory or hf://OWNER/NAME) or a GGUF: its tokenizer.")
@json_option
def encode(path: Path, thinking: str, keep_thinking: bool, no_bos: bool, as_ids: bool,
           model: Path | HubReference | None, as_json: bool) -> None:
    """Write a conversation as the prompt that the model reads: DeepSeek's own encoding, which has no chat template.

    MESSAGES.json is a list of messages, or an object with messages and tools, as OpenAI's chat API takes them; - reads
    standard input. The prompt ends where the model goes on. Piped, it is written byte for byte, without a new line at
    its end.

    \b
    Examples:
      dsv4tools encode chat.json
      dsv4tools encode chat.json --thinking off > prompt.txt
      dsv4tools encode chat.json --ids --model flash.gguf
      echo '[{"role": "user", "content": "Hello"}]' | dsv4tools encode - --json
    """
    if as_ids != (model is not None):
        raise click.UsageError("--ids and --model belong together")
    prompt = _read_prompt(path, thinking, keep_thinking, no_bos)
    ids = _token_ids(prompt, model) if model is not None else None
    if as_json:
        data: dict[str, Any] = {"prompt": prompt}
        show_json(data if ids is None else data | {"ids": ids, "n_tokens": len(ids)})
    elif ids is not None:
        show(",".join(map(str, ids)))
    elif sys.stdout.isatty():
        for line in prompt.split("\n"):
            show(line)
    else:
        click.echo(prompt.encode(), nl=False)


def _read_prompt(path: Path, thinking: str, keep_thinking: bool, no_bos: bool) -> str:
    if str(path) == "-":
        where, raw = "standard input", sys.stdin.buffer.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise InputError(where, f"is larger than {MAX_JSON_BYTES:,} bytes")
    else:
        where, raw = str(path), read_small_file(path, max_bytes=MAX_JSON_BYTES)
    messages = messages_from_request(parse_json(raw, where), where)
    try:
        return encode_messages(messages, "chat" if thinking == "off" else "thinking", drop_thinking=not keep_thinking,
                               add_default_bos_token=not no_bos, reasoning_effort=_EFFORTS.get(thinking))
    except InputError as e:
        raise InputError(f"{where}: {e.where}", e.what, hint=e.hint) from None


def _token_ids(prompt: str, model: Path | HubReference) -> list[int]:
    from dsv4tools.tokenizer import load_tokenizer  # noqa: PLC0415  - text needs no tokenizer

    tokenizer = load_tokenizer(local_files(model))
    for token in SPECIAL_TOKENS:
        if token in prompt:
            tokenizer.token_id(token)   # spelled in several tokens it would say nothing to the model
    return tokenizer.encode(prompt)
