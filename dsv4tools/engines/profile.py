"""Reading templates/engines/*.toml: what one state of one engine takes, and in which words it refuses.

docs/engines.md says what the tables mean and how to add one.
"""

from __future__ import annotations

import string
import tomllib
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dsv4tools.engines.checks import CHECKS
from dsv4tools.engines.verdict import SEVERITIES, Severity
from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.table import FORMATS
from dsv4tools.gguf.values import VALUE_TYPES
from dsv4tools.resources import data_directory
from dsv4tools.template.symbols import SYMBOLS
from dsv4tools.template.tables import load_tables

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_MAX_PROFILE_BYTES = 1_000_000
_Row = TypeVar("_Row")
Value = Any   # a number, a string, a bool, or a list of them: what TOML and metadata hold


@dataclass(frozen=True, slots=True)
class Reader:
    """How the engine reads values of a kind.

    `types` are what it takes, arrays as ``arr[i32]``. `missing` is what it says where there is no such key. Where the
    type is another it says `wrong_type`; for an array of another item type `wrong_item`, or `unknown_item` where that
    type is none of the profile's `known_items`. Without `wrong_type` it goes on as if the key were absent.
    """

    types: tuple[str, ...]
    missing: str = ""
    wrong_type: str = ""
    wrong_item: str = ""
    unknown_item: str = ""


@dataclass(frozen=True, slots=True)
class MetadataRule:
    """Keys that the engine reads. `absent` is how grave it is if one is not there; empty if that is fine."""

    keys: tuple[str, ...]
    reader: str
    absent: str = "refuse"
    effect: str = ""
    remedy: str = ""
    when: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """A comparison (`CHECKS`) that the values of `keys` must pass.

    `of` is a value, the name of a key (its value, or the length of its array), or ``shape``: the value that the shape
    fixes. `when` limits the check to files in which each of its keys has one of the values listed there.
    """

    keys: tuple[str, ...]
    check: str
    of: Value = None
    severity: Severity = "refuse"
    message: str = ""
    effect: str = ""
    remedy: str = ""
    when: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shape:
    """A model that the engine knows: the values that select it, in the order of its checks, and those it fixes."""

    name: str
    values: dict[str, Value]
    fixed: dict[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorRule:
    """Types that the engine takes for the tensors that match a glob; the first rule that matches decides."""

    tensors: tuple[str, ...]
    types: tuple[str, ...]
    severity: Severity = "refuse"
    message: str = ""
    effect: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class OptionalTensor:
    """A tensor that may be absent, in layers of the kind `layers`; `absent` as in `MetadataRule`."""

    name: str
    shape: tuple[str, ...]
    layers: str = "all"
    absent: str = ""
    effect: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """Files with further layers that predict tokens ahead, which the profile does not describe.

    `count` is the key that counts these layers, `tensor` one that the first of them has; `effect` what is said then.
    """

    count: str
    tensor: str
    effect: str


@dataclass(frozen=True, slots=True)
class ExpertPairs:
    """Types of gate and up, and of down, that a backend computes; other pairs load and then fail."""

    backend: str
    pairs: tuple[tuple[str, str], ...]
    severity: Severity
    effect: str


@dataclass(frozen=True, slots=True)
class Messages:
    """What the engine says. An empty `extra_tensor` or `gate_up` means that it has nothing against it."""

    missing_tensor: str
    type: str
    dims: str
    n_dims: str = ""
    extra_tensor: str = ""
    gate_up: str = ""
    version: str = ""
    splits: str = ""
    shape: str = ""


@dataclass(frozen=True)
class Profile:
    """One state of one engine.

    Attributes
    ----------
    name:
        The file's name without ``.toml``.
    commit, repository:
        The state that the rules were taken from.
    evidence:
        ``run``: that state was seen to accept and refuse files as the rules say. ``read``: its source was read only.
    tables:
        The file of templates/ that names tensors and gives their shapes.
    gguf_versions, splits:
        Versions of GGUF that it reads, and whether it reads split files.
    vocabulary:
        The key whose value or length is the number of tokens.
    unknown_types:
        ggml types that it has no name for.
    trailing_ones:
        Whether dimensions of 1 at the end make no difference.
    reshaped:
        Globs of tensors of which only the number of values counts.
    known_items:
        Item types of arrays that it has a word for.
    draft:
        How files with layers that predict further tokens are known.
    shape_width:
        Characters that a dimension takes in its message about a shape, which then names all four of what it found;
        0: as many as it has, and no more dimensions.
    """

    name: str
    description: str
    repository: str
    commit: str
    evidence: str
    messages: Messages
    readers: dict[str, Reader]
    metadata: tuple[MetadataRule, ...]
    tensor: tuple[TensorRule, ...]
    note: str = ""
    tables: str = "deepseek4"
    gguf_versions: tuple[int, ...] = (2, 3)
    splits: bool = False
    vocabulary: str = "tokenizer.ggml.tokens"
    unknown_types: tuple[str, ...] = ()
    trailing_ones: bool = False
    reshaped: tuple[str, ...] = ()
    known_items: tuple[str, ...] = tuple(VALUE_TYPES)
    shape_width: int = 0
    draft: Draft | None = None
    shape: tuple[Shape, ...] = ()
    check: tuple[Check, ...] = ()
    optional: tuple[OptionalTensor, ...] = ()
    experts: tuple[ExpertPairs, ...] = ()

    def key(self, name: str) -> str:
        """The whole metadata key that a table of the profile calls `name`."""
        return name if name.startswith(_WHOLE_KEYS) else f"{load_tables(self.tables).architecture}.{name}"


_WHOLE_KEYS = ("general.", "tokenizer.", "split.")
_LISTS: dict[str, type[Any]] = {"metadata": MetadataRule, "check": Check, "shape": Shape, "tensor": TensorRule,
                                "optional": OptionalTensor, "experts": ExpertPairs}
# Words that a message may use in braces, besides the keys of a shape with underscores for dots.
MESSAGE_WORDS = frozenset({"key", "name", "found", "expected", "tensor", "type_id", "axis", "layer", "shape"})


def list_profiles() -> list[Profile]:
    """The profiles that the package ships, by name."""
    return [read_profile(path) for path in _shipped().values()]


def find_profile(name: str) -> Profile:
    """A shipped profile by name in any case, or a profile file by path; UsageError names the known ones."""
    known = _shipped()
    if name.lower() in known:
        return read_profile(known[name.lower()])
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return read_profile(path)
    names = ", ".join(p.stem for p in known.values())
    raise UsageError("--engine", f"{name!r} is neither a known engine ({names}) nor a profile file",
                     hint="none skips the check")


def _shipped() -> dict[str, Path]:
    """Name in lower case -> file, by name."""
    paths = sorted((data_directory("templates") / "engines").glob("*.toml"), key=lambda path: path.stem)
    return {path.stem.lower(): path for path in paths}


@cache
def read_profile(path: Path) -> Profile:
    """Read and check a profile; InputError names the table and the entry that is wrong."""
    try:
        with path.open("rb") as f:
            data = f.read(_MAX_PROFILE_BYTES + 1)
        if len(data) > _MAX_PROFILE_BYTES:
            raise InputError(path, f"is larger than {_MAX_PROFILE_BYTES:,} bytes, no profile")
        raw = tomllib.loads(data.decode())
    except OSError as e:
        raise InputError(path, f"cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise InputError(path, f"is not valid UTF-8 at byte {e.start}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise InputError(path, f"is not valid TOML: {e}", hint="mend that line") from None
    for key, kind in _LISTS.items():
        if key in raw:
            raw[key] = _rows(kind, raw[key], f"{path}: [[{key}]]")
    raw["messages"] = _row(Messages, raw.get("messages"), f"{path}: [messages]")
    if "draft" in raw:
        raw["draft"] = _row(Draft, raw["draft"], f"{path}: [draft]")
    readers = raw.get("readers")
    if not isinstance(readers, dict):
        raise InputError(f"{path}: [readers]", "is missing")
    raw["readers"] = {name: _row(Reader, r, f"{path}: [readers.{name}]") for name, r in readers.items()}
    profile: Profile = _row(Profile, raw | {"name": path.stem}, str(path))
    _check_profile(profile, path)
    return profile


def _rows(kind: type[_Row], raw: object, where: str) -> tuple[_Row, ...]:
    if not isinstance(raw, list):
        raise InputError(where, "is not a list of tables")
    return tuple(_row(kind, entry, f"{where} {i}") for i, entry in enumerate(raw, 1))


def _row(kind: type[_Row], raw: object, where: str) -> _Row:
    """A dataclass from a TOML table, with its annotations as the schema."""
    if not isinstance(raw, dict):
        raise InputError(where, "is missing, or is no table")
    schema = {f.name: str(f.type) for f in fields(kind)}  # type: ignore[arg-type]  # only dataclasses are given
    unknown = set(raw) - set(schema)
    if unknown:
        raise InputError(where, f"unknown entry {min(unknown)!r}, known are {', '.join(schema)}")
    values = {}
    for name, value in raw.items():
        given = tuple(tuple(v) if isinstance(v, list) else v for v in value) if isinstance(value, list) else value
        if not _fits(given, schema[name]):
            raise InputError(where, f"{name} is {str(value)[:80]}, expected {schema[name]}")
        values[name] = given if schema[name].startswith("tuple") else value
    try:
        return kind(**values)
    except TypeError as e:   # an entry that has no default is not there
        raise InputError(where, str(e).rpartition("() ")[2]) from None


def _fits(value: object, kind: str) -> bool:
    if kind == "Severity":
        return value in SEVERITIES
    simple: dict[str, type] = {"str": str, "bool": bool, "int": int}
    if kind in simple:
        return type(value) is simple[kind]
    if kind.startswith("dict["):
        return isinstance(value, dict)
    items = {"tuple[str, ...]": str, "tuple[int, ...]": int}
    if kind in items:
        return isinstance(value, tuple) and bool(value) and all(type(v) is items[kind] for v in value)
    if kind == "tuple[tuple[str, str], ...]":
        return isinstance(value, tuple) and all(isinstance(v, tuple) and [type(x) for x in v] == [str, str]
                                                for v in value)
    return kind == "Value" or (isinstance(value, tuple) and all(hasattr(v, "__dataclass_fields__") for v in value)) \
        or hasattr(value, "__dataclass_fields__")


def _check_profile(profile: Profile, path: Path) -> None:
    """Refuse names that mean nothing: each would be a rule that is never asked."""
    models = {p.stem for p in data_directory("templates").glob("*.toml")}
    if profile.tables not in models:
        raise InputError(path, f"unknown tables {profile.tables!r}, known are {', '.join(sorted(models))}")
    kinds = {"all", *load_tables(profile.tables).layer_kinds}
    absent = [*(r.absent for r in profile.metadata), *(o.absent for o in profile.optional)]
    formats = [*profile.unknown_types, *(t for r in profile.tensor for t in r.types),
               *(t for e in profile.experts for pair in e.pairs for t in pair)]
    value_types = [t.removeprefix("arr[").removesuffix("]") for r in profile.readers.values() for t in r.types]
    value_types += profile.known_items
    known: list[tuple[str, Iterable[str], Collection[str]]] = [
        ("reader", (r.reader for r in profile.metadata), profile.readers),
        ("absent", absent, ("", *SEVERITIES)),
        ("check", (c.check for c in profile.check), CHECKS),
        ("ggml type", formats, FORMATS),
        ("value type", value_types, VALUE_TYPES),
        ("symbol", (s for o in profile.optional for s in o.shape), SYMBOLS),
        ("layer kind", (o.layers for o in profile.optional), kinds),
        ("evidence", [profile.evidence], ("run", "read")),
    ]
    for what, names, allowed in known:
        for name in names:
            if name not in allowed:
                raise InputError(path, f"unknown {what} {name!r}, known are {', '.join(map(repr, allowed))}")
    words = MESSAGE_WORDS | {key.replace(".", "_") for s in profile.shape for key in s.values}
    texts = [getattr(profile.messages, f.name) for f in fields(Messages)]
    texts += [t for r in profile.readers.values() for t in (r.missing, r.wrong_type, r.wrong_item, r.unknown_item)]
    texts += [*(c.message for c in profile.check), *(r.message for r in profile.tensor)]
    for text in texts:
        _check_message(text, words, path)


def _check_message(text: str, words: frozenset[str], path: Path) -> None:
    try:
        used = {name for _, name, spec, _ in string.Formatter().parse(text) if name is not None
                if name not in words or spec}
    except ValueError as e:
        raise InputError(path, f"message {text!r}: {e}") from None
    if used:
        raise InputError(path, f"message {text!r} uses {{{min(used)}}}, known are {', '.join(sorted(words))}")
