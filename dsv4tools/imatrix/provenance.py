"""What a GGUF says about the importance matrix that it was made with: llama.cpp's keys, and the file's hash."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4tools.gguf.values import KV

if TYPE_CHECKING:
    from dsv4tools.imatrix.file import ImatrixFile

FILE_KEY = "quantize.imatrix.file"
HASH_KEY = "dsv4tools.imatrix_sha256"


def provenance(file: ImatrixFile) -> list[KV]:
    """Entries for the metadata of what is made with `file`; its name stands there without its directory."""
    name = file.path.name.encode(errors="replace").decode()   # a name need not be text, a value must
    entries = [KV(FILE_KEY, "str", name)]
    if file.datasets:
        entries.append(KV("quantize.imatrix.dataset", "str", file.datasets[0]))
    entries.append(KV("quantize.imatrix.entries_count", "u32", len(file.entries)))
    if file.n_chunks:
        entries.append(KV("quantize.imatrix.chunks_count", "u32", file.n_chunks))
    return [*entries, KV(HASH_KEY, "str", file.sha256)]
