"""Conversions with an importance matrix: bytes against the C quantizer's, and which vector weighs which rows."""

from __future__ import annotations

import hashlib
import json
import struct
import sys

import numpy as np
import pytest
from conftest import SMALL
from gguf import GGUFReader
from imatrix_bytes import dat, read_dat, write_gguf
from independent import Weights, payload
from tamper import write_tensor

import dsv4tools as dt
from dsv4tools import spot_check
from dsv4tools.errors import InputError, UsageError
from dsv4tools.imatrix import open_imatrix
from dsv4tools.options import RunOptions
from dsv4tools.workers import StopRequest

GATE = "blk.0.ffn_gate_exps.weight"


def hashes(path) -> dict[str, str]:
    return {t.name: hashlib.sha256(payload(t)).hexdigest() for t in GGUFReader(path).tensors}


def metadata(path):
    """Key -> (type, value) of what concerns the importance matrix, by gguf-py."""
    fields = GGUFReader(path).fields
    return {key: (f.types[-1].name, f.contents()) for key, f in fields.items() if "imatrix" in key}


@pytest.fixture(scope="module")
def goldens(tiny_6e, tmp_path_factory, data):
    """The checkpoint converted as the C quantizer was told to for its hashes, by the recipe's name."""
    directory, checkpoint = tmp_path_factory.mktemp("golden"), dt.open_checkpoint(tiny_6e)
    plans = {f"{policy}{ending}": dt.plan(checkpoint, policy=policy, imatrix=data / given if given else None)
             for policy in ("q2", "q4k") for ending, given in (("", None), ("-imatrix", "tiny-6e.imatrix.dat"))}
    del plans["q4k"]   # is tested without matrices
    return {name: dt.convert(plan, directory / f"{name}.gguf", threads=2).path for name, plan in plans.items()}


@pytest.fixture
def golden(goldens):
    return goldens["q4k-imatrix"]


@pytest.fixture(scope="module")
def entries(data):
    """Name -> values, each a float32 mean times 3 calls."""
    return {name: values for name, _, values in read_dat((data / "tiny-6e.imatrix.dat").read_bytes())[0]}


@pytest.fixture(scope="module")
def source(_written):
    return _written(shape=SMALL, seed=0, shards=2, merges_form="strings")


@pytest.fixture(scope="module")
def weights(source):
    return Weights(source)


@pytest.mark.parametrize("recipe", ["q2", "q2-imatrix", "q4k-imatrix"])
def test_every_tensor_is_what_the_c_quantizer_writes(recipe, goldens, data):
    expected = json.loads((data / "tiny-6e.tensors.json").read_text())[recipe]
    assert hashes(goldens[recipe]) == {name: t["sha256"] for name, t in expected.items()}


class TestForms:
    """The same numbers in other forms give the same bytes."""

    @pytest.mark.parametrize("form", ["gguf", "names of experts", "names of the source"])
    def test_bytes_are_the_same(self, form, tiny_6e, golden, entries, tmp_path):
        path = tmp_path / "a.dat"
        if form == "gguf":
            write_gguf(path, {name: (v.reshape(12, -1), [3] * 12) for name, v in entries.items()})
        elif form == "names of experts":
            path.write_bytes(dat([(f"{name}.expert{'._'[e % 2]}{e}", 3, part) for name, values in entries.items()
                                  for e, part in enumerate(values.reshape(12, -1))]))
        else:
            theirs = {"gate": "w1", "down": "w2", "up": "w3"}
            path.write_bytes(dat([(f"layers.{name[4]}.ffn.experts.{e}.{theirs[name.split('_')[1]]}.weight", 3, part)
                                  for name, v in entries.items() for e, part in enumerate(v.reshape(12, -1))]))
        plan = dt.plan(dt.open_checkpoint(tiny_6e), imatrix=path)
        assert len(plan.coverage.covered) == 15
        assert not plan.coverage.without_data
        dt.convert(plan, tmp_path / "out.gguf", threads=1)
        assert hashes(tmp_path / "out.gguf") == hashes(golden)

    def test_a_single_vector_is_for_all_experts(self, source, weights, tmp_path):
        vector = np.random.default_rng(1).uniform(0.1, 2, 256).astype(np.float32)
        (tmp_path / "a.dat").write_bytes(dat([(GATE, 1, vector)]))
        dt.convert(dt.plan(dt.open_checkpoint(source), imatrix=tmp_path / "a.dat"), tmp_path / "out.gguf")
        found = {t.name: payload(t) for t in GGUFReader(tmp_path / "out.gguf").tensors}
        assert found[GATE] == dt.quantize(weights.gguf(GATE), "Q4_K", vector).tobytes()
        other = "blk.0.ffn_up_exps.weight"
        assert found[other] == dt.quantize(weights.gguf(other), "Q4_K").tobytes()

    @pytest.mark.parametrize("per_group", [True, False])
    def test_both_sizes_of_attn_output_a(self, per_group, source, weights, tmp_path):
        """llama-imatrix writes a vector for each group of rows, llama-quantize and others take one for all."""
        name, n_groups = "blk.1.attn_output_a.weight", SMALL.o_groups
        values = weights.gguf(name)
        vectors = np.random.default_rng(2).uniform(0.1, 2, (n_groups, values.shape[1])).astype(np.float32)
        vectors = vectors if per_group else vectors[:1]
        write_gguf(tmp_path / "a.gguf", {name: (vectors.reshape(1, -1) * 2, [2])})
        plan = dt.plan(dt.open_checkpoint(source), tensor_types=[f"{name}=q4_k"], imatrix=tmp_path / "a.gguf")
        dt.convert(plan, tmp_path / "out.gguf")
        found = next(payload(t) for t in GGUFReader(tmp_path / "out.gguf").tensors if t.name == name)
        parts = zip(np.split(values, len(vectors)), vectors, strict=True)
        assert found == b"".join(dt.quantize(rows, "Q4_K", vector).tobytes() for rows, vector in parts)

    def test_units_may_cross_groups_and_end_in_them(self, source, weights, tmp_path, monkeypatch):
        name = "blk.1.attn_output_a.weight"
        values = weights.gguf(name)
        vectors = np.random.default_rng(2).uniform(0.1, 2, (4, values.shape[1])).astype(np.float32)
        write_gguf(tmp_path / "a.gguf", {name: (vectors, [1, 1, 1, 1])})
        plan = dt.plan(dt.open_checkpoint(source), tensor_types=[f"{name}=q4_k"], imatrix=tmp_path / "a.gguf")
        expected = b"".join(dt.quantize(rows, "Q4_K", vector).tobytes()
                            for rows, vector in zip(np.split(values, 4), vectors, strict=True))
        for n in (100 * values.shape[1], 384 * values.shape[1]):
            monkeypatch.setattr(sys.modules["dsv4tools.plan"], "MAX_UNIT_VALUES", n)
            dt.convert(plan, tmp_path / "out.gguf", overwrite=True)
            assert next(payload(t) for t in GGUFReader(tmp_path / "out.gguf").tensors if t.name == name) == expected

    def test_an_expert_without_data_weighs_all_columns_the_same(self, source, weights, tmp_path):
        sums = np.random.default_rng(1).uniform(0.1, 2, (4, 256)).astype(np.float32)
        write_gguf(tmp_path / "a.gguf", {GATE: (sums, [1, 1, 0, 1])})
        plan = dt.plan(dt.open_checkpoint(source), imatrix=tmp_path / "a.gguf")
        assert plan.coverage.without_data == {GATE: (2,)}
        dt.convert(plan, tmp_path / "out.gguf")
        found = next(payload(t) for t in GGUFReader(tmp_path / "out.gguf").tensors if t.name == GATE)
        sums[2] = 1
        assert found == b"".join(dt.quantize(rows, "Q4_K", vector).tobytes()
                                 for rows, vector in zip(weights.gguf(GATE), sums, strict=True))


def energy(rows):
    """The squares of each column, added up in float32, row after row."""
    total = np.zeros(rows.shape[1], np.float32)
    for row in rows:
        total += row * row
    return total


class TestColumnEnergy:
    """What stands in for importance where a type cannot do without."""

    def test_it_is_that_of_the_whole_expert(self, source, weights, tmp_path, monkeypatch):
        """Units are parts of experts, and the plan says what is done."""
        monkeypatch.setattr(sys.modules["dsv4tools.plan"], "MAX_UNIT_VALUES", 100 * 256)
        monkeypatch.setattr(sys.modules["dsv4tools.derive"], "ENERGY_VALUES", 70 * 256)
        vector = np.random.default_rng(1).uniform(0.1, 2, 256).astype(np.float32)
        (tmp_path / "a.dat").write_bytes(dat([(f"{GATE}.expert.1", 1, vector)]))
        plan = dt.plan(dt.open_checkpoint(source), policy="q2", imatrix=tmp_path / "a.dat")
        (note,) = plan.notes
        assert note.startswith("6 tensors have a type that needs importance (IQ2_XXS) and none, or not for all")
        dt.convert(plan, tmp_path / "out.gguf", threads=2)
        found = {t.name: payload(t) for t in GGUFReader(tmp_path / "out.gguf").tensors}
        for name, own in ((GATE, {1: vector}), ("blk.2.ffn_up_exps.weight", {})):
            assert found[name] == b"".join(
                dt.quantize(rows, "IQ2_XXS", own[e] if e in own else energy(rows)).tobytes()
                for e, rows in enumerate(weights.gguf(name)))
        report = dt.verify(tmp_path / "out.gguf", source=source, imatrix=tmp_path / "a.dat", sample=30)
        assert {t.judgement for t in report.tensors} == {"identical"}

    def test_of_a_matrix_it_is_that_of_all_rows(self, source, weights, tmp_path):
        name = "blk.1.attn_output_a.weight"
        plan = dt.plan(dt.open_checkpoint(source), tensor_types=[f"{name}=iq2_xxs"])
        dt.convert(plan, tmp_path / "out.gguf", engines=["none"])
        found = next(payload(t) for t in GGUFReader(tmp_path / "out.gguf").tensors if t.name == name)
        rows = weights.gguf(name)
        assert found == dt.quantize(rows, "IQ2_XXS", energy(rows)).tobytes()

    def test_from_a_gguf_it_is_the_same(self, source, tmp_path):
        """A source of blocks: MXFP4 has exactly the checkpoint's values."""
        checkpoint = dt.open_checkpoint(source)
        dt.convert(dt.plan(checkpoint, policy="mxfp4"), tmp_path / "mxfp4.gguf")
        dt.convert(dt.plan(checkpoint, policy="q2"), tmp_path / "q2.gguf")
        dt.convert(dt.plan(dt.open_source(tmp_path / "mxfp4.gguf"), policy="q2"), tmp_path / "again.gguf")
        assert hashes(tmp_path / "again.gguf") == hashes(tmp_path / "q2.gguf")

    def test_values_that_are_not_finite(self, make_checkpoint, tmp_path):
        path = make_checkpoint()
        name = "layers.1.ffn.experts.2.w1"
        write_tensor(path, f"{name}.scale", b"\xff", at=5)
        with pytest.raises(InputError, match=r"experts\.2\.w1\.scale.* NaN scale byte"):
            dt.convert(dt.plan(dt.open_checkpoint(path), policy="q2"), tmp_path / "out.gguf")
        done = dt.convert(dt.plan(dt.open_checkpoint(path), policy="q2", nan="zero"), tmp_path / "zero.gguf")
        assert done.zeroed == {"blk.1.ffn_gate_exps.weight": 32}
        values = Weights(path).source(f"{name}.weight")
        values[np.isnan(values)] = 0
        found = next(payload(t) for t in GGUFReader(done.path).tensors if t.name == "blk.1.ffn_gate_exps.weight")
        n = len(found) // 4
        assert found[2 * n : 3 * n] == dt.quantize(values, "IQ2_XXS", energy(values)).tobytes()


class TestCoverage:
    def test_all(self, tiny_6e, data):
        plan = dt.plan(dt.open_checkpoint(tiny_6e), imatrix=data / "tiny-6e.imatrix.dat", imatrix_strict=True)
        coverage = plan.coverage
        assert (coverage.n_tensors, len(coverage.covered)) == (15, 15)
        assert (coverage.missing, coverage.unknown, coverage.n_unused, coverage.without_data) == ((), (), 0, {})

    def test_gaps(self, source, tmp_path, dsv4tools):
        ones = np.ones(1024, np.float32)
        ones[:256] = 2
        path = tmp_path / "a.dat"
        path.write_bytes(dat([(GATE, 4, 4 * ones), ("blk.1.attn_kv.weight", 1, ones[:256]), ("blk.9.x", 1, [1]),
                              ("blk.1.ffn_up_exps.weight.expert.3", 1, ones[:256])], 5, "a.txt"))
        coverage = dt.plan(dt.open_checkpoint(source), imatrix=path).coverage
        assert coverage.covered == (GATE, "blk.1.ffn_up_exps.weight")
        assert coverage.without_data == {GATE: (1, 2, 3)}
        assert coverage.without_entry == {"blk.1.ffn_up_exps.weight": (0, 1, 2)}
        assert len(coverage.missing) == 7
        assert (coverage.n_unused, coverage.unknown) == (1, ("blk.9.x",))
        ended = dsv4tools("convert", source, tmp_path / "o.gguf", "--imatrix", path, "--dry-run")
        assert "importance     a.dat (5 chunks of a.txt), for 2 of the 9 tensors whose types use it" in ended.out
        assert f"no data of 3 experts, whose columns all weigh the same: {GATE} 1, 2, 3\n" in ended.out
        assert "no entry of 3 experts, which are encoded as without a matrix: blk.1.ffn_up_exps.weight 0," in ended.out
        assert "none for blk.0.ffn_up_exps.weight, " in ended.out
        assert "1 entries are of no tensor: blk.9.x" in ended.out
        ended = dsv4tools("convert", source, tmp_path / "o.gguf", "--imatrix", path, "--json")
        assert ended.data["imatrix"] == {
            "path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "form": "dat", "n_entries": 4,
            "n_chunks": 5, "chunk_size": 0, "datasets": ["a.txt"]}
        assert ended.data["imatrix_coverage"]["experts_without_data"] == {GATE: [1, 2, 3]}
        assert ended.data["imatrix_coverage"]["experts_without_entry"] == {"blk.1.ffn_up_exps.weight": [0, 1, 2]}
        message = dsv4tools("convert", source, tmp_path / "p.gguf", "--imatrix", path, "--imatrix-strict").failed(3)
        assert "has no entry for 7 of 9 tensors whose types use importance: blk.0.ffn_up_exps.weight, " in message
        assert "has no entry of some experts: blk.1.ffn_up_exps.weight 0, 1, 2; " in message
        assert f"has no data of some experts: {GATE} 1, 2, 3; " in message
        assert "leave --imatrix-strict out" in message

    def test_names_of_the_checkpoint_serve_a_gguf_too(self, source, weights, tmp_path):
        """ds4's quantizer asks for them as well, and files that use them know nothing of where they are used."""
        path, rng = tmp_path / "a.dat", np.random.default_rng(8)
        ones = rng.uniform(0.1, 4, (4, 256)).astype(np.float32)
        path.write_bytes(dat([(f"layers.0.ffn.experts.{i}.w1.weight", 1, ones[i]) for i in range(4)]))
        dt.convert(dt.plan(dt.open_checkpoint(source), policy="mxfp4"), tmp_path / "mxfp4.gguf")
        plan = dt.plan(dt.open_source(tmp_path / "mxfp4.gguf"), imatrix=path)
        assert (plan.coverage.covered, plan.coverage.unknown) == ((GATE,), ())
        dt.convert(plan, tmp_path / "out.gguf")
        found = next(payload(t) for t in GGUFReader(tmp_path / "out.gguf").tensors if t.name == GATE)
        expected = [dt.quantize(x, "Q4_K", ones[i]).tobytes() for i, x in enumerate(weights.gguf(GATE))]
        assert found == b"".join(expected)

    def test_a_type_without_use_for_it(self, source, tmp_path, data, dsv4tools):
        path = tmp_path / "a.dat"
        path.write_bytes(dat([(GATE, 1, np.ones(256))]))
        plain = dt.plan(dt.open_checkpoint(source), policy="q8")
        plan = dt.plan(dt.open_checkpoint(source), policy="q8", imatrix=path)
        assert (plan.header, plan.imatrix) == (plain.header, None)
        ended = dsv4tools("convert", source, tmp_path / "o.gguf", "--imatrix", path, "--policy", "q8")
        assert "importance: the importance matrix is of no use here: no tensor has a type that uses one" in ended.out


BAD = {
    "another model": ([("blk.9.ffn_up_exps.weight", 1, [1])], "has no entry of any tensor of this model, but blk.9"),
    "size": ([(GATE, 1, np.ones(255))], f"entry '{GATE}': has 255 values, tensor {GATE} needs 256 or 256 x 4 experts"),
    "groups": ([("blk.0.attn_output_a.weight", 1, np.ones(300))],
               "has 300 values, tensor blk.0.attn_output_a.weight needs 256 or 256 x 4 groups"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", BAD)
    def test_a_file_that_does_not_fit(self, case, source, tmp_path, dsv4tools):
        given, message = BAD[case]
        (tmp_path / "a.dat").write_bytes(dat(given))
        arguments = ("convert", source, tmp_path / "o.gguf", "--imatrix", tmp_path / "a.dat",
                     "--tensor-type", "blk.0.attn_output_a.weight=q4_k")
        assert message in dsv4tools(*arguments).failed(3)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.dat"]

    def test_usage(self, source, tmp_path, data, dsv4tools):
        given = tmp_path / "a.gguf"
        given.write_bytes((data / "tiny-6e.imatrix.dat").read_bytes())
        assert "--imatrix-strict: needs --imatrix" in \
            dsv4tools("convert", source, tmp_path / "o.gguf", "--imatrix-strict").failed(2)
        assert "no such file" in dsv4tools("convert", source, tmp_path / "o.gguf", "--imatrix", "nowhere").failed(3)
        sized = tmp_path / "b.gguf"
        sized.write_bytes(dat([(GATE, 1, np.ones(256))]))
        assert "is one of the inputs" in \
            dsv4tools("convert", source, sized, "--imatrix", sized, "--overwrite").failed(2)

    def test_another_matrix_does_not_continue(self, source, tmp_path, dsv4tools):
        for i in (1, 2):
            (tmp_path / f"{i}.dat").write_bytes(dat([(GATE, 1, np.full(256, i))]))
        out = tmp_path / "out.gguf"
        stop = StopRequest()
        run = RunOptions(threads=1, stop=stop, progress=lambda n: stop.request(2))
        with pytest.raises(dt.Dsv4Error, match="stopped"):
            dt.convert(dt.plan(dt.open_checkpoint(source), imatrix=tmp_path / "1.dat"), out, run=run)
        for options, said in ((("--imatrix", tmp_path / "2.dat"), "importance matrix is sha256 "), ((), "is none")):
            message = dsv4tools("convert", source, out, *options).failed(2)
            assert said in message
            assert "out.gguf.partial: belongs to another conversion" in message
        assert dsv4tools("convert", source, out, "--imatrix", tmp_path / "1.dat").code == 0

    def test_a_matrix_that_changes_on_the_way(self, source, tmp_path):
        path = tmp_path / "a.dat"
        path.write_bytes(dat([(GATE, 1, np.ones(256))]))
        plan = dt.plan(dt.open_checkpoint(source), imatrix=path)
        path.write_bytes(dat([(GATE, 1, np.full(256, 3))], 1))
        with pytest.raises(dt.VerifyError, match=r"a\.dat: was changed while it was in use"):
            dt.convert(plan, tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()


def test_provenance(golden, data):
    """llama-quantize's keys with its types, without a directory; and which file it was."""
    raw = (data / "tiny-6e.imatrix.dat").read_bytes()
    assert metadata(golden) == {
        "quantize.imatrix.file": ("STRING", "tiny-6e.imatrix.dat"),
        "quantize.imatrix.dataset": ("STRING", "calibration.txt"),
        "quantize.imatrix.entries_count": ("UINT32", 15),
        "quantize.imatrix.chunks_count": ("UINT32", 17),
        "dsv4tools.imatrix_sha256": ("STRING", hashlib.sha256(raw).hexdigest()),
    }


def test_names_that_are_no_text(source, tmp_path):
    path = tmp_path / "\udcff.dat"
    path.write_bytes(dat([(GATE, 1, np.ones(256))]))
    dt.convert(dt.plan(dt.open_checkpoint(source), imatrix=path), tmp_path / "out.gguf")
    assert metadata(tmp_path / "out.gguf")["quantize.imatrix.file"] == ("STRING", "?.dat")


class TestVerify:
    def test_with_it_bytes_are_derived_again(self, golden, tiny_6e, data, dsv4tools):
        report = dt.verify(golden, source=tiny_6e, imatrix=open_imatrix(data / "tiny-6e.imatrix.dat"))
        assert report.ok
        assert not [f for f in report.findings if "imatrix" in f.code]
        assert {t.judgement for t in report.tensors} == {"identical"}
        options = ("--imatrix", data / "tiny-6e.imatrix.dat", "--sample", 5)
        ended = dsv4tools("verify", golden, "--source", tiny_6e, *options)
        assert ended.code == 0
        assert "150 of 150 tensors are what the source gives, byte for byte, in a sample of 5 %" in ended.out

    def test_without_it_values_are_compared_and_it_says_so(self, golden, tiny_6e):
        report = dt.verify(golden, source=tiny_6e)
        (finding,) = (f for f in report.findings if "imatrix" in f.code)
        assert (finding.severity, finding.code) == ("warning", "imatrix-missing")
        assert "with the importance matrix 'tiny-6e.imatrix.dat': give it with --imatrix" in finding.message
        assert report.ok
        assert sum(t.judgement == "within" for t in report.tensors) == 15

    def test_another_one_is_named(self, golden, tiny_6e, entries, tmp_path):
        (tmp_path / "b.dat").write_bytes(dat([(name, 1, v[::-1]) for name, v in entries.items()]))
        report = dt.verify(golden, source=tiny_6e, imatrix=tmp_path / "b.dat", tensors=["blk.0.ffn_*_exps.weight"])
        (finding,) = (f for f in report.findings if "imatrix" in f.code)
        assert finding.code == "imatrix-other"
        assert f"{tmp_path / 'b.dat'} has " in finding.message
        assert {t.judgement for t in report.tensors} == {"within"}

    def test_a_file_that_says_nothing(self, source, tmp_path):
        (tmp_path / "a.dat").write_bytes(dat([(GATE, 1, np.ones(256))]))
        dt.convert(dt.plan(dt.open_checkpoint(source)), tmp_path / "out.gguf")
        report = dt.verify(tmp_path / "out.gguf", source=source, imatrix=tmp_path / "a.dat", tensors=["output_norm*"])
        assert [f.code for f in report.findings if "imatrix" in f.code] == ["imatrix-unsaid"]

    def test_damage_is_found(self, golden, tiny_6e, data, tmp_path):
        raw = bytearray(golden.read_bytes())
        tensor = next(t for t in GGUFReader(golden).tensors if t.name == "blk.3.ffn_up_exps.weight")
        raw[tensor.data_offset + 20000] ^= 1
        (tmp_path / "bad.gguf").write_bytes(raw)
        report = dt.verify(tmp_path / "bad.gguf", source=tiny_6e, imatrix=data / "tiny-6e.imatrix.dat")
        (wrong,) = report.wrong
        assert (wrong.name, wrong.n_different) == ("blk.3.ffn_up_exps.weight", 1)

    def test_refusals(self, golden, tiny_6e, tmp_path, dsv4tools):
        with pytest.raises(UsageError, match="--imatrix: needs --source"):
            dt.verify(golden, imatrix="a.dat")
        with pytest.raises(InputError, match="no such file"):
            dt.verify(golden, source=tiny_6e, imatrix=tmp_path / "a.dat")
        (tmp_path / "a.dat").write_bytes(struct.pack("<i", 7))
        ended = dsv4tools("verify", golden, "--source", tiny_6e, "--imatrix", tmp_path / "a.dat")
        assert "expected 1 to 1" in ended.failed(3)


def test_the_look_at_a_finished_file_knows_what_was_weighed(source, tmp_path, monkeypatch):
    """Columns without weight may come out as anything; a row of another matrix may not."""
    vector = np.zeros(256, np.float32)
    vector[::16] = 1
    path = tmp_path / "a.dat"
    path.write_bytes(dat([(f"blk.{layer}.ffn_{kind}_exps.weight", 1, vector) for layer in range(3)
                          for kind in ("gate", "up", "down")]))
    for policy in ("q4_k", "q2_k"):
        plan = dt.plan(dt.open_checkpoint(source), families={"experts": policy}, imatrix=path)
        dt.convert(plan, tmp_path / f"{policy}.gguf")
    read = spot_check._read_row
    monkeypatch.setattr("dsv4tools.spot_check._read_row", lambda *a: read(*a)[:, ::-1])
    with pytest.raises(dt.Dsv4Error, match="was written wrongly: its last row is not that of"):
        dt.convert(plan, tmp_path / "wrong.gguf")

