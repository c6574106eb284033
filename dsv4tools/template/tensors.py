"""The tensors of a GGUF, derived from a checkpoint: names, shapes and which source matrices each is made of.

Every tensor of the checkpoint is either used or left out by a rule that says why; anything unclaimed or missing is an
error that lists all of it, because each would be a silent fault in a file of 150 GB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from dsv4tools.checkpoint.matrix import SCALED_DTYPES, Matrix, bind_matrix, scale_name
from dsv4tools.checkpoint.strict_json import MAX_LISTED, listed
from dsv4tools.errors import InputError
from dsv4tools.template.symbols import layer_sizes, model_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsv4tools.checkpoint import Checkpoint, Config
    from dsv4tools.formats.table import Format
    from dsv4tools.template.tables import ModelTables, TensorRow


@dataclass(frozen=True, slots=True)
class TemplateTensor:
    """One tensor of the GGUF.

    Attributes
    ----------
    name:
        Its GGUF name.
    ne:
        Dimensions, fastest first.
    sources:
        The source matrices, stacked in this order: one, or one per expert.
    layer:
        Its layer, None for tensors of the whole model.
    source_names:
        What a checkpoint calls the sources, whatever they are called where they are read from.
    """

    name: str
    ne: tuple[int, ...]
    sources: tuple[Matrix, ...] = field(repr=False)
    layer: int | None
    source_names: tuple[str, ...] = field(default=(), repr=False)

    @property
    def holds_integers(self) -> bool:
        """Whether it is a routing table (I32), not weights."""
        return self.sources[0].kind is None

    @property
    def stored_format(self) -> Format | None:
        """The ggml type that its sources have already, in a GGUF; None where they are a checkpoint's."""
        return self.sources[0].stored_format

    @property
    def is_matrix(self) -> bool:
        """Whether a policy chooses its type: vectors stay F32, routing tables I32."""
        return len(self.ne) > 1 and not self.holds_integers

    @property
    def source_bytes(self) -> int:
        """Stored bytes of all sources, scales included."""
        return sum(matrix.n_bytes for matrix in self.sources)


def derive_tensors(checkpoint: Checkpoint, tables: ModelTables) -> tuple[tuple[TemplateTensor, ...], dict[str, int]]:
    """All tensors in file order, and how many source tensors each left-out rule claimed (pattern -> count).

    Raises
    ------
    InputError
        Source tensors that are missing or that nothing claims (all are listed), a layer of unknown kind, or a
        matrix whose shape, dtype or scale is not what config.json implies.
    """
    config = checkpoint.config
    check_layer_kinds(config, tables, f"{checkpoint.directory / 'config.json'}: key 'compress_ratios'")
    names = _source_names(checkpoint, tables)
    left_out = _check_claims(checkpoint, tables, [n for of_row in names for n in of_row])
    tensors = []
    for (row, layer, shape), of_row in zip(expand_rows(config, tables), names, strict=True):
        one = shape[1:] if row.is_stacked else shape
        sources = tuple(bind_matrix(checkpoint.tensors, n, one, config.weight_block_size) for n in of_row)
        for matrix in sources:
            if (matrix.kind is None) != row.integers:
                raise InputError(matrix.weight.where, f"has dtype {matrix.weight.dtype}, expected "
                                 f"{'I64 expert ids' if row.integers else 'weights'}")
        tensors.append(TemplateTensor(row.name.format(layer=layer), shape[::-1], sources, layer, tuple(of_row)))
    return tuple(tensors), left_out


def check_layer_kinds(config: Config, tables: ModelTables, where: object) -> None:
    """InputError names the first layer whose ratio is none of the tables'."""
    for at, ratio in enumerate(config.compress_ratios[: config.num_hidden_layers]):
        if ratio not in tables.overlaps:
            raise InputError(where, f"layer {at} has ratio {ratio}, an unknown layer kind",
                             hint=f"known are {', '.join(map(str, tables.overlaps))}")


def expand_rows(config: Config, tables: ModelTables) -> Iterator[tuple[TensorRow, int | None, tuple[int, ...]]]:
    """Each row with each of its layers and its shape there: model tensors first, then layer by layer."""
    sizes = model_sizes(config)
    for row in tables.tensors:
        if row.layers is None:
            yield row, None, tuple(sizes[s] for s in row.shape)
    for layer in range(config.num_hidden_layers):
        here = sizes | layer_sizes(config, layer, tables.overlaps)
        for row in tables.tensors:
            if row.layers is not None and tables.layer_kinds[row.layers].has(config, layer):
                yield row, layer, tuple(here[s] for s in row.shape)


def _source_names(checkpoint: Checkpoint, tables: ModelTables) -> list[list[str]]:
    """The source tensors of each row: one, or one per expert.

    Ends early where too many are missing to list: a false size in config.json must not make names without end.
    """
    names = []
    n_missing = 0
    n_experts = min(checkpoint.config.n_routed_experts, len(checkpoint.tensors) + MAX_LISTED)
    for row, layer, _ in expand_rows(checkpoint.config, tables):
        experts = range(n_experts) if row.is_stacked else [None]
        names.append([row.source.format(layer=layer, expert=e) for e in experts])
        n_missing += sum(n not in checkpoint.tensors for n in names[-1])
        if n_missing > MAX_LISTED:
            break
    return names


def _check_claims(checkpoint: Checkpoint, tables: ModelTables, names: list[str]) -> dict[str, int]:
    present = checkpoint.tensors
    # A plain matrix has no use for a scale: that one would change its values must not be passed over.
    scales = {n: scale_name(n) for n in names if n in present and present[n].dtype in SCALED_DTYPES}
    missing = [n for n in (*names, *scales.values()) if n not in present]
    claimed = {*names, *scales.values()}
    left_out = dict.fromkeys((rule.tensors for rule in tables.left_out), 0)
    unclaimed = []
    for name in present:
        if name in claimed:
            continue
        rule = next((r.tensors for r in tables.left_out if fnmatchcase(name, r.tensors)), None)
        if rule is None:
            unclaimed.append(name)
        else:
            left_out[rule] += 1
    problems = []
    if missing:
        problems.append(f"missing: {listed(missing)}")
    if unclaimed:
        problems.append(f"that nothing uses: {listed(unclaimed)}")
    if problems:
        c = checkpoint.config
        raise InputError(
            checkpoint.directory, f"source tensors {'; '.join(problems)}",
            hint=f"config.json (num_hidden_layers = {c.num_hidden_layers}, n_routed_experts = {c.n_routed_experts}, "
                 f"num_hash_layers = {c.num_hash_layers}) and shards do not describe the same model",
        )
    return left_out
