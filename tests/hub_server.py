"""A Hub on the loopback interface: the part of its HTTP API that fetching a model takes, with faults on demand.

    with HubServer({"org/model": directory}) as hub:
        hub.fault("resolve", "model-00001-of-00003.safetensors", corrupt=5)
        subprocess.run([...], env=hub.environment(home))

What it speaks (as https://huggingface.co does): model information with and without ``blobs``, the tree, and files under
``resolve``: their commit, etag and size in headers of HEAD, ranges, and for files in LFS a redirect to another path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_TestTokenThatNobodyMayEverSee"
SIGNATURE = "SignedForThisClientOnly"
_LFS_SUFFIXES = (".safetensors", "tokenizer.json", ".gguf", ".bin")
_CHUNK = 1 << 16
_UNWANTED = ("HF_", "HUGGING", "HTTP", "http", "ALL_PROXY", "all_proxy")   # variables that could lead elsewhere


@dataclass
class Fault:
    """What goes wrong with requests of one kind for one file, `times` times, then no more; the first `after` go well.

    `status` answers with an error (`code` is its X-Error-Code, `retry_after` its Retry-After); `corrupt` flips a bit of
    that byte of the body; `drop` breaks the connection after so many bytes of it (`reset`: as a crash does, not as an
    orderly end); `ignore_range` answers 200 with the whole file; `short` announces so many bytes fewer than there are
    and sends those; `stall` sends nothing for so many seconds first.
    """

    status: int | None = None
    code: str | None = None
    retry_after: int | None = None
    corrupt: int | None = None
    drop: int | None = None
    reset: bool = False
    ignore_range: bool = False
    short: int = 0
    stall: float = 0.0
    times: int = 1_000_000
    after: int = 0


@dataclass
class Request:
    """One request that came in."""

    method: str
    path: str
    headers: dict[str, str]
    kind: str = ""
    file: str = ""
    n_sent: int = 0   # bytes of a file


@dataclass
class _Repository:
    directory: Path
    commit: str
    revisions: set[str]
    gated: bool = False
    private: bool = False
    hashes: dict[str, tuple[int, str, str]] = field(default_factory=dict)

    def names(self) -> list[str]:
        return sorted(p.relative_to(self.directory).as_posix() for p in self.directory.rglob("*")
                      if p.is_file() and ".cache" not in p.parts)

    def entry(self, name: str) -> tuple[int, str, str]:
        """Size, sha256 and git blob id of a file; computed once: a Hub never changes a commit."""
        if name not in self.hashes:
            raw = (self.directory / name).read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
            self.hashes[name] = len(raw), hashlib.sha256(raw).hexdigest(), blob
        return self.hashes[name]


def is_lfs(name: str) -> bool:
    return name.endswith(_LFS_SUFFIXES)


class HubServer:
    """See the module. Kinds of requests for `fault`: ``info``, ``tree``, ``resolve`` (HEAD and GET), ``lfs``.

    Attributes
    ----------
    requests:
        All that came in, in order.
    watch:
        Called before each piece of a file is sent.
    """

    def __init__(self, repositories: dict[str, Path] | None = None) -> None:
        self.repositories: dict[str, _Repository] = {}
        self.requests: list[Request] = []
        self.watch: Callable[[Request], None] = lambda _: None
        self._faults: list[tuple[str, str, Fault]] = []
        self._lock = threading.Lock()
        for name, directory in (repositories or {}).items():
            self.add(name, directory)
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def store_url(self) -> str:
        """Where files in LFS lie: another host by its name, so that clients must not send their token there."""
        return f"http://localhost:{self._server.server_address[1]}"

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """The variables of a process that knows no other Hub than this one. `home` is where it keeps its own files."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(_UNWANTED)}
        return kept | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                       "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **extra}

    def add(self, name: str, directory: Path, *, gated: bool = False, private: bool = False) -> None:
        self.repositories[name] = _Repository(directory, COMMIT, {"main", COMMIT, "v1.0"}, gated, private)

    def fault(self, kind: str, file: str = "", **what: Any) -> None:
        """From now on requests of `kind` (for `file`, if given) fail as `Fault` says; the latest word counts."""
        with self._lock:
            self._faults.insert(0, (kind, file, Fault(**what)))

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    def take_fault(self, kind: str, file: str) -> Fault:
        with self._lock:
            for known, name, fault in self._faults:
                if known == kind and name in {"", file} and fault.after > 0:
                    fault.after -= 1
                elif known == kind and name in {"", file} and fault.times > 0:
                    fault.times -= 1
                    return fault
        return Fault()

    def count(self, kind: str, file: str = "", method: str = "") -> int:
        """How many requests of `kind` came in."""
        return sum(r.kind == kind and file in {"", r.file} and method in {"", r.method} for r in self.requests)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        """A client that was killed is no fault of the server's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        self.hub.requests.append(request)
        self._request = request
        path = unquote(parts.path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            request.kind = "info"
            self._info(match[1], match[2] or "main", blobs="blobs" in parse_qs(parts.query))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            request.kind = "tree"
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            request.kind, request.file = "resolve", match[3]
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            request.kind, request.file = "lfs", match[2]
            self._lfs(match[1], match[2])
        else:
            self._refuse(404, "no such path")

    def _repository(self, kind: str, name: str, revision: str, file: str = "") -> tuple[_Repository, Fault] | None:
        """The repository, if it is there for this client; else the refusal is sent."""
        fault = self.hub.take_fault(kind, file)
        if fault.stall:
            time.sleep(fault.stall)
        repository = self.hub.repositories.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if fault.status is not None:
            self._refuse(fault.status, "as ordered", fault.code, fault.retry_after)
        elif self.headers.get("Authorization") and not known:
            self._refuse(401, "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not known):
            self._refuse(401 if not known else 404, "Repository not found", "RepoNotFound")
        elif kind == "resolve" and repository.gated and not known:
            self._refuse(401, "Access to model is restricted", "GatedRepo")
        elif revision not in repository.revisions:
            self._refuse(404, "Invalid rev id", "RevisionNotFound")
        else:
            return repository, fault
        return None

    def _refuse(self, status: int, message: str, code: str | None = None, retry_after: int | None = None) -> None:
        raw = json.dumps({"error": message}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Error-Message", message)
        if code:
            self.send_header("X-Error-Code", code)
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _json(self, value: object) -> None:
        raw = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _info(self, name: str, revision: str, *, blobs: bool) -> None:
        found = self._repository("info", name, revision)
        if found is None:
            return
        repository, _ = found
        commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else repository.commit
        siblings = []
        for file in repository.names():
            sibling: dict[str, Any] = {"rfilename": file}
            if blobs:
                n_bytes, sha256, blob = repository.entry(file)
                sibling |= {"size": n_bytes, "blobId": blob}
                if is_lfs(file):
                    sibling["lfs"] = {"sha256": sha256, "size": n_bytes, "pointerSize": 135}
            siblings.append(sibling)
        self._json({"id": name, "modelId": name, "sha": commit, "private": repository.private, "tags": [],
                    "gated": "manual" if repository.gated else False, "downloads": 0, "likes": 0, "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        found = self._repository("tree", name, revision)
        if found is None:
            return
        repository, _ = found
        entries = []
        for file in repository.names():
            n_bytes, sha256, blob = repository.entry(file)
            entry: dict[str, Any] = {"type": "file", "path": file, "size": n_bytes, "oid": blob}
            if is_lfs(file):
                entry["lfs"] = {"oid": sha256, "size": n_bytes, "pointerSize": 135}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, name: str, revision: str, file: str) -> None:
        found = self._repository("resolve", name, revision, file)
        if found is None:
            return
        repository, fault = found
        if file not in repository.names():
            self._refuse(404, "Entry not found", "EntryNotFound")
            return
        n_bytes, sha256, blob = repository.entry(file)
        commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else repository.commit
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob}"'}
        if is_lfs(file):
            headers |= {"X-Linked-Size": str(n_bytes), "X-Linked-Etag": f'"{sha256}"', "ETag": f'"{sha256}"'}
            self.send_response(302)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Location", f"{self.hub.store_url}/cdn/{name}/{file}?Signature={SIGNATURE}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(repository.directory / file, headers, fault)

    def _lfs(self, name: str, file: str) -> None:
        fault = self.hub.take_fault("lfs", file)
        if fault.stall:
            time.sleep(fault.stall)
        if fault.status is not None:
            self._refuse(fault.status, "as ordered", fault.code, fault.retry_after)
            return
        self._send(self.hub.repositories[name].directory / file, {"ETag": '"of-the-store"'}, fault)

    def _send(self, path: Path, headers: dict[str, str], fault: Fault) -> None:
        n_file = path.stat().st_size
        begin, end = 0, n_file
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match and not fault.ignore_range:
            begin = int(match[1])
            end = min(int(match[2]) + 1, n_file) if match[2] else n_file
            if begin >= n_file:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{n_file}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{n_file}")
        else:
            self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - begin - fault.short))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(path, begin, end - fault.short, fault)

    def _send_body(self, path: Path, begin: int, end: int, fault: Fault) -> None:
        stop = end if fault.drop is None else min(begin + fault.drop, end)
        with path.open("rb") as file:
            file.seek(begin)
            at = begin
            while at < stop:
                self.hub.watch(self._request)
                data = bytearray(file.read(min(_CHUNK, stop - at)))
                if fault.corrupt is not None and at <= fault.corrupt < at + len(data):
                    data[fault.corrupt - at] ^= 1
                try:
                    self.wfile.write(data)
                except OSError:   # the client has gone
                    self.close_connection = True
                    return
                at += len(data)
                self._request.n_sent += len(data)
        if stop < end:
            self.close_connection = True
            self.wfile.flush()
            if fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR) if not fault.reset else self.connection.close()
