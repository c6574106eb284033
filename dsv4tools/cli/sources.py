"""Arguments that name a checkpoint: a path, or a repository of the Hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dsv4tools.errors import UsageError
from dsv4tools.hub.faults import mask
from dsv4tools.hub.reference import HubReference, is_reference, parse_reference
from dsv4tools.hub.remote import open_source_files
from dsv4tools.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4tools.checkpoint import Checkpoint

CACHE_VARIABLE = "DSV4TOOLS_CACHE"
NEEDS_WEIGHTS = "running a model reads its weights again and again"
_CHATTY = ("httpx", "httpx2", "httpcore", "httpcore2", "filelock", "urllib3")   # they log addresses that are signed


def source_argument(text: str) -> Path | HubReference:
    """The type of an argument that is a path or hf://OWNER/NAME[@REVISION]."""
    return parse_reference(text) if is_reference(text) else Path(text)


def local_argument(reason: str, what: str = "directory") -> Callable[[str], Path]:
    """The type of an argument that must be a path; of a repository it says what to do instead, and the `reason`."""

    def parse(text: str) -> Path:
        if is_reference(text):
            require_local(parse_reference(text), reason, what)
        return Path(text)

    return parse


def require_local(reference: HubReference, reason: str, what: str = "directory") -> NoReturn:
    """Refuse a repository with UsageError, for a `reason`."""
    revision = f" --revision {reference.revision}" if reference.revision else ""
    raise UsageError(reference, f"is on the Hub, and {reason}",
                     hint=f"dsv4tools download {reference.repository}{revision}, then give the {what}")


file_argument = local_argument("this file is read from the disk", "file")
"""The type of an argument that must be a file to read."""


def output_argument(text: str) -> Path:
    """The type of an argument that is written to."""
    if is_reference(text):
        raise UsageError(text, "is on the Hub, and nothing is written there", hint="give a path on this machine")
    return Path(text)


def open_argument(source: Path | HubReference) -> Checkpoint:
    """The checkpoint that a `source_argument` names."""
    if isinstance(source, HubReference):
        tame_loggers()
    return open_source(source, cache=cache_directory())


def local_files(source: Path | HubReference) -> Path:
    """`source`, or the directory that has all but the weights of a repository: what a tokenizer needs."""
    if isinstance(source, Path):
        return source
    tame_loggers()
    return open_source_files(source, cache_directory()).directory


def cache_directory() -> Path | None:
    """Where the user wants files of the Hub to be kept."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else None


def tame_loggers() -> None:
    """No signed addresses, no tokens, one line for each warning of the Hub's library, through our own handler."""
    import huggingface_hub.utils.logging  # noqa: PLC0415  - takes a quarter of a second; gives the logger its handler

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    hub = logging.getLogger(huggingface_hub.__name__)
    hub.setLevel(logging.WARNING)
    hub.handlers.clear()
    for handler in logging.getLogger().handlers:
        handler.addFilter(_mask_record)


def _mask_record(record: logging.LogRecord) -> bool:
    record.msg, record.args, record.exc_info = mask(record.getMessage()), (), None
    return True
