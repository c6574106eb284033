"""What a checkpoint says of itself outside its weights: model card, sampling defaults, origin."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4tools.checkpoint.strict_json import read_json_object, read_small_file
from dsv4tools.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# generation_config.json key -> what llama.cpp calls it under general.sampling
SAMPLING_KEYS = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp"}


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Facts about a checkpoint for the ``general.*`` keys; what it does not say is None or empty.

    `repository` and `revision` are those of the Hub where the directory is a snapshot in its cache.
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
        name or directory.resolve().name, _text(front.get("license")), _texts(front.get("base_model")),
        _read_sampling(directory / "generation_config.json"), repository, revision,
    )


def _find_origin(directory: Path) -> tuple[str | None, str | None]:
    home = directory.resolve()
    cache = home.parent.parent.name
    if home.parent.name != "snapshots" or not cache.startswith("models--"):
        return None, None
    return cache.removeprefix("models--").replace("--", "/", 1), home.name if _COMMIT.fullmatch(home.name) else None


def _read_front_matter(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    text = read_small_file(path, max_bytes=10_000_000).decode("utf-8", errors="replace")
    match = _FRONT_MATTER.match(text[:100_000])
    if match is None:
        return {}
    import yaml  # noqa: PLC0415  - only checkpoints with a model card need it

    try:
        front = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError) as e:
        problem = str(e).splitlines()[0]
        raise InputError(path, f"front matter is not valid YAML: {problem}", hint="mend or remove it") from None
    return front if isinstance(front, dict) else {}


def _text(value: Any) -> str | None:  # noqa: ANN401  - unchecked YAML
    return value if isinstance(value, str) and value else None


def _texts(value: Any) -> tuple[str, ...]:  # noqa: ANN401  - unchecked YAML
    items = value if isinstance(value, list) else [value]
    return tuple(item for item in items if isinstance(item, str) and item)


def _read_sampling(path: Path) -> dict[str, int | float]:
    if not path.exists():
        return {}
    raw = read_json_object(path, max_bytes=1_000_000)
    return {new: raw[old] for old, new in SAMPLING_KEYS.items() if type(raw.get(old)) in (int, float)}
