"""The options that say which tokens a model reads: shared by logits, generate and compare."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import numpy as np

from dsv4tools.checkpoint.strict_json import read_small_file
from dsv4tools.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dsv4tools.tokenizer import Tokenizer

_Command = TypeVar("_Command", bound="Callable[..., Any]")

MAX_TOKENS_BYTES = 100_000_000


def token_options(command: _Command) -> _Command:
    """Add --tokens, --tokens-file, --text and --no-bos, for `read_tokens`."""
    for option in reversed([
        click.option("--tokens", metavar="1,2,3", help="Token ids."),
        click.option("--tokens-file", type=click.Path(path_type=Path), metavar="F",
                     help="A file of token ids: text with commas or spaces between them, or a .npy array."),
        click.option("--text", metavar="T", help="Text, by the model's tokenizer."),
        no_bos_option,
    ]):
        command = option(command)
    return command


no_bos_option = click.option("--no-bos", is_flag=True, help="Do not begin text with the begin-of-sentence token.")


def read_tokens(
    model: Path, tokens: str | None, tokens_file: Path | None, text: str | None, *, no_bos: bool
) -> NDArray[np.int64]:
    """The token ids [S] that the options give."""
    if [tokens, tokens_file, text].count(None) != 2:
        raise click.UsageError("give one of --tokens, --tokens-file and --text")
    if tokens is not None:
        return _parse_ids(tokens, "--tokens")
    if tokens_file is not None:
        return _read_ids(tokens_file)
    from dsv4tools.tokenizer import load_tokenizer  # noqa: PLC0415  - ids need no tokenizer

    return np.array(encode_text(load_tokenizer(model), text or "", no_bos=no_bos), np.int64)


def encode_text(tokenizer: Tokenizer, text: str, *, no_bos: bool) -> list[int]:
    """The ids of `text` behind the token that begins every sentence, which tokenizers of DeepSeek do not add."""
    ids = tokenizer.encode(text)
    begin = tokenizer.bos_id
    return ids if no_bos or begin is None or ids[:1] == [begin] else [begin, *ids]


def _parse_ids(text: str, where: object) -> NDArray[np.int64]:
    words = text.replace(",", " ").split()
    bad = next((w for w in words if not (w.isascii() and w.isdigit() and len(w) < 10)), None)
    if bad is not None:
        raise UsageError(where, f"{bad[:40]!r} is no token id")
    if not words:
        raise UsageError(where, "has no token ids")
    return np.array(words, np.int64)


def _read_ids(path: Path) -> NDArray[np.int64]:
    raw = read_small_file(path, max_bytes=MAX_TOKENS_BYTES)
    if raw[:6] == b"\x93NUMPY":
        try:
            ids = np.load(io.BytesIO(raw), allow_pickle=False)
        except (ValueError, EOFError) as e:
            raise InputError(path, f"is no valid .npy file: {' '.join(str(e).split())}") from None
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ids.size:
            raise InputError(path, f"has {ids.dtype} {list(ids.shape)}, expected a list of token ids")
        return np.asarray(ids).astype(np.int64)
    try:
        return _parse_ids(raw.decode("ascii"), path)
    except UnicodeDecodeError:
        raise InputError(path, "is neither text of token ids nor a .npy array") from None
