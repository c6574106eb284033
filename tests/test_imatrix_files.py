"""Importance matrix files: both forms read and written, beside gguf-py and a reader of a few lines; and bad ones."""

from __future__ import annotations

import hashlib
import os
import struct

import numpy as np
import pytest
from gguf import GGUFWriter
from imatrix_bytes import dat, read_dat, read_gguf, text, write_gguf

from dsv4tools.errors import Dsv4Error, InputError, ResourceError, UsageError, VerifyError
from dsv4tools.imatrix import Imatrix, Sums, open_imatrix, write_imatrix

RNG = np.random.default_rng(5)
SUMS = RNG.uniform(0, 9, (3, 8)).astype(np.float32)
ENTRIES = {"blk.0.ffn_up_exps.weight": (SUMS, [7, 0, 2]), "blk.0.attn_kv.weight": (SUMS[:1], [9])}


@pytest.fixture
def gguf(tmp_path):
    return write_gguf(tmp_path / "a.gguf", ENTRIES)


class TestReading:
    def test_dat(self, data):
        raw = (data / "tiny-6e.imatrix.dat").read_bytes()
        file = open_imatrix(data / "tiny-6e.imatrix.dat")
        entries, chunks, dataset = read_dat(raw)
        assert (file.legacy, file.n_chunks, file.chunk_size, file.datasets) == (True, chunks, 0, (dataset,))
        assert (chunks, dataset) == (17, "calibration.txt")
        assert file.sha256 == hashlib.sha256(raw).hexdigest()
        assert list(file.entries) == [name for name, _, _ in entries]
        for name, calls, values in entries:
            np.testing.assert_array_equal(file.read_sums(name), values)
            np.testing.assert_array_equal(file.read_mean(name), values / np.float32(calls))
            np.testing.assert_array_equal(file.read_mean(name, 256, 100), (values / np.float32(calls))[256:356])

    @pytest.mark.parametrize(("chunks", "dataset"), [(None, None), (3, None), (3, "")])
    def test_a_dat_may_end_early(self, chunks, dataset, tmp_path):
        (tmp_path / "a.dat").write_bytes(dat([("a", 2, [1, 4])], chunks, dataset))
        file = open_imatrix(tmp_path / "a.dat")
        assert (file.n_chunks, file.datasets) == (chunks or 0, ())
        assert file.read_mean("a").tolist() == [0.5, 2]

    @pytest.mark.parametrize("calls", [0, -3])
    def test_without_calls_values_are_means(self, calls, tmp_path):
        (tmp_path / "a.dat").write_bytes(dat([("a", calls, [1, 4])]))
        assert open_imatrix(tmp_path / "a.dat").read_mean("a").tolist() == [1, 4]

    def test_gguf(self, gguf):
        file = open_imatrix(gguf)
        assert (file.legacy, file.n_chunks, file.chunk_size, file.datasets) == (False, 2, 512, ("calibration.txt",))
        experts = file.read_mean("blk.0.ffn_up_exps.weight").reshape(3, 8)
        np.testing.assert_array_equal(experts[0], SUMS[0] / np.float32(7))
        np.testing.assert_array_equal(experts[1], np.ones(8))   # no data: all columns weigh the same
        np.testing.assert_array_equal(experts[2], SUMS[2] / np.float32(2))
        np.testing.assert_array_equal(file.read_mean("blk.0.ffn_up_exps.weight", 12, 8),
                                      experts.reshape(-1)[12:20])
        np.testing.assert_array_equal(file.read_mean("blk.0.attn_kv.weight"), SUMS[0] / np.float32(9))

    def test_counts_are_rounded_and_other_tensors_passed_over(self, tmp_path):
        entries = {"a": (SUMS, [2.5, 0.4, 3.0])}
        file = open_imatrix(write_gguf(tmp_path / "a.gguf", entries))
        assert file.entries["a"].counts.tolist() == [3, 0, 3]
        write_gguf(tmp_path / "b.gguf", entries | {"a.in_sum": (SUMS, [1])},
                   leave_out=("a.in_sum.counts", "a.in_sum.in_sum2"))
        assert list(open_imatrix(tmp_path / "b.gguf").entries) == ["a"]

    def test_a_changed_file_is_noticed(self, gguf):
        file = open_imatrix(gguf)
        os.utime(gguf, ns=(1, 1))
        with pytest.raises(VerifyError, match="was changed while it was in use"):
            file.read_mean("blk.0.attn_kv.weight")
        gguf.unlink()
        with pytest.raises(InputError, match="no such file"):
            file.read_mean("blk.0.attn_kv.weight")


class TestInspecting:
    def test_gguf(self, gguf, dsv4tools):
        ended = dsv4tools("inspect", gguf, "--tensors")
        assert ended.code == 0
        assert "measured on    2 chunks of 512 tokens of calibration.txt" in ended.out
        assert "entries        2, 32 values; 1 experts without data" in ended.out
        assert f"sha256         {hashlib.sha256(gguf.read_bytes()).hexdigest()}" in ended.out
        assert "blk.0.ffn_up_exps.weight      24       3        7" in ended.out
        found = dsv4tools("inspect", gguf, "--json").data
        assert (found["kind"], found["form"], found["entries"][0]) == ("imatrix", "gguf", {
            "name": "blk.0.ffn_up_exps.weight", "n_values": 24, "n_counts": 3, "largest_count": 7, "without_data": [1]})

    def test_dat(self, data, tmp_path, dsv4tools):
        ended = dsv4tools("inspect", data / "tiny-6e.imatrix.dat")
        assert "measured on    17 chunks of calibration.txt" in ended.out
        (tmp_path / "a.dat").write_bytes(b"nothing of the kind")
        assert "expected 1 to 1" in dsv4tools("inspect", tmp_path / "a.dat").failed(3)


class TestWriting:
    def test_gguf_is_what_gguf_py_reads_and_writes(self, gguf, tmp_path):
        write_imatrix(open_imatrix(gguf).load(), tmp_path / "b.gguf")
        entries, *about = read_gguf(tmp_path / "b.gguf")
        assert about == [2, 512, ["calibration.txt"]]
        assert list(entries) == sorted(ENTRIES)
        for name, (sums, counts) in ENTRIES.items():
            np.testing.assert_array_equal(entries[name][0], sums)
            np.testing.assert_array_equal(entries[name][1].reshape(-1), counts)

    def test_gguf_round_trip(self, gguf, tmp_path):
        write_imatrix(open_imatrix(gguf).load(), tmp_path / "b.gguf")
        write_imatrix(open_imatrix(tmp_path / "b.gguf").load(), tmp_path / "c.gguf")
        assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()

    def test_dat_round_trip(self, data, tmp_path):
        given = data / "tiny-6e.imatrix.dat"
        write_imatrix(open_imatrix(given).load(), tmp_path / "b.dat")
        entries, *about = read_dat(given.read_bytes())
        assert (tmp_path / "b.dat").read_bytes() == dat(sorted(entries, key=lambda e: e[0]), *about)

    def test_dat_holds_means_times_chunks(self, tmp_path):
        """As llama-imatrix writes them: whole chunks of the largest count, 1 where nothing was counted."""
        entries = {"b": Sums(SUMS.astype(np.float64), np.array([700, 0, 2])),
                   "a": Sums(SUMS[:1], np.array([1024])), "none": Sums(SUMS[:1], np.array([0]))}
        n = write_imatrix(Imatrix(entries, 2, 512, ("first", "last")), tmp_path / "a.dat")
        assert n == (tmp_path / "a.dat").stat().st_size
        (a, b), chunks, dataset = read_dat((tmp_path / "a.dat").read_bytes())
        assert (chunks, dataset) == (2, "last")
        assert (a[:2], b[:2]) == (("a", 2), ("b", 2))
        np.testing.assert_array_equal(a[2], SUMS[0] / np.float32(1024) * np.float32(2))
        expected = np.stack([SUMS[0] / np.float32(700) * 2, np.full(8, 2, np.float32), SUMS[2] / np.float32(2) * 2])
        np.testing.assert_array_equal(b[2].reshape(3, 8), expected)
        np.testing.assert_array_equal(open_imatrix(tmp_path / "a.dat").read_mean("b", 8, 8), np.ones(8))

    def test_refusals(self, tmp_path):
        good = Imatrix({"a": Sums(SUMS[:1], np.array([1]))})
        (tmp_path / "old.dat").write_text("mine")
        for matrix, name, error, message in (
            (good, "a.imatrix", UsageError, r"a.imatrix: ends in '.imatrix', expected .gguf or .dat"),
            (good, "a", UsageError, "ends in 'nothing'"),
            (good, "old.dat", UsageError, "old.dat: exists; --overwrite replaces it"),
            (good, "no/a.dat", ResourceError, "no: is no directory"),
            (Imatrix({}), "a.dat", InputError, "needs one entry or more"),
            (Imatrix({"a": Sums(np.array([[1, 1e39]]), np.array([1]))}), "a.gguf", InputError,
             "importance of a: column 1 of matrix 0 is inf"),
            (Imatrix({"a": Sums(np.array([[1], [-1.0]]), np.array([1, 1]))}), "a.dat", InputError,
             r"column 0 of matrix 1 is -1.0, expected a finite number >= 0"),
        ):
            with pytest.raises(error, match=message):
                write_imatrix(matrix, tmp_path / name)
        assert [p.name for p in tmp_path.iterdir()] == ["old.dat"]
        assert (tmp_path / "old.dat").read_text() == "mine"
        write_imatrix(good, tmp_path / "old.dat", overwrite=True)
        assert list(open_imatrix(tmp_path / "old.dat").entries) == ["a"]


def broken(i: int, at: int = 4) -> bytes:
    raw = bytearray(dat([("a", 1, [1, 2])], 1, "t"))
    raw[at : at + 4] = struct.pack("<i", i)
    return bytes(raw)


BAD_DAT = {
    "empty": (b"", "ends at byte 0: the number of entries needs 4 bytes from byte 0"),
    "no entries": (broken(0, 0), "the number of entries is 0 (byte 0), expected 1 to 1"),
    "many entries": (broken(1 << 30, 0), "the number of entries is 1073741824"),
    "text": (b"# a readme, or any other text", "the number of entries is 543236131"),
    "long name": (broken(5000), "the length of the name of entry 0 is 5000 (byte 4), expected 1 to 4096"),
    "negative name": (broken(-1), "the length of the name of entry 0 is -1"),
    "name without end": (broken(4000), "ends at byte 34: the name of entry 0 needs 4000 bytes from byte 8"),
    "no values": (dat([("a", 1, [])]) + bytes(8), "the number of values of 'a' is 0"),
    "many values": (broken((1 << 31) - 1, 13), "ends at byte 34: 'a' with 2147483647 values needs 8589934588 bytes"),
    "no text": (dat([(b"\xff", 1, [1])]), "the name of entry 0 is no UTF-8 at its byte 0"),
    "twice": (dat([("a", 1, [1]), ("a", 1, [1])]), "has two entries 'a', expected one"),
    "nan": (dat([("a", 1, [1, np.nan])]), "a.dat: entry 'a': value 1 is nan, expected a finite number >= 0"),
    "infinite": (dat([("a", 1, [np.inf])]), "value 0 is inf"),
    "negative": (dat([("a", 1, [1, 1, -1e-30])]), "value 2 is -1.0000000031710769e-30"),
    "bytes behind": (dat([("a", 1, [1])], 1, "t") + b"x", "has 1 bytes behind its end at byte 30"),
    "short tail": (dat([("a", 1, [1])]) + b"xx", "the number of chunks needs 4 bytes"),
    "short text": (dat([("a", 1, [1])], 1) + text("abc")[:-1], "the name of the text needs 3 bytes"),
}
BAD_GGUF = {
    "another kind": ({"kind": "model"}, "is a GGUF of the kind 'model', expected 'imatrix'"),
    "no kind": ({"leave_out": ("general.type",)}, "is a GGUF of the kind 'of a model'"),
    "no datasets": ({"leave_out": ("imatrix.datasets",)}, "key 'imatrix.datasets': is missing, expected arr of str"),
    "no chunks": ({"leave_out": ("imatrix.chunk_count",)}, "key 'imatrix.chunk_count': is missing, expected u32"),
    "no size": ({"leave_out": ("imatrix.chunk_size",)}, "key 'imatrix.chunk_size': is missing"),
    "numbers for names": ({"datasets": [1, 2]}, "key 'imatrix.datasets': is arr of i32, expected arr of str"),
    "sums alone": ({"leave_out": ("a.counts",)}, "has 'a.in_sum2' without 'a.counts'"),
    "counts alone": ({"leave_out": ("a.in_sum2",)}, "has 'a.counts' without 'a.in_sum2'"),

    "uneven": ({"entries": {"a": (SUMS, [1, 2, 3, 4, 5])}}, "has 5 counts for 24 sums, expected a divisor"),
    "negative count": ({"entries": {"a": (SUMS, [1, -2, 3])}}, "tensor 'a.counts': count 1 is -2.0"),
    "nan count": ({"entries": {"a": (SUMS, [np.nan])}}, "count 0 is nan"),
    "huge count": ({"entries": {"a": (SUMS, [1e30])}}, "count 0 is 1.0000000150474662e+30"),
    "nan": ({"entries": {"a": (np.array([[1, np.nan]]), [1])}}, "entry 'a': value 1 is nan"),
    "negative": ({"entries": {"a": (np.array([[-1.0]]), [1])}}, "entry 'a': value 0 is -1.0"),
}
BAD_GGUF["nothing"] = ({"leave_out": ("a.counts", "a.in_sum2")}, "has no tensor NAME.in_sum2: no entries")


class TestBadFiles:
    @pytest.mark.parametrize("case", BAD_DAT)
    def test_dat(self, case, tmp_path):
        raw, message = BAD_DAT[case]
        (tmp_path / "a.dat").write_bytes(raw)
        with pytest.raises(InputError) as caught:
            open_imatrix(tmp_path / "a.dat")
        assert message in str(caught.value)
        assert str(tmp_path / "a.dat") in str(caught.value)

    @pytest.mark.parametrize("case", BAD_GGUF)
    def test_gguf(self, case, tmp_path):
        options, message = BAD_GGUF[case]
        entries = options.pop("entries", {"a": (SUMS, [1, 2, 3])})
        with pytest.raises(InputError) as caught:
            open_imatrix(write_gguf(tmp_path / "a.gguf", entries, **options))
        assert message in str(caught.value)

    def test_other_types(self, tmp_path):
        writer = GGUFWriter(tmp_path / "a.gguf", "x")
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", ["t"])
        writer.add_uint32("imatrix.chunk_count", 1)
        writer.add_uint32("imatrix.chunk_size", 1)
        writer.add_tensor("a.in_sum2", SUMS.astype(np.float16))
        writer.add_tensor("a.counts", np.ones((1, 1), np.float32))
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        with pytest.raises(InputError, match=r"tensor 'a.in_sum2': is F16 \[8, 3\], expected F32 values"):
            open_imatrix(tmp_path / "a.gguf")

    def test_no_files(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path, message in ((tmp_path / "none", "no such file"), (tmp_path, "is a directory"),
                              (tmp_path / "pipe", "is a pipe"), ("/dev/null", "is no regular file")):
            with pytest.raises(InputError, match=message):
                open_imatrix(path)

    @pytest.mark.parametrize("form", ["dat", "gguf"])
    def test_whatever_is_cut_or_changed_ends_in_an_error_of_ours(self, form, tmp_path, gguf):
        raw = gguf.read_bytes() if form == "gguf" else dat([("a", 1, [1, 2]), ("b", 2, [1])], 1, "t")
        path = tmp_path / "x"
        for n in range(0, len(raw), 7 if form == "gguf" else 1):
            path.write_bytes(raw[:n])
            if n < len(raw) - 32 or form == "dat":   # the end of a GGUF may be padding
                try:
                    open_imatrix(path)
                except InputError:
                    continue
                assert form == "dat"
                assert n in {42, 46}   # without its optional end: a right file
        rng = np.random.default_rng(3)
        for _ in range(300):
            changed = bytearray(raw)
            changed[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            try:
                file = open_imatrix(path)
            except Dsv4Error:
                continue
            for name in file.entries:
                assert np.isfinite(file.read_mean(name)).all()
