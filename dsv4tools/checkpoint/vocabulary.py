"""The tokenizer of a checkpoint as a GGUF stores it: tokens by id, their types, merges, special ids.

Token strings stay byte for byte what tokenizer.json has (byte-level BPE text); nothing is normalized. The chat template
is opaque text: it is copied, never rendered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from itertools import count
from typing import TYPE_CHECKING, Any

from dsv4tools.checkpoint.strict_json import read_json_object, read_small_file, shown
from dsv4tools.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

MAX_CHAT_TEMPLATE_BYTES = 1_000_000
# Text that DeepSeek's tokenizers use for control tokens, with the full-width bar or the ASCII one.
_CONTROL_TEXT = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


class TokenType(IntEnum):
    """tokenizer.ggml.token_type (llama.h: LLAMA_TOKEN_TYPE)."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the tokenizer files say.

    Attributes
    ----------
    tokens, types:
        One entry per id, padded to the model's vocabulary with ``[PAD<id>]`` of type UNUSED.
    merges:
        ``"left right"`` in rank order.
    special_ids:
        ``bos``, ``eos``, ``padding`` -> id, those that the files name.
    add_bos, add_eos:
        Whether the tokenizer itself adds them.
    chat_template:
        The checkpoint's own template, or None: the published V4 repositories ship none.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_vocabulary(directory: Path, vocab_size: int) -> Vocabulary:
    """Read tokenizer.json, tokenizer_config.json and the chat template of a checkpoint.

    Raises
    ------
    InputError
        No byte-level BPE, an id outside ``[0, vocab_size)`` or used twice, an empty or repeated token, text that is
        not valid Unicode, a merge of unknown form, no merges.
    """
    path = directory / "tokenizer.json"
    raw = read_json_object(path)
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{path}: key 'model'", "is no BPE model with a vocab", hint="expected a byte-level BPE")
    added = _read_added(raw.get("added_tokens", []), path)
    tokens, types = _place_tokens(model["vocab"], added, vocab_size, path)
    settings = directory / "tokenizer_config.json"
    config = read_json_object(settings) if settings.exists() else {}
    ids = {text: i for i, text in enumerate(tokens)}
    special_ids = _read_special_ids(directory, config, ids, vocab_size)
    return Vocabulary(
        tokens, types, _read_merges(model.get("merges"), ids, path), special_ids,
        _read_flag(config, "add_bos_token", settings), _read_flag(config, "add_eos_token", settings),
        _read_chat_template(directory, config, settings),
    )


def _check_text(text: Any, what: str, path: Path) -> str:  # noqa: ANN401  - unchecked JSON
    if not isinstance(text, str) or not text:
        raise InputError(path, f"{what} is {shown(text)}, expected text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(path, f"{what} {shown(text)} is not valid Unicode") from None
    return text


def _check_id(value: Any, what: str, limit: int, path: Path) -> int:  # noqa: ANN401  - unchecked JSON
    if type(value) is not int or not 0 <= value < limit:
        raise InputError(path, f"{what} has id {shown(value)}, expected 0 to {limit - 1} (config.json's vocab_size)")
    return value


def _read_added(entries: Any, path: Path) -> dict[str, tuple[Any, bool]]:  # noqa: ANN401  - unchecked JSON
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise InputError(f"{path}: key 'added_tokens'", "is not a list of objects")
    added: dict[str, tuple[Any, bool]] = {}
    for entry in entries:
        text = _check_text(entry.get("content"), "an added token", path)
        if text in added:
            raise InputError(path, f"added token {shown(text)} appears twice")
        added[text] = (entry.get("id"), entry.get("special") is True)
    return added


def _assign_ids(vocab: dict[str, Any], added: dict[str, tuple[Any, bool]]) -> dict[str, int]:
    """The id that each added token really has: that of the vocab, or else the number of tokens before it.

    The `tokenizers` library (AddedVocabulary, measured with 0.23) assigns ids so and does not look at the ``id`` field;
    the two differ where the file leaves a gap, and then text encoded by any user of the library has these ids.
    """
    following = count(len(vocab))
    return {text: vocab[text] if text in vocab else next(following) for text in added}


def _place_tokens(
    vocab: dict[str, Any], added: dict[str, tuple[Any, bool]], vocab_size: int, path: Path
) -> tuple[list[str], list[int]]:
    tokens: list[str | None] = [None] * vocab_size
    for text, token_id in [*vocab.items(), *_assign_ids(vocab, added).items()]:
        _check_text(text, "a token", path)
        at = _check_id(token_id, f"token {shown(text)}", vocab_size, path)
        if tokens[at] not in (None, text):
            raise InputError(path, f"id {at} belongs to {shown(tokens[at])} and to {shown(text)}")
        tokens[at] = text
    for text, (declared, _) in added.items():
        _check_id(declared, f"added token {shown(text)}", vocab_size, path)
        if vocab.get(text, declared) != declared:
            raise InputError(path, f"token {shown(text)} has id {vocab[text]} in the vocab, "
                             f"{declared} among the added tokens")
    present = set(tokens)
    placed = [f"[PAD{i}]" if t is None else t for i, t in enumerate(tokens)]
    clash = next((p for p, t in zip(placed, tokens, strict=True) if t is None and p in present), None)
    if clash:
        raise InputError(path, f"token {shown(clash)} has the name that fills an unused id")
    return placed, [_token_type(t, added) for t in tokens]


def _token_type(text: str | None, added: dict[str, tuple[Any, bool]]) -> int:
    if text is None:
        return TokenType.UNUSED
    if text not in added:
        return TokenType.NORMAL
    special = added[text][1] or _CONTROL_TEXT.fullmatch(text) is not None
    return TokenType.CONTROL if special else TokenType.USER_DEFINED


def _read_merges(raw: Any, ids: dict[str, int], path: Path) -> list[str]:  # noqa: ANN401  - unchecked JSON
    if not isinstance(raw, list) or not raw:
        raise InputError(f"{path}: key 'model.merges'", "is missing or empty", hint="a GGUF needs the merge list")
    merges = []
    for rank, merge in enumerate(raw):
        pair = merge.split(" ") if isinstance(merge, str) else merge   # the older form is one string, the newer a pair
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{path}: merge {rank}", f"is {shown(merge)}, expected two tokens")
        left, right = (_check_text(part, f"merge {rank}", path) for part in pair)
        if left + right not in ids:
            raise InputError(f"{path}: merge {rank}", f"makes {shown(left + right)}, which is no token")
        # A GGUF joins the two by one space; inside a part a space is written as byte-level BPE writes it.
        merges.append(f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}")
    return merges


def _read_special_ids(
    directory: Path, config: dict[str, Any], ids: dict[str, int], vocab_size: int
) -> dict[str, int]:
    found: dict[str, int] = {}
    path = directory / "tokenizer_config.json"
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        entry = config.get(key)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if text is not None:
            if not isinstance(text, str) or text not in ids:
                raise InputError(f"{path}: key {key!r}", f"is {shown(text)}, which is no token of tokenizer.json")
            found[name] = ids[text]
    missing = [name for name in ("bos", "eos", "padding") if name not in found]
    model_config = read_json_object(directory / "config.json") if missing else {}
    for name in missing:
        key = f"{'pad' if name == 'padding' else name}_token_id"
        if model_config.get(key) is not None:
            found[name] = _check_id(model_config[key], key, vocab_size, directory / "config.json")
    return found


def _read_flag(config: dict[str, Any], key: str, path: Path) -> bool:
    value = config.get(key, False)
    if value is not None and type(value) is not bool:
        raise InputError(f"{path}: key {key!r}", f"is {shown(value)}, expected true or false")
    return bool(value)


def _read_chat_template(directory: Path, config: dict[str, Any], path: Path) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):   # several named templates: the GGUF key holds the default one
        named = (e.get("template") for e in template if isinstance(e, dict) and e.get("name") == "default")
        template = next(named, None)
    if template is None and (directory / "chat_template.jinja").exists():
        path = directory / "chat_template.jinja"
        raw = read_small_file(path, max_bytes=MAX_CHAT_TEMPLATE_BYTES)
        try:
            template = raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise InputError(path, f"is not valid UTF-8 at byte {e.start}") from None
    if template is None:
        return None
    text = _check_text(template, "chat_template", path)
    if len(text.encode()) > MAX_CHAT_TEMPLATE_BYTES:
        raise InputError(f"{path}: key 'chat_template'", f"is larger than {MAX_CHAT_TEMPLATE_BYTES:,} bytes")
    return text
