"""The view with fewer experts per token: one number, narrower tables, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from tamper import read_tensor

from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.checkpoint.matrix import RowReader
from dsv4tools.derive import UnitDeriver
from dsv4tools.errors import UsageError
from dsv4tools.plan import make_plan, tensor_units
from dsv4tools.reroute import reroute

TABLE = "layers.0.ffn.gate.tid2eid"


@pytest.fixture
def six(tiny_6e):
    return open_checkpoint(tiny_6e)


def test_config_and_shapes(six):
    view = reroute(six, 4)
    assert view.config.num_experts_per_tok == 4
    assert view.stored_experts_per_token == six.stored_experts_per_token == six.config.num_experts_per_tok == 6
    tables = [f"layers.{n}.ffn.gate.tid2eid" for n in range(3)]
    assert {n for n in view.tensors if view.tensors[n] != six.tensors[n]} == set(tables)
    for name in tables:
        assert (view.tensors[name].shape, view.tensors[name].stored_columns) == ((512, 4), 6)
        assert six.tensors[name].shape == (512, 6)
    assert {f for f in six.config.__slots__ if getattr(view.config, f) != getattr(six.config, f)} == {
        "num_experts_per_tok"}
    assert (view.directory, view.shards) == (six.directory, six.shards)


def test_a_plan_of_the_view(six):
    view, plain = make_plan(reroute(six, 4)), make_plan(six)
    ne, before = ({t.name: t.tensor.ne for t in plan.tensors} for plan in (view, plain))
    changed = {name: ne[name] for name in ne if ne[name] != before[name]}
    assert changed == {f"blk.{n}.ffn_gate_tid2eid.weight": (4, 512) for n in range(3)}
    changed = {kv.key for kv, other in zip(view.kvs, plain.kvs, strict=True) if kv != other}
    assert changed == {"deepseek4.expert_used_count"}
    assert {kv.key: kv.value for kv in view.kvs}["deepseek4.expert_used_count"] == 4


@pytest.mark.parametrize("n", [1, 4, 5])
def test_the_bytes_of_a_table_are_its_first_columns(six, tiny_6e, n):
    stored = np.frombuffer(read_tensor(tiny_6e, TABLE), "<i8").reshape(512, 6)
    planned = next(t for t in make_plan(reroute(six, n)).tensors if t.name == "blk.0.ffn_gate_tid2eid.weight")
    deriver = UnitDeriver(12)
    units = list(tensor_units(planned))
    raw = b"".join(deriver.encode(u, deriver.read(u))[0].tobytes() for u in units)
    assert raw == stored[:, :n].astype("<i4").tobytes()
    assert len(raw) == planned.n_bytes


def test_a_view_of_a_view(six, tiny_6e):
    stored = np.frombuffer(read_tensor(tiny_6e, TABLE), "<i8").reshape(512, 6)
    view = reroute(reroute(six, 5), 2)
    assert (view.tensors[TABLE].shape, view.tensors[TABLE].stored_columns) == ((512, 2), 6)
    matrix = next(t for t in make_plan(view).tensors if t.name == "blk.0.ffn_gate_tid2eid.weight").tensor.sources[0]
    assert np.array_equal(RowReader().read_ids(matrix, 500, 12, 12), stored[500:, :2])
    with pytest.raises(UsageError, match="choose 1 to 2"):   # the columns are gone from sight
        reroute(view, 3)


def test_as_many_as_there_are_is_the_checkpoint_itself(six):
    assert reroute(six, 6) is six
    view = reroute(six, 4)
    assert reroute(view, 4) is view


@pytest.mark.parametrize("n", [7, 12, 1000, 0, -1])
def test_more_than_there_are_or_none_at_all(six, n):
    with pytest.raises(UsageError, match=rf"--experts-per-token: is {n}, .* routes each token to 6") as caught:
        reroute(six, n)
    assert caught.value.exit_code == 2


def test_without_tables_only_the_number_changes(make_checkpoint):
    checkpoint = open_checkpoint(make_checkpoint(hash_layers=0))
    view = reroute(checkpoint, 1)
    assert view.config.num_experts_per_tok == 1
    assert view.tensors == checkpoint.tensors


def test_vocabulary_and_card_are_the_checkpoints(six):
    view = reroute(six, 4)
    assert view.vocabulary == six.vocabulary
    assert view.card == six.card
    assert view.n_source_bytes == six.n_source_bytes
