"""tokenizer.json and its companions: a byte-level BPE of any size, in the published layout.

Ids: three special tokens, the 256 bytes, the merges, then DeepSeek's added tokens.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from dsv4tools.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

MergesForm = Literal["strings", "pairs"]
"""``"a b"`` strings, or the ``["a", "b"]`` pairs that newer versions of the tokenizers library write."""

SPECIAL_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
ADDED_TOKENS = (
    "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>", "<｜action｜>",
    "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜read_url｜>", "<｜extracted_url｜>",
    "<｜place▁holder▁no▁0｜>",
)  # fmt: skip
_NOT_SPECIAL = frozenset({"<think>", "</think>", "｜DSML｜"})
_WORDS = (
    " the", " of", " and", " to", " in", " is", " you", " that", " it", " for", " are", " this", " with", " as", " be",
    " on", " have", " from", " def", " return", " import", "ing", "er", "tion", "  ", "    ", "\n\n",
)  # fmt: skip
_N_UNUSED = 8  # ids left without a token at the end, as in the published files, whose vocabulary is padded
_MOST_MERGES = 450_000  # there are 26**4 made-up words of four letters
LEAST_VOCAB = len(SPECIAL_TOKENS) + 256 + len(ADDED_TOKENS) + _N_UNUSED

_SPLITS = (
    "\\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    (
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
        " ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    ),
)


def byte_letters() -> dict[int, str]:
    """Byte -> the printable letter that stands for it in a byte-level vocabulary, in vocabulary order.

    The scheme of GPT-2: printable Latin-1 stands for itself, the other bytes are numbered from U+0100 up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + n) for n, b in enumerate(others)}


def make_tokenizer(
    vocab_size: int, *, merges: int | None = None, merges_form: MergesForm = "strings"
) -> dict[str, Any]:
    """tokenizer.json for an embedding of `vocab_size` rows.

    Parameters
    ----------
    vocab_size:
        From `LEAST_VOCAB` up.
    merges:
        How many merges. None: those of a few dozen common words, as far as they fit; the ids behind them stay unused
        up to the added tokens. A count: made-up syllables fill it up, and placeholder tokens take all remaining ids.
    merges_form:
        How a merge is written.
    """
    if vocab_size < LEAST_VOCAB:
        raise UsageError("tokenizer", f"found a vocabulary of {vocab_size}, expected at least {LEAST_VOCAB}")
    room = vocab_size - len(ADDED_TOKENS) - _N_UNUSED
    letters = byte_letters()
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *letters.values()))}
    most = min(room - len(vocab), _MOST_MERGES)
    if merges is not None and not 0 <= merges <= most:
        raise UsageError("tokenizer", f"found {merges} merges, expected 0 to {most} in a vocabulary of {vocab_size}")
    pairs: list[tuple[str, str]] = []
    for left, right in _candidate_merges(letters, made_up=merges is not None):
        if len(pairs) == (most if merges is None else merges):
            break
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            pairs.append((left, right))
    added = [_added_token(i, token, special=True) for i, token in enumerate(SPECIAL_TOKENS)]
    first = room if merges is None else len(vocab)
    added += [_added_token(first + i, token, special=token not in _NOT_SPECIAL) for i, token in enumerate(ADDED_TOKENS)]
    if merges is not None:
        rest = range(first + len(ADDED_TOKENS), vocab_size)
        added += [_added_token(i, f"<｜place▁holder▁no▁{n}｜>", special=True) for n, i in enumerate(rest, start=1)]
    return _tokenizer_json(vocab, pairs, added, merges_form)


def make_tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json: no chat template, as DeepSeek publishes none for this model."""
    bos, eos = _token_text(SPECIAL_TOKENS[0]), _token_text(SPECIAL_TOKENS[1])
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 1_048_576,
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def make_generation_config() -> dict[str, Any]:
    """generation_config.json with the published sampling values."""
    return {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
    }


def _candidate_merges(letters: dict[int, str], *, made_up: bool) -> Iterator[tuple[str, str]]:
    """Pairs to merge, in order, the parts before their result; the caller drops those whose result exists."""
    for word in _WORDS:
        spelled = [letters[b] for b in word.encode()]
        for end in range(1, len(spelled)):
            yield "".join(spelled[:end]), spelled[end]
    if made_up:
        alphabet = [chr(c) for c in range(ord("a"), ord("z") + 1)]
        syllables = ["".join(pair) for pair in product(alphabet, repeat=2)]
        yield from product(alphabet, repeat=2)
        yield from product([letters[ord(" ")]], syllables)
        yield from product(syllables, repeat=2)


def _added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def _token_text(content: str) -> dict[str, Any]:
    return {
        "__type": "AddedToken",
        "content": content,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }


def _tokenizer_json(
    vocab: dict[str, int], pairs: list[tuple[str, str]], added: list[dict[str, Any]], merges_form: MergesForm
) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in _SPLITS
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": []},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, byte_level | {"add_prefix_space": False, "use_regex": False}],
        },
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [f"{a} {b}" for a, b in pairs] if merges_form == "strings" else [list(pair) for pair in pairs],
        },
    }
