"""Opening a model from either side: the tensors of a checkpoint, or of a GGUF, under the same names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.checkpoint import Checkpoint, open_checkpoint
from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.codecs import DECODABLE
from dsv4tools.gguf.splits import SplitFile, open_whole
from dsv4tools.model.model import Model
from dsv4tools.model.stored import CheckpointTensor, GgufTensor
from dsv4tools.model.weights import Weights
from dsv4tools.plan import TEMPLATE_KEY
from dsv4tools.reroute import reroute
from dsv4tools.template.gguf_config import read_gguf_config
from dsv4tools.template.tables import load_tables
from dsv4tools.template.tensors import derive_tensors, expand_rows

if TYPE_CHECKING:
    from dsv4tools.checkpoint import Config
    from dsv4tools.gguf.reader import GgufFile


def open_model(
    source: str | Path | Checkpoint, *, experts_per_token: int | None = None,
    dtype: type[np.floating[Any]] = np.float32, threads: int | None = None,
) -> Model:
    """Open a model to run: headers are read and checked, no weights. Close it, or use it as a context manager.

    Parameters
    ----------
    source:
        A checkpoint (directory, opened, or a re-routed view of one), or a GGUF file, or a part of a split one.
    experts_per_token:
        Route each token to fewer experts than the checkpoint does.
    dtype:
        Of the arithmetic: float32 or float64.
    threads:
        How many share a product; all usable cores by default.

    Raises
    ------
    InputError
        Missing tensors (all are listed), a wrong shape, an unknown layer kind, a type that cannot be decoded.
    UsageError
        `experts_per_token` for a GGUF, or more than the checkpoint has.
    """
    if isinstance(source, Checkpoint):
        checkpoint = source
    elif Path(source).is_dir():
        checkpoint = open_checkpoint(source)
    else:
        if experts_per_token is not None:
            raise UsageError("--experts-per-token", "is for checkpoints: a GGUF is made for one number of experts",
                             hint="re-route the GGUF, or give the checkpoint")
        return _open_gguf_model(Path(source), dtype, threads)
    if experts_per_token is not None:
        checkpoint = reroute(checkpoint, experts_per_token)
    _check_supported(checkpoint.config, checkpoint.directory)
    tensors, _ = derive_tensors(checkpoint, load_tables())
    stored = {t.name: CheckpointTensor(t) for t in tensors}
    paths = [shard.path for shard in checkpoint.shards.values()]
    return Model(Weights(checkpoint.config, stored, paths, dtype=dtype, threads=threads))


def _open_gguf_model(path: Path, dtype: type[np.floating[Any]], threads: int | None) -> Model:
    file = open_whole(path, template=True)
    try:
        _check_weights(file)
        config = read_gguf_config(file)
        _check_supported(config, path)
        stored = bind_tensors(file, config)
        paths = [part.path for part in file.parts] if isinstance(file, SplitFile) else [path]
        return Model(Weights(config, stored, paths, dtype=dtype, threads=threads, close=file.close))
    except BaseException:
        file.close()
        raise


def _check_weights(file: GgufFile) -> None:
    if file.template or file.value(TEMPLATE_KEY) is True:
        raise InputError(file.path, "is a template: it holds no weights", hint="convert the checkpoint first")


def _check_supported(config: Config, where: object) -> None:
    if (config.n_group or 0) > 1:
        raise InputError(where, f"routes within {config.n_group} groups of experts, expected none",
                         hint="no DeepSeek-V4 does, and no engine would")
    if config.sliding_window < 1:
        raise InputError(where, "has a sliding window of 0 tokens, expected at least the token itself")


def bind_tensors(file: GgufFile, config: Config) -> dict[str, GgufTensor]:
    """The tensors that a model of `config` needs; InputError lists all that are missing, misshapen or undecodable."""
    missing, problems, found = [], [], {}
    for row, layer, shape in expand_rows(config, load_tables()):
        name = row.name.format(layer=layer)
        info = file.tensors.get(name)
        if info is None:
            missing.append(name)
            continue
        allowed = {"I32"} if row.integers else DECODABLE
        if info.ne != shape[::-1]:
            problems.append(f"tensor {name} is {list(info.ne)}, the metadata imply {list(shape[::-1])}")
        elif info.format.name not in allowed:
            problems.append(f"tensor {name} is {info.format.name}, expected {', '.join(sorted(allowed))}")
        else:
            found[name] = GgufTensor(file, info)
    if missing:
        problems.insert(0, f"{len(missing)} tensors missing: {', '.join(missing)}")
    if problems:
        raise InputError(file.path, "; ".join(problems))
    return found
