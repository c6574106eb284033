"""What a conversion reads, wherever it is: a checkpoint directory, a repository of the Hub, or a GGUF."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dsv4tools.checkpoint import Checkpoint, open_checkpoint
from dsv4tools.errors import InputError
from dsv4tools.gguf.regular import open_regular, read_bytes
from dsv4tools.gguf.rules import MAGIC
from dsv4tools.hub.reference import SCHEME, HubReference, is_reference, parse_reference
from dsv4tools.hub.remote import open_remote
from dsv4tools.plan import TEMPLATE_KEY
from dsv4tools.template.gguf_source import GgufSource, open_gguf_source

# What is written for hf://owner/name by mistake; a path has lost one of two slashes.
_REPOSITORY = re.compile(r"(?:(?i:hf):/+|https?:/+(?:www\.)?huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)/?", re.ASCII)


def open_source(source: str | Path | HubReference | Checkpoint, *, cache: Path | None = None) -> Checkpoint:
    """Open a checkpoint directory, ``hf://owner/name[@revision]``, or a GGUF (any part of a set); reads no weights.

    Parameters
    ----------
    source:
        Where it is. What is opened already is returned as it is.
    cache:
        Where files of the Hub are kept; the user's cache directory by default.

    Raises
    ------
    UsageError, InputError, ResourceError, VerifyError
        As `open_checkpoint`, `hub.open_remote` and `open_gguf_source`; InputError for a template, which has no weights.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, HubReference):
        return open_remote(source, cache)
    if is_reference(source):
        return open_remote(parse_reference(str(source)), cache)
    is_file = os.path.isfile(source)  # noqa: PTH113  - the one in pathlib raises for names that are too long
    check_no_repository(source)
    return _open_gguf(Path(source)) if is_file else open_checkpoint(source)


def check_no_repository(path: str | Path) -> None:
    """InputError for a path that is not there but looks like a repository of the Hub: it says what to write."""
    match = _REPOSITORY.fullmatch(str(path))
    if match is not None and not os.path.lexists(path):
        raise InputError(path, "is missing", hint=f"if a repository of the Hub is meant: {SCHEME}{match[1]}")


def _open_gguf(path: Path) -> GgufSource:
    fd, n_bytes = open_regular(path)
    try:
        is_gguf = read_bytes(fd, 0, min(n_bytes, len(MAGIC)), path) == MAGIC
    finally:
        os.close(fd)
    if not is_gguf:
        raise InputError(path, "is no directory, and no GGUF file either", hint="give the checkpoint's directory")
    source = open_gguf_source(path)
    if source.file.value(TEMPLATE_KEY) is True:
        raise InputError(path, "is a template: it holds no weights", hint="give the model itself")
    return source
