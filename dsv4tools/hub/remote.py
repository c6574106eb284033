"""A checkpoint on the Hub, opened where it is: small files come whole, of the weights only the headers."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4tools.checkpoint.card import RECEIPT
from dsv4tools.checkpoint.checkpoint import bind_checkpoint
from dsv4tools.checkpoint.config import read_config
from dsv4tools.checkpoint.index import INDEX_NAME, gather_shards
from dsv4tools.checkpoint.shard import Shard, check_header_length, parse_header
from dsv4tools.checkpoint.strict_json import MAX_JSON_BYTES
from dsv4tools.errors import InputError, VerifyError
from dsv4tools.hub.local import matches, write_receipt
from dsv4tools.hub.ranges import RangeReader
from dsv4tools.hub.reference import SCHEME, HubReference, parse_reference
from dsv4tools.hub.snapshot import RemoteFile, Snapshot, list_snapshot
from dsv4tools.outfile import explained

if TYPE_CHECKING:
    from dsv4tools.checkpoint import Checkpoint

# All that is read of a checkpoint besides its weights.
TEXT_NAMES = ("config.json", INDEX_NAME, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
              "generation_config.json", "README.md")
_FIRST_BYTES = 1 << 18   # the header of a published shard has about 200 KB: it comes with the first request
_REQUESTS = 8            # at a time
_WEIGHTS = ".safetensors"


def default_cache() -> Path:
    """Where files of the Hub are kept that nobody gave a place: `dsv4tools/hub` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4tools" / "hub"


@dataclass
class RemoteSource:
    """A snapshot, the directory of our own cache that belongs to it, and what is at hand of it.

    `local` has the shards that are in the directory and were found to have the Hub's hash in this process.
    """

    snapshot: Snapshot
    directory: Path
    ranges: RangeReader
    local: dict[str, Shard] = field(default_factory=dict)

    @property
    def reference(self) -> HubReference:
        """What it is, at its commit."""
        return HubReference(self.snapshot.repository, self.snapshot.revision)


@dataclass(frozen=True, slots=True)
class RemoteShard(Shard):
    """A shard on the Hub; `path` is where it lies in the cache while it is there.

    Reads come from there if it is, else they are range requests.
    """

    file: RemoteFile
    source: RemoteSource = field(compare=False, repr=False)

    @property
    def state(self) -> list[int | str]:
        """Its hash: at a commit nothing can change."""
        return [self.file.sha256 or self.file.git_sha1 or ""]

    @property
    def at_hand(self) -> bool:
        """Whether it is in the cache."""
        return self.path.name in self.source.local

    def read_into(self, begin: int, out: memoryview) -> None:
        """Fill `out` with the bytes from position `begin`; errors of `Shard.read_into` and `RangeReader.read_into`."""
        local = self.source.local.get(self.path.name)
        if local is not None:
            local.read_into(begin, out)
        else:
            self.source.ranges.read_into(self.file, begin, out)


def open_remote(reference: HubReference | str, cache: Path | None = None) -> Checkpoint:
    """Open a checkpoint on the Hub: a few MB come, the small files and the headers of all shards.

    The revision is resolved to a commit once. Small files are kept in `cache` (`default_cache` if None) and compared
    with the Hub's hashes; headers are read by range requests, and nothing else of the weights is.

    Raises
    ------
    UsageError
        `reference` is none.
    InputError
        As `open_checkpoint`, or a file is larger than such a file can be.
    ResourceError
        As `list_snapshot` and `RangeReader.read_into`; the cache cannot be written.
    VerifyError
        A small file came twice with a wrong hash.
    """
    source = open_source_files(reference, cache)
    directory, files = source.directory, source.snapshot.files
    config = read_config(directory / "config.json")
    names = [name for name in files if name.endswith(_WEIGHTS) and "/" not in name and name[0] != "."]
    with ThreadPoolExecutor(_REQUESTS, "header") as pool:
        jobs = {name: pool.submit(_open_shard, source, files[name]) for name in names}
        try:
            shards = gather_shards(directory, names, lambda name: jobs[name].result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return bind_checkpoint(directory, config, shards, str(source.reference))


def open_source_files(reference: HubReference | str, cache: Path | None = None) -> RemoteSource:
    """The small files of a repository, in a directory of `cache` for its commit; errors of `open_remote`."""
    if isinstance(reference, str):
        reference = parse_reference(reference)
    snapshot = list_snapshot(reference.repository, reference.revision)
    home = snapshot.repository.replace("/", "--")
    source = RemoteSource(snapshot, (cache or default_cache()) / home / snapshot.revision, RangeReader(snapshot))
    files = [snapshot.files[name] for name in TEXT_NAMES if name in snapshot.files]
    with explained(source.directory):
        (source.directory / RECEIPT).parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        _fetch_small(source, file)
    if not (source.directory / RECEIPT).exists():
        write_receipt(source.directory, snapshot, files)
    return source


def _fetch_small(source: RemoteSource, file: RemoteFile) -> None:
    path = source.directory / file.name
    if file.n_bytes > MAX_JSON_BYTES:
        raise InputError(f"{source.reference}: file {file.name!r}", f"has {file.n_bytes:,} bytes, "
                         "too large for what it is")
    if path.is_file() and matches(path, file, lambda _: None):
        return
    for _ in range(2):
        raw = bytearray(file.n_bytes)
        source.ranges.read_into(file, 0, memoryview(raw))
        # Under a name of its own until it is right: two processes may fetch it at the same time.
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with explained(path):
            try:
                partial.write_bytes(raw)
                if matches(partial, file, lambda _: None):
                    partial.replace(path)
                    return
            finally:
                partial.unlink(missing_ok=True)
    raise VerifyError(f"{source.reference}: file {file.name!r}", "came twice with another hash than the Hub states",
                      hint="the way from the Hub damages files: try another network or later")


def _open_shard(source: RemoteSource, file: RemoteFile) -> RemoteShard:
    where = f"{SCHEME}{source.snapshot.repository}: {file.name}"
    if file.n_bytes < 8:
        raise InputError(where, f"has {file.n_bytes} bytes, too short for a safetensors header")
    raw = bytearray(min(_FIRST_BYTES, file.n_bytes))
    source.ranges.read_into(file, 0, memoryview(raw))
    n_header = check_header_length(bytes(raw[:8]), file.n_bytes, where)
    missing = 8 + n_header - len(raw)
    if missing > 0:
        begin = len(raw)
        raw += bytes(missing)
        source.ranges.read_into(file, begin, memoryview(raw)[begin:])
    head = bytes(raw[8: 8 + n_header])
    tensors, metadata = parse_header(head, file.n_bytes, where)
    return RemoteShard(source.directory / file.name, file.n_bytes, hashlib.sha256(head).hexdigest(), 0, 0, tensors,
                       metadata, file, source)
