"""Changing the data of a GGUF: tensors are found by gguf-py, nothing here knows our reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from gguf import GGUFReader

import dsv4tools as dt

if TYPE_CHECKING:
    from pathlib import Path


class Edit:
    """The bytes of a file, to be changed and written elsewhere."""

    def __init__(self, path: Path) -> None:
        self.raw = bytearray(path.read_bytes())
        self.types = {}
        self.places = {}
        self.shapes = {}
        for t in GGUFReader(path).tensors:
            self.types[t.name] = t.tensor_type.name
            self.places[t.name] = int(t.data_offset), int(t.n_bytes)
            self.shapes[t.name] = tuple(int(n) for n in t.shape)

    def data(self, name: str) -> bytes:
        start, n_bytes = self.places[name]
        return bytes(self.raw[start : start + n_bytes])

    def put(self, name: str, data: bytes, at: int = 0) -> Edit:
        """Write over a tensor's bytes from its byte `at` on."""
        start, n_bytes = self.places[name]
        assert at + len(data) <= n_bytes
        self.raw[start + at : start + at + len(data)] = data
        return self

    def flip(self, name: str, at: int, bit: int) -> Edit:
        self.raw[self.places[name][0] + at] ^= 1 << bit
        return self

    def put_values(self, name: str, values: np.ndarray, importance: np.ndarray | None = None) -> Edit:
        """Encode values in the tensor's own type."""
        x = np.ascontiguousarray(values, np.float32)
        return self.put(name, dt.quantize(x, self.types[name], importance).tobytes())

    def expert(self, name: str, number: int) -> tuple[int, bytes]:
        """First byte and bytes of an expert."""
        size = self.places[name][1] // self.shapes[name][2]
        return number * size, self.data(name)[number * size : (number + 1) * size]

    def move_expert(self, name: str, number: int, data: bytes) -> Edit:
        return self.put(name, data, self.expert(name, number)[0])

    def swap_experts(self, name: str, a: int, b: int) -> Edit:
        of_a, of_b = self.expert(name, a)[1], self.expert(name, b)[1]
        return self.move_expert(name, a, of_b).move_expert(name, b, of_a)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.raw)
        return path
