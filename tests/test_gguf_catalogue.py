"""Every file of the catalogue is judged right, by scanning and by opening, quickly and in little memory."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter

import pytest
from gguf_catalogue import CASES

from dsv4tools.errors import InputError
from dsv4tools.gguf.reader import open_gguf, scan_gguf


def test_names_are_unique():
    assert [n for n, count in Counter(c.name for c in CASES).items() if count > 1] == []


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{c.verdict}-{c.name}") for c in CASES])
def test_catalogue(case, tmp_path):
    path = tmp_path / "case.gguf"
    path.write_bytes(case.raw)
    tracemalloc.start()
    before = time.process_time()
    with scan_gguf(path) as gguf:
        seconds = time.process_time() - before
    n_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert n_bytes < 200_000_000

    errors = [f.code for f in gguf.findings if f.severity == "error"]
    warnings = [f.code for f in gguf.findings if f.severity == "warning"]
    assert gguf.ok is (case.verdict != "reject")
    if case.verdict == "accept":
        assert gguf.findings == []
    elif case.verdict == "warn":
        assert (errors, warnings) == ([], [case.code])
    else:
        assert errors[0] == case.code
    for finding in gguf.findings:
        assert finding.where
        assert finding.offset is not None
        assert 0 <= finding.offset <= len(case.raw)
        assert str(finding).isprintable()

    if case.verdict == "reject":
        with pytest.raises(InputError) as caught:
            open_gguf(path)
        assert str(path) in str(caught.value)
        assert str(caught.value).isprintable()
    else:
        with open_gguf(path) as again:
            assert list(again.kvs) == list(gguf.kvs)
            assert again.tensors == gguf.tensors
