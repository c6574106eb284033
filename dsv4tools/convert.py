"""Running a plan: units are read, encoded and written into a `.partial` file that gets its name when it is right."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dsv4tools.derive import UnitDeriver, source_checksum
from dsv4tools.engines import check_plan
from dsv4tools.errors import Dsv4Error, Interrupted, ResourceError, UsageError
from dsv4tools.formats.codecs import prepare, self_test
from dsv4tools.gguf.reader import scan_gguf
from dsv4tools.gguf.splits import SPLIT_KEYS, join_parts, open_whole
from dsv4tools.hub.stream import feed_units, plan_stream
from dsv4tools.identity import plan_identity, shard_states
from dsv4tools.journal import BYTES_PER_UNIT
from dsv4tools.loss import Loss, measure_losses
from dsv4tools.manifest import write_manifest
from dsv4tools.options import RunOptions
from dsv4tools.outfile import check_output, check_space, partial_path
from dsv4tools.output import OutputFile, was_completed, working_paths
from dsv4tools.split_plan import output_paths, sized_files
from dsv4tools.spot_check import check_samples
from dsv4tools.workers import choose_threads, run_units

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Generator, Iterable, Sequence

    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.journal import FinishedUnit
    from dsv4tools.plan import Plan, PlannedFile, Unit

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did.

    Attributes
    ----------
    path, n_bytes:
        The file and its size; of a split set the first file, and the size of all.
    zeroed:
        Per tensor how many values were zeroed (``--nan zero``).
    losses:
        Of a GGUF as source: what giving its tensors other types has cost, by family.
    paths:
        All files that it wrote.
    """

    path: Path
    n_bytes: int
    zeroed: dict[str, int] = field(default_factory=dict)
    losses: tuple[Loss, ...] = ()
    paths: tuple[Path, ...] = ()


def convert(
    plan: Plan, out: str | Path, *, overwrite: bool = False, manifest: str | Path | None = None,
    threads: int | None = None, progress: Callable[[int], None] | None = None, run: RunOptions | None = None,
    engines: Sequence[str] = (),
) -> Conversion:
    """Write the GGUF that `plan` describes.

    The bytes do not depend on the number of threads. Memory is (threads + 2) x one unit's source and output bytes,
    whatever the size of the model, and about 0.3 KB per unit. The file carries its name only when it is complete,
    checked and on disk; until then it is ``OUT.partial``, and a stopped conversion goes on where it was when it is
    called again with an equal plan.

    Shards of a checkpoint on the Hub are fetched into its cache while others are converted (`hub.stream`).

    Parameters
    ----------
    out:
        The output file; ``OUT.partial``, ``OUT.journal`` and ``OUT.lock`` stand beside it on the way. A plan that
        `split_plan` has cut is written as ``NAME-00001-of-0000N.gguf`` and so on: all of them get their names at the
        end, the first one last.
    overwrite:
        Replace an existing `out` (at the end, in one step).
    manifest:
        Also write the sha256 of every tensor, of all tensors and of the file there.
    run:
        How to run; `threads` and `progress` alone are short for ``RunOptions(threads=..., progress=...)``.
    engines:
        Engines that must load the file (`dsv4tools.engines.choose_engines`); one of those known must in any case.
        ``["none"]`` asks none.

    Raises
    ------
    UsageError
        `out` or `manifest` exists, or is an input; `threads` out of range; a partial file of another plan; an unknown
        engine; shards of a directory are to be deleted.
    InputError
        An engine that was asked for would refuse the file, or every known one would; a source value is not finite, or
        does not fit its type.
    ResourceError
        No space, no permission, another conversion holds the lock, a read or write failed.
    VerifyError
        A shard changed while it was being read, or came from the Hub with a wrong hash twice.
    Interrupted
        ``run.stop`` was set.
    """
    out, manifest = Path(out), None if manifest is None else Path(manifest)
    run = run or RunOptions(threads=threads, progress=progress)
    plan_stream(plan, run)   # for its refusals
    check_plan(plan, engines)
    n_threads = check_conversion(plan, out, threads=run.threads, overwrite=overwrite, manifest=manifest)
    paths = output_paths(plan, out)
    output = OutputFile(paths[0], plan.total_bytes, plan_identity(plan), shard_states(plan),
                        files=sized_files(plan, paths), recheck=make_recheck(plan), run=run,
                        extents=lambda: ((plan.position(u), u.n_bytes) for u in plan.units()))
    prepare(plan.kernels)
    self_test()
    with output:
        if not output.completed:
            write_units(plan, output, plan.units(), plan.position, n_threads, run)
            output.complete(plan.header, lambda _: check_written(plan, output.partials),
                            later=[(file.start, file.header) for file in plan.files[1:]])
        zeroed = count_zeroed(plan, output.finished)
        if manifest is not None:
            write_manifest(paths, manifest, zeroed, stop=run.stop)
    with open_whole(paths[0]) as file:
        losses = measure_losses(plan, file, threads=n_threads, stop=run.stop)
    return Conversion(paths[0], plan.total_bytes, zeroed, tuple(losses), tuple(paths))


def check_conversion(
    plan: Plan, out: Path, *, threads: int | None = None, overwrite: bool = False, manifest: Path | None = None
) -> int:
    """Raise what `convert` with these arguments would raise before its work; returns the number of threads."""
    n_threads = choose_threads(threads)
    paths = output_paths(plan, out)
    is_there = was_completed(paths[0], plan_identity(plan), paths)
    for path in paths:
        check_output(plan.checkpoint, path, overwrite=overwrite or is_there)
    if manifest is not None:
        check_output(plan.checkpoint, manifest, overwrite=overwrite)
        if manifest.resolve() in {p.resolve() for path in paths for p in working_paths(path)}:
            raise UsageError(manifest, "is the output itself", hint="give the manifest another name")
    if not is_there:
        check_space(paths[0], plan.total_bytes + BYTES_PER_UNIT * plan.n_units, [partial_path(path) for path in paths])
    return n_threads


def check_written(plan: Plan, paths: Sequence[Path]) -> None:
    """Read the files with the strict reader, compare all they say with the plan, and a few rows with their source.

    A difference is a bug of ours.
    """
    with ExitStack() as opened:
        parts = [opened.enter_context(scan_gguf(path)) for path in paths]
        for i, (file, planned) in enumerate(zip(parts, plan.files, strict=True)):
            _check_part(file, planned, [kv.key for kv in plan.kvs] if i == 0 else [], split=len(parts) > 1)
        check_samples(plan, join_parts(paths[0], parts))


def _check_part(file: GgufFile, planned: PlannedFile, keys: list[str], *, split: bool) -> None:
    errors = [f for f in file.findings if f.severity == "error"]
    if errors:
        raise Dsv4Error(file.path, f"was written wrongly: {errors[0].where}: {errors[0].message}",
                        hint="please report this")
    found = [(t.name, t.ne, t.format.name, t.offset) for t in file.tensors.values()]
    expected = [(t.name, t.tensor.ne, t.format.name, t.offset) for t in planned.tensors]
    has_keys = list(file.kvs) == [*keys, *(SPLIT_KEYS if split else ())]
    if found != expected or file.n_file_bytes != planned.n_bytes or not has_keys:
        raise Dsv4Error(file.path, "was written wrongly: it does not match its plan", hint="please report this")


def write_units(  # noqa: PLR0917  - what, whereto, how: each of them once
    plan: Plan, output: OutputFile, units: Iterable[Unit], position: Callable[[Unit], int], threads: int,
    run: RunOptions,
) -> None:
    """Derive and write all `units` that `output` does not have yet.

    `position` says where in the file a unit belongs. Raises Interrupted, with all that was done recorded, when
    ``run.stop`` was set before the last unit.
    """
    zero_nan = plan.nan == "zero"

    def make_worker(computing: threading.Semaphore) -> Callable[[Unit], FinishedUnit]:
        deriver = UnitDeriver(plan.checkpoint.config.n_routed_experts, zero_nan=zero_nan)

        def work(unit: Unit) -> FinishedUnit:
            try:
                rows = deriver.read(unit)
                source = source_checksum(rows)   # at once: much later the bytes are out of the processor's cache
                with computing:
                    data, n_zeroed = deriver.encode(unit, rows)
            except MemoryError:
                raise ResourceError(unit.planned.name, "not enough memory", hint="use fewer --threads") from None
            return output.write(position(unit), data, source, n_zeroed)

        return work

    todo = (unit for unit in units if position(unit) not in output.finished)
    with feed_units(plan.checkpoint, todo, run, output.flush) as feed:
        results = run_units(feed, make_worker, threads, run.stop, feed.halt)
        record_all(results, output, run, feed.done)


def record_all(
    results: Generator[tuple[Item, FinishedUnit], None, None], output: OutputFile, run: RunOptions,
    done: Callable[[Item], None] = lambda _: None,
) -> None:
    """Record what workers have written until there is no more; Interrupted if they were stopped.

    `done` hears of each item that was recorded.
    """
    with closing(results):
        for item, finished in results:
            output.record(finished)
            run.advance(finished.n_bytes)
            done(item)
    output.flush()
    if run.stop.is_set():
        raise Interrupted(run.stop.signal_number, "stopped", hint=output.hint)


def make_recheck(plan: Plan) -> Callable[[FinishedUnit, set[str]], bool]:
    """For `OutputFile`: whether a finished unit's source bytes are still those that it was made from."""
    deriver = UnitDeriver(plan.checkpoint.config.n_routed_experts)
    units: dict[int, Unit] = {}

    def recheck(finished: FinishedUnit, changed: set[str]) -> bool:
        if not units:
            units.update((plan.position(unit), unit) for unit in plan.units())
        unit = units.get(finished.position)
        if unit is None:
            return False
        if changed.isdisjoint(unit.matrix.shard_names):
            return True
        # To fetch a shard again in order to look at it would be no less work than to do its units again.
        return unit.matrix.at_hand and source_checksum(deriver.read(unit)) == finished.source

    return recheck


def count_zeroed(plan: Plan, finished: dict[int, FinishedUnit]) -> dict[str, int]:
    """Tensor name -> values that were not finite and became 0, where there are any."""
    if not any(u.n_zeroed for u in finished.values()):
        return {}
    totals: dict[str, int] = {}
    for unit in plan.units():
        n = finished[plan.position(unit)].n_zeroed
        if n:
            totals[unit.planned.name] = totals.get(unit.planned.name, 0) + n
    return totals
