"""A checkpoint, wherever it is: a directory, or a repository of the Hub that is read where it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4tools.checkpoint import Checkpoint, open_checkpoint
from dsv4tools.hub.reference import HubReference, is_reference, parse_reference
from dsv4tools.hub.remote import open_remote

if TYPE_CHECKING:
    from pathlib import Path


def open_source(source: str | Path | HubReference | Checkpoint, *, cache: Path | None = None) -> Checkpoint:
    """Open a checkpoint directory or ``hf://owner/name[@revision]``; no weights are read.

    Parameters
    ----------
    source:
        Where it is. What is opened already is returned as it is.
    cache:
        Where files of the Hub are kept; the user's cache directory by default.

    Raises
    ------
    UsageError, InputError, ResourceError, VerifyError
        As `open_checkpoint` and `hub.open_remote`.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, HubReference):
        return open_remote(source, cache)
    if is_reference(source):
        return open_remote(parse_reference(str(source)), cache)
    return open_checkpoint(source)
