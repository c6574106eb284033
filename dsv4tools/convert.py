"""Running a plan: units are read, encoded and written into a `.partial` file that gets its name when it is right."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4tools.derive import UnitDeriver
from dsv4tools.errors import Dsv4Error, ResourceError, UsageError
from dsv4tools.files import free_bytes, preallocate, pwrite_all, sync_directory, usable_cpus
from dsv4tools.formats.codecs import prepare, self_test
from dsv4tools.gguf.reader import scan_gguf
from dsv4tools.manifest import write_manifest
from dsv4tools.sizes import format_bytes
from dsv4tools.workers import run_units

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

    from dsv4tools.plan import Plan, Unit

MAX_THREADS = 1024
SPACE_MARGIN_BYTES = 1 << 20   # for the directory entry and the manifest


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did: the file, its size, and per tensor how many values were zeroed (``--nan zero``)."""

    path: Path
    n_bytes: int
    zeroed: dict[str, int] = field(default_factory=dict)


def convert(
    plan: Plan, out: str | Path, *, threads: int | None = None, overwrite: bool = False,
    manifest: str | Path | None = None, progress: Callable[[int], None] | None = None,
) -> Conversion:
    """Write the GGUF that `plan` describes.

    The bytes do not depend on `threads`. Memory is (threads + 2) x one unit's source and output bytes, whatever the
    size of the model. The file carries its name only when it is complete, checked and on disk.

    Parameters
    ----------
    out:
        The output file; ``OUT.partial`` beside it is used on the way.
    threads:
        How many units are encoded at once; all usable cores by default.
    overwrite:
        Replace an existing `out` (at the end, in one step).
    manifest:
        Also write the sha256 of every tensor, of all tensors and of the file there.
    progress:
        Called with the number of output bytes that were finished since the last call.

    Raises
    ------
    UsageError
        `out` or `manifest` exists, or is an input; `threads` out of range.
    InputError
        A source value is not finite, or does not fit its type.
    ResourceError
        No space, no permission, a read or write failed.
    VerifyError
        A shard changed while it was being read.
    """
    out = Path(out)
    threads = usable_cpus() if threads is None else threads
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError("--threads", f"is {threads}, expected 1 to {MAX_THREADS}")
    check_output(plan, out, overwrite=overwrite)
    if manifest is not None:
        _check_new(Path(manifest), overwrite=overwrite)
    check_space(plan, out)
    prepare({t.format.name for t in plan.tensors} - {"I32"})
    self_test()
    partial = out.with_name(out.name + ".partial")
    with _partial_file(partial) as fd:
        zeroed = _write_units(plan, partial, fd, threads, progress)
        with _explained(partial):
            pwrite_all(fd, memoryview(plan.header), 0)   # last: until now no reader takes the file for a GGUF
            os.fsync(fd)
        check_written(plan, partial)
        with _explained(out):
            partial.replace(out)
            sync_directory(out.parent)
    if manifest is not None:
        write_manifest(out, Path(manifest), zeroed)
    return Conversion(out, plan.total_bytes, zeroed)


def check_output(plan: Plan, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, is an input, lies in the source directory, or cannot be created."""
    inputs = [shard.path for shard in plan.checkpoint.shards.values()]
    source = plan.checkpoint.directory.resolve()
    if out.is_dir():
        raise UsageError(out, "is a directory", hint="give the name of the output file")
    if out.exists() and any(out.samefile(path) for path in inputs):
        raise UsageError(out, "is one of the inputs")
    if out.resolve().is_relative_to(source):
        raise UsageError(out, f"lies in the source directory {source}",
                         hint="write elsewhere: inputs are never touched")
    _check_new(out, overwrite=overwrite)
    if not out.parent.is_dir():
        raise ResourceError(out.parent, "is no directory", hint="create it first")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ResourceError(out.parent, "cannot be written to")


def _check_new(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UsageError(path, "exists", hint="--overwrite replaces it")


def check_space(plan: Plan, out: Path) -> None:
    """ResourceError with the numbers if the output does not fit the disk."""
    with _explained(out.parent):
        free = free_bytes(out.parent)
    need = plan.total_bytes + SPACE_MARGIN_BYTES
    if need > free:
        raise ResourceError(out.parent, f"{format_bytes(free)} free, the output needs {format_bytes(need)}",
                            hint="free some space or write elsewhere")


def check_written(plan: Plan, path: Path) -> None:
    """Read `path` with the strict reader and compare all it says with the plan; a difference is a bug of ours."""
    with scan_gguf(path) as file:
        errors = [f for f in file.findings if f.severity == "error"]
        if errors:
            raise Dsv4Error(path, f"was written wrongly: {errors[0].where}: {errors[0].message}",
                            hint="please report this")
        found = [(t.name, t.ne, t.format.name, t.offset) for t in file.tensors.values()]
        planned = [(t.name, t.tensor.ne, t.format.name, t.offset) for t in plan.tensors]
        if found != planned or file.n_file_bytes != plan.total_bytes or list(file.kvs) != [kv.key for kv in plan.kvs]:
            raise Dsv4Error(path, "was written wrongly: it does not match its plan", hint="please report this")


@contextlib.contextmanager
def _partial_file(path: Path) -> Iterator[int]:
    """A new file open for writing, removed again unless it was renamed; two runs on one output exclude each other."""
    with _explained(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(fd, path)
        with _explained(path):
            os.ftruncate(fd, 0)   # what an earlier, killed run left
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(fd)


def _lock(fd: int, path: Path) -> None:
    try:
        import fcntl  # noqa: PLC0415  - not on every platform
    except ImportError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ResourceError(path, "is being written by another conversion") from None
    except OSError:
        return   # a file system without locks


def _write_units(
    plan: Plan, partial: Path, fd: int, threads: int, progress: Callable[[int], None] | None
) -> dict[str, int]:
    with _explained(partial):
        preallocate(fd, plan.total_bytes)
    zero_nan = plan.nan == "zero"

    def make_worker(computing: threading.Semaphore) -> Callable[[Unit], int]:
        deriver = UnitDeriver(plan.checkpoint.config.n_routed_experts, zero_nan=zero_nan)

        def work(unit: Unit) -> int:
            rows = deriver.read(unit)
            with computing:
                data, n_zeroed = deriver.encode(unit, rows)
            with _explained(partial):
                pwrite_all(fd, data.data, plan.data_offset + unit.planned.offset + unit.start)
            return n_zeroed

        return work

    zeroed: dict[str, int] = {}
    for unit, n_zeroed in run_units(plan.units(), make_worker, threads):
        if n_zeroed:
            zeroed[unit.planned.name] = zeroed.get(unit.planned.name, 0) + n_zeroed
        if progress is not None:
            progress(unit.n_bytes)
    return zeroed


_WHY = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file system allows no file of this size",
    errno.EROFS: "the file system is read-only",
}


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into ours."""
    try:
        yield
    except OSError as e:
        raise ResourceError(path, f"cannot be written: {_WHY.get(e.errno or 0, e.strerror or str(e))}") from None
