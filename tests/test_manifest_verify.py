"""`verify --manifest`: manifests of ours and of llama-gguf-hash, hashed here without any code of dsv4tools."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import uuid

import pytest
import xxhash
from gguf import GGUFReader
from gguf_edit import Edit
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import payload

import dsv4tools as dt
from dsv4tools.errors import InputError
from dsv4tools.verify.hashes import read_manifest

NORM = "blk.1.attn_norm.weight"


@pytest.fixture(scope="module")
def made(_written, tmp_path_factory):
    """A small file and the manifest that was written with it. Not to be changed."""
    from conftest import SMALL  # noqa: PLC0415  - the suite's own module

    source = _written(shape=SMALL, seed=0, shards=2, merges_form="strings")
    directory = tmp_path_factory.mktemp("manifest")
    dt.convert(dt.plan(dt.open_checkpoint(source)), directory / "out.gguf", manifest=directory / "out.sha256")
    return directory / "out.gguf", directory / "out.sha256"


@pytest.fixture
def right(made):
    return made[0]


@pytest.fixture
def manifest(made):
    return made[1]


@pytest.fixture
def edited(right, tmp_path):
    """A copy under the same name, to be changed: `edited(edit)`."""
    return lambda edit: edit.write(tmp_path / right.name)


def llama_gguf_hash(path, algorithms, name=None):
    """The lines that llama-gguf-hash prints (its README and its format strings)."""
    def xxh64(data):
        return xxhash.xxh64(data).hexdigest()

    def xxh3(data):
        return xxhash.xxh3_64(data).hexdigest()

    def as_uuid(data):
        namespace = bytes.fromhex("ef001206dadc5f6da15f3359e577d4e5")
        digest = bytearray(hashlib.sha1(namespace + data).digest()[:16])
        digest[6] = digest[6] & 0x0F | 0x50
        digest[8] = digest[8] & 0x3F | 0x80
        return str(uuid.UUID(bytes=bytes(digest)))

    compute = {
        "sha256": lambda data: hashlib.sha256(data).hexdigest(), "sha1": lambda data: hashlib.sha1(data).hexdigest(),
        "xxh64": xxh64, "xxh3": xxh3, "uuid": as_uuid,
    }  # fmt: skip
    name = name or path.name
    lines, everything = [], b""
    for t in GGUFReader(path).tensors:
        everything += payload(t)
        lines += [f"{a:<8}  {compute[a](payload(t))}  {name}:{t.name}" for a in algorithms if a != "uuid"]
    return lines + [f"{a:<8}  {compute[a](everything)}  {name}" for a in algorithms]


def test_our_own_manifest(right, manifest, dsv4tools):
    before = (right.read_bytes(), manifest.read_bytes(), sorted(right.parent.iterdir()))
    ended = dsv4tools("verify", right, "--manifest", manifest, "--engine", "none")
    assert ended.succeeded
    assert f"out.sha256: {92 + 2} of {92 + 2} hashes agree (sha256)" in ended.out
    data = dsv4tools("verify", right, "--manifest", manifest, "--json").data["manifest"]
    assert (data["n_right"], data["n_hashes"], data["algorithms"]) == (94, 94, ["sha256"])
    assert (right.read_bytes(), manifest.read_bytes(), sorted(right.parent.iterdir())) == before


@pytest.mark.parametrize("algorithms", [["xxh64"], ["sha1"], ["sha256"], ["xxh3"], ["uuid"],
                                        ["xxh64", "xxh3", "sha1", "sha256", "uuid"]], ids="-".join)
def test_manifests_of_llama_gguf_hash(algorithms, right, edited, tmp_path):
    path = tmp_path / "manifest"
    path.write_text("\n".join(llama_gguf_hash(right, algorithms)) + "\n")
    report = dt.verify(right, manifest=path)
    assert report.ok
    n = sum(1 if a == "uuid" else 93 for a in algorithms)
    assert (report.manifest.n_right, report.manifest.n_hashes) == (n, n)
    assert set(report.manifest.algorithms) == set(algorithms)
    report = dt.verify(edited(Edit(right).flip(NORM, 5, 0)), manifest=path)
    assert not report.ok
    assert report.manifest.n_right == n - sum(1 if a == "uuid" else 2 for a in algorithms)
    assert {f.where for f in report.errors} == {"all tensor data", *([] if algorithms == ["uuid"] else [NORM])}


def test_a_flipped_bit_is_in_a_tensor_in_all_data_and_in_the_file(right, edited, manifest, dsv4tools):
    path = edited(Edit(right).flip(NORM, 5, 0))
    ended = dsv4tools("verify", path, "--manifest", manifest, "--engine", "none")
    assert (ended.code, ended.err) == (5, "")
    was, now = (hashlib.sha256(Edit(p).data(NORM)).hexdigest() for p in (right, path))
    assert f"error: {NORM}: has sha256 {now[:16]}..., the manifest says {was[:16]}...\n" in ended.out
    assert "error: all tensor data: has sha256 " in ended.out
    assert "error: whole file: has sha256 " in ended.out
    assert "91 of 94 hashes agree" in ended.out


def test_metadata_show_in_the_whole_file_alone(right, edited, manifest):
    edit = Edit(right)
    at = edit.raw.index(b"general.name") + len("general.name") + 4 + 8
    edit.raw[at] ^= 1
    report = dt.verify(edited(edit), manifest=manifest)
    assert [f.where for f in report.errors] == ["whole file"]


def test_tensors_that_only_one_side_has(right, manifest, tmp_path):
    lines = manifest.read_text().splitlines()
    path = tmp_path / "m"
    path.write_text("\n".join(line for line in lines if not line.endswith(f":{NORM}")))
    report = dt.verify(right, manifest=path)
    assert [(f.where, f.message) for f in report.errors] == [(NORM, "is in the file and not in the manifest")]
    path.write_text("\n".join([f"sha256    {'0' * 64}  out.gguf:blk.9.none", *lines]))
    report = dt.verify(right, manifest=path)
    assert [(f.where, f.message) for f in report.errors] == [("blk.9.none", "is in the manifest and not in the file")]


def test_only_hashes_of_everything(right, tmp_path):
    """``llama-gguf-hash --no-layer``: no tensor is missed."""
    path = tmp_path / "m"
    path.write_text(llama_gguf_hash(right, ["sha256"])[-1])
    report = dt.verify(right, manifest=path)
    assert report.ok
    assert report.manifest.n_hashes == 1


@pytest.mark.parametrize("name", [
    "out.gguf", "models/out.gguf", "/a b/out.gguf", "C:\\models\\out.gguf", "renamed.gguf",
])  # fmt: skip
def test_whatever_the_file_is_called(name, right, tmp_path):
    path = tmp_path / "m"
    path.write_text("\r\n".join(llama_gguf_hash(right, ["xxh64"], name)) + "\r\n")
    report = dt.verify(right, manifest=path)
    assert report.ok
    assert report.manifest.n_hashes == 93


def test_a_manifest_of_several_files(right, tmp_path):
    path = tmp_path / "m"
    mine = llama_gguf_hash(right, ["xxh64"])
    other = [f"xxh64     {'0' * 16}  other.gguf:{NORM}"]
    path.write_text("\n".join(other + mine))
    assert dt.verify(right, manifest=path).ok
    path.write_text("\n".join([*other, f"xxh64     {'0' * 16}  third.gguf"]))
    with pytest.raises(InputError, match=r"has hashes of other\.gguf, third\.gguf, none of out\.gguf"):
        dt.verify(right, manifest=path)


GOOD = f"sha256    {'0' * 64}  out.gguf:a"


@pytest.mark.parametrize(("text", "said"), [
    ("", "has no hashes"),
    ("# only a remark\n\n", "has no hashes"),
    ("hello\n", "line 1: is 'hello', expected an algorithm, a hash and a name"),
    (f"{GOOD}\nsha256 {'0' * 64}\n", "line 2: is 'sha256 "),
    (f"md5 {'0' * 32} out.gguf\n", "line 1: has the algorithm 'md5', known are sha256, sha1, xxh64, xxh3, uuid"),
    (f"sha256 {'0' * 63} out.gguf\n", "has 63 characters of sha256, expected 64"),
    (f"sha256 {'z' * 64} out.gguf\n", "expected an algorithm, a hash and a name"),
    (f"{GOOD}\n{GOOD.replace('0' * 64, '1' * 64)}\n", "line 2: has another sha256 of 'out.gguf:a' than a line before"),
])  # fmt: skip
def test_a_manifest_that_is_none(text, said, right, tmp_path, dsv4tools):
    path = tmp_path / "m"
    path.write_text(text)
    assert said in dsv4tools("verify", right, "--manifest", path).failed(3)


def test_what_cannot_be_read(right, tmp_path, dsv4tools):
    dsv4tools("verify", right, "--manifest", tmp_path / "none").failed(3)
    dsv4tools("verify", right, "--manifest", tmp_path).failed(3)
    assert dsv4tools("verify", tmp_path / "none.gguf", "--manifest", tmp_path / "none").code == 3


def test_upper_case_and_repeated_lines(right, tmp_path):
    path = tmp_path / "m"
    lines = llama_gguf_hash(right, ["sha1"])
    path.write_text("\n".join([*lines, *lines[:3]]).replace("sha1 ", "SHA1 "))
    assert dt.verify(right, manifest=path).ok


def test_names_with_colons(tmp_path):
    path = tmp_path / "m"
    path.write_text(f"sha1 {'a' * 40} dir/a:b.gguf:x:y\nsha1 {'b' * 40} dir/a:b.gguf\n")
    manifest = read_manifest(path, "a:b.gguf")
    assert (manifest.tensors, manifest.payloads) == ({("sha1", "x:y"): "a" * 40}, {"sha1": "b" * 40})


def test_reading_in_pieces_changes_nothing(right, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["dsv4tools.verify.hashes"], "_CHUNK_BYTES", 10_000)
    path = tmp_path / "m"
    path.write_text("\n".join(llama_gguf_hash(right, ["xxh64", "sha1"])))
    steps, totals = [], []
    assert dt.verify(right, manifest=path, progress=steps.append, announce=totals.append).ok
    assert totals == [sum(steps)]


def test_hashes_of_a_converted_file_with_more_algorithms(right, manifest, tmp_path):
    """Ours with lines of another algorithm put to it: the whole file counts all the same."""
    path = tmp_path / "m"
    path.write_text(manifest.read_text() + "\n".join(llama_gguf_hash(right, ["xxh64"])))
    report = dt.verify(right, manifest=path)
    assert report.ok
    assert report.manifest.n_hashes == 94 + 93


@settings(deadline=None, max_examples=200, derandomize=True)
@given(text=st.one_of(st.binary(max_size=80), st.lists(st.sampled_from([
    b"sha1", b"sha256", b"uuid", b" ", b"  ", b"a" * 40, b"0" * 64, b"out.gguf", b":x", b"\n", b"#", b"\xff", b"/",
])).map(b"".join)))  # fmt: skip
def test_any_text_is_a_manifest_or_an_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.manifest"
    path.write_bytes(text)
    with contextlib.suppress(InputError):
        manifest = read_manifest(path, "out.gguf")
        assert manifest.tensors or manifest.payloads
