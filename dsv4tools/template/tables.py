"""Reading templates/*.toml: tensor names on both sides, shapes, layer kinds, metadata keys."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from dsv4tools.errors import InputError
from dsv4tools.resources import data_directory

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dsv4tools.checkpoint.config import Config


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of every layer of a kind (or of the model, where `layers` is None)."""

    name: str
    source: str
    shape: tuple[str, ...]
    layers: str | None = None
    integers: bool = False

    @property
    def is_stacked(self) -> bool:
        """Whether all experts' matrices are stacked in it."""
        return "{expert}" in self.source


@dataclass(frozen=True, slots=True)
class LayerKind:
    """A set of layers: by compression ratio, by routing, or all."""

    ratios: tuple[int, ...] | None = None
    hashed: bool | None = None

    def has(self, config: Config, layer: int) -> bool:
        """Whether `layer` is of this kind."""
        if self.ratios is not None and config.compress_ratios[layer] not in self.ratios:
            return False
        return self.hashed is None or config.is_hash_layer(layer) == self.hashed


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Source tensors that no GGUF has, and why."""

    tensors: str
    reason: str


@dataclass(frozen=True, slots=True)
class MetadataRow:
    """One metadata key: its type and where its value comes from."""

    key: str
    type: str
    config: str | None = None
    symbol: str | None = None
    values: Mapping[str, int] = field(default_factory=dict)
    per_layer: bool = False
    optional: bool = False
    implied: str | None = None


@dataclass(frozen=True, slots=True)
class ModelTables:
    """Everything that a template file of this package says about an architecture."""

    architecture: str
    alignment: int
    overlaps: Mapping[int, int]
    layer_kinds: Mapping[str, LayerKind]
    tensors: tuple[TensorRow, ...]
    left_out: tuple[LeftOut, ...]
    metadata: tuple[MetadataRow, ...]


@cache
def load_tables(name: str = "deepseek4") -> ModelTables:
    """The tables of ``templates/NAME.toml``; InputError names the entry that is malformed."""
    path = data_directory("templates") / f"{name}.toml"
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as e:
        raise InputError(path, f"is not valid TOML: {e}") from None
    try:
        tables = ModelTables(
            raw["architecture"], raw["alignment"],
            {int(ratio): entry["overlap"] for ratio, entry in raw["compression"].items()},
            {kind: LayerKind(tuple(e["ratios"]) if "ratios" in e else None, e.get("hashed"))
             for kind, e in raw["layer_kinds"].items()},
            tuple(TensorRow(**{**e, "shape": tuple(e["shape"])}) for e in raw["tensor"]),
            tuple(LeftOut(**e) for e in raw["left_out"]),
            tuple(MetadataRow(**e) for e in raw["metadata"]),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(path, f"has a malformed entry: {e}") from None
    _check_tables(tables, path)
    return tables


def _check_tables(tables: ModelTables, path: Path) -> None:
    from dsv4tools.template.symbols import SYMBOLS  # noqa: PLC0415  - symbols need the config module only when checked

    for row in tables.tensors:
        unknown = [s for s in row.shape if s not in SYMBOLS]
        if unknown or (row.layers is not None and row.layers not in tables.layer_kinds):
            raise InputError(f"{path}: tensor {row.name!r}", f"unknown symbol or layer kind {unknown or row.layers}")
    for entry in tables.metadata:
        sources: list[Any] = [entry.config, entry.symbol]
        if sources.count(None) != 1 or (entry.symbol and entry.symbol not in SYMBOLS):
            raise InputError(f"{path}: metadata {entry.key!r}", "needs exactly one of config and a known symbol")
