"""Judging tensors: are they all there, none too many, in shapes and types that the engine takes."""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import translate
from functools import cache
from math import prod
from typing import TYPE_CHECKING

from dsv4tools.engines.checks import either
from dsv4tools.engines.metadata import CONVERT_AGAIN
from dsv4tools.engines.verdict import EngineFinding, Severity
from dsv4tools.gguf.rules import MAX_DIMS
from dsv4tools.template.symbols import model_sizes
from dsv4tools.template.tables import load_tables
from dsv4tools.template.tensors import expand_rows

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from dsv4tools.checkpoint import Config
    from dsv4tools.engines.header import Header
    from dsv4tools.engines.profile import OptionalTensor, Profile, TensorRule
    from dsv4tools.gguf.header import TensorInfo

# A finding, and what makes it one with others: the same rule broken in the same way.
_Found = tuple["Hashable", EngineFinding]
_MAX_MISSING = 10_000   # a made-up block_count must not keep us busy for hours


def judge_tensors(profile: Profile, header: Header, config: Config) -> list[EngineFinding]:
    """All findings about tensors; what is wrong in the same way in many layers is one finding."""
    grouped: dict[Hashable, EngineFinding] = {}
    for key, finding in _judge(profile, header, config):
        first = grouped.get(key)
        grouped[key] = finding if first is None else replace(first, n=first.n + 1)
    return list(grouped.values())


def _judge(profile: Profile, header: Header, config: Config) -> Iterator[_Found]:
    wanted: set[str] = set()
    n_missing = 0
    for row, optional, name, ne in _expected(profile, config):
        wanted.add(name)
        info = header.tensors.get(name)
        if info is not None:
            yield from _judge_type(profile, row, info)
            yield from _judge_dims(profile, row, info, ne)
        elif optional is None:
            n_missing += 1
            message = profile.messages.missing_tensor.format(tensor=name)
            yield ("missing", row), EngineFinding("refuse", name, "missing", "a tensor of this name", message,
                                                  remedy=CONVERT_AGAIN)
            if n_missing > _MAX_MISSING:
                return
        elif optional.absent:
            yield ("missing", row), EngineFinding(_severity(optional.absent), name, "missing", "a tensor of this name",
                                                  effect=optional.effect, remedy=CONVERT_AGAIN)
    extra = [name for name in header.tensors if name not in wanted]
    for name in extra:
        if profile.messages.extra_tensor:
            message = profile.messages.extra_tensor.format(
                tensor=name, found=len(header.tensors) - len(extra), expected=len(header.tensors))
            yield "extra", EngineFinding("refuse", name, "a tensor that the engine does not know", "none", message,
                                         remedy="leave it out")
        else:
            yield "extra", EngineFinding("note", name, "a tensor that the engine does not know", "none",
                                         effect="it is not read")
    yield from _judge_experts(profile, header, config)


def _expected(
    profile: Profile, config: Config
) -> Iterator[tuple[str, OptionalTensor | None, str, tuple[int, ...]]]:
    """Row, whether it may be absent, name and ne (fastest first) of each tensor that the engine looks for."""
    tables = load_tables(profile.tables)
    optional = {o.name: o for o in profile.optional}
    named = set()
    for row, layer, shape in expand_rows(config, tables):
        name = row.name.format(layer=layer)
        named.add(name)
        yield row.name, optional.get(row.name), name, shape[::-1]
    sizes = model_sizes(config)
    for o in profile.optional:   # in layers in which the tables do not have them
        for layer in range(config.num_hidden_layers):
            name = o.name.format(layer=layer)
            if name not in named and (o.layers == "all" or tables.layer_kinds[o.layers].has(config, layer)):
                yield o.name, replace(o, absent=""), name, tuple(sizes[s] for s in reversed(o.shape))


@cache
def _any_of(globs: tuple[str, ...]) -> re.Pattern[str]:
    """Matches what one of `globs` matches."""
    return re.compile("|".join(map(translate, globs)))


def _judge_type(profile: Profile, row: str, info: TensorInfo) -> Iterator[_Found]:
    rule = next((r for r in profile.tensor if _any_of(r.tensors).match(info.name)), None)
    if rule is None or info.format.name in rule.types:
        return
    unknown = info.format.name in profile.unknown_types
    message = (rule.message or profile.messages.type).format(
        tensor=info.name, type_id=info.format.type_id, found="unknown" if unknown else info.format.name.lower(),
        expected=rule.types[0].lower()) if rule.severity == "refuse" else rule.message
    yield ("type", row, info.format), EngineFinding(
        rule.severity, info.name, info.format.name, either(rule.types), message, rule.effect,
        rule.remedy or f"give it one of these types: --tensor-type {_flag(row, rule)}")


def _flag(row: str, rule: TensorRule) -> str:
    return f"'{row.format(layer='*')}={rule.types[0].lower()}'"


def _judge_dims(profile: Profile, row: str, info: TensorInfo, ne: tuple[int, ...]) -> Iterator[_Found]:
    found, expected = info.ne, ne
    if profile.trailing_ones:
        found, expected = _without_ones(found), _without_ones(expected)
    if profile.reshaped and _any_of(profile.reshaped).match(info.name):
        found, expected = (prod(found),), (prod(expected),)
    if found == expected:
        return
    text = profile.messages
    if text.n_dims and len(found) != len(expected):
        message = text.n_dims.format(tensor=info.name, found=len(found), expected=len(expected))
    else:
        axis = next((i for i, (f, e) in enumerate(zip(found, expected, strict=False)) if f != e), 0)
        values = (info.ne[axis], ne[axis]) if text.n_dims else _in_its_words(profile, info.ne, ne)
        message = text.dims.format(tensor=info.name, axis=axis, found=values[0], expected=values[1])
    yield ("dims", row, info.ne), EngineFinding(
        "refuse", info.name, f"[{_listed(info.ne)}]", f"[{_listed(ne)}]", message,
        remedy="metadata and tensors are not of one model: convert the checkpoint again")


def _without_ones(ne: tuple[int, ...]) -> tuple[int, ...]:
    while len(ne) > 1 and ne[-1] == 1:
        ne = ne[:-1]
    return ne


def _in_its_words(profile: Profile, found: Sequence[int], expected: Sequence[int]) -> tuple[str, str]:
    width = profile.shape_width
    whole = (*found, *[1] * (MAX_DIMS - len(found))) if width else found
    return _listed(whole, width), _listed(expected, width)


def _listed(ne: Sequence[int], width: int = 0) -> str:
    return ", ".join(f"{n:{width}}" for n in ne)


def _judge_experts(profile: Profile, header: Header, config: Config) -> Iterator[_Found]:
    """Types of the experts' matrices that only count together."""
    for layer in range(config.num_hidden_layers):
        names = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
        if not all(name in header.tensors for name in names):
            if layer > len(header.tensors):
                return
            continue
        gate, up, down = (header.tensors[name].format.name for name in names)
        if gate != up:
            if profile.messages.gate_up:
                yield ("gate-up", gate, up), EngineFinding(
                    "refuse", names[1], up, f"{gate} like {names[0]}", profile.messages.gate_up.format(layer=layer),
                    remedy=f"give both one type: --tensor-type 'blk.*.ffn_up_exps.weight={gate.lower()}'")
            continue
        for backend in profile.experts:
            if (gate, down) not in backend.pairs:
                pairs = either(f"{g}/{d}" for g, d in backend.pairs)
                yield ("pair", backend.backend, gate, down), EngineFinding(
                    backend.severity, f"blk.{layer}.ffn_*_exps.weight", f"gate and up {gate}, down {down}",
                    f"{pairs} on {backend.backend}", effect=backend.effect, remedy="choose one of these pairs of types")


def _severity(absent: str) -> Severity:
    return "wrong-numbers" if absent == "wrong-numbers" else "note"
