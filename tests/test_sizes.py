"""Sizes in GB and GiB, times in the units that people use."""

from __future__ import annotations

import pytest

from dsv4tools.sizes import format_bytes, format_seconds


@pytest.mark.parametrize(("n", "text"), [
    (0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB (0.98 KiB)"), (1024, "1.02 kB (1.00 KiB)"),
    (1 << 20, "1.05 MB (1.00 MiB)"), (10**9, "1.00 GB (0.93 GiB)"), (164_628_168_768, "164.63 GB (153.32 GiB)"),
    (899_827_146_560, "899.83 GB (838.03 GiB)"), (10**12, "1.00 TB (0.91 TiB)"),
    (5 * 10**15, "5000.00 TB (4547.47 TiB)"),
])
def test_bytes(n, text):
    assert format_bytes(n) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "1 s"), (0.4, "1 s"), (1.6, "2 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (60, "1 min 00 s"),
    (200, "3 min 20 s"), (3599, "59 min 59 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min"), (360_000, "100 h 00 min"),
])
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text
