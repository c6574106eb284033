"""How a matrix is stored is decided by its dtype; shapes and scales are compared; rows are read with their scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tamper import read_tensor, replace_tensor, write_tensor

from dsv4tools.checkpoint import SourceTensor, open_checkpoint
from dsv4tools.checkpoint.matrix import RowReader, bind_matrix
from dsv4tools.checkpoint.shard import Shard
from dsv4tools.errors import InputError, ResourceError, VerifyError
from dsv4tools.formats.source import SourceKind
from dsv4tools.reroute import reroute

SHARD = Shard(Path("x.safetensors"), 0, "", 0, 0, {}, {})


def tensors(**described):
    """SourceTensors from name=(dtype, *shape), a double underscore standing for a dot."""
    made = {}
    for name, (dtype, *shape) in described.items():
        name = name.replace("__", ".")  # noqa: PLW2901  - keywords cannot hold dots
        made[name] = SourceTensor(name, dtype, tuple(shape), SHARD, 0, 0)
    return made


# Binding


@pytest.mark.parametrize(
    ("dtype", "kind"), [("F32", SourceKind.F32), ("F16", SourceKind.F16), ("BF16", SourceKind.BF16)])
@pytest.mark.parametrize("shape", [(256, 96), (7,), (1,), (3, 5)])
def test_plain_dtypes_take_any_shape_and_no_scale(dtype, kind, shape):
    matrix = bind_matrix(tensors(a__weight=(dtype, *shape)), "a.weight", shape, (128, 128))
    assert (matrix.kind, matrix.n_cols, matrix.scale) == (kind, shape[-1], None)
    assert matrix.n_rows == (shape[0] if len(shape) > 1 else 1)


@pytest.mark.parametrize(("shape", "block", "scales"), [
    ((256, 256), (128, 128), (2, 2)),
    ((200, 130), (128, 128), (2, 2)),   # edge tiles: published matrices end in the middle of a block
    ((1, 1), (128, 128), (1, 1)),
    ((129, 128), (128, 128), (2, 1)),
    ((64, 96), (32, 32), (2, 3)),
    ((5, 100), (1, 128), (5, 1)),
])
def test_fp8_scales_cover_blocks_of_the_size_that_config_json_says(shape, block, scales):
    found = tensors(a__weight=("F8_E4M3", *shape), a__scale=("F8_E8M0", *scales))
    matrix = bind_matrix(found, "a.weight", shape, block)
    assert (matrix.kind, matrix.block, matrix.scale.name) == (SourceKind.FP8, block, "a.scale")
    for wrong in ((scales[0] + 1, scales[1]), (scales[0], scales[1] + 1), (scales[0],), (*scales, 1), ()):
        wrong_scale = tensors(a__scale=("F8_E8M0", *wrong))
        with pytest.raises(InputError, match="expected F8_E8M0"):
            bind_matrix(found | wrong_scale, "a.weight", shape, block)


@pytest.mark.parametrize("dtype", ["I8", "U8", "F4"])
def test_packed_fp4_has_a_scale_for_32_columns(dtype):
    stored = (3, 64) if dtype == "F4" else (3, 32)
    found = tensors(a__weight=(dtype, *stored), a__scale=("F8_E8M0", 3, 2))
    matrix = bind_matrix(found, "a.weight", (3, 64), None)
    assert (matrix.kind, matrix.n_rows, matrix.n_cols, matrix.block) == (SourceKind.FP4, 3, 64, (1, 32))
    with pytest.raises(InputError, match=r"'a\.scale': is F8_E8M0 \[3, 1\], expected F8_E8M0 \[3, 2\]"):
        bind_matrix(found | tensors(a__scale=("F8_E8M0", 3, 1)), "a.weight", (3, 64), None)
    with pytest.raises(InputError, match="expected a multiple of 32"):
        bind_matrix(found, "a.weight", (3, 48), None)


def test_scales_may_be_declared_as_plain_bytes_and_as_nothing_else():
    found = tensors(a__weight=("I8", 3, 32), a__scale=("U8", 3, 2))
    assert bind_matrix(found, "a.weight", (3, 64), None).scale.dtype == "U8"
    for dtype in ("F32", "BF16", "I8", "F8_E4M3"):
        with pytest.raises(InputError, match=f"is {dtype} "):
            bind_matrix(found | tensors(a__scale=(dtype, 3, 2)), "a.weight", (3, 64), None)


@pytest.mark.parametrize("dtype", ["I8", "F4", "U8", "F8_E4M3"])
def test_a_missing_scale(dtype):
    with pytest.raises(InputError, match=r"its scale 'a\.scale' is missing"):
        bind_matrix(tensors(a__weight=(dtype, 3, 32 if dtype in ("I8", "U8") else 64)), "a.weight", (3, 64), (128, 128))


@pytest.mark.parametrize(("dtype", "stored"), [("F8_E4M3", 64), ("I8", 32), ("F4", 64), ("U8", 32)])
def test_a_quantized_vector_is_refused(dtype, stored):
    found = tensors(a__weight=(dtype, stored), a__scale=("F8_E8M0", 2))
    with pytest.raises(InputError, match=r"'a\.weight'.*vector"):
        bind_matrix(found, "a.weight", (64,), (128, 128))


@pytest.mark.parametrize(("dtype", "stored"), [("BF16", (4, 64)), ("F32", (64, 3)), ("F16", (3,)), ("F8_E4M3", (3, 65)),
                                               ("I8", (3, 64)), ("I8", (3, 16)), ("F4", (3, 32)), ("I64", (3, 6))])
def test_another_shape_than_config_json_implies(dtype, stored):
    found = tensors(a__weight=(dtype, *stored), a__scale=("F8_E8M0", 1, 1))
    with pytest.raises(InputError, match=r"config\.json implies") as caught:
        bind_matrix(found, "a.weight", (3, 64), (128, 128))
    assert str(list(stored)) in str(caught.value)


@pytest.mark.parametrize("dtype", ["F64", "BOOL", "U16", "I16", "F8_E5M2", "F8_E8M0", "C64", "F6_E2M3"])
def test_a_dtype_that_no_weight_has(dtype):
    with pytest.raises(InputError, match=f"has dtype {dtype}"):
        bind_matrix(tensors(a__weight=(dtype, 3, 64)), "a.weight", (3, 64), (128, 128))


def test_fp8_without_a_declared_block_size():
    with pytest.raises(InputError, match="weight_block_size"):
        bind_matrix(tensors(a__weight=("F8_E4M3", 3, 64)), "a.weight", (3, 64), None)


def test_a_missing_weight_is_left_to_the_caller():
    with pytest.raises(KeyError):
        bind_matrix({}, "a.weight", (3, 64), None)


# Reading


@pytest.fixture(scope="module")
def edges(tmp_path_factory, _written):
    """A checkpoint whose FP8 matrices end in the middle of blocks."""
    from dataclasses import replace  # noqa: PLC0415

    from conftest import SMALL  # noqa: PLC0415

    shape = replace(SMALL, hidden=160, q_lora=96, head_dim=72, expert_hidden=96)
    return _written(shape=shape, seed=3, shards=2, merges_form="strings")


MATRICES = {
    "layers.0.attn.wq_b.weight": (576, 96),                    # FP8, rows cut a block
    "layers.0.attn.wo_b.weight": (160, 512),                   # FP8
    "layers.0.ffn.experts.1.w1.weight": (96, 160),             # FP4
    "embed.weight": (512, 160),                                # BF16
    "layers.0.hc_attn_fn": (24, 640),                          # F32
}


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_run_of_rows_is_read_with_the_scales_of_its_blocks(edges, draw):
    checkpoint = open_checkpoint(edges)
    reader = RowReader()
    for _ in range(3):   # the buffers are used again, by larger and smaller runs
        name = draw.draw(st.sampled_from(sorted(MATRICES)))
        shape = MATRICES[name]
        matrix = bind_matrix(checkpoint.tensors, name, shape, checkpoint.config.weight_block_size)
        first = draw.draw(st.integers(0, shape[0] - 1))
        n_rows = draw.draw(st.integers(1, shape[0] - first))
        rows = reader.read_rows(matrix, first, n_rows)
        whole = np.frombuffer(read_tensor(edges, name), np.uint8).reshape(shape[0], -1)
        assert np.array_equal(rows.data.reshape(n_rows, -1), whole[first : first + n_rows])
        assert (rows.n_rows, rows.n_cols, rows.kind) == (n_rows, shape[1], matrix.kind)
        if matrix.scale is None:
            assert rows.scales is None
            continue
        scales = np.frombuffer(read_tensor(edges, matrix.scale.name), np.uint8).reshape(matrix.scale.shape)
        for row in {0, n_rows // 2, n_rows - 1}:   # the documented rule: which scale row belongs to row r of the run
            mine = rows.scales[(rows.first_row + row) // rows.scale_rows]
            assert np.array_equal(mine, scales[(first + row) // matrix.block[0]])
        assert rows.scale_cols == matrix.block[1]


def test_integers_are_no_weights_and_weights_no_integers(make_checkpoint):
    checkpoint = open_checkpoint(make_checkpoint())
    table = bind_matrix(checkpoint.tensors, "layers.0.ffn.gate.tid2eid", (512, 2), None)
    gate = bind_matrix(checkpoint.tensors, "layers.0.ffn.gate.weight", (4, 256), None)
    with pytest.raises(InputError, match="has integers"):
        RowReader().read_rows(table, 0, 1)
    with pytest.raises(InputError, match="expected integers"):
        RowReader().read_ids(gate, 0, 1, 4)


@pytest.mark.parametrize("dtype", ["I64", "I32"])
def test_routing_tables(make_checkpoint, dtype):
    path = make_checkpoint()
    name = "layers.0.ffn.gate.tid2eid"
    ids = np.frombuffer(read_tensor(path, name), "<i8").reshape(512, 2)
    if dtype == "I32":
        replace_tensor(path, name, "I32", [512, 2], ids.astype("<i4").tobytes())
    checkpoint = open_checkpoint(path)
    matrix = bind_matrix(checkpoint.tensors, name, (512, 2), None)
    found = RowReader().read_ids(matrix, 100, 300, 4)
    assert found.dtype == np.dtype("<i4")
    assert np.array_equal(found, ids[100:400])
    view = reroute(checkpoint, 1)
    narrow = bind_matrix(view.tensors, name, (512, 1), None)
    assert np.array_equal(RowReader().read_ids(narrow, 100, 300, 4), ids[100:400, :1])


@pytest.mark.parametrize("bad", [4, -1, 1 << 32, -(1 << 63)])
def test_an_expert_that_does_not_exist(make_checkpoint, bad):
    path = make_checkpoint()
    name = "layers.0.ffn.gate.tid2eid"
    write_tensor(path, name, int(bad).to_bytes(8, "little", signed=True), at=8 * (2 * 7 + 1))
    checkpoint = open_checkpoint(path)
    matrix = bind_matrix(checkpoint.tensors, name, (512, 2), None)
    with pytest.raises(InputError, match=rf"tid2eid': row 7 column 1 routes to expert {bad}, expected 0 to 3"):
        RowReader().read_ids(matrix, 5, 20, 4)
    RowReader().read_ids(matrix, 8, 20, 4)
    narrow = bind_matrix(reroute(checkpoint, 1).tensors, name, (512, 1), None)
    RowReader().read_ids(narrow, 0, 512, 4)   # the column that a view does not show is nobody's fault


def test_a_shard_replaced_or_truncated_between_plan_and_read(make_checkpoint):
    path = make_checkpoint()
    checkpoint = open_checkpoint(path)
    matrix = bind_matrix(checkpoint.tensors, "embed.weight", (512, 256), None)
    shard = matrix.weight.shard.path
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(VerifyError, match="source changed") as caught:
        RowReader().read_rows(matrix, 0, 1)
    assert caught.value.exit_code == 5
    shard.unlink()
    with pytest.raises(ResourceError, match="cannot be opened") as caught:
        RowReader().read_rows(matrix, 0, 1)
    assert caught.value.exit_code == 4
