"""Tokenizers from files: a checkpoint's tokenizer.json, or the ``tokenizer.ggml.*`` entries of a GGUF.

A GGUF holds tokens, types and merges, and only names the expressions that cut the text. What a tokenizer.json can say
beyond that is refused, so that a checkpoint and its GGUF never disagree about a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.checkpoint import Checkpoint
from dsv4tools.checkpoint.config import read_config
from dsv4tools.checkpoint.strict_json import read_json_object, shown
from dsv4tools.checkpoint.vocabulary import TokenType, Vocabulary, read_vocabulary
from dsv4tools.errors import InputError
from dsv4tools.gguf.reader import GgufFile
from dsv4tools.gguf.splits import open_whole
from dsv4tools.template.gguf_source import GgufSource
from dsv4tools.template.metadata import PRE_TOKENIZER
from dsv4tools.tokenizer.encoder import PRE_TOKENIZERS, check_pre_tokenizer, make_tokenizer

if TYPE_CHECKING:
    import os

    from dsv4tools.tokenizer.tokenizer import Tokenizer

_MODEL = "gpt2"   # llama.cpp's name for a byte-level BPE
_KEY = "tokenizer.ggml."
_UNSAID_OF_MODEL = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip
_UNSAID_OF_TOKEN = ("single_word", "lstrip", "rstrip")
_UNSAID_HINT = "a GGUF cannot say this, and its engines do not know it"


def load_tokenizer(source: str | os.PathLike[str] | Checkpoint | GgufFile) -> Tokenizer:
    """The tokenizer of a checkpoint or GGUF.

    Parameters
    ----------
    source:
        A checkpoint's directory (config.json and the tokenizer's files are enough), a GGUF file (its header is enough),
        or either of them opened.

    Raises
    ------
    InputError
        No byte-level BPE, or one that cuts text in another way than DeepSeek-V4's; the message names file and key.
    ResourceError
        A file cannot be read, or the `tokenizers` library is not installed.
    """
    if isinstance(source, GgufSource):
        return _from_gguf(source.file)
    if isinstance(source, Checkpoint):
        return _from_directory(source.directory, source.vocabulary)
    if isinstance(source, GgufFile):
        return _from_gguf(source)
    path = Path(source)
    if path.is_dir():
        return _from_directory(path, read_vocabulary(path, read_config(path / "config.json").vocab_size))
    with open_whole(path, template=True) as file:
        return _from_gguf(file)


def _from_directory(directory: Path, vocabulary: Vocabulary) -> Tokenizer:
    path = directory / "tokenizer.json"
    raw = read_json_object(path)   # its form was checked with the vocabulary
    _check_unsaid(raw["model"], _UNSAID_OF_MODEL, f"{path}: key 'model'")
    for entry in raw.get("added_tokens", []):
        _check_unsaid(entry, _UNSAID_OF_TOKEN, f"{path}: added token {shown(entry['content'])}")
    check_pre_tokenizer(raw, PRE_TOKENIZER, path)
    return make_tokenizer(vocabulary, PRE_TOKENIZER, path)


def _check_unsaid(settings: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    odd = next((key for key in keys if settings.get(key)), None)
    if odd:
        raise InputError(where, f"has {odd!r} set to {shown(settings[odd])}", hint=_UNSAID_HINT)


def _from_gguf(file: GgufFile) -> Tokenizer:
    model, pre = file.value(_KEY + "model"), file.value(_KEY + "pre")
    if model != _MODEL:
        raise InputError(f"{file.path}: {_KEY}model", f"is {_found(model)}, expected {_MODEL!r} (byte-level BPE)",
                         hint="give the first file of a split set" if "split.no" in file.kvs else "")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise InputError(f"{file.path}: {_KEY}pre",
                         f"is {_found(pre)}, expected {' or '.join(map(repr, PRE_TOKENIZERS))}")
    return make_tokenizer(_read_vocabulary(file), pre, file.path)


def _read_vocabulary(file: GgufFile) -> Vocabulary:
    tokens = _read_array(file, "tokens", "str")
    types = _read_array(file, "token_type", "i32", "u32")
    if len(types) != len(tokens):
        raise InputError(f"{file.path}: {_KEY}token_type", f"has {len(types)} entries, there are {len(tokens)} tokens")
    known = {int(kind) for kind in TokenType}
    seen: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind not in known:
            raise InputError(f"{file.path}: {_KEY}token_type",
                             f"says {kind} of token {i}, expected {', '.join(map(str, sorted(known)))}")
        if kind != TokenType.UNUSED and (not token or seen.setdefault(token, i) != i):
            found = f"{shown(token)} like token {seen[token]}" if token else "empty"
            raise InputError(f"{file.path}: {_KEY}tokens", f"token {i} is {found}, expected a text of its own")
    special_ids = {}
    for name in ("bos", "eos", "padding"):
        key = f"{_KEY}{name}_token_id"
        value = file.value(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(tokens):
            raise InputError(f"{file.path}: {key}", f"is {shown(value)}, expected 0 to {len(tokens) - 1}")
        special_ids[name] = value
    merges = _read_array(file, "merges", "str")
    return Vocabulary(tokens, types, merges, special_ids, add_bos=False, add_eos=False, chat_template=None)


def _read_array(file: GgufFile, name: str, *item_types: str) -> list[Any]:
    kv = file.kvs.get(_KEY + name)
    if kv is None or kv.type != "arr" or kv.item_type not in item_types or not len(kv.value):
        found = "missing" if kv is None else f"{len(kv.value)} of {kv.item_type}" if kv.item_type else kv.type
        raise InputError(f"{file.path}: {_KEY}{name}", f"is {found}, expected a list of {item_types[0]}")
    return kv.value.tolist() if isinstance(kv.value, np.ndarray) else list(kv.value)


def _found(value: object) -> str:
    return "missing" if value is None else shown(value)
