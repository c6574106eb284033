"""JSON from files that we did not write, without the surprises of the standard reader.

The standard library lets the last of two equal keys win, reads NaN and Infinity, and reports deep nesting as a
RecursionError; each of those has been used to make two readers of one checkpoint disagree.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, NoReturn

from dsv4tools.errors import InputError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_SHOWN_LENGTH = 200
MAX_LISTED = 1000
MAX_JSON_BYTES = 100_000_000   # the cap of the safetensors format; no published file comes near it


def parse_json(raw: bytes, where: object) -> Any:  # noqa: ANN401  - JSON is of any type until it is checked
    """The value of `raw`; InputError on invalid UTF-8 or JSON, duplicate keys, NaN, Infinity or bottomless nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]  # set.add in a test
            raise InputError(where, f"key {shown(twice)} appears twice in one JSON object")
        return found

    def refuse(token: str) -> NoReturn:
        raise InputError(where, f"{token} is not a JSON number")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as e:
        raise InputError(where, f"is not valid UTF-8 at byte {e.start}") from None
    except RecursionError:
        raise InputError(where, "JSON is nested too deeply") from None
    except ValueError as e:   # JSONDecodeError, and integers of more digits than Python will convert
        raise InputError(where, f"is not valid JSON: {e}") from None


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises
    ------
    InputError
        The file is missing, no regular file, larger than `max_bytes`, or not a strict JSON object.
    ResourceError
        It cannot be read.
    """
    raw = read_small_file(path, max_bytes=max_bytes)
    value = parse_json(raw, path)
    if not isinstance(value, dict):
        raise InputError(path, f"holds a JSON {type(value).__name__}, expected an object")
    return value


def shown(value: object) -> str:
    """What a message says of an unchecked value: its repr, shortened, so that a message stays a line."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_LENGTH else f"{text[:MAX_SHOWN_LENGTH - 3]}..."


def listed(items: Sequence[str]) -> str:
    """What a message says of many things: all of them, up to a thousand, and how many more."""
    more = f" and {len(items) - MAX_LISTED:,} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more


def read_small_file(path: Path, *, max_bytes: int) -> bytes:
    """All bytes of a regular file of at most `max_bytes`; a FIFO or device is refused before it can hang the reader."""
    try:
        if not path.exists():
            raise InputError(path, "is missing")
        if not path.is_file():
            raise InputError(path, "is not a regular file")
        with path.open("rb") as f:
            # A read sets aside what it is asked for: no more than the file holds, and one byte to notice a longer one.
            raw = f.read(min(max_bytes, os.fstat(f.fileno()).st_size) + 1)
    except OSError as e:
        raise ResourceError(path, f"cannot be read: {e.strerror}") from None
    if len(raw) > max_bytes:
        raise InputError(path, f"is larger than {max_bytes:,} bytes, too large for what it is")
    return raw
