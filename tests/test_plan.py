"""Plans: sizes to the byte, units that tile every tensor, metadata that says what was decided; cheap at any size."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4tools import __version__
from dsv4tools.checkpoint import SourceTensor, open_checkpoint
from dsv4tools.checkpoint.matrix import Matrix
from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.source import SourceKind
from dsv4tools.formats.table import FORMATS
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.plan import MAX_UNIT_VALUES, PlannedTensor, make_plan, tensor_units
from dsv4tools.policy import load_policy
from dsv4tools.synthetic import PRO, write_sparse
from dsv4tools.template import TemplateTensor
from dsv4tools.workers import EXTRA_THREADS

MEASURE = """
import json, resource, sys, time
begin = time.process_time()
import dsv4tools as dt
plan = dt.plan(dt.open_checkpoint(sys.argv[1]))
n_units = sum(1 for _ in plan.units())
try:   # ru_maxrss survives exec: it may be the memory of the process that started this one
    with open("/proc/self/status") as f:
        peak = 1024 * int(f.read().split("VmHWM:")[1].split()[0])
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"tensors": len(plan.tensors), "bytes": plan.data_bytes, "units": n_units, "peak": peak,
                  "seconds": time.process_time() - begin, "buffers": plan.memory_bytes(8),
                  "numba": "numba" in sys.modules}))
"""


def measured(path):
    run = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


# At full size


def test_flash_to_the_byte_in_seconds_and_little_memory(flash_sparse):
    found = measured(flash_sparse)
    assert (found["tensors"], found["bytes"]) == (1328, 164_628_168_768)
    assert found["seconds"] < 30
    assert found["peak"] < 1 << 30
    assert found["buffers"] < 300 << 20
    assert not found["numba"]   # planning compiles nothing


def test_pro_to_the_byte_in_seconds_and_little_memory(tmp_path):
    found = measured(write_sparse(tmp_path / "pro", PRO))
    assert (found["tensors"], found["bytes"]) == (1894, 899_827_146_560)
    assert found["seconds"] < 60
    assert found["peak"] < 1 << 30


def test_flash_by_type(flash_plan):
    totals = flash_plan.bytes_by_format()
    assert list(totals) == ["Q4_K", "Q8_0", "F16", "I32", "F32"]
    assert sum(totals.values()) <= flash_plan.data_bytes
    assert totals["Q4_K"] == 43 * 3 * 256 * 2048 * 4096 // 256 * 144
    assert totals["I32"] == 3 * 129_280 * 6 * 4


# Layout


@pytest.fixture
def checkpoint(make_checkpoint):
    return open_checkpoint(make_checkpoint())


@pytest.mark.parametrize("policy", ["q4k", "q8", "bf16", "f32"])
def test_tensors_stand_one_behind_the_other_padded(tiny_6e, data, policy):
    plan = make_plan(open_checkpoint(tiny_6e), policy=policy)
    expected = json.loads((data / "tiny-6e.tensors.json").read_text("utf-8"))[policy]
    assert {t.name: t.n_bytes for t in plan.tensors} == {name: t["nbytes"] for name, t in expected.items()}
    end = 0
    for t in plan.tensors:
        assert t.offset == end
        end += -(-t.n_bytes // 32) * 32
    assert (plan.data_bytes, plan.total_bytes) == (end, end + plan.data_offset)
    assert plan.data_offset == len(plan.header)
    assert plan.data_offset % 32 == 0


def test_the_header_is_what_the_strict_reader_reads(checkpoint, tmp_path):
    plan = make_plan(checkpoint)
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.total_bytes)
    with open_gguf(path) as file:
        assert list(file.kvs) == [kv.key for kv in plan.kvs]
        assert list(file.tensors) == [t.name for t in plan.tensors]
        assert file.data_offset == plan.data_offset


def test_the_same_call_gives_the_same_header(tiny_6e):
    assert make_plan(open_checkpoint(tiny_6e)).header == make_plan(open_checkpoint(tiny_6e)).header


def test_source_bytes_are_all_that_is_read(tiny_6e):
    checkpoint = open_checkpoint(tiny_6e)
    draft = sum(t.n_bytes for name, t in checkpoint.tensors.items() if name.startswith("mtp."))
    headers = sum(shard.n_file_bytes - sum(t.n_bytes for t in shard.tensors.values())
                  for shard in checkpoint.shards.values())
    assert make_plan(checkpoint).source_bytes == checkpoint.n_source_bytes - headers - draft


# Units


def assert_units_tile(planned):
    units = list(tensor_units(planned))
    start, sources = 0, iter(planned.tensor.sources)
    matrix, next_row = None, 0
    for unit in units:
        if matrix is None or next_row == matrix.n_rows:
            matrix, next_row = next(sources), 0
        assert unit.matrix is matrix
        assert (unit.first_row, unit.start) == (next_row, start)
        assert unit.n_rows * matrix.n_cols <= MAX_UNIT_VALUES or unit.n_rows == 1
        assert unit.n_bytes == unit.n_rows * planned.format.row_bytes(matrix.n_cols)
        next_row += unit.n_rows
        start += unit.n_bytes
    assert start == planned.n_bytes
    assert next_row == matrix.n_rows
    assert next(sources, None) is None


def test_units_tile_every_tensor(tiny_6e, flash_plan):
    for plan in (make_plan(open_checkpoint(tiny_6e)), flash_plan):
        for planned in plan.tensors:
            assert_units_tile(planned)
        assert len({plan.position(u) for u in plan.units()}) == sum(1 for _ in plan.units())


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3), st.integers(1, 70_000), st.integers(1, 20_000_000), st.integers(1, 1 << 31))
def test_units_of_any_shape_and_block_tile_and_keep_to_their_bound(n_sources, n_rows, n_cols, block_rows):
    n_rows = max(1, min(n_rows, 50_000_000 // n_cols))
    weight = SourceTensor("w", "F8_E4M3", (n_rows, n_cols), None, 0, n_rows * n_cols)
    matrix = Matrix(weight, None, SourceKind.FP8, n_rows, n_cols, (block_rows, 128))
    sources = tuple(Matrix(weight, None, matrix.kind, n_rows, n_cols, matrix.block) for _ in range(n_sources))
    tensor = TemplateTensor("t", (n_cols, n_rows, n_sources), sources, None)
    assert_units_tile(PlannedTensor(tensor, FORMATS["F16"], "rule", 0, 2 * prod(tensor.ne)))


def test_units_begin_at_blocks_of_scales(flash_plan):
    assert all(u.first_row % u.matrix.block[0] == 0 for u in flash_plan.units())


def test_memory_is_by_threads_and_not_by_tensors(flash_plan, tiny_6e):
    assert flash_plan.memory_bytes(8) == (8 + EXTRA_THREADS) * flash_plan.memory_bytes(1) // (1 + EXTRA_THREADS)
    assert flash_plan.memory_bytes(1) // (1 + EXTRA_THREADS) <= 4 * MAX_UNIT_VALUES + 4 * MAX_UNIT_VALUES
    assert make_plan(open_checkpoint(tiny_6e)).memory_bytes(1) < 10 << 20


# Metadata


def values(plan):
    return {kv.key: kv.value for kv in plan.kvs}


def test_a_plan_says_what_made_it(checkpoint):
    found = values(make_plan(checkpoint))
    assert found["general.file_type"] == 14
    assert found["general.quantization_version"] == 2
    assert found["general.quantized_by"] == f"dsv4tools {__version__}"
    assert found["dsv4tools.policy"] == "q4k"
    assert found["dsv4tools.policy_sha256"] == load_policy("q4k").sha256
    assert "dsv4tools.nan" not in found
    assert "dsv4tools.template" not in found


def test_general_entries_come_first_then_the_models_then_the_tokenizers(checkpoint):
    rooms = [kv.key.split(".")[0] for kv in make_plan(checkpoint).kvs]
    ends = [rooms.index(room) for room in ("deepseek4", "tokenizer")]
    assert rooms[0] == "general"
    assert set(rooms[: ends[0]]) == {"general", "dsv4tools"}
    assert set(rooms[ends[0] : ends[1]]) == {"deepseek4"}
    assert set(rooms[ends[1] :]) == {"tokenizer"}


@pytest.mark.parametrize(("arguments", "file_type"), [
    ({"policy": "q8"}, 7), ({"policy": "bf16"}, 32), ({"policy": "f32"}, 0),
    ({"families": {"experts": "q8_0"}}, 7),            # flags: the type with most bytes
    ({"families": {"experts": "bf16", "dense": "f16"}}, 32),
    ({"families": {"output": "f16"}}, 14),
    ({"tensor_types": ["output.weight=bf16"]}, 14),
])
def test_file_types(tiny_6e, arguments, file_type):
    assert values(make_plan(open_checkpoint(tiny_6e), **arguments))["general.file_type"] == file_type


def test_flags_are_written_down(checkpoint):
    plan = make_plan(checkpoint, families={"output": "f16"})
    assert values(plan)["dsv4tools.policy"] == "q4k with flags"
    assert values(plan)["dsv4tools.policy_sha256"] == plan.policy.sha256 != load_policy("q4k").sha256
    assert {t.name: t.rule for t in plan.tensors}["output.weight"] == "--output"


def test_nan(checkpoint):
    assert values(make_plan(checkpoint, nan="zero"))["dsv4tools.nan"] == "zero"
    for bad in ("ignore", "", None, "Zero"):
        with pytest.raises(UsageError, match="--nan"):
            make_plan(checkpoint, nan=bad)


def test_errors_of_the_parts_come_through(checkpoint):
    with pytest.raises(UsageError, match="--policy"):
        make_plan(checkpoint, policy="nothing")
    with pytest.raises(UsageError, match="--experts"):
        make_plan(checkpoint, families={"experts": "q9"})
    with pytest.raises(InputError, match="no such file"):
        make_plan(checkpoint, template_file="nowhere.gguf")
    with pytest.raises(InputError, match="not a whole number of Q4_K blocks"):
        make_plan(checkpoint, tensor_types=["blk.*.hc_*_fn.weight=f16", "blk.1.attn_compressor_ape.weight=q4_k",
                                            "blk.2.attn_compressor_ape.weight=q4_k"])


def test_a_model_too_narrow_for_the_default_policy(make_checkpoint):
    with pytest.raises(InputError) as caught:
        make_plan(open_checkpoint(make_checkpoint(expert_hidden=96)))
    for part in ("q4k rule 1", "blk.0.ffn_down_exps.weight", "96 columns", "Q4_K"):
        assert part in str(caught.value)


def test_rules_of_a_plan(tiny_6e):
    rules = {t.name: t.rule for t in make_plan(open_checkpoint(tiny_6e)).tensors}
    assert rules["blk.0.ffn_up_exps.weight"] == "q4k rule 1: blk.*.ffn_*_exps.weight"
    assert rules["blk.2.indexer.attn_q_b.weight"] == "q4k rule 2: blk.*.indexer.*"
    assert rules["output_norm.weight"] == "vector"
    assert rules["blk.0.ffn_gate_tid2eid.weight"] == "routing table"


def test_planning_reads_headers_only(make_checkpoint):
    path = make_checkpoint()
    before = make_plan(open_checkpoint(path))
    for shard in path.glob("*.safetensors"):
        raw = bytearray(shard.read_bytes())
        n_header = 8 + int.from_bytes(raw[:8], "little")
        raw[n_header:] = np.random.default_rng(0).bytes(len(raw) - n_header)
        shard.write_bytes(raw)
    assert make_plan(open_checkpoint(path)).header == before.header
