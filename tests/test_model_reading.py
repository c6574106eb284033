"""What is read of a model: only the experts that tokens are routed to, and never the whole file at once."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from dataclasses import replace

import pytest

import dsv4tools as dt
from dsv4tools.model import open_model
from dsv4tools.synthetic import FLASH, write_sparse

DECODE_AT_FULL_WIDTH = """
import re, resource, sys
from pathlib import Path

from dsv4tools.model import open_model

def peak_bytes():
    status = Path("/proc/self/status")
    if status.exists():   # getrusage would count what the parent had before it started us
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

with open_model(sys.argv[1], threads=2) as model:
    cache = model.new_cache()
    model.forward([1, 2, 3], cache)
    before = model.weights.n_bytes_read
    used = {}
    model.forward([4], cache, observe=lambda what, layer, ids: used.update({(what, layer): ids}))
    read = model.weights.n_bytes_read - before
    for layer in range(3):
        n_bytes = [read[f"blk.{layer}.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")]
        print(layer, len(set(used["experts", layer][0].tolist())), *n_bytes)
print(peak_bytes())
"""


@pytest.mark.parametrize("kind", ["checkpoint", "gguf"])
def test_only_routed_experts_are_read(tiny_6e, tmp_path, kind):
    path = tiny_6e
    if kind == "gguf":
        path = tmp_path / "q4k.gguf"
        dt.convert(dt.plan(dt.open_checkpoint(tiny_6e)), path)
    used = defaultdict(set)

    def note(what, layer, ids):
        if what == "experts":
            used[layer].update(ids.reshape(-1).tolist())

    with open_model(path) as model:
        model.forward([3, 5], observe=note)
        read = model.weights.n_bytes_read
    assert {len(experts) for experts in used.values()} - set(range(6, 13)) == set()
    assert any(len(experts) < 12 for experts in used.values())
    n_bytes = {"checkpoint": 256 * 128 + 256 * 8, "gguf": 256 * 144}[kind]   # of one matrix, 256 x 256
    for layer in range(5):
        if kind == "gguf":
            for name in ("gate", "up", "down"):
                assert read[f"blk.{layer}.ffn_{name}_exps.weight"] == len(used[layer]) * n_bytes
        else:
            for name in ("w1", "w2", "w3"):
                matrices = {e: read[f"layers.{layer}.ffn.experts.{e}.{name}.weight"] for e in range(12)}
                assert matrices == {e: n_bytes if e in used[layer] else 0 for e in range(12)}


def test_full_width_from_disk(tmp_path):
    """Three layers of Flash with all their experts, 11 GB that are a hole: a token reads a few hundred MB of it."""
    shape = replace(FLASH, layers=3, vocab=1024, lead_ratios=(0, 4, 128), hash_layers=1, draft_blocks=0, merges=None)
    plan = dt.plan(dt.open_checkpoint(write_sparse(tmp_path / "checkpoint", shape, shards=2)))
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.total_bytes)
    assert plan.total_bytes > 10e9
    command = [sys.executable, "-c", DECODE_AT_FULL_WIDTH, path]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    *layers, peak = ended.stdout.splitlines()
    one_expert = 2048 * 4096 // 256 * 144
    for line in layers:
        _, n_experts, *n_bytes = map(int, line.split())
        assert 1 <= n_experts <= 6
        assert n_bytes == [n_experts * one_expert] * 3
    assert len(layers) == 3
    assert int(peak) < 1e9


def test_vectors_are_read_once(tiny_6e):
    with open_model(tiny_6e) as model:
        model.forward([1])
        first = model.weights.n_bytes_read
        model.forward([1])
        second = model.weights.n_bytes_read - first
    assert first["layers.0.attn_norm.weight"] == 512
    assert second["layers.0.attn_norm.weight"] == 0
    assert second["layers.0.attn.wkv.weight"] == first["layers.0.attn.wkv.weight"]


def test_an_exchanged_file_is_noticed(make_checkpoint):
    path = make_checkpoint()
    with open_model(path) as model:
        shard = min(path.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes())
        with pytest.raises(dt.VerifyError, match=shard.name):
            model.forward([1])


def test_closed_models_say_so(tiny_6e):
    with open_model(tiny_6e) as model:
        pass
    model.close()
    with pytest.raises(dt.UsageError, match="was closed"):
        model.forward([1])
