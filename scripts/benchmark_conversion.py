"""Whole conversions for scripts/benchmark: beside ggml on the same expert rows, and beside what the disk can do.

A checkpoint with Flash's widths is made once (three layers of the three kinds). Each conversion runs in a process of
its own on source files that were dropped from the page cache. The disk's time is a cold read of the source and a write
with fsync of as many bytes as the output has, measured in the same run; "pure encode" is the time inside the encoders
of a conversion by one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

import dsv4tools as dt
from dsv4tools.derive import UnitDeriver
from dsv4tools.formats.codecs import prepare
from dsv4tools.synthetic import write_full_width

if TYPE_CHECKING:
    from pathlib import Path

    from quant_reference import Ggml

_CHUNK_BYTES = 1 << 23
_CHILD = """
import json, resource, sys, time
import dsv4tools as dt
from dsv4tools.formats.codecs import prepare
source, out, threads = sys.argv[1:]
plan = dt.plan(dt.open_checkpoint(source))
prepare({t.format.name for t in plan.tensors} - {"I32"})
convert = dt.convert   # loads its modules
started = time.perf_counter()
convert(plan, out, threads=int(threads), overwrite=True)
seconds = time.perf_counter() - started
try:   # ru_maxrss survives exec: it may be the memory of the process that started this one
    with open("/proc/self/status") as f:
        peak = 1024 * int(f.read().split("VmHWM:")[1].split()[0])
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak}))
"""


def drop_from_cache(paths: list[Path]) -> None:
    """Write back and forget the cached pages of files, so that the next read comes from the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDWR)
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def disk_seconds(sources: list[Path], directory: Path, n_bytes: int) -> tuple[float, float]:
    """Seconds of a cold read of `sources`, and of writing `n_bytes` with fsync."""
    drop_from_cache(sources)
    buffer = memoryview(bytearray(os.urandom(_CHUNK_BYTES)))
    started = time.perf_counter()
    for path in sources:
        with path.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    read = time.perf_counter() - started
    target = directory / "disk.tmp"
    started = time.perf_counter()
    with target.open("wb", buffering=0) as f:
        for at in range(0, n_bytes, _CHUNK_BYTES):
            f.write(buffer[: min(_CHUNK_BYTES, n_bytes - at)])
        os.fsync(f.fileno())
    write = time.perf_counter() - started
    target.unlink()
    return read, write


def encode_seconds(plan: dt.Plan) -> float:
    """Seconds inside the encoders, one thread, for all units of a plan."""
    prepare({t.format.name for t in plan.tensors} - {"I32"})
    deriver = UnitDeriver(plan.checkpoint.config.n_routed_experts)
    total = 0.0
    for unit in plan.units():
        rows = deriver.read(unit)
        started = time.perf_counter()
        deriver.encode(unit, rows)
        total += time.perf_counter() - started
    return total


def ggml_seconds(plan: dt.Plan, ggml: Ggml, seconds: float) -> float:
    """Seconds that ggml's quantizer takes for all expert rows, one thread, from a timed share of these very rows."""
    experts = [t for t in plan.tensors if len(t.tensor.ne) == 3]
    n_values = sum(int(np.prod(t.tensor.ne)) for t in experts)
    deriver = UnitDeriver(plan.checkpoint.config.n_routed_experts)
    from dsv4tools.formats.codecs import decode_source  # noqa: PLC0415  - beside its use

    done, spent = 0, 0.0
    for unit in (u for u in plan.units() if u.planned in experts):
        rows = deriver.read(unit)
        x = np.zeros((rows.n_rows, rows.n_cols), np.float32)
        decode_source(rows, x)
        started = time.perf_counter()
        ggml.quantize(x, unit.planned.format.name)
        spent += time.perf_counter() - started
        done += x.size
        if spent >= seconds:
            break
    return spent * n_values / done


def measure_conversion(
    directory: Path, experts: int, thread_counts: list[int], ggml: Ggml | None, seconds: float
) -> list[dict[str, Any]]:
    """One line per number of threads, for a full-width checkpoint with `experts` experts per layer."""
    source = directory / f"full-width-{experts}"
    if not source.exists():
        write_full_width(source, experts=experts)
    plan = dt.plan(dt.open_checkpoint(source))
    shards = [shard.path for shard in plan.checkpoint.shards.values()]
    pure = encode_seconds(plan)
    theirs = ggml_seconds(plan, ggml, seconds) if ggml else None
    lines = []
    for threads in thread_counts:
        read, write = disk_seconds(shards, directory, plan.total_bytes)
        drop_from_cache(shards)
        out = directory / "out.gguf"
        child = subprocess.run([sys.executable, "-c", _CHILD, str(source), str(out), str(threads)], check=True,
                               capture_output=True, text=True)  # fmt: skip
        out.unlink()
        result = json.loads(child.stdout)
        limit = max(pure / threads, read + write)
        line = {
            "experts": experts, "threads": threads, "seconds": result["seconds"],
            "peak_rss_bytes": result["peak_rss_bytes"], "source_bytes": plan.source_bytes,
            "output_bytes": plan.total_bytes, "pure_encode_seconds": pure, "disk_read_seconds": read,
            "disk_write_seconds": write, "over_limit": result["seconds"] / limit,
        }  # fmt: skip
        if theirs is not None:
            line["ggml_seconds_one_thread"] = theirs
            line["ratio_to_ggml_on_as_many_threads"] = theirs / threads / result["seconds"]
        lines.append(line)
    return lines


def show_conversions(lines: list[dict[str, Any]]) -> None:
    """The lines as a table."""
    print(f"{'experts':>7} {'threads':>7} {'seconds':>8} {'peak MB':>8} {'encode/thr':>10} {'disk r+w':>12} "
          f"{'of limit':>8} {'ggml/thr':>9} {'ratio':>6}")
    for line in lines:
        disk = f"{line['disk_read_seconds']:.1f}+{line['disk_write_seconds']:.1f}"
        print(f"{line['experts']:7} {line['threads']:7} {line['seconds']:8.2f} {line['peak_rss_bytes'] / 1e6:8.0f} "
              f"{line['pure_encode_seconds'] / line['threads']:10.2f} {disk:>12} {line['over_limit']:7.2f}x", end="")
        if "ggml_seconds_one_thread" in line:
            ggml = line["ggml_seconds_one_thread"] / line["threads"]
            print(f" {ggml:9.1f} {line['ratio_to_ggml_on_as_many_threads']:5.1f}x", end="")
        print()


def name_kernel(line: dict[str, Any]) -> str:
    """A kernel and the case that was measured."""
    return f"{line['kernel']}, {line['rows']} rows, {line['threads']} thr."


def plot(kernels: list[dict[str, Any]], conversions: list[dict[str, Any]], path: Path) -> None:
    """Ratios of the kernels and times of the conversions as bars, in one SVG."""
    bars = [(name_kernel(k), k["ratio"], f"{k['ratio']:.1f}x {k['other']}") for k in kernels if "ratio" in k]
    times = [(name_kernel(k), k["seconds"], f"{1e3 * k['seconds']:.2f} ms") for k in kernels]
    rows = [("Kernels, ratio to the other side on the same rows", bars), ("Kernels, time", times)]
    rows.append(("Conversions, seconds", [
        (f"{c['experts']} experts, {c['threads']} threads", c["seconds"], f"{c['seconds']:.1f} s")
        for c in conversions]))
    parts, y = [], 24
    for title, entries in rows:
        if not entries:
            continue
        parts.append(f'<text x="8" y="{y}" font-weight="bold">{title}</text>')
        largest = max(value for _, value, _ in entries)
        for label, value, text in entries:
            y += 22
            width = 380 * value / largest
            parts.append(f'<text x="388" y="{y}" text-anchor="end">{label.replace(">", "&gt;")}</text>'
                         f'<rect x="396" y="{y - 12}" width="{width:.1f}" height="15" fill="#4878a8"/>'
                         f'<text x="{402 + width:.1f}" y="{y}">{text}</text>')
        y += 40
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{y}" font-family="sans-serif" '
                    f'font-size="13"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n', "utf-8")
