"""A repository of the Hub at one commit: the files, their sizes, and the hashes that the Hub states for them."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from dsv4tools import __version__
from dsv4tools.errors import InputError, UsageError
from dsv4tools.hub.faults import persist

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LIBRARY_NAME = "dsv4tools"   # what we call ourselves to the Hub
_OWN_FOLDERS = frozenset({".cache", ".git"})   # bookkeeping of huggingface_hub, git and ourselves lies there


@dataclass(frozen=True, slots=True)
class RemoteFile:
    r"""One file of a repository.

    Attributes
    ----------
    name:
        Its path, with ``/``.
    n_bytes:
        Its size.
    sha256:
        Of its content, for files in LFS (all weights are); else None.
    git_sha1:
        The git blob id, for the others: sha1 over ``blob SIZE\0`` and the content. None where the Hub states none.
    """

    name: str
    n_bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class Snapshot:
    """A repository at a commit: what it holds can no longer change.

    Attributes
    ----------
    repository:
        ``owner/name``.
    revision:
        The commit, 40 hex digits.
    files:
        By name, in the order of their names.
    """

    repository: str
    revision: str
    files: Mapping[str, RemoteFile]

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(f.n_bytes for f in self.files.values())


def list_snapshot(repository: str, revision: str | None = None) -> Snapshot:
    """What `repository` holds at `revision` (a branch, tag or commit; the main branch by default), in one request.

    Raises
    ------
    UsageError
        `repository` is no ``owner/name``.
    ResourceError
        There is no such repository or revision, it is private, there is no connection, the Hub has a fault.
    InputError
        It lists names that must not become paths.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  - takes a quarter of a second

    if repository.count("/") != 1:
        raise UsageError(repository, "is no name of a repository", hint="expected OWNER/NAME")
    api = HfApi(library_name=LIBRARY_NAME, library_version=__version__)
    info = persist(lambda: api.model_info(repository, revision=revision or "main", files_metadata=True, timeout=30),
                   repository, revision, attempts=2)
    if info.sha is None:
        raise InputError(repository, "the Hub names no commit for it")
    files = {}
    for sibling in sorted(info.siblings or [], key=lambda s: s.rfilename):
        name = check_file_name(sibling.rfilename, repository)
        if sibling.size is None:
            raise InputError(f"{repository}: file {name!r}", "the Hub states no size for it")
        lfs = sibling.lfs
        files[name] = RemoteFile(name, lfs.size if lfs else sibling.size, lfs.sha256 if lfs else None,
                                 None if lfs else sibling.blob_id)
    if not files:
        raise InputError(repository, "holds no files")
    return Snapshot(repository, info.sha, files)


def check_file_name(name: str, repository: str) -> str:
    """`name` if it may become a path below a directory of ours, else InputError: it is a stranger's."""
    parts = name.split("/")
    windows = PureWindowsPath(name)
    if (not name.isprintable() or "\\" in name or {"", ".", ".."} & set(parts) or PurePosixPath(name).is_absolute()
            or windows.drive or windows.root or parts[0] in _OWN_FOLDERS):
        raise InputError(f"{repository}: file {name!r}", "has a name that must not become a path")
    return name


def select_files(snapshot: Snapshot, include: Sequence[str], exclude: Sequence[str]) -> list[RemoteFile]:
    """The files that match a glob of `include` (all without any) and none of `exclude`; ``*`` crosses folders.

    UsageError where nothing is left.
    """
    files = [f for name, f in snapshot.files.items()
             if (not include or _matches_any(name, include)) and not _matches_any(name, exclude)]
    if not files:
        raise UsageError("--include/--exclude",
                         f"leave none of the {len(snapshot.files)} files of {snapshot.repository}")
    return files


def _matches_any(name: str, globs: Sequence[str]) -> bool:
    """As in huggingface_hub: a glob that ends in ``/`` stands for all that is in that folder."""
    return any(fnmatchcase(name, glob + "*" if glob.endswith("/") else glob) for glob in globs)
