"""Importance matrix files put together by hand and by gguf-py, and read by hand: nothing here is the package's.

Layouts: llama.cpp's tools/imatrix/imatrix.cpp.
"""

from __future__ import annotations

import struct

import numpy as np
from gguf import GGUFReader, GGUFWriter


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<i", len(raw)) + raw


def dat(entries, chunks=None, dataset=None) -> bytes:
    """A ``.dat`` file of (name, calls, float32 values)."""
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        out += text(name) + struct.pack("<ii", calls, len(values)) + np.asarray(values, "<f4").tobytes()
    out += b"" if chunks is None else struct.pack("<i", chunks)
    return out + (b"" if dataset is None else text(dataset))


def read_dat(raw: bytes):
    """(entries as `dat` takes them, chunks, dataset)."""
    at = 0

    def number():
        nonlocal at
        at += 4
        return struct.unpack_from("<i", raw, at - 4)[0]

    def string():
        nonlocal at
        n = number()
        at += n
        return raw[at - n : at].decode()

    entries = []
    for _ in range(number()):
        name, calls, n = string(), number(), number()
        entries.append((name, calls, np.frombuffer(raw, "<f4", n, at)))
        at += 4 * n
    rest = (number(), string()) if at < len(raw) else (None, None)
    assert at == len(raw)
    return entries, *rest


def write_gguf(path, entries, *, chunks=2, size=512, datasets=("calibration.txt",), kind="imatrix", leave_out=()):
    """A GGUF by gguf-py, of name -> (sums [matrices, columns], counts [n])."""
    writer = GGUFWriter(path, "")
    for key, add, value in (("general.type", writer.add_string, kind), ("imatrix.datasets", writer.add_array, datasets),
                            ("imatrix.chunk_count", writer.add_uint32, chunks),
                            ("imatrix.chunk_size", writer.add_uint32, size)):
        if key not in leave_out:
            add(key, value)
    for name, (sums, counts) in entries.items():
        for suffix, values in ((".in_sum2", sums), (".counts", np.reshape(counts, (-1, 1)))):
            if name + suffix not in leave_out:
                writer.add_tensor(name + suffix, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path):
    """(name -> (sums, counts), chunks, size, datasets) by gguf-py."""
    reader = GGUFReader(path)
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    assert reader.fields["general.type"].contents() == "imatrix"
    entries = {name.removesuffix(".in_sum2"): (sums, tensors[name.removesuffix(".in_sum2") + ".counts"])
               for name, sums in tensors.items() if name.endswith(".in_sum2")}
    assert len(tensors) == 2 * len(entries)
    keys = ("imatrix.chunk_count", "imatrix.chunk_size", "imatrix.datasets")
    return entries, *(reader.fields[key].contents() for key in keys)
