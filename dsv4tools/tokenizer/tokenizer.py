"""Encoding, decoding, and decoding of ids that come one by one. Decoding needs only the tokens, no library."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.checkpoint.strict_json import shown
from dsv4tools.checkpoint.vocabulary import TokenType
from dsv4tools.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import tokenizers

    from dsv4tools.checkpoint.vocabulary import Vocabulary


def byte_letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in tokens (GPT-2): printable Latin-1 itself, the others from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in sorted(printable)} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


_BYTES = {letter: byte for byte, letter in byte_letters().items()}


class Tokenizer:
    """Text to token ids and back. Made by `load_tokenizer`.

    Attributes
    ----------
    bos_id, eos_id:
        Ids of the tokens that begin and end a sentence; None if the model names none.
    n_tokens:
        How many ids there are, unused ones included.
    path:
        The file it was read from.
    """

    def __init__(self, vocabulary: Vocabulary, encoder: tokenizers.Tokenizer, path: Path) -> None:
        self.path = path
        self.bos_id = vocabulary.special_ids.get("bos")
        self.eos_id = vocabulary.special_ids.get("eos")
        self.n_tokens = len(vocabulary.tokens)
        self._tokens, self._types = vocabulary.tokens, vocabulary.types
        self._encoder = encoder

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens written in it are those tokens; none is added.

        Raises
        ------
        InputError
            The text has no UTF-8 form: half a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InputError("text", f"is not valid Unicode: half a surrogate pair at character {e.start}") from None
        return self._encoder.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens included. Bytes that are no UTF-8 become U+FFFD, unused ids nothing.

        Raises
        ------
        UsageError
            An id is none of the vocabulary.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, perhaps a part of a character; errors of `decode`."""
        if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
            raise UsageError("token id", f"is {shown(token_id)}, expected an integer")
        if not 0 <= token_id < self.n_tokens:
            raise UsageError("token id", f"is {token_id}, expected 0 to {self.n_tokens - 1}")
        token, kind = self._tokens[token_id], self._types[token_id]
        if kind == TokenType.UNUSED:
            return b""
        if kind == TokenType.NORMAL and all(letter in _BYTES for letter in token):
            return bytes(_BYTES[letter] for letter in token)
        return token.encode()

    def token_id(self, token: str) -> int:
        """The id of a special token; InputError if the model has no such token."""
        found = self._encoder.token_to_id(token)
        if found is None or self._types[found] == TokenType.NORMAL:
            raise InputError(self.path, f"has no special token {shown(token)}", hint="is it a DeepSeek-V4?")
        return int(found)

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        return TextStream(self)


class TextStream:
    """Text from ids that come one by one: a character appears when all its bytes have come. In sum it is `decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes, perhaps none; errors of `Tokenizer.decode`."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that was never completed. The stream can be used again."""
        return self._decoder.decode(b"", final=True)
