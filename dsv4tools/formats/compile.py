"""Compiling kernels with numba, once per installation and machine.

numba's own cache looks at the file of the outermost kernel only: a change in an imported helper leaves stale machine
code, and a damaged file raises from deep inside. Here every kernel module has one cache entry, a directory whose name
is a hash over all sources of this package, numba's version and the processor. An entry is built aside, described by a
manifest of checksums and moved into place; one that does not match its manifest is thrown away and built again. A
cache that cannot be written is no error: the kernels are compiled for this process only, and the log says so. It also
says, once in a process, that kernels are being compiled: that takes seconds in which nothing else is seen.

numba is imported when the first kernel is asked for, not before.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dsv4tools.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
_MANIFEST = "manifest.json"
_KEPT_KEYS = 6   # caches of other versions, lane widths or processors (shared home directories) that are left alone
_BUILD_SECONDS = 3600   # no build takes longer

_lock = threading.RLock()
_announced = False                     # whether this process has said that it compiles
_entry: Path | None = None             # where kernels that are being declared keep their machine code
_declared: list[Any] = []              # the kernels declared by the import under way

_Function = TypeVar("_Function", bound="Callable[..., Any]")


def kernel(signature: str) -> Callable[[_Function], _Function]:
    """Declare an entry point from Python: compiled for `signature` at import, cached, runs without the GIL.

    No fastmath: sums keep their order and nothing is contracted to FMA, or the bytes would not be those of the C code.
    """

    def declare(function: _Function) -> _Function:
        import numba  # noqa: PLC0415  - planners import this package's tables and must not pay for numba

        compiled = numba.njit(signature, nogil=True, error_model="numpy", cache=_entry is not None)(function)
        _declared.append(compiled)
        return compiled

    return declare


def helper(function: _Function) -> _Function:
    """Declare a function that kernels call: compiled into each of them, under the same rules of arithmetic."""
    return _inner(function, forceinline=True)


def routine(function: _Function) -> _Function:
    """Declare a function as `helper` does, but a large one: the compiler may call it instead."""
    return _inner(function)


def _inner(function: _Function, **options: bool) -> _Function:
    import numba  # noqa: PLC0415  - see `kernel`

    only_in_kernels = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}   # a third of the compile time
    return numba.njit(nogil=True, error_model="numpy", **only_in_kernels, **options)(function)


def instruction(rule: Callable[..., Any]) -> Any:
    """Declare a function of kernels by numba's type rule and the LLVM instructions for it.

    ``rule(typing, *types)`` returns a signature and ``lower(context, builder, signature, args)``, or None where the
    types do not fit. Numbers that are written as such arrive as literal types.
    """
    from numba.extending import intrinsic  # noqa: PLC0415  - see `kernel`

    return intrinsic(prefer_literal=True)(rule)


def load(module: str) -> ModuleType:
    """The kernel module of this package called `module`, its kernels ready to run.

    Raises UsageError where NUMBA_DISABLE_JIT makes kernels impossible.
    """
    name = f"{__package__}.{module}"
    with _lock:
        if name in sys.modules:
            return sys.modules[name]
        import numba  # noqa: PLC0415  - see `kernel`

        if numba.config.DISABLE_JIT:
            raise UsageError("NUMBA_DISABLE_JIT", "is set, and kernels cannot run uncompiled", hint="unset it")
        entry = _entry_of(module)
        if _is_intact(entry):
            try:
                return _import(name, entry)
            except Exception as error:  # noqa: BLE001  - numba and pickle raise anything on an entry they cannot read
                log.warning("compiling %s again: %s could not be loaded (%s)", module, entry, _one_line(error))
                _remove(entry)
        return _compile(name, entry)


def is_loaded(module: str) -> bool:
    """Whether the kernels of `module` are ready in this process."""
    return f"{__package__}.{module}" in sys.modules


def cache_root() -> Path:
    """Directory of all compiled kernels: below NUMBA_CACHE_DIR where that is set, else in the user's cache."""
    import numba  # noqa: PLC0415  - see `kernel`

    if numba.config.CACHE_DIR:
        return Path(numba.config.CACHE_DIR) / "dsv4tools"
    try:
        home = Path.home()
    except RuntimeError:   # a user whom the system does not know, as in some containers
        home = Path(os.devnull)   # nothing can be written below it, which is noticed later
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "dsv4tools" / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "dsv4tools" / "kernels"


@cache
def cache_key() -> str:
    """What compiled kernels depend on: sources (and where they lie, which numba asks for), versions, processor."""
    import llvmlite  # noqa: PLC0415  - see `kernel`
    import llvmlite.binding  # noqa: PLC0415
    import numba  # noqa: PLC0415

    from dsv4tools.formats import lanes  # noqa: PLC0415  - it imports numba

    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.glob("*.py")):
        digest.update(f"{path} {path.stat().st_mtime_ns}\n".encode() + path.read_bytes())
    processor = (
        numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name(),
        numba.config.CPU_FEATURES or ",".join(host_features()),
    )
    versions = (numba.__version__, llvmlite.__version__, sys.version, platform.system(), platform.machine())
    for part in (*versions, *processor, numba.config.OPT, lanes.WIDTH):
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()[:20]


def host_features() -> list[str]:
    """What LLVM knows about this processor: "+avx2" ... ; nothing on platforms where it cannot ask."""
    import llvmlite.binding  # noqa: PLC0415  - see `kernel`

    try:
        return sorted(llvmlite.binding.get_host_cpu_features().flatten().split(","))
    except RuntimeError:
        return []


def _entry_of(module: str) -> Path:
    return cache_root() / cache_key() / module


def _import(name: str, entry: Path | None) -> ModuleType:
    """Import a kernel module while numba's cache directory is `entry` (None: no cache)."""
    import numba  # noqa: PLC0415  - see `kernel`

    global _entry  # noqa: PLW0603  - under the lock, for the decorators that the import runs
    kept = numba.config.CACHE_DIR
    _entry = entry
    _declared.clear()
    try:
        if entry is not None:
            numba.config.CACHE_DIR = str(entry)
        module = importlib.import_module(name)
        if entry is not None:
            _check_place(entry)
            if any(k.stats.cache_misses for k in _declared):
                _write_manifest(entry)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    finally:
        numba.config.CACHE_DIR = kept
        _entry = None
    return module


def _check_place(entry: Path) -> None:
    """OSError unless the kernels just declared use `entry`: where numba cannot write it takes the source directory."""
    if not all(Path(k.stats.cache_path).is_relative_to(entry) for k in _declared):
        raise OSError(f"{entry} cannot be written")


def _compile(name: str, entry: Path) -> ModuleType:
    global _announced  # noqa: PLW0603  - under the lock
    if not _announced:
        log.info("compiling kernels, once per version and machine: 10 to 30 s ...")
        _announced = True
    started = time.perf_counter()
    try:
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    except OSError as error:
        log.warning("kernels are compiled for this process only: no cache in %s (%s)", entry.parent, _one_line(error))
        return _import(name, None)
    try:
        module = _import(name, building)
        building.rename(entry)
    except (OSError, RuntimeError) as error:   # numba makes it a RuntimeError when it finds no place at all
        if name not in sys.modules:   # the disk is full, say: numba could not write what it had compiled
            log.warning("kernels are compiled for this process only: %s", _one_line(error))
            return _import(name, None)
        module = sys.modules[name]
        if not _is_intact(entry):     # else another process was faster, and its entry serves
            log.warning("compiled kernels could not be kept in %s (%s)", entry, _one_line(error))
    finally:
        shutil.rmtree(building, ignore_errors=True)
    log.debug("compiled %s in %.1f s", entry.name, time.perf_counter() - started)
    _prune(entry.parent)
    return module


def _files(entry: Path) -> dict[str, str]:
    return {
        str(path.relative_to(entry)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(entry.rglob("*"))
        if path.is_file() and path.name != _MANIFEST
    }


def _write_manifest(entry: Path) -> None:
    (entry / _MANIFEST).write_text(json.dumps(_files(entry)), encoding="utf-8")


def _is_intact(entry: Path) -> bool:
    """Whether `entry` is complete and unchanged since it was built; a damaged one is removed."""
    try:
        if not entry.exists():
            return False
        if json.loads((entry / _MANIFEST).read_bytes()) == _files(entry):
            return True
    except (OSError, ValueError):
        pass
    log.warning("compiling %s again: its cache entry %s is damaged", entry.name, entry)
    _remove(entry)
    return False


def _remove(entry: Path) -> None:
    shutil.rmtree(entry, ignore_errors=True)


def _prune(current: Path) -> None:
    """Drop the oldest caches of other keys and what killed processes left, so that the disk does not fill up."""
    try:
        keys = sorted((p for p in current.parent.iterdir() if p != current), key=lambda p: p.stat().st_mtime)
        left = [p for p in current.glob(".*") if p.stat().st_mtime < time.time() - _BUILD_SECONDS]
    except OSError:
        return
    for stale in keys[:-_KEPT_KEYS] + left:
        _remove(stale)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
