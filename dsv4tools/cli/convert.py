"""``dsv4tools convert``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv4tools.cli.engines import engine_option, show_summaries
from dsv4tools.cli.importance import show_coverage
from dsv4tools.cli.output import (
    EPILOG,
    json_option,
    progress_bar,
    say,
    shell_words,
    show,
    show_json,
    show_table,
    threads_option,
)
from dsv4tools.cli.planning import plan_from_options, plan_options
from dsv4tools.cli.signals import graceful_stop
from dsv4tools.cli.sources import output_argument, source_argument
from dsv4tools.convert import check_conversion
from dsv4tools.convert import convert as run_conversion
from dsv4tools.describe import describe_plan, output_name
from dsv4tools.engines import choose_engines, judge_plan, require_engines
from dsv4tools.errors import UsageError
from dsv4tools.files import usable_cpus
from dsv4tools.hints import find_hints
from dsv4tools.hub.stream import MAX_AHEAD, plan_stream
from dsv4tools.options import RunOptions
from dsv4tools.outfile import check_not_input
from dsv4tools.parts import convert_part, parse_part
from dsv4tools.requantize import list_changes
from dsv4tools.sizes import format_bytes, format_seconds, parse_bytes
from dsv4tools.split_plan import output_paths, split_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4tools.convert import Conversion
    from dsv4tools.engines import Verdict
    from dsv4tools.hints import Mxfp4Hint
    from dsv4tools.hub import HubReference
    from dsv4tools.hub.stream import StreamPlan
    from dsv4tools.plan import Plan


@click.command(epilog=EPILOG)
@click.argument("source", metavar="SRC", type=source_argument)
@click.argument("out", metavar="[OUT.gguf]", type=output_argument, required=False)
@plan_options
@engine_option
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--manifest", type=click.Path(path_type=Path), metavar="M",
              help="Also write the sha256 of every tensor, of all and of the file to M.")
@click.option("--restart", is_flag=True, help="Do not continue an interrupted conversion, begin anew.")
@click.option("--steal-lock", is_flag=True, help="Take the lock of a run that cannot be asked whether it still lives.")
@click.option("--split-max-size", metavar="SIZE",
              help="Write a split set of files of at most SIZE (40G, 500M, 32GiB): OUT-00001-of-0000N.gguf and so on.")
@click.option("--shards-ahead", type=click.IntRange(0, MAX_AHEAD), default=RunOptions().shards_ahead, metavar="N",
              show_default=True, help="Of hf://...: shards to fetch while others are converted.")
@click.option("--delete-shards", is_flag=True,
              help="Of hf://...: remove each shard from the cache as soon as it is used up.")
@click.option("--part", metavar="I/N", help="Write only part I of N, for job arrays; `assemble` joins them.")
@click.option("--dry-run", is_flag=True, help="Print the plan, from headers alone, and write nothing.")
@json_option
def convert(source: Path | HubReference, out: Path | None, threads: int | None, overwrite: bool, manifest: Path | None,
            restart: bool, steal_lock: bool, split_max_size: str | None, shards_ahead: int, delete_shards: bool,
            part: str | None, dry_run: bool, as_json: bool, engines: tuple[str, ...], **options: Any) -> None:
    """Write a GGUF from SRC: a checkpoint directory, or a GGUF whose types or dialect are to change.

    Of a GGUF tensors that have their type already are copied, others decoded and encoded; values that were rounded
    before are not rounded again without --allow-requantize.

    Without OUT.gguf the name follows the GGUF naming convention, in the current directory. The bytes do not depend on
    the number of threads. The output carries its name only when it is complete and checked; an interrupted conversion
    goes on where it was when the same command is given again.

    Before anything is written the plan is checked against what ds4 and llama.cpp load. It stops (exit code 3) where an
    engine named by --engine would refuse the file, or where all of them would.

    From hf://OWNER/NAME[@REVISION] shards are fetched while earlier ones are converted, and checked by their hashes.
    They stay in the cache (DSV4TOOLS_CACHE names its place), with --delete-shards only as long as they are needed.

    \b
    Examples:
      dsv4tools convert DeepSeek-V4-Flash flash.gguf --dry-run
      dsv4tools convert DeepSeek-V4-Flash flash.gguf --manifest flash.sha256
      dsv4tools convert DeepSeek-V4-Flash flash-4e.gguf --experts-per-token 4
      dsv4tools convert DeepSeek-V4-Flash flash.gguf --split-max-size 40G
      dsv4tools convert DeepSeek-V4-Flash flash.gguf --tensor-type blk.0=bf16 --engine llama.cpp
      dsv4tools convert from-llama.cpp.gguf for-ds4.gguf --policy mxfp4 --engine ds4
      dsv4tools convert DeepSeek-V4-Flash flash.gguf --imatrix flash.imatrix.gguf
      dsv4tools convert hf://deepseek-ai/DeepSeek-V4-Flash flash.gguf --delete-shards
    """
    chosen = None if part is None else parse_part(part)
    if chosen is not None and manifest is not None:
        raise UsageError("--manifest", "is for a whole file", hint="give it to `dsv4tools assemble`")
    asked = choose_engines(engines)
    max_bytes = None if split_max_size is None else parse_bytes(split_max_size, "--split-max-size")
    plan = plan_from_options(source, **options)
    if max_bytes is not None:
        plan = split_plan(plan, max_bytes)
    verdicts = judge_plan(plan, asked)
    threads = threads or usable_cpus()
    out = out or Path(output_name(plan))
    stream = plan_stream(plan, RunOptions(shards_ahead=shards_ahead, delete_shards=delete_shards))
    hints = find_hints(plan, verdicts, asked)
    report = describe_plan(plan, out, threads, stream) | {"engines": [v.as_data() for v in verdicts],
                                                          "hints": [hint.as_data() for hint in hints]}
    if dry_run:
        show_json(report) if as_json else _show_plan(plan, report, verdicts, hints, stream)
        require_engines(plan, verdicts, asked)
        return
    inputs = (options["template_file"], options["imatrix"], Path(options["policy"]))
    for path in output_paths(plan, out):
        check_not_input(path, [f for f in inputs if f and f.is_file()])
    if chosen is None:
        check_conversion(plan, out, threads=threads, overwrite=overwrite, manifest=manifest)
    if not as_json:
        show_summaries(verdicts)
    require_engines(plan, verdicts, asked)
    _tell_notes(plan, stream)
    started = time.monotonic()
    total_bytes = sum(t.n_bytes for t in plan.tensors) // (chosen[1] if chosen else 1)
    with graceful_stop() as stop, progress_bar(total_bytes, out.name) as advance:
        run = RunOptions(threads, restart, steal_lock, advance, lambda note: say(f"note: {note}"), stop, shards_ahead,
                         delete_shards)
        if chosen is not None:
            path, existed = convert_part(plan, out, *chosen, overwrite=overwrite, run=run)
            _show_part(path, existed=existed, out=out, as_json=as_json)
            return
        done = run_conversion(plan, out, overwrite=overwrite, manifest=manifest, run=run, engines=engines)
    seconds = time.monotonic() - started
    if as_json:
        summary = {k: v for k, v in report.items() if k not in {"tensors", "free_bytes", "estimated_seconds"}}
        show_json(summary | {"seconds": round(seconds, 3), "zeroed": done.zeroed,
                             "losses": [loss.as_data() for loss in done.losses],
                             "manifest": str(manifest) if manifest else None})
    else:
        _show_done(plan, done, seconds, source, manifest, options["imatrix"])


def _tell_notes(plan: Plan, stream: StreamPlan | None) -> None:
    for note in plan.notes:
        say(f"note: {note}")
    if stream is not None:
        say(f"note: up to {stream.peak_shards} of {stream.n_shards} shards at once, {format_bytes(stream.peak_bytes)}, "
            f"in {stream.directory}")


def _show_done(
    plan: Plan, done: Conversion, seconds: float, source: Path | HubReference, manifest: Path | None,
    imatrix: Path | None,
) -> None:
    out = done.path
    files = f"{out} and {len(done.paths) - 1} more parts" if len(done.paths) > 1 else out
    show(f"wrote {files}: {len(plan.tensors)} tensors, {format_bytes(done.n_bytes)} in {format_seconds(seconds)}")
    for name, n in done.zeroed.items():
        show(f"{n} values that are not finite were converted to 0 in {name}")
    if done.losses:
        show("values that got another type, measured on a sample against the source:")
        show_table([("tensors", "", "from", "to", "relative RMSE", "largest error"),
                    *((each.n_tensors, each.family, each.stored.name, each.target.name,
                       f"{each.errors.relative_rmse:.3g}", f"{each.errors.largest_error:.3g}")
                      for each in done.losses)], right="rlllrr")
    show_coverage(plan, "importance: ")
    if manifest:
        show(f"wrote {manifest}")
    with_imatrix = ("--imatrix", imatrix) if plan.imatrix is not None else ()
    origin = plan.checkpoint.reference or source
    show(f"next: {shell_words('dsv4tools', 'verify', out, '--source', origin, *with_imatrix)}")


def _show_part(path: Path, *, existed: bool, out: Path, as_json: bool) -> None:
    n_bytes = path.stat().st_size
    if as_json:
        show_json({"part": str(path), "n_bytes": n_bytes, "existed": existed})
        return
    if existed:
        show(f"{path} was there already, from this same conversion")
    else:
        show(f"wrote {path}: {format_bytes(n_bytes)}")
    show(f"next, when all parts are there: {shell_words('dsv4tools', 'assemble', out)}")


def _show_source(plan: Plan, stream: StreamPlan | None) -> None:
    hashes = "not hash-verified" if stream is None else "the sha256 of each shard is checked before it is used"
    show(f"source         {plan.source_bytes} bytes to read, {format_bytes(plan.source_bytes)}; {hashes}")
    if stream is None:
        return
    there = f", {format_bytes(stream.n_present_bytes)} of them there" if stream.n_present_bytes else ""
    kept = "each is removed when it is used up" if stream.delete else "they stay there (--delete-shards removes them)"
    show(f"shards         {stream.n_shards} from the Hub, {format_bytes(stream.n_bytes)}{there}; "
         f"{stream.shards_ahead} fetched ahead")
    show(f"extra disk     at most {stream.peak_shards} shards at once, {format_bytes(stream.peak_bytes)}, in "
         f"{stream.directory}: {kept}")


def _show_plan(
    plan: Plan, report: dict[str, object], verdicts: Sequence[Verdict], hints: Sequence[Mxfp4Hint],
    stream: StreamPlan | None,
) -> None:
    rows: list[tuple[object, ...]] = [("tensor", "shape", "type", "offset", "bytes", "rule")]
    rows += [(t.name, "x".join(map(str, t.tensor.ne)), t.format.name, t.offset, t.n_bytes, t.rule)
             for t in plan.tensors]
    show_table(rows, right="lllrr")
    show()
    for pattern, count in plan.template.left_out.items():
        if count:
            show(f"left out       {count} source tensors {pattern}")
    for note in plan.notes:
        show(f"note           {note}")
    for hint in hints:
        show(f"hint           {hint.text}")
    show(f"policy         {plan.policy.name}: {plan.policy.description}")
    for name, n_bytes in plan.bytes_by_format().items():
        show(f"  {name:<12} {format_bytes(n_bytes)}")
    show_coverage(plan, "importance     ")
    show(f"tensors        {len(plan.tensors)}")
    for c in list_changes(plan.tensors):
        how = f"{c.stored.name} as it is" if c.change == "copied" else f"{c.stored.name} to {c.target.name}"
        show(f"  {c.change:<12} {c.n_tensors} tensors, {how}, {format_bytes(c.n_bytes)}")
    show(f"tensor data    {plan.data_bytes} bytes, {format_bytes(plan.data_bytes)}")
    show(f"output         {report['out']}, {plan.total_bytes} bytes, {format_bytes(plan.total_bytes)}")
    if len(plan.files) > 1:
        for path, file in zip(output_paths(plan, Path(str(report["out"]))), plan.files, strict=True):
            show(f"  {path.name:<12} {len(file.tensors)} tensors, {file.n_bytes} bytes, {format_bytes(file.n_bytes)}")
    _show_source(plan, stream)
    free = report["free_bytes"]
    show(f"free space     {format_bytes(free) if isinstance(free, int) else 'unknown'}"
         + ("" if report["fits"] else ": NOT ENOUGH"))
    show(f"memory         about {format_bytes(plan.memory_bytes(int(str(report['threads']))))} of buffers")
    seconds = format_seconds(float(str(report["estimated_seconds"])))
    show(f"time           about {seconds} with {report['threads']} threads, an estimate")
    if plan.nan == "zero":
        show("values         that are not finite are converted to 0 and counted")
    show_summaries(verdicts)
