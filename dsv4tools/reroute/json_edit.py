"""Changing one number in a JSON text and nothing else: not a space, not the notation of another number.

Loading and dumping would rewrite 1e-06 as 1e-6, drop the indent and the escapes. So the number's place is found, and
its digits replaced.
"""

from __future__ import annotations

import json
from json.decoder import scanstring  # type: ignore[attr-defined]  # in every CPython, not in the stubs
from typing import TYPE_CHECKING

from dsv4tools.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()


def replace_number(raw: bytes, path: Sequence[str], value: int, where: object) -> bytes:
    """`raw` with the number under the keys `path` replaced by `value`.

    `raw` must have been accepted by `parse_json`: without duplicate keys the place is unique. InputError if there is
    no number at `path`.
    """
    text = raw.decode("utf-8")
    begin = 0
    for key in path:
        begin = _find_member(text, begin, key)
        if begin < 0:
            raise InputError(f"{where}: key {'.'.join(path)!r}", "is missing")
    found, end = _DECODER.raw_decode(text, begin)
    if type(found) not in (int, float):
        raise InputError(f"{where}: key {'.'.join(path)!r}", f"is {found!r}, expected a number")
    return (text[:begin] + str(value) + text[end:]).encode()


def _find_member(text: str, begin: int, key: str) -> int:
    """Where the value of `key` begins in the object that begins at or behind `begin`; -1 if there is none."""
    at = _skip(text, begin)
    if text[at : at + 1] != "{":
        return -1
    at = _skip(text, at + 1)
    while text[at] != "}":
        name, at = scanstring(text, at + 1)
        at = _skip(text, _skip(text, at) + 1)       # behind the colon
        if name == key:
            return at
        at = _skip(text, _DECODER.raw_decode(text, at)[1])
        if text[at] == ",":
            at = _skip(text, at + 1)
    return -1


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at
