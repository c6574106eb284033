"""The structural values of a GGUF, as the Config of a checkpoint: the template's metadata table read backwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.checkpoint.config import Config, ConfigReader, parse_config
from dsv4tools.checkpoint.strict_json import shown
from dsv4tools.errors import InputError
from dsv4tools.template.symbols import model_sizes
from dsv4tools.template.tables import MetadataRow, load_tables
from dsv4tools.template.tensors import check_layer_kinds

if TYPE_CHECKING:
    from dsv4tools.gguf.reader import GgufFile



def read_gguf_config(file: GgufFile) -> Config:
    """The Config that the ``deepseek4.*`` entries of `file` state.

    Raises
    ------
    InputError
        Another architecture, or a value that is missing, mistyped or contradicts another; the message names the key.
    """
    tables = load_tables()
    prefix = f"{tables.architecture}."
    architecture = file.value("general.architecture")
    if architecture != tables.architecture:
        raise InputError(f"{file.path}: key 'general.architecture'",
                         f"is {architecture!r}, expected {tables.architecture!r}")
    raw: dict[str, Any] = {}
    labels: dict[str, str] = {}
    for row in tables.metadata:
        if row.config is None:
            continue
        value = _plain(file, prefix, row)
        key = row.config
        labels.setdefault(key, prefix + row.key)
        if value is None:
            continue
        into = raw
        *outer, last = key.split(".")
        for part in outer:
            into = into.setdefault(part, {})
        if last in into and into[last] != value:
            raise InputError(f"{file.path}: key {prefix + row.key!r}",
                             f"is {value}, {labels[key]} is {into[last]}: they must be equal")
        into[last] = value
    if "vocab_size" not in raw and "token_embd.weight" in file.tensors:   # llama.cpp's converter does not write it
        raw["vocab_size"] = file.tensors["token_embd.weight"].ne[-1]
    config = parse_config(ConfigReader(raw, file.path, labels))
    check_layer_kinds(config, tables, f"{file.path}: key '{prefix}attention.compress_ratios'")
    _check_symbols(config, file, prefix)
    return config


def _plain(file: GgufFile, prefix: str, row: MetadataRow) -> Any:  # noqa: ANN401  - of the row's type
    """A value as config.json would have it; None where there is none."""
    value = _listed(file, prefix, row)
    if value is None:
        return row.implied
    where = f"{file.path}: key {prefix + row.key!r}"
    if row.values:
        name = next((name for name, number in row.values.items() if type(value) is int and value == number), None)
        if name is None:
            raise InputError(where, f"is {shown(value)}, expected one of {', '.join(map(str, row.values.values()))}")
        return name
    if row.per_layer:
        n_layers = file.value(f"{prefix}block_count")
        if not value or len(set(value)) > 1 or (isinstance(n_layers, int) and len(value) < n_layers):
            raise InputError(where, f"is {shown(value)}, expected one and the same value for each of {n_layers} layers")
        return value[0]
    return value


def _listed(file: GgufFile, prefix: str, row: MetadataRow) -> Any:  # noqa: ANN401  - of the row's type
    """A value, arrays as lists; InputError where it is an array and should be none, or the other way round."""
    value = file.value(prefix + row.key)
    is_list = isinstance(value, (list, np.ndarray))
    if value is not None and is_list != row.type.startswith("arr["):
        raise InputError(f"{file.path}: key {prefix + row.key!r}",
                         f"is {'an array' if is_list else 'a single value'}, expected {row.type}")
    return np.asarray(value).tolist() if is_list else value


def _check_symbols(config: Config, file: GgufFile, prefix: str) -> None:
    """Values that follow from others must be what follows."""
    sizes = model_sizes(config)
    for row in load_tables().metadata:
        found = _listed(file, prefix, row) if row.symbol else None
        if row.symbol and found is not None and found != sizes[row.symbol]:
            raise InputError(f"{file.path}: key {prefix + row.key!r}",
                             f"is {shown(found)}, the other keys imply {sizes[row.symbol]}")
