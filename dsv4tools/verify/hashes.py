"""Checking a manifest: lines of llama-gguf-hash, as `convert --manifest` writes them too.

Each line is ``ALGORITHM  HEX  FILE:TENSOR`` or, over all payloads in file order, ``ALGORITHM  HEX  FILE``. The hash of
``uuid`` is SHA-1 over a fixed namespace and all payloads, cut and marked as a UUID of version 5 (RFC 9562, 5.5).
"""

from __future__ import annotations

import hashlib
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import xxhash

from dsv4tools.checkpoint.strict_json import read_small_file
from dsv4tools.errors import InputError
from dsv4tools.gguf.reader import Finding
from dsv4tools.manifest import hash_file
from dsv4tools.verify.report import ManifestCheck

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.gguf.splits import SplitFile

MAX_MANIFEST_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 23
_WHOLE_FILE = re.compile(r"# sha256 of the whole file: ([0-9a-f]{64})")
_LINE = re.compile(r"(?P<algorithm>\S+)\s+(?P<digest>[0-9A-Fa-f-]+)\s+(?P<name>\S.*)")
# llama.cpp's namespace: the UUID of version 5 of en.wikipedia.org/wiki/Llama.cpp in the namespace of URLs.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "en.wikipedia.org/wiki/Llama.cpp")


class _Digest(Protocol):
    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Uuid:
    """SHA-1 that ends as a UUID."""

    def __init__(self) -> None:
        self._sha1 = hashlib.sha1(_NAMESPACE.bytes, usedforsecurity=False)

    def update(self, data: memoryview) -> None:
        self._sha1.update(data)

    def hexdigest(self) -> str:
        return str(uuid.UUID(bytes=self._sha1.digest()[:16], version=5))


# Name in a manifest -> what computes it, and the characters of its result.
_ALGORITHMS: dict[str, tuple[Callable[[], _Digest], int]] = {
    "sha256": (hashlib.sha256, 64),
    "sha1": (lambda: hashlib.sha1(usedforsecurity=False), 40),
    "xxh64": (xxhash.xxh64, 16),
    "xxh3": (xxhash.xxh3_64, 16),
    "uuid": (_Uuid, 36),
}


@dataclass(slots=True)
class Manifest:
    """Hashes that a file must have.

    Attributes
    ----------
    path:
        Of the manifest.
    tensors, payloads:
        (algorithm, tensor) -> digest, and algorithm -> digest over all payloads.
    whole_file:
        sha256 of the file, empty if the manifest does not give it.
    """

    path: Path
    tensors: dict[tuple[str, str], str] = field(default_factory=dict)
    payloads: dict[str, str] = field(default_factory=dict)
    whole_file: str = ""

    @property
    def algorithms(self) -> tuple[str, ...]:
        """Those that it has hashes of, the strongest first."""
        used = {a for a, _ in self.tensors} | set(self.payloads)
        return tuple(a for a in _ALGORITHMS if a in used)


def read_manifest(path: Path, file_name: str) -> Manifest:
    """Read the lines of a manifest that are about the file called `file_name`, whatever directory they name.

    If none is and all lines are about one other file, they are taken: it was renamed.

    Raises
    ------
    InputError
        The manifest cannot be read, has a line of another form, two different hashes for one thing, or no hashes.
    """
    by_file = _read_lines(path, [file_name])
    if file_name not in by_file and len(by_file) > 1:
        raise InputError(path, f"has hashes of {', '.join(sorted(by_file)[:3])}, none of {file_name}")
    return by_file.get(file_name) or next(iter(by_file.values()))


def _read_lines(path: Path, names: Sequence[str]) -> dict[str, Manifest]:
    """What a manifest says of each file; `names` are of files that are expected. Errors of `read_manifest`."""
    lines = read_small_file(path, max_bytes=MAX_MANIFEST_BYTES).decode("utf-8", "surrogateescape").split("\n")
    by_file: dict[str, Manifest] = {}
    whole_files: list[tuple[str, str]] = []   # with the file of the line before
    file = ""
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r")
        found = _WHOLE_FILE.fullmatch(text)
        if found:
            whole_files.append((file, found[1]))
        if not text.strip() or text.startswith("#"):
            continue
        algorithm, digest, name = _parse(text, f"{path}: line {number}")
        file, tensor = _split_name(name, names)
        entry = by_file.setdefault(file, Manifest(path))
        key = algorithm if tensor is None else (algorithm, tensor)
        known: dict[object, str] = entry.payloads if tensor is None else entry.tensors  # type: ignore[assignment]  # one of two dicts, each with its own keys
        if known.setdefault(key, digest) != digest:
            raise InputError(f"{path}: line {number}", f"has another {algorithm} of {name!r} than a line before")
    if not by_file:
        raise InputError(path, "has no hashes", hint="convert --manifest and llama-gguf-hash write manifests")
    for file, digest in whole_files:
        if file in by_file or len(by_file) == 1:
            by_file.get(file, next(iter(by_file.values()))).whole_file = digest
    return by_file


def _parse(text: str, where: str) -> tuple[str, str, str]:
    line = _LINE.fullmatch(text)
    if line is None:
        raise InputError(where, f"is {text[:60]!r}, expected an algorithm, a hash and a name")
    algorithm, digest = line["algorithm"].lower(), line["digest"].lower()
    if algorithm not in _ALGORITHMS:
        raise InputError(where, f"has the algorithm {algorithm!r}, known are {', '.join(_ALGORITHMS)}")
    if len(digest) != _ALGORITHMS[algorithm][1]:
        raise InputError(where, f"has {len(digest)} characters of {algorithm}, expected {_ALGORITHMS[algorithm][1]}")
    return algorithm, digest, line["name"]


def _split_name(name: str, names: Sequence[str]) -> tuple[str, str | None]:
    """File name without directories, and tensor (None: all payloads)."""
    base = re.split(r"[/\\]", name)[-1]
    for file_name in names:
        if base == file_name:
            return base, None
        if base.startswith(f"{file_name}:"):
            return file_name, base[len(file_name) + 1 :]
    file, colon, tensor = base.partition(":")
    return file, tensor if colon else None


def check_set(
    file: SplitFile, expected: Manifest, progress: Callable[[int], None] | None = None
) -> tuple[ManifestCheck, list[Finding]]:
    """`check_manifest` for a split set: part by part, or as one file where the manifest is of none of the parts.

    InputError where it has hashes of some parts only.
    """
    names = [path.name for path in file.paths]
    by_file = _read_lines(expected.path, names)
    missing = [name for name in names if name not in by_file]
    if len(missing) == len(names):   # the whole model's, before it was split: the tensors are the same
        return check_manifest(file, expected, progress)
    if missing:
        raise InputError(expected.path, f"has no hashes of {', '.join(missing[:3])}, a part of the set")
    n_right = n = 0
    findings: list[Finding] = []
    for part in file.parts:
        check, found = check_manifest(part, by_file[part.path.name], progress)
        n_right, n = n_right + check.n_right, n + check.n_hashes
        findings += [replace(f, where=f"{part.path.name}: {f.where}") for f in found]
    return ManifestCheck(expected.path, expected.algorithms, n_right, n), findings


def check_manifest(
    file: GgufFile, manifest: Manifest, progress: Callable[[int], None] | None = None
) -> tuple[ManifestCheck, list[Finding]]:
    """Hash the payloads of `file` and compare; what differs or is missing on either side is an error."""
    algorithms = manifest.algorithms
    tensors, payloads, whole = _hash(file, manifest, progress)
    findings = []
    n_right = 0
    for (algorithm, name), expected in manifest.tensors.items():
        if name not in file.tensors:
            findings.append(Finding("error", "manifest", name, "is in the manifest and not in the file", None))
        elif tensors[algorithm, name] == expected:
            n_right += 1
        else:
            findings.append(_mismatch(name, algorithm, tensors[algorithm, name], expected))
    listed = {name for _, name in manifest.tensors}
    if listed:
        missing = [name for name in file.tensors if name not in listed]
        findings += [Finding("error", "manifest", n, "is in the file and not in the manifest", None) for n in missing]
    for algorithm, expected in manifest.payloads.items():
        if payloads[algorithm] == expected:
            n_right += 1
        else:
            findings.append(_mismatch("all tensor data", algorithm, payloads[algorithm], expected))
    if whole:
        if whole == manifest.whole_file:
            n_right += 1
        else:
            findings.append(_mismatch("whole file", "sha256", whole, manifest.whole_file))
    n = len(manifest.tensors) + len(manifest.payloads) + bool(whole)
    return ManifestCheck(manifest.path, algorithms, n_right, n), findings


def _mismatch(where: str, algorithm: str, found: str, expected: str) -> Finding:
    what = f"has {algorithm} {found[:16]}..., the manifest says {expected[:16]}..."
    return Finding("error", "manifest", where, what, None)


def _hash(
    file: GgufFile, manifest: Manifest, progress: Callable[[int], None] | None
) -> tuple[dict[tuple[str, str], str], dict[str, str], str]:
    """Digests of the file's tensors, of all payloads, and of the whole file where the manifest has it."""
    whole = ""
    if manifest.whole_file and file.data_offset:
        tensors, payloads, whole = hash_file(file.path)   # one reading gives all three
        if manifest.algorithms == ("sha256",):
            if progress is not None:
                progress(sum(t.n_bytes for t in file.tensors.values()))
            return {("sha256", n): digest for n, digest in tensors.items()}, {"sha256": payloads}, whole
    overall = {a: _ALGORITHMS[a][0]() for a in manifest.algorithms}
    digests: dict[tuple[str, str], str] = {}
    room = np.zeros(_CHUNK_BYTES, np.uint8)
    with ThreadPoolExecutor(max(1, 2 * len(overall))) as pool:
        for name, tensor in file.tensors.items():
            own = {a: _ALGORITHMS[a][0]() for a in overall}
            for start in range(0, tensor.n_bytes, _CHUNK_BYTES):
                data = room[: min(_CHUNK_BYTES, tensor.n_bytes - start)]
                file.read_tensor_into(name, data, start)
                # Hashing releases the GIL: the digests run side by side.
                list(pool.map(lambda digest, data=data.data: digest.update(data), (*overall.values(), *own.values())))
                if progress is not None:
                    progress(len(data))
            digests |= {(a, name): digest.hexdigest() for a, digest in own.items()}
    return digests, {a: digest.hexdigest() for a, digest in overall.items()}, whole
