"""Where the data files that users read and edit lie: inside the installed package, or at the top of a source tree."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from dsv4tools.errors import ResourceError


@cache
def data_directory(name: str) -> Path:
    """The directory called `name` (``templates`` or ``policies``); ResourceError if the installation lacks it."""
    package = Path(__file__).resolve().parent
    for candidate in (package / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise ResourceError(package / name, "is missing from the installation", hint="install dsv4tools again")
