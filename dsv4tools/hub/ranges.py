"""Parts of files on the Hub, by HTTP range requests: headers without weights, and rows without shards.

huggingface_hub's own session does the talking, so that proxies, certificates and endpoints are as for any download.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dsv4tools import __version__
from dsv4tools.errors import ResourceError
from dsv4tools.hub.faults import persist
from dsv4tools.hub.snapshot import LIBRARY_NAME
from dsv4tools.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsv4tools.hub.snapshot import RemoteFile, Snapshot

_ATTEMPTS = 4
_SECONDS_OF_SILENCE = 30.0    # the longest wait for a connection, or for the next piece of an answer
MAX_SKIPPED_BYTES = 1 << 24  # thrown away where a server sends whole files; more is a download by another name
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_EXPIRED = frozenset({401, 403, 404, 410})   # what stores say to an address that was signed some time ago


class RangeReader:
    """Reads parts of the files of one snapshot. May be used by many threads.

    The Hub redirects to a store. The address that it names is signed for about an hour: it is used until it is refused,
    so that the Hub itself is asked once for each file and not for each read.

    Attributes
    ----------
    sends_whole_files:
        Whether a whole file came where a part of it was asked for.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._addresses: dict[str, str] = {}
        self.sends_whole_files = False

    def read_into(self, file: RemoteFile, begin: int, out: memoryview) -> None:
        """Fill `out` with the bytes of `file` from position `begin`; asks for these bytes and no others.

        What has come stays when a connection breaks: only the rest is asked for again. Nothing is compared with a hash:
        the Hub states none for parts of files.

        Raises
        ------
        ResourceError
            No connection, no access, too many requests; or the server does not send what it is asked for.
        """
        done = 0

        def attempt() -> None:
            nonlocal done
            for piece in self._request(file, begin + done, len(out) - done):
                out[done: done + len(piece)] = piece
                done += len(piece)
            if done < len(out):   # an orderly end, but too soon
                raise OSError("short answer")

        persist(attempt, self._snapshot.repository, self._snapshot.revision, attempts=_ATTEMPTS)

    def _request(self, file: RemoteFile, begin: int, n_bytes: int) -> Iterator[bytes]:
        """The bytes asked for, piece by piece as they come; perhaps fewer, never more."""
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status  # noqa: PLC0415  - takes a quarter of a second
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415  - as documented

        known = self._addresses.get(file.name)
        url = known or hf_hub_url(self._snapshot.repository, file.name, revision=self._snapshot.revision)
        headers = {"Range": f"bytes={begin}-{begin + n_bytes - 1}", "Accept-Encoding": "identity"}
        if known is None:   # a signed address needs no token, and must not get it
            headers |= build_hf_headers(library_name=LIBRARY_NAME, library_version=__version__)
        with get_session().stream("GET", url, headers=headers, timeout=_SECONDS_OF_SILENCE,
                                  follow_redirects=True) as response:
            expired = known is not None and response.status_code in _EXPIRED
            if not expired:
                hf_raise_for_status(response)
                n_skipped = self._check_answer(response, file, begin, n_bytes)
                if response.history:
                    self._addresses[file.name] = str(response.url)
                yield from _cut(response.iter_raw(), n_skipped, n_bytes)
                return
        self._addresses.pop(file.name, None)
        yield from self._request(file, begin, n_bytes)

    def _check_answer(self, response: Any, file: RemoteFile, begin: int, n_bytes: int) -> int:  # noqa: ANN401  - httpx by either of its names
        """How many bytes come before those that were asked for: 0 unless the server sends the whole file."""
        where = f"{self._snapshot.repository}: file {file.name!r}"
        if response.status_code == 200:
            self.sends_whole_files |= n_bytes < file.n_bytes
            if begin > MAX_SKIPPED_BYTES:
                raise ResourceError(where, f"bytes from {begin:,} on were asked for, the server sends the whole "
                                    f"file of {format_bytes(file.n_bytes)}",
                                    hint="it serves no parts: use dsv4tools download, and give the directory")
            return begin
        found = response.headers.get("content-range", "")
        match = _CONTENT_RANGE.fullmatch(found)
        if response.status_code != 206 or match is None or int(match[1]) != begin:
            raise ResourceError(where, f"bytes {begin:,} to {begin + n_bytes - 1:,} were asked for, the answer is "
                                f"{found!r} with status {response.status_code}", hint="check HF_ENDPOINT and any proxy")
        if match[3] not in {"*", str(file.n_bytes)}:
            raise ResourceError(where, f"has {int(match[3]):,} bytes, the Hub states {file.n_bytes:,}",
                                hint="check HF_ENDPOINT and any proxy")
        return 0


def _cut(pieces: Iterator[bytes], n_skipped: int, n_bytes: int) -> Iterator[bytes]:
    """At most `n_bytes` of what `pieces` hold behind the first `n_skipped` bytes."""
    for piece in pieces:
        part = piece[n_skipped:][:n_bytes]
        n_skipped = max(n_skipped - len(piece), 0)
        n_bytes -= len(part)
        yield part
        if n_bytes == 0:
            return
