"""Running a plan: units are read, encoded and written into a `.partial` file that gets its name when it is right."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4tools.derive import UnitDeriver
from dsv4tools.errors import Dsv4Error, ResourceError, UsageError
from dsv4tools.files import preallocate, pwrite_all
from dsv4tools.formats.codecs import prepare, self_test
from dsv4tools.gguf.reader import scan_gguf
from dsv4tools.manifest import write_manifest
from dsv4tools.outfile import check_output, check_space, complete_file, explained, partial_path
from dsv4tools.workers import choose_threads, run_units

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from dsv4tools.plan import Plan, Unit


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
    out, manifest = Path(out), None if manifest is None else Path(manifest)
    threads = check_conversion(plan, out, threads=threads, overwrite=overwrite, manifest=manifest)
    prepare({t.format.name for t in plan.tensors} - {"I32"})
    self_test()
    partial = partial_path(out)
    with complete_file(out) as fd:
        zeroed = _write_units(plan, partial, fd, threads, progress)
        with explained(partial):
            pwrite_all(fd, memoryview(plan.header), 0)   # last: until now no reader takes the file for a GGUF
            os.fsync(fd)
        check_written(plan, partial)
    if manifest is not None:
        write_manifest(out, manifest, zeroed)
    return Conversion(out, plan.total_bytes, zeroed)


def check_conversion(
    plan: Plan, out: Path, *, threads: int | None = None, overwrite: bool = False, manifest: Path | None = None
) -> int:
    """Raise what `convert` with these arguments would raise before its work; returns the number of threads."""
    n_threads = choose_threads(threads)
    check_output(plan.checkpoint, out, overwrite=overwrite)
    if manifest is not None:
        check_output(plan.checkpoint, manifest, overwrite=overwrite)
        if manifest.resolve() in {out.resolve(), partial_path(out).resolve()}:
            raise UsageError(manifest, "is the output itself", hint="give the manifest another name")
    check_space(out, plan.total_bytes)
    return n_threads


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


def _write_units(
    plan: Plan, partial: Path, fd: int, threads: int, progress: Callable[[int], None] | None
) -> dict[str, int]:
    with explained(partial):
        preallocate(fd, plan.total_bytes)
    zero_nan = plan.nan == "zero"

    def make_worker(computing: threading.Semaphore) -> Callable[[Unit], int]:
        deriver = UnitDeriver(plan.checkpoint.config.n_routed_experts, zero_nan=zero_nan)

        def work(unit: Unit) -> int:
            try:
                rows = deriver.read(unit)
                with computing:
                    data, n_zeroed = deriver.encode(unit, rows)
            except MemoryError:
                raise ResourceError(unit.planned.name, "not enough memory", hint="use fewer --threads") from None
            with explained(partial):
                pwrite_all(fd, data.data, plan.data_offset + unit.planned.offset + unit.start)
            return n_zeroed

        return work

    zeroed: dict[str, int] = {}
    with closing(run_units(plan.units(), make_worker, threads)) as results:
        for unit, n_zeroed in results:
            if n_zeroed:
                zeroed[unit.planned.name] = zeroed.get(unit.planned.name, 0) + n_zeroed
            if progress is not None:
                progress(unit.n_bytes)
    return zeroed
