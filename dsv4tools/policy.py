"""Policies: ordered rules that give each matrix of a GGUF its ggml type, and say which rule decided.

A policy is a TOML file of ``[[rule]]`` tables (see policies/). The first rule that matches a tensor decides. Vectors
stay F32 and routing tables I32: a wildcard passes over them, a literal name is an error, because it cannot be obeyed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4tools.checkpoint.strict_json import shown
from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.codecs import ENCODABLE
from dsv4tools.formats.table import FORMATS, Format, find_format
from dsv4tools.resources import data_directory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dsv4tools.template import TemplateTensor

KEEP = "template"   # the policy, and the type, that keep what the template file has, or the source if it is a GGUF
KEEP_WORDS = frozenset({KEEP, "keep"})
_MAX_POLICY_BYTES = 1_000_000
_MAX_GLOB_LENGTH = 200
_MAX_GLOBS = 10_000          # five times the tensors of the largest model
_MAX_KEY_PARTS = 32
_STRING_OR_COMMENT = re.compile(
    r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|#[^\n]*')
_MAX_STARS = 4      # more serve nobody, and each multiplies the time that matching may take
_RULE_KEYS = {"tensors", "layers", "type", "optional"}


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes
    ----------
    tensors:
        Globs (``*``, ``?``, ``[...]``) on the whole GGUF name, or literal names.
    format:
        The type it gives; None keeps that of the template file or of the source GGUF.
    layers:
        Layers that it is limited to, or None.
    optional:
        Whether it may decide nothing.
    label:
        What messages and plans call it.
    excluded:
        Globs of names that it leaves to later rules; only command-line flags have them.
    """

    tensors: tuple[str, ...]
    format: Format | None
    layers: frozenset[int] | None = None
    optional: bool = False
    label: str = ""
    excluded: tuple[str, ...] = ()

    def matches(self, tensor: TemplateTensor) -> bool:
        """Whether the rule applies to `tensor`, by name and layer."""
        if self.layers is not None and tensor.layer not in self.layers:
            return False
        if any(fnmatchcase(tensor.name, glob) for glob in self.excluded):
            return False
        return any(fnmatchcase(tensor.name, glob) for glob in self.tensors)


@dataclass(frozen=True, slots=True)
class Policy:
    """A named list of rules.

    `file_type` is the LLAMA_FTYPE that it stands for; None: that of the type with most bytes. `flags` are rules from
    the command line, asked before the others. `path` is the file it was read from.
    """

    name: str
    description: str
    rules: tuple[Rule, ...]
    file_type: int | None = None
    flags: tuple[Rule, ...] = ()
    path: Path | None = None

    @property
    def sha256(self) -> str:
        """Hash of what the rules say; comments and file name do not count."""
        rules = [[r.tensors, r.format.name if r.format else KEEP, sorted(r.layers) if r.layers is not None else None,
                  r.excluded] for r in (*self.flags, *self.rules)]
        return hashlib.sha256(json.dumps(rules, separators=(",", ":")).encode()).hexdigest()

    def with_flags(self, flags: Sequence[Rule]) -> Policy:
        """The same rules with `flags` asked first; the policy then stands for no one file type."""
        if not flags:
            return self
        return replace(self, name=f"{self.name} with flags", file_type=None, flags=tuple(flags))


@dataclass(frozen=True, slots=True)
class Decision:
    """The type of one tensor, and the rule that decided it."""

    format: Format
    rule: str


def list_policies() -> list[Policy]:
    """The policies that the package ships, the default first."""
    paths = sorted(data_directory("policies").glob("*.toml"), key=lambda p: (p.stem != "q4k", p.stem))
    return [read_policy(path) for path in paths]


def load_policy(name: str | Path, option: str = "--policy") -> Policy:
    """A shipped policy by name, a policy file by path, or ``template`` (also called ``keep``); `option` named it.

    Raises
    ------
    UsageError
        Neither a shipped policy nor a file.
    InputError
        The file is no valid policy; the message names the line (syntax) or the rule.
    """
    if str(name) in KEEP_WORDS:
        return Policy(KEEP, "the types of the template file or of the source", (Rule(("*",), None, label="type kept"),))
    shipped = {path.stem: path for path in sorted(data_directory("policies").glob("*.toml"))}
    if str(name) in shipped:
        return read_policy(shipped[str(name)])
    if not os.path.isfile(name):  # noqa: PTH113  - the one in pathlib raises for names that are too long
        known = ", ".join(shipped)
        raise UsageError(option, f"{shown(str(name))} is neither a shipped policy ({known}) nor a file")
    return read_policy(Path(name))


def read_policy(path: Path) -> Policy:
    """Read a policy file; InputError names the line or the rule that is wrong."""
    try:
        with path.open("rb") as f:
            raw = f.read(_MAX_POLICY_BYTES + 1)
        if len(raw) > _MAX_POLICY_BYTES:
            raise InputError(path, f"is larger than {_MAX_POLICY_BYTES:,} bytes, no policy")
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
        _check_keys(text, path)
        table = tomllib.loads(text)
    except OSError as e:
        raise InputError(path, f"cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise InputError(path, f"is not valid UTF-8 at byte {e.start}") from None
    except (ValueError, RecursionError) as e:   # not only TOMLDecodeError: integers have their own limit of digits
        raise InputError(path, f"is not valid TOML: {e}", hint="mend that line") from None
    unknown = set(table) - {"description", "file_type", "rule"}
    if unknown:
        raise InputError(path, f"unknown key {min(unknown)!r}", hint="known are description, file_type and [[rule]]")
    rules, file_type = table.get("rule", []), table.get("file_type")
    if not isinstance(rules, list) or not rules or not all(isinstance(r, dict) for r in rules):
        raise InputError(path, "has no [[rule]] tables")
    if file_type is not None and (type(file_type) is not int or not 0 <= file_type < 1 << 31):
        raise InputError(f"{path}: key 'file_type'",
                         f"is {shown(file_type)}, expected llama.cpp's number of a file type")
    description = table.get("description", "")
    if not isinstance(description, str):
        raise InputError(f"{path}: key 'description'", f"is {shown(description)}, expected text")
    read = tuple(_read_rule(r, i, path) for i, r in enumerate(rules, 1))
    if sum(len(rule.tensors) for rule in read) > _MAX_GLOBS:
        raise InputError(path, f"has more than {_MAX_GLOBS:,} globs", hint="let one glob match many tensors")
    return Policy(path.stem, description, read, file_type, path=path)


def _check_keys(text: str, path: Path) -> None:
    """Refuse keys of very many parts, ``a.a.a``: the standard reader's time grows with the square of their number."""
    for number, line in enumerate(_STRING_OR_COMMENT.sub(lambda m: "\n" * m[0].count("\n"), text).split("\n"), 1):
        if line.count(".") > _MAX_KEY_PARTS:
            raise InputError(path, f"is no policy: line {number} has a key of more than {_MAX_KEY_PARTS} parts")


def _read_rule(raw: dict[str, Any], number: int, path: Path) -> Rule:
    globs = raw.get("tensors")
    where = f"{path}: rule {number} ({shown(globs)})"
    unknown = set(raw) - _RULE_KEYS
    if unknown:
        raise InputError(where, f"unknown key {min(unknown)!r}, known are {', '.join(sorted(_RULE_KEYS))}")
    globs = [globs] if isinstance(globs, str) else globs
    if not isinstance(globs, list) or not globs or not all(isinstance(g, str) for g in globs):
        raise InputError(where, "needs tensors: a glob or a list of globs")
    for glob in globs:
        check_glob(glob, where)
    if not isinstance(raw.get("type"), str):
        raise InputError(where, f"needs a type, has {shown(raw.get('type'))}")
    optional = raw.get("optional", False)
    if type(optional) is not bool:
        raise InputError(where, f"optional is {shown(optional)}, expected true or false")
    layers = raw.get("layers")
    return Rule(
        tuple(globs), _read_type(raw["type"], where), None if layers is None else _read_layers(layers, where), optional,
        f"{path.stem} rule {number}: {', '.join(globs)}",
    )


def _read_type(name: str, where: str) -> Format | None:
    if name.lower() in KEEP_WORDS:
        return None
    try:
        return find_format(name)
    except UsageError:
        raise InputError(where, f"unknown type {shown(name)}, known are {', '.join(FORMATS)}") from None


def is_glob(name: str) -> bool:
    """Whether `name` has wildcards."""
    return any(c in name for c in "*?[")


def check_glob(glob: str, where: str) -> None:
    """Refuse globs that could make matching slow or that no tensor name can match."""
    if not glob or len(glob) > _MAX_GLOB_LENGTH or not glob.isascii() or not glob.isprintable():
        raise InputError(where, f"{shown(glob)} is no glob of tensor names")
    if glob.count("*") > _MAX_STARS:
        raise InputError(where, f"{glob!r} has more than {_MAX_STARS} stars", hint="name the tensors more directly")
    if glob.count("[") != glob.count("]"):
        raise InputError(where, f"{glob!r} has an unbalanced bracket")


def _read_layers(text: Any, where: str) -> frozenset[int]:  # noqa: ANN401  - unchecked TOML
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return frozenset({text})
    layers: set[int] = set()
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise InputError(where, f"layers is {shown(text)}, expected numbers and ranges such as '0-2,5'")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(layers)


def decide_formats(
    policy: Policy, tensors: Iterable[TemplateTensor], file_formats: Mapping[str, Format]
) -> dict[str, Decision]:
    """Each tensor's type, and the rule that decided it.

    Raises
    ------
    InputError
        A matrix that no rule matches, a row that is not a whole number of blocks, a rule that decides nothing and is
        not optional, a rule that names a vector or routing table, a type that only a template file could give.
    """
    decided: dict[str, Decision] = {}
    used: set[Rule] = set()
    for tensor in tensors:
        if not tensor.is_matrix:
            _refuse_literal(policy, tensor)
            name = "I32" if tensor.holds_integers else "F32"
            decided[tensor.name] = Decision(FORMATS[name], "routing table" if tensor.holds_integers else "vector")
            continue
        flag = next((rule for rule in policy.flags if rule.matches(tensor)), None)
        rule = next((rule for rule in policy.rules if rule.matches(tensor)), None)
        # A rule that a flag overrides has still found its tensor.
        used.update(r for r in (flag, rule) if r is not None)
        rule = flag or rule
        if rule is None:
            raise InputError(policy.path or policy.name, f"no rule matches tensor {tensor.name!r}",
                             hint='end the policy with a rule for "*"')
        decided[tensor.name] = Decision(_choose(policy, rule, tensor, file_formats), rule.label)
    for rule in (*policy.flags, *policy.rules):
        if rule not in used and not rule.optional:
            raise InputError(_place(policy, rule), "decides no tensor",
                             hint="earlier rules took all it matches, or the name is wrong; optional = true allows it")
    return decided


def _place(policy: Policy, rule: Rule) -> str:
    """Where a user finds `rule`: the flag, or the file with the rule's number and globs."""
    return rule.label if rule in policy.flags or policy.path is None else f"{policy.path}: {rule.label}"


def _choose(policy: Policy, rule: Rule, tensor: TemplateTensor, file_formats: Mapping[str, Format]) -> Format:
    where = f"{_place(policy, rule)}: tensor {tensor.name!r}"
    chosen = rule.format or file_formats.get(tensor.name)
    if chosen is None:
        raise InputError(where, "is to keep its type and has none yet", hint="give a template file, or a GGUF as SRC")
    if chosen.name not in ENCODABLE and chosen != tensor.stored_format:
        raise InputError(where, f"type {chosen.name} cannot be written, can be are {', '.join(sorted(ENCODABLE))}")
    try:
        chosen.row_bytes(tensor.ne[0], where)
    except InputError as e:
        raise InputError(e.where, e.what, hint="give it a type of smaller blocks, in a rule before this one or by "
                         f"--tensor-type {tensor.name}=TYPE") from None
    return chosen


def _refuse_literal(policy: Policy, tensor: TemplateTensor) -> None:
    for rule in (*policy.flags, *policy.rules):
        if tensor.name in rule.tensors:
            kind = "routing table, which is always I32" if tensor.holds_integers else "vector, which is always F32"
            raise InputError(_place(policy, rule), f"{tensor.name!r} is a {kind}",
                             hint="take it out of the rule")
