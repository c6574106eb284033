"""Manifests: the sha256 of every tensor, of all tensors together, and of the file.

Lines are those of llama-gguf-hash (``sha256    HEX  FILE:TENSOR``, then ``sha256    HEX  FILE`` over all payloads in
file order, padding left out), so that its ``--check`` reads them. What that tool does not know stands behind a ``#``.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from dsv4tools.errors import Interrupted, ResourceError
from dsv4tools.files import pread_into, pwrite_all
from dsv4tools.gguf.reader import open_gguf
from dsv4tools.outfile import complete_file, explained

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dsv4tools.workers import StopRequest

_CHUNK_BYTES = 1 << 23


def hash_file(path: Path, stop: StopRequest | None = None) -> tuple[dict[str, str], str, str]:
    """sha256 of each tensor's payload by name, of all payloads in order, and of the whole file, in one reading.

    Raises ResourceError where the file cannot be read, Interrupted soon after `stop` was set.
    """
    with open_gguf(path) as file, ThreadPoolExecutor(3) as pool:
        extents = [(t.name, file.data_offset + t.offset, t.n_bytes) for t in file.tensors.values()]
        whole, payloads, tensors = hashlib.sha256(), hashlib.sha256(), {}
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            position = 0
            for name, start, n_bytes in [*extents, ("", file.n_file_bytes, 0)]:
                for data in _chunks(fd, position, start, buffer, path):   # header or padding
                    whole.update(data)
                one = hashlib.sha256()
                for data in _chunks(fd, start, start + n_bytes, buffer, path):
                    if stop is not None and stop.is_set():
                        raise Interrupted(stop.signal_number, "stopped while the file was being hashed",
                                          hint="run the same command again to continue")
                    # Hashing releases the GIL: the three run side by side.
                    list(pool.map(lambda digest, data=data: digest.update(data), (whole, payloads, one)))
                position = start + n_bytes
                tensors[name] = one.hexdigest()
        finally:
            os.close(fd)
    del tensors[""]
    return tensors, payloads.hexdigest(), whole.hexdigest()


def _chunks(fd: int, position: int, end: int, buffer: memoryview, path: Path) -> Iterator[memoryview]:
    while position < end:
        n = pread_into(fd, buffer[: min(len(buffer), end - position)], position)
        if n == 0:
            raise ResourceError(path, f"ended at byte {position:,} while it was being hashed")
        yield buffer[:n]
        position += n


def write_manifest(
    files: Sequence[Path], path: Path, zeroed: Mapping[str, int], stop: StopRequest | None = None
) -> None:
    """Hash a GGUF, or all files of a split set, and write the manifest to `path`, complete or not at all.

    Raises as `hash_file`.
    """
    lines = []
    for gguf in files:
        tensors, payloads, whole = hash_file(gguf, stop)
        lines += [f"sha256    {digest}  {gguf.name}:{name}" for name, digest in tensors.items()]
        lines.append(f"sha256    {payloads}  {gguf.name}")
        lines.append(f"# sha256 of the whole file: {whole}")
    lines += [f"# {n} values that are not finite were converted to 0 in {name}" for name, n in zeroed.items()]
    with complete_file(path) as fd, explained(path):
        pwrite_all(fd, memoryview(os.fsencode("\n".join(lines) + "\n")), 0)
