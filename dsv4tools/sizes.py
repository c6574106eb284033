"""Sizes and times as people read them: both GB (powers of ten) and GiB (powers of two), always."""

from __future__ import annotations

_UNITS = ((10**12, 2**40, "T"), (10**9, 2**30, "G"), (10**6, 2**20, "M"), (10**3, 2**10, "k"))


def format_bytes(n: int) -> str:
    """``164.63 GB (153.32 GiB)``."""
    for ten, two, letter in _UNITS:
        if n >= ten:
            return f"{n / ten:.2f} {letter}B ({n / two:.2f} {letter.upper()}iB)"
    return f"{n} bytes"


def format_seconds(seconds: float) -> str:
    """``2 h 05 min``, ``3 min 20 s``, ``12 s``."""
    total = max(1, round(seconds))
    if total >= 3600:
        return f"{total // 3600} h {total % 3600 // 60:02} min"
    return f"{total // 60} min {total % 60:02} s" if total >= 60 else f"{total} s"
