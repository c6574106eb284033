"""The encoder: three expressions that cut the text, then merges of bytes, done by the `tokenizers` library.

The library never sees unchecked tokens or merges: it panics on some of them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dsv4tools.checkpoint.strict_json import shown
from dsv4tools.checkpoint.vocabulary import TokenType
from dsv4tools.errors import InputError, ResourceError
from dsv4tools.tokenizer.tokenizer import Tokenizer, byte_letters

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from dsv4tools.checkpoint.vocabulary import Vocabulary

# The published tokenizer.json cuts text by these, one after the other: up to three digits; Chinese characters and kana;
# words with the character before them, punctuation, line ends, spaces.
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+",
    (
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
        r" ?[\p{P}\p{S}]+[\r\n]*|"
        r"\s*[\r\n]+|"
        r"\s+(?!\S)|"
        r"\s+"
    ),
)
PRE_TOKENIZERS = {"joyai-llm": _DEEPSEEK, "deepseek-v3": _DEEPSEEK}
"""``tokenizer.ggml.pre`` -> the expressions; llama.cpp knows DeepSeek-V4's by the first name, V3 has the same."""

# Text on which two ways of cutting differ if they differ for anything that people write: each class of characters in
# the expressions, and all that the usual normalizers change.
_PROBE = (
    " don't .foo -Foo _bar x+=1; 1 12 123 1234567 ١٢٣٤ x²y ¼½¾⅓ Ⅳa ÄÖÜ e\u0301 \ufb01 \u1e9e"
    " \u0939\u093f\u0928\u094d\u0926\u0940 漢字かなカナ々〆䶵一龥龦ぁゟ゠ヿㄅｱ한국어 русский  a   b"
    " \t\tc\u00a0d\u3000e\r\n\r\nf\n \n g \U0001f468\u200d\U0001f469 \u2764\ufe0f…“”€© ?!\n\nh \n  "
)


def check_pre_tokenizer(raw: dict[str, Any], name: str, path: Path) -> None:
    """InputError unless the normalizer and pre-tokenizer of a tokenizer.json do what those called `name` do.

    Judged by what they do to a text of all kinds: the same can be written in many ways.
    """
    library = _import_library()
    settings: dict[str, Any] = {
        "version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [],
        "normalizer": raw.get("normalizer"), "pre_tokenizer": raw.get("pre_tokenizer"),
    }
    try:
        theirs = library.Tokenizer.from_str(json.dumps(settings))
    except Exception as e:  # noqa: BLE001  - the library raises no narrower class
        raise InputError(f"{path}: keys 'normalizer' and 'pre_tokenizer'", f"are not understood: {e}") from None
    if theirs.normalizer is not None and theirs.normalizer.normalize_str(_PROBE) != _PROBE:
        raise InputError(f"{path}: key 'normalizer'", "changes text, expected one that changes nothing")
    pieces = None if theirs.pre_tokenizer is None else theirs.pre_tokenizer.pre_tokenize_str(_PROBE)
    if pieces != _make_pre_tokenizer(PRE_TOKENIZERS[name]).pre_tokenize_str(_PROBE):
        raise InputError(f"{path}: key 'pre_tokenizer'", "cuts text in another way than DeepSeek-V4's",
                         hint=f"a GGUF with pre-tokenizer {name!r} would give other ids")


def make_tokenizer(vocabulary: Vocabulary, pre: str, path: Path) -> Tokenizer:
    """The tokenizer of a vocabulary whose tokens are distinct, cutting text by the expressions called `pre`.

    Added tokens are looked for before the text is cut, the leftmost and longest first. tokenizer.json can have some of
    them looked for later (those called ``normalized``); a GGUF cannot say that, and it matters only where two overlap
    in a text, which DeepSeek's cannot.

    Raises
    ------
    InputError
        A byte without a token, a merge that is not two tokens which make a third.
    ResourceError
        The library is not installed.
    """
    library = _import_library()
    kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
    ids = {token: i for i, (token, kind) in enumerate(kinds) if kind != TokenType.UNUSED}
    lacking = next((byte for byte, letter in byte_letters().items() if letter not in ids), None)
    if lacking is not None:
        raise InputError(path, f"has no token for the byte {lacking:#04x}, expected one for each of the 256 bytes",
                         hint="text with this byte could not be encoded")
    merges = _split_merges(vocabulary.merges, ids, path)
    added = [token for token, i in ids.items() if vocabulary.types[i] in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    try:
        encoder = library.Tokenizer(library.models.BPE(vocab=ids, merges=merges))
        encoder.pre_tokenizer = _make_pre_tokenizer(PRE_TOKENIZERS[pre])
        encoder.add_tokens([library.AddedToken(token, normalized=False) for token in added])
    except Exception as e:  # noqa: BLE001  - the library raises no narrower class
        raise InputError(path, f"the tokenizers library refuses its tokens: {e}") from None
    return Tokenizer(vocabulary, encoder, path)


def _split_merges(merges: Iterable[str], ids: dict[str, int], path: Path) -> list[tuple[str, str]]:
    pairs = []
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise InputError(f"{path}: merge {rank}", f"is {shown(merge)}, expected two tokens that make a third")
        pairs.append((left, right))
    return pairs


def _make_pre_tokenizer(splits: Sequence[str]) -> Any:  # noqa: ANN401  - a class of the library
    library = _import_library()
    cuts = [library.pre_tokenizers.Split(library.Regex(split), behavior="isolated") for split in splits]
    to_letters = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return library.pre_tokenizers.Sequence([*cuts, to_letters])


def _import_library() -> Any:  # noqa: ANN401  - a module
    try:
        import tokenizers  # noqa: PLC0415  - reading and converting files do without it
    except ImportError as e:
        raise ResourceError("tokenizers", f"the library cannot be imported: {e}",
                            hint="pip install tokenizers") from None
    return tokenizers
