"""What a checkpoint says of itself outside its weights: model card, sampling defaults, origin."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from dsv4tools.checkpoint.strict_json import read_json_object, read_small_file, shown
from dsv4tools.errors import InputError

RECEIPT = Path(".cache/dsv4tools/download.json")
"""Where `dsv4tools download` notes, below the directory it fills, what it fetched from where."""
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)
_MAX_DEPTH = 100
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127
# generation_config.json key -> what llama.cpp calls it under general.sampling
SAMPLING_KEYS = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp"}


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Facts about a checkpoint for the ``general.*`` keys; what it does not say is None or empty.

    `repository` and `revision` are those of the Hub where the directory is a snapshot in its cache, or was fetched by
    `dsv4tools download`.
    """

    name: str
    license: str | None = None
    base_models: tuple[str, ...] = ()
    sampling: dict[str, int | float] = field(default_factory=dict)
    repository: str | None = None
    revision: str | None = None


def read_card(directory: Path) -> ModelCard:
    """Read README.md's front matter and generation_config.json, both optional; InputError where one is malformed."""
    front = _read_front_matter(directory / "README.md")
    repository, revision = _find_origin(directory)
    name = _text(front.get("model_name") or front.get("name")) or (repository or "").split("/")[-1]
    return ModelCard(
        name or _directory_name(directory), _text(front.get("license")), _texts(front.get("base_model")),
        _read_sampling(directory / "generation_config.json"), repository, revision,
    )


def _directory_name(directory: Path) -> str:
    # A file system may hold names that are no text; a GGUF may not.
    return os.fsencode(directory.resolve().name).decode("utf-8", errors="replace")


def _find_origin(directory: Path) -> tuple[str | None, str | None]:
    home = directory.resolve()
    if (home / RECEIPT).is_file():
        receipt = read_json_object(home / RECEIPT, max_bytes=10_000_000)
        repository, revision = receipt.get("repository"), receipt.get("revision")
        return _text(repository), revision if isinstance(revision, str) and _COMMIT.fullmatch(revision) else None
    cache = home.parent.parent.name
    if home.parent.name != "snapshots" or not cache.startswith("models--"):
        return None, None
    return cache.removeprefix("models--").replace("--", "/", 1), home.name if _COMMIT.fullmatch(home.name) else None


def _read_front_matter(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    text = read_small_file(path, max_bytes=10_000_000).decode("utf-8-sig", errors="replace")
    match = _FRONT_MATTER.match(text[:100_000])
    if match is None:
        return {}
    if _depth(match[1]) > _MAX_DEPTH:
        raise InputError(path, "front matter is nested too deeply", hint="mend or remove it")
    import yaml  # noqa: PLC0415  - only checkpoints with a model card need it

    try:
        # The base loader gives text, lists and mappings and nothing else. The others give meanings to values, which
        # a date such as 2024-13-45 breaks with errors of any class, and merge keys, which a few lines make explode.
        front = yaml.load(match[1], Loader=yaml.BaseLoader)  # noqa: S506  - it constructs nothing
    except (yaml.YAMLError, RecursionError) as e:
        problem = shown(str(e).splitlines()[0])
        raise InputError(path, f"front matter is not valid YAML: {problem}", hint="mend or remove it") from None
    return front if isinstance(front, dict) else {}


def _depth(text: str) -> int:
    """How deep brackets are nested, quoted ones counted too: PyYAML takes minutes for some ten thousand."""
    return max(accumulate((c in "[{") - (c in "]}") for c in text), default=0)


def _text(value: Any) -> str | None:  # noqa: ANN401  - unchecked YAML
    return value.encode("utf-8", errors="replace").decode() if isinstance(value, str) and value not in _NULL else None


def _texts(value: Any) -> tuple[str, ...]:  # noqa: ANN401  - unchecked YAML
    items = value if isinstance(value, list) else [value]
    return tuple(text for text in map(_text, items) if text is not None)


def _read_sampling(path: Path) -> dict[str, int | float]:
    if not path.exists():
        return {}
    raw = read_json_object(path, max_bytes=1_000_000)
    values = {old: raw[old] for old in SAMPLING_KEYS if raw.get(old) is not None}
    for key, value in values.items():
        kinds, largest = ((int,), 2**31 - 1) if key == "top_k" else ((int, float), _LARGEST_FLOAT32)
        if type(value) not in kinds or abs(value) > largest:
            expected = "an integer" if key == "top_k" else "a number"
            raise InputError(f"{path}: key {key!r}", f"is {shown(value)}, expected {expected}")
    return {SAMPLING_KEYS[key]: value for key, value in values.items()}
