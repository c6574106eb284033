"""A template: everything a GGUF says before its weights, derived from a checkpoint, or taken from a file or source."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4tools.checkpoint.strict_json import MAX_LISTED, listed
from dsv4tools.errors import InputError
from dsv4tools.gguf.splits import open_whole
from dsv4tools.template.gguf_source import GgufSource
from dsv4tools.template.metadata import general_entries, model_entries, tokenizer_entries
from dsv4tools.template.symbols import model_sizes
from dsv4tools.template.tables import load_tables
from dsv4tools.template.tensors import TemplateTensor, derive_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.formats.table import Format
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.gguf.values import KV

_TOKENS = "tokenizer.ggml.tokens"
# Entries that a conversion decides anew; a template file's own are dropped.
_RENEWED = ("general.file_type", "general.quantization_version", "general.quantized_by", "quantize.imatrix.", "split.",
            "dsv4tools.")
_HISTORY = tuple(key for key in _RENEWED if key != "split.")


@dataclass(frozen=True)
class Template:
    """Ordered metadata and ordered tensors, without types: those are the policy's.

    Attributes
    ----------
    kvs:
        Metadata entries in file order, without those that depend on the policy.
    tensors:
        In file order.
    alignment:
        Of the data section and every tensor, bytes.
    left_out:
        Pattern of source tensors left out on purpose -> how many there are.
    file_formats:
        The types in the template file, or in the GGUF that is the source, by tensor name; empty where there is neither.
    notes:
        What was changed in a template file or a source to fit, one sentence each.
    history:
        Entries of a source GGUF about how its tensors were encoded, by key; a plan says what still holds.
    """

    kvs: tuple[KV, ...] = field(repr=False)
    tensors: tuple[TemplateTensor, ...] = field(repr=False)
    alignment: int
    left_out: Mapping[str, int]
    file_formats: Mapping[str, Format] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    history: Mapping[str, KV] = field(default_factory=dict)


def derive_template(checkpoint: Checkpoint) -> Template:
    """The template of a checkpoint, by templates/deepseek4.toml; errors of `derive_tensors` and `read_vocabulary`.

    That of a source GGUF is its own, with the architecture's keys as a checkpoint would give them.
    """
    tables = load_tables()
    tensors, left_out = derive_tensors(checkpoint, tables)
    entries = model_entries(checkpoint.config, tables, model_sizes(checkpoint.config))
    if isinstance(checkpoint, GgufSource):
        return _take_over(checkpoint.file, tensors, {kv.key: kv for kv in entries}, left_out)
    kvs = [*general_entries(checkpoint, tables, tensors), *entries, *tokenizer_entries(checkpoint.vocabulary)]
    return Template(tuple(kvs), tensors, tables.alignment, left_out)


def _take_over(
    file: GgufFile, tensors: tuple[TemplateTensor, ...], model: Mapping[str, KV], left_out: Mapping[str, int]
) -> Template:
    """The template of a GGUF that is the source: its order and entries, but `model` keys as given."""
    by_name = {t.name: t for t in tensors}
    kvs, notes = [], []
    for key, held in file.kvs.items():
        if key.startswith(_RENEWED):
            continue
        own = model.get(key, held)
        kvs.append(own)
        if (held.type, held.item_type) != (own.type, own.item_type):
            notes.append(f"{key} written as {own.item_type or own.type}, the source has {held.item_type or held.type}")
    at = max((i for i, kv in enumerate(kvs, 1) if kv.key in model), default=len(kvs))
    missing = [own for key, own in model.items() if key not in file.kvs]
    kvs[at:at] = missing
    notes += [f"{kv.key} added, the source lacks it" for kv in missing]
    history = {key: kv for key, kv in file.kvs.items() if key.startswith(_HISTORY)}
    return Template(tuple(kvs), tuple(by_name[name] for name in file.tensors), file.alignment, left_out,
                    {name: t.format for name, t in file.tensors.items()}, tuple(notes), history)


def apply_template_file(derived: Template, path: Path) -> Template:
    """`derived`, with tensor order, metadata and tokenizer of the GGUF `path` (header-only, whole, or a part of a set).

    What the checkpoint implies must not be contradicted: every model value and every shape in the file is compared.
    Model keys are written with the checkpoint's types whatever type the file has them in, and keys that the file
    lacks are added; both are noted.

    Raises
    ------
    InputError
        The file is no GGUF, its tensors or shapes are not the checkpoint's, or a value contradicts it.
    """
    with open_whole(path, template=True) as file:
        return apply_template(derived, file)


def apply_template(derived: Template, file: GgufFile) -> Template:
    """`apply_template_file` for a file that is open already."""
    tensors = _order_tensors(derived, file)
    kvs, notes = _merge_entries(derived, file)
    formats = {name: t.format for name, t in file.tensors.items()}
    return replace(derived, kvs=tuple(kvs), tensors=tensors, alignment=file.alignment, file_formats=formats,
                   notes=tuple(notes))


def _order_tensors(derived: Template, file: GgufFile) -> tuple[TemplateTensor, ...]:
    ours = {t.name: t for t in derived.tensors}
    problems = []
    missing = [n for n in ours if n not in file.tensors]
    extra = [n for n in file.tensors if n not in ours]
    if missing:
        problems.append(f"lacks {len(missing)} tensors of the checkpoint: {listed(missing)}")
    if extra:
        problems.append(f"has {len(extra)} tensors that the checkpoint does not give: {listed(extra)}")
    problems += [
        f"tensor {name!r} is {list(file.tensors[name].ne)}, the checkpoint gives {list(t.ne)}"
        for name, t in ours.items() if name in file.tensors and file.tensors[name].ne != t.ne
    ]
    if problems:
        raise InputError(file.path, "; ".join(problems[:MAX_LISTED]), hint="use a template of the same model, or none")
    return tuple(ours[name] for name in file.tensors)


def _check_identity(ours: Mapping[str, KV], file: GgufFile) -> bool:
    """Refuse a file of another model; whether it brings a tokenizer of its own, with other tokens."""
    architecture = ours["general.architecture"].value
    if not _agree(file.value("general.architecture"), architecture):
        raise InputError(f"{file.path}: key 'general.architecture'",
                         f"is {_shown(file.value('general.architecture'))}, the checkpoint is {architecture!r}")
    if _TOKENS not in file.kvs:
        return False
    if _TOKENS not in ours:   # a source GGUF without a tokenizer
        return True
    where = f"{file.path}: key {_TOKENS!r}"
    if file.kvs[_TOKENS].item_type != "str":
        raise InputError(where, "is no list of strings")
    tokens, own = file.value(_TOKENS), ours[_TOKENS].value
    if len(tokens) != len(own):
        raise InputError(where, f"has {len(tokens)} tokens, the checkpoint's vocabulary has {len(own)}")
    return bool(tokens != own)


def _merge_entries(derived: Template, file: GgufFile) -> tuple[list[KV], list[str]]:
    ours = {kv.key: kv for kv in derived.kvs}
    has_other_tokens = _check_identity(ours, file)
    architecture = ours["general.architecture"].value
    merged, notes = [], []
    for key, kv in file.kvs.items():
        if key.startswith(_RENEWED):
            continue
        own = ours.get(key) if key.startswith(f"{architecture}.") else None
        merged.append(own or kv)
        if own is None:
            continue
        if not _agree(kv.value, own.value):
            raise InputError(f"{file.path}: key {key!r}",
                             f"is {_shown(kv.value)}, the checkpoint says {_shown(own.value)}")
        if (kv.type, kv.item_type) != (own.type, own.item_type):
            notes.append(f"{key} written as {own.item_type or own.type}, "
                         f"the template file has {kv.item_type or kv.type}")
    # What the checkpoint's tokenizer says of its tokens must not be mixed with others.
    wanted = (f"{architecture}.",) if has_other_tokens else (f"{architecture}.", "tokenizer.")
    for key, own in ours.items():
        if key.startswith(wanted) and key not in file.kvs:
            merged.append(own)
            notes.append(f"{key} added, the template file lacks it")
    return merged, notes


def _agree(theirs: Any, ours: Any) -> bool:  # noqa: ANN401  - metadata values are of any type
    theirs, ours = (v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v for v in (theirs, ours))
    if isinstance(ours, (list, tuple)):
        # compress_ratios may stop at the last layer: the entries behind it belong to draft blocks.
        return (isinstance(theirs, (list, tuple)) and len(theirs) <= len(ours) and not any(ours[len(theirs):])
                and all(map(_agree, theirs, ours)))
    if isinstance(ours, (str, bool)) or not isinstance(theirs, (int, float)) or isinstance(theirs, bool):
        return type(theirs) is type(ours) and bool(theirs == ours)
    with np.errstate(over="ignore"):   # a float64 beyond float32 agrees with nothing
        return bool(np.float32(theirs) == np.float32(ours) if isinstance(ours, float) else theirs == ours)


def _shown(value: Any) -> str:  # noqa: ANN401  - metadata values are of any type
    text = str(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 80 else text[:77] + "..."
