"""Judging metadata: which keys the engine can read, whether it knows the model, what it demands of the values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4tools.engines.checks import CHECKS, either, shown
from dsv4tools.engines.header import value_type
from dsv4tools.engines.verdict import EngineFinding
from dsv4tools.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsv4tools.engines.header import Header
    from dsv4tools.engines.profile import Check, MetadataRule, Profile, Shape
    from dsv4tools.engines.verdict import Severity

CONVERT_AGAIN = "convert the checkpoint again: dsv4tools writes what this engine reads"
_LISTED = 3   # differences from the nearest shape that a message names


class Metadata:
    """The values that the engine can read (`values`), and what it says of those that it cannot (`findings`)."""

    def __init__(self, profile: Profile, header: Header) -> None:
        self.profile, self.header = profile, header
        self.values: dict[str, Any] = {}
        self.findings = [f for rule in profile.metadata if self.applies(rule.when) for name in rule.keys
                         for f in self._read(rule, name)]

    def applies(self, when: dict[str, Any]) -> bool:
        """Whether each key has one of the values listed for it; an empty list asks that it is absent."""
        have = self.header.values
        keys = {self.profile.key(name): allowed for name, allowed in when.items()}
        return all(have.get(key) in allowed if allowed else key not in have for key, allowed in keys.items())

    def _read(self, rule: MetadataRule, name: str) -> Iterator[EngineFinding]:
        key, reader = self.profile.key(name), self.profile.readers[rule.reader]
        kv = self.header.kvs.get(key)
        expected = either(reader.types)
        remedy = rule.remedy or CONVERT_AGAIN
        if kv is not None and value_type(kv) in reader.types:
            self.values[key] = self.header.values[key]
        elif kv is not None and reader.wrong_type:
            by_item = bool(kv.type == "arr" and reader.wrong_item)
            unknown = bool(reader.unknown_item) and kv.item_type not in self.profile.known_items
            text = reader.wrong_type if not by_item else reader.unknown_item if unknown else reader.wrong_item
            message = text.format(key=key, name=name, found=kv.item_type if by_item else kv.type,
                                  expected=reader.types[0])
            yield EngineFinding("refuse", key, value_type(kv), expected, message, remedy=remedy)
        elif rule.absent == "refuse":
            found = "missing" if kv is None else value_type(kv)
            yield EngineFinding("refuse", key, found, expected, reader.missing.format(key=key, name=name), rule.effect,
                                remedy)
        elif rule.absent or kv is not None:
            severity: Severity = "wrong-numbers" if rule.absent == "wrong-numbers" else "note"
            found = "missing" if kv is None else f"{value_type(kv)}, which it passes over"
            yield EngineFinding(severity, key, found, expected, effect=rule.effect, remedy=remedy)


def judge_shape(metadata: Metadata) -> tuple[Shape | None, EngineFinding | None]:
    """The engine's shape that the values come closest to, and a finding if they are not it.

    (None, None) where the engine fixes no shape, or where a value that selects one cannot be read. A model of another
    shape gets one finding: its fields are no faults one by one.
    """
    profile = metadata.profile
    keys = {profile.key(key) for shape in profile.shape for key in shape.values}
    if not profile.shape or not keys <= set(metadata.values):
        return None, None
    shape = min(profile.shape, key=lambda s: len(_differences(metadata, s)))
    different = _differences(metadata, shape)
    if not different:
        return shape, None
    name, found, expected = different[0]
    words = {key.replace(".", "_"): shown(metadata.values[profile.key(key)]) for key in shape.values}
    message = profile.messages.shape.format(**words | {
        "name": name, "found": shown(found), "expected": shown(_as_list(expected)[0]), "shape": shape.name})
    listed = [f"{n} {either(map(shown, _as_list(e)))} (is {shown(f)})" for n, f, e in different[:_LISTED]]
    if len(different) > _LISTED:
        listed.append(f"{len(different) - _LISTED} more")
    where = profile.key(name) if len(different) == 1 else "model shape"
    return shape, EngineFinding("refuse", where, f"not a {either(map(_short, profile.shape))} shape",
                                f"{', '.join(listed)} as in {_short(shape)}", message,
                                remedy="no setting changes that: use an engine that loads it")


def _short(shape: Shape) -> str:
    return shape.name.rsplit(" ", 1)[-1]


def _differences(metadata: Metadata, shape: Shape) -> list[tuple[str, Any, Any]]:
    found = ((name, metadata.values[metadata.profile.key(name)], expected) for name, expected in shape.values.items())
    return [(name, value, expected) for name, value, expected in found if value not in _as_list(expected)]


def judge_values(metadata: Metadata, shape: Shape | None) -> Iterator[EngineFinding]:
    """The profile's checks of values that could be read: the first failure of each key."""
    failed: set[str] = set()
    for check in metadata.profile.check:
        for name in check.keys:
            key = metadata.profile.key(name)
            if key in metadata.values and key not in failed and metadata.applies(check.when):
                for finding in _compare(metadata, shape, check, name):
                    failed.add(key)
                    yield finding
                    break


def _compare(metadata: Metadata, shape: Shape | None, check: Check, name: str) -> Iterator[EngineFinding]:
    key, comparison = metadata.profile.key(name), CHECKS[check.check]
    limit, origin = _limit(metadata, shape, check, name)
    if limit is None and check.of is not None:
        return   # what it is to be compared with cannot be read: that has its own finding
    for layer, value, of in _pairs(metadata, check, metadata.values[key], limit):
        try:
            holds = comparison.holds(value, of)
        except TypeError:
            raise InputError(f"engine profile {metadata.profile.name}: check {check.check!r} of {name!r}",
                             f"cannot compare {shown(value)} with {shown(of)}") from None
        if not holds:
            found = len(value) if isinstance(value, list) else value
            words = {"key": key, "name": name, "found": shown(found), "expected": shown(of), "layer": layer,
                     "shape": shape.name if shape else ""}
            yield EngineFinding(
                check.severity, key if layer is None else f"{key}[{layer}]",
                f"{found} items" if isinstance(value, list) else shown(value),
                comparison.expected.format(of=shown(of)) + origin, check.message.format(**words), check.effect,
                check.remedy or CONVERT_AGAIN)


def _limit(metadata: Metadata, shape: Shape | None, check: Check, name: str) -> tuple[Any, str]:
    """What to compare with, and in words where it comes from."""
    if check.of == "shape":
        return (None, "") if shape is None else (shape.fixed.get(name), f" ({_short(shape)})")
    if not isinstance(check.of, str):
        return check.of, ""
    value = metadata.values.get(metadata.profile.key(check.of))
    return len(value) if isinstance(value, list) else value, f" ({check.of})"


def _pairs(metadata: Metadata, check: Check, value: Any, limit: Any) -> Iterator[tuple[int | None, Any, Any]]:  # noqa: ANN401  - metadata and TOML hold values of many types
    """(layer or None, value, what to compare it with): several where items are compared one by one."""
    comparison = CHECKS[check.check]
    if comparison.whole:
        if isinstance(value, list):
            for of in limit if isinstance(limit, list) else [limit]:
                yield None, value, of
    elif isinstance(value, list):
        n_layers = metadata.values.get(metadata.profile.key("block_count"), len(value))
        per_layer = check.of == "shape" and isinstance(limit, list)
        for layer, item in enumerate(value[:n_layers]):
            if not per_layer or layer < len(limit):
                yield layer, item, limit[layer] if per_layer else limit
    else:
        yield None, value, limit


def _as_list(value: Any) -> list[Any]:  # noqa: ANN401  - see _pairs
    return value if isinstance(value, list) else [value]
