"""scripts/benchmark: every case of rows and threads is measured, compared and drawn; wrong options are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "benchmark"


def benchmark(*options):
    return subprocess.run([sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True, check=False)


def test_rows_and_threads_are_measured_one_by_one(tmp_path):
    plot = tmp_path / "growth.svg"
    ended = benchmark("--only", "bf16", "--rows", "8,24", "--threads", "1,2", "--columns", 256, "--numpy-rows", 4,
                      "--seconds", 0.001, "--json", "--plot", plot)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in json.loads(ended.stdout)["kernels"] if "ratio" in line]
    assert {(line["rows"], line["threads"]) for line in lines} == {(8, 1), (24, 1), (8, 2), (24, 2)}
    assert all(line["same_bytes"] and line["other"] == "numpy" for line in lines)
    for line in lines:
        assert line["seconds"] * line["values_per_second"] == pytest.approx(line["rows"] * 256)
    assert "F32 -&gt; BF16, 24 rows, 2 thr." in plot.read_text("utf-8")
    ET.parse(plot)


@pytest.mark.parametrize(("options", "said"), [
    (("--ggml-lib", "no-such-library"), "--ggml-lib: "),
    (("--only", "Q9"), "invalid choice: 'Q9'"),
    (("--threads", "0"), "invalid counts value: '0'"),
    (("--plot", "growth.png"), "plots are SVG files"),
    (("--processor-time", "--threads", "1,2"), "leave --threads out"),
])
def test_wrong_options(options, said):
    ended = benchmark(*options)
    assert ended.returncode == 2
    assert said in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
