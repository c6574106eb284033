"""A checkpoint: a directory of safetensors shards with config.json and tokenizer.json, opened and validated."""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4tools.checkpoint.card import ModelCard, read_card
from dsv4tools.checkpoint.config import Config, read_config
from dsv4tools.checkpoint.index import open_shards
from dsv4tools.checkpoint.vocabulary import Vocabulary, read_vocabulary
from dsv4tools.errors import InputError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsv4tools.checkpoint.shard import Shard
    from dsv4tools.formats.table import Format

# The hash layers' routing tables: expert ids by token id.
ROUTING_TABLE = re.compile(r"layers\.\d+\.ffn\.gate\.tid2eid")


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of a checkpoint.

    `shape` is the shape that the checkpoint shows; `stored_columns` is set where a view shows only the first columns
    of a wider matrix on disk. In a GGUF `format` is the tensor's ggml type (and `dtype` its name), and `expert` the one
    whose slice of a stacked tensor this is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard = field(repr=False)
    begin: int
    n_bytes: int
    stored_columns: int | None = None
    format: Format | None = None
    expert: int | None = None

    @property
    def where(self) -> str:
        """What messages call it."""
        expert = "" if self.expert is None else f" expert {self.expert}"
        return f"{self.shard.path.name}: tensor {self.name!r}{expert}"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, or a re-routed view of one (the same class: nothing else need know the difference).

    A GGUF that is a source is one too: `template.gguf_source.GgufSource` shows it under a checkpoint's names.

    Attributes
    ----------
    directory:
        Where it lies; of a GGUF the file.
    config:
        The structural values of config.json.
    shards, tensors:
        By name, in file order.
    stored_experts_per_token:
        What config.json itself says; differs from ``config.num_experts_per_tok`` in a re-routed view.
    reference:
        ``hf://owner/name@commit`` where the weights are on the Hub; `directory` then has the other files.
    """

    directory: Path
    config: Config
    shards: Mapping[str, Shard] = field(repr=False)
    tensors: Mapping[str, SourceTensor] = field(repr=False)
    stored_experts_per_token: int
    reference: str | None = None

    @property
    def label(self) -> str:
        """What a user calls it."""
        return self.reference or str(self.directory)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Tokens, types, merges and special ids, from the tokenizer files."""
        return read_vocabulary(self.directory, self.config.vocab_size)

    @cached_property
    def card(self) -> ModelCard:
        """What the checkpoint says of itself: name, license, base models, sampling defaults."""
        return read_card(self.directory)

    @property
    def n_source_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.n_file_bytes for shard in self.shards.values())


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a checkpoint directory: config and the headers of all shards, strictly validated; no weights are read.

    Raises
    ------
    InputError
        The directory is no checkpoint in the published layout; the message names file and key or tensor.
    ResourceError
        A file cannot be read.
    """
    directory = Path(directory)
    try:
        is_directory = stat.S_ISDIR(directory.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):   # ValueError: a zero byte in the path
        raise InputError(directory, "is missing") from None
    except OSError as e:
        raise ResourceError(directory, f"cannot be opened: {e.strerror}") from None
    if not is_directory:
        raise InputError(directory, "is no directory", hint="give the checkpoint's directory")
    config = read_config(directory / "config.json")
    return bind_checkpoint(directory, config, open_shards(directory))


def bind_checkpoint(
    directory: Path, config: Config, shards: Mapping[str, Shard], reference: str | None = None
) -> Checkpoint:
    """The checkpoint that these parts make; InputError where routing tables and config disagree."""
    tensors = {
        name: SourceTensor(name, t.dtype, t.shape, shard, t.begin, t.n_bytes)
        for shard in shards.values() for name, t in shard.tensors.items()
    }
    for name, t in tensors.items():
        if ROUTING_TABLE.fullmatch(name) and (len(t.shape) != 2 or t.shape[1] != config.num_experts_per_tok):
            raise InputError(t.where, f"has shape {list(t.shape)}, config.json says num_experts_per_tok = "
                             f"{config.num_experts_per_tok}", hint="table and config must agree")
    return Checkpoint(directory, config, shards, tensors, config.num_experts_per_tok, reference)
