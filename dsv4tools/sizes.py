"""Sizes and times as people read them: both GB (powers of ten) and GiB (powers of two), always."""

from __future__ import annotations

import re

from dsv4tools.errors import UsageError

_UNITS = ((10**12, 2**40, "T"), (10**9, 2**30, "G"), (10**6, 2**20, "M"), (10**3, 2**10, "k"))


def format_bytes(n: int) -> str:
    """``164.63 GB (153.32 GiB)``."""
    for ten, two, letter in _UNITS:
        if n >= ten:
            return f"{n / ten:.2f} {letter}B ({n / two:.2f} {letter.upper()}iB)"
    return f"{n} bytes"


def parse_bytes(text: str, where: object) -> int:
    """``40G``, ``500M``, ``1.5T``, ``32GiB`` or a number of bytes; letters alone are powers of ten, as llama.cpp's.

    UsageError for anything else.
    """
    match = re.fullmatch(r"([0-9]{1,20})(?:\.([0-9]{1,9}))?\s*(?:([KMGT])(i?)B?|B?)", text.strip(), re.IGNORECASE)
    if match is None or (match[2] and not match[3]):
        raise UsageError(where, f"is {text[:40]!r}, expected a size such as 40G, 500M or 32GiB")
    whole, decimals, letter, binary = match[1], match[2] or "", (match[3] or "").upper(), match[4]
    power = "KMGT".index(letter) + 1 if letter else 0
    unit: int = (1024 if binary else 1000) ** power
    parts: int = 10 ** len(decimals)
    return int(whole + decimals) * unit // parts


def format_seconds(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 20 s``, ``12 s``."""
    total = max(1, round(seconds))
    if total >= 3600:
        return f"{total // 3600} h {total % 3600 // 60:02} min"
    return f"{total // 60} min {total % 60:02} s" if total >= 60 else f"{total} s"
