"""``hf://owner/name[@revision]``: how a repository of the Hub is named where a checkpoint is taken."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsv4tools.errors import UsageError

SCHEME = "hf://"
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository, and the branch, tag or commit that is meant (None: the main branch)."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def is_reference(text: object) -> bool:
    """Whether `text` names a repository and no path."""
    return isinstance(text, str) and text.startswith(SCHEME)


def parse_reference(text: str) -> HubReference:
    """``"hf://owner/name@revision"`` -> its parts; UsageError if it is not of this form."""
    repository, at, revision = text.removeprefix(SCHEME).partition("@")
    if not text.startswith(SCHEME) or not _REPOSITORY.fullmatch(repository) or (at and not revision):
        raise UsageError(text, "names no repository of models", hint="expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return HubReference(repository, revision or None)
