"""Manifests, against hashes of what gguf-py reads."""

from __future__ import annotations

import hashlib
import os
import re
import sys

import pytest
from gguf import GGUFReader
from gguf_bytes import gguf, tensor
from independent import payload

import dsv4tools as dt
from dsv4tools.errors import InputError, ResourceError
from dsv4tools.manifest import hash_file, write_manifest


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def converted(make_checkpoint, tmp_path):
    out = tmp_path / "out.gguf"
    dt.convert(dt.plan(dt.open_checkpoint(make_checkpoint())), out, manifest=tmp_path / "out.sha256")
    return out


def test_every_line(converted):
    lines = converted.with_name("out.sha256").read_text("utf-8").splitlines()
    tensors = {t.name: payload(t) for t in GGUFReader(converted).tensors}
    expected = [f"sha256    {sha256(data)}  out.gguf:{name}" for name, data in tensors.items()]
    expected.append(f"sha256    {sha256(b''.join(tensors.values()))}  out.gguf")
    expected.append(f"# sha256 of the whole file: {sha256(converted.read_bytes())}")
    assert lines == expected
    # What llama-gguf-hash --check reads: algorithm, hash, file with an optional tensor.
    assert all(re.fullmatch(r"sha256 {4}[0-9a-f]{64} {2}out\.gguf(:[\w.]+)?", line) for line in lines[:-1])


def test_reading_in_pieces_changes_nothing(converted, monkeypatch):
    before = hash_file(converted)
    monkeypatch.setattr(sys.modules["dsv4tools.manifest"], "_CHUNK_BYTES", 1000)
    assert hash_file(converted) == before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_is_the_umasks(mask, converted, tmp_path):
    before = os.umask(mask)
    try:
        write_manifest([converted], tmp_path / "again", {})
    finally:
        os.umask(before)
    assert (tmp_path / "again").stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_empty_file_and_an_empty_tensor(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf([], [tensor("none", (0,)), tensor("some", (8,))], bytes(range(32))))
    tensors, payloads, whole = hash_file(path)
    assert tensors == {"none": sha256(b""), "some": sha256(bytes(range(32)))}
    assert (payloads, whole) == (sha256(bytes(range(32))), sha256(path.read_bytes()))
    path.write_bytes(gguf())
    assert hash_file(path) == ({}, sha256(b""), sha256(path.read_bytes()))


def test_what_cannot_be_hashed_leaves_no_manifest(converted, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(converted.read_bytes()[:-1000])
    with pytest.raises(InputError):
        write_manifest([broken], tmp_path / "m", {})
    with pytest.raises(ResourceError, match="cannot be written"):
        write_manifest([converted], tmp_path / "nowhere" / "m", {})
    assert not list(tmp_path.glob("m*"))


def test_a_file_that_shrinks_while_it_is_hashed(converted, monkeypatch):
    """The third reading finds the end of the file, as if somebody had cut it."""
    module = sys.modules["dsv4tools.manifest"]
    read, n_calls = module.pread_into, 0

    def shrink(fd, out, position):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            os.truncate(converted, position)
        return read(fd, out, position)

    monkeypatch.setattr(module, "pread_into", shrink)
    with pytest.raises(ResourceError, match=r"ended at byte [\d,]+ while it was being hashed"):
        hash_file(converted)


# ------------------------------------------------------------------------------------ where a manifest may be written


def refused(dsv4tools, source, out, manifest, code, *options) -> str:
    message = dsv4tools("convert", source, out, "--manifest", manifest, *options).failed(code)
    assert not list(out.parent.glob(out.name + "*")), "the conversion must not have begun"
    return message


def test_a_manifest_that_exists_is_kept(make_checkpoint, tmp_path, dsv4tools):
    source, out, manifest = make_checkpoint(layers=1), tmp_path / "out.gguf", tmp_path / "m"
    manifest.write_text("mine")
    assert "exists; --overwrite replaces it" in refused(dsv4tools, source, out, manifest, 2)
    assert manifest.read_text() == "mine"
    assert dsv4tools("convert", source, out, "--manifest", manifest, "--overwrite").code == 0
    assert manifest.read_text().startswith("sha256 ")


@pytest.mark.parametrize("name", ["out.gguf", "out.gguf.partial", "../{parent}/out.gguf"])
def test_a_manifest_must_not_be_the_output(name, make_checkpoint, tmp_path, dsv4tools):
    manifest = tmp_path / name.format(parent=tmp_path.name)
    for options in ((), ("--overwrite",)):
        source = make_checkpoint(f"checkpoint-{len(options)}", layers=1)
        message = refused(dsv4tools, source, tmp_path / "out.gguf", manifest, 2, *options)
        assert "is the output itself" in message


def test_a_manifest_must_not_touch_the_source(make_checkpoint, tmp_path, dsv4tools):
    source = make_checkpoint(layers=1)
    shard = next(source.glob("*.safetensors"))
    before = shard.read_bytes()
    message = refused(dsv4tools, source, tmp_path / "out.gguf", shard, 2, "--overwrite")
    assert "is one of the inputs" in message
    message = refused(dsv4tools, source, tmp_path / "out.gguf", source / "new", 2)
    assert "lies in the source directory" in message
    assert shard.read_bytes() == before


def test_a_manifest_that_cannot_be_written_is_said_before_the_work(make_checkpoint, tmp_path, dsv4tools):
    source = make_checkpoint(layers=1)
    assert "is no directory; create it first" in refused(dsv4tools, source, tmp_path / "o", tmp_path / "no" / "m", 4)
    assert "is a directory" in refused(dsv4tools, source, tmp_path / "o", tmp_path, 2)
