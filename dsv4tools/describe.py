"""Plans, checkpoints and GGUF files as plain data, for --json, for `inspect`, and for whoever calls the library."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict
from math import prod
from typing import TYPE_CHECKING, Any

from dsv4tools.errors import Dsv4Error
from dsv4tools.files import free_bytes
from dsv4tools.journal import BYTES_PER_UNIT
from dsv4tools.outfile import SPACE_MARGIN_BYTES
from dsv4tools.requantize import list_changes
from dsv4tools.split_plan import output_paths
from dsv4tools.template.metadata import size_label

if TYPE_CHECKING:
    from pathlib import Path

    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.hub.stream import StreamPlan
    from dsv4tools.imatrix import ImatrixFile
    from dsv4tools.plan import Plan

# Values per second and thread, as measured on one AVX-512 core (docs/performance.md); only for estimates.
ENCODE_RATES = {"Q4_K": 350e6, "Q8_0": 2e9}
OTHER_RATE = 400e6
DISK_BYTES_PER_SECOND = 500e6
MAX_NAME_LENGTH = 100   # of what a model calls itself, in a file name


def estimate_seconds(plan: Plan, threads: int) -> float:
    """A rough wall time: the slower of encoding on `threads` cores and moving the bytes at 500 MB/s."""
    encoding = sum(prod(t.tensor.ne) / ENCODE_RATES.get(t.format.name, OTHER_RATE) for t in plan.tensors)
    return max(encoding / threads, (plan.source_bytes + plan.total_bytes) / DISK_BYTES_PER_SECOND)


def describe_plan(plan: Plan, out: Path, threads: int, stream: StreamPlan | None = None) -> dict[str, Any]:
    """The plan as JSON-ready data; free space is None where the output's directory does not exist.

    `stream` says how shards come from the Hub; None where they are files.
    """
    try:
        free: int | None = free_bytes(out.parent)
    except OSError:
        free = None
    return {
        "out": str(out),
        "files": [{"path": str(path), "n_bytes": file.n_bytes, "n_tensors": len(file.tensors)}
                  for path, file in zip(output_paths(plan, out), plan.files, strict=True)],
        "total_bytes": plan.total_bytes,
        "data_bytes": plan.data_bytes,
        "data_offset": plan.data_offset,
        "source_bytes": plan.source_bytes,
        "free_bytes": free,
        "fits": free is not None and _fits(plan, out, free, stream),
        "hash_verified": stream is not None,
        "stream": None if stream is None else asdict(stream) | {"directory": str(stream.directory)},
        "threads": threads,
        "buffer_bytes": plan.memory_bytes(threads),
        "estimated_seconds": round(estimate_seconds(plan, threads), 1),
        "policy": {"name": plan.policy.name, "description": plan.policy.description, "sha256": plan.policy.sha256},
        "experts_per_token": plan.checkpoint.config.num_experts_per_tok,
        "nan": plan.nan,
        "imatrix": plan.imatrix.as_data() if plan.imatrix else None,
        "imatrix_coverage": plan.coverage.as_data() if plan.coverage else None,
        "notes": list(plan.notes),
        "left_out": dict(plan.template.left_out),
        "bytes_by_type": plan.bytes_by_format(),
        "n_tensors": len(plan.tensors),
        "changes": [{"change": c.change, "from": c.stored.name, "to": c.target.name, "n_tensors": c.n_tensors,
                     "n_bytes": c.n_bytes} for c in list_changes(plan.tensors)],
        "tensors": [
            {"name": t.name, "ne": list(t.tensor.ne), "type": t.format.name, "rule": t.rule, "offset": t.offset,
             "part": t.part, "n_bytes": t.n_bytes, "source_bytes": t.tensor.source_bytes,
             "sources": list(dict.fromkeys(m.weight.name for m in t.tensor.sources))}
            for t in plan.tensors
        ],
    }


def _fits(plan: Plan, out: Path, free: int, stream: StreamPlan | None) -> bool:
    """Whether the output, and the shards on their way, fit the file systems that they are for."""
    need = plan.total_bytes + BYTES_PER_UNIT * plan.n_units + SPACE_MARGIN_BYTES
    if stream is None:
        return need <= free
    home = next(p for p in (stream.directory, *stream.directory.parents) if p.exists())
    if home.stat().st_dev == out.parent.stat().st_dev:
        return need + stream.n_more_bytes <= free
    return need <= free and stream.n_more_bytes + SPACE_MARGIN_BYTES <= free_bytes(home)


def output_name(plan: Plan) -> str:
    """A file name by the GGUF naming convention (ggml, docs/gguf.md): base, size label, version, encoding."""
    # A template file may bring a name, or none; what becomes a path is never taken from it unchecked.
    name = next((str(kv.value) for kv in plan.kvs if kv.key == "general.name"), plan.checkpoint.card.name)
    words = re.findall(r"[A-Za-z0-9]+", name[:MAX_NAME_LENGTH]) or ["model"]
    base = words[0]
    for word in words[1:]:
        # The convention has no words such as "6e", that begin with a digit and are no number.
        base += word if word[0].isdigit() and not word.isdigit() else f"-{word}"
    config = plan.checkpoint.config
    n_experts = config.num_experts_per_tok
    tune = f"-{n_experts}Expert" if plan.checkpoint.stored_experts_per_token != n_experts else ""
    encoding = next(iter(plan.bytes_by_format()))
    return f"{base}-{size_label(plan.template.tensors)}{tune}-v1.0-{encoding}.gguf"


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint holds; the tokenizer is None where it is missing or wrong, with the reason."""
    c = checkpoint.config
    n_layers = c.num_hidden_layers
    try:
        vocabulary: dict[str, Any] = {
            "n_tokens": len(checkpoint.vocabulary.tokens), "n_merges": len(checkpoint.vocabulary.merges),
            "special_ids": checkpoint.vocabulary.special_ids,
            "chat_template": checkpoint.vocabulary.chat_template is not None,
        }
    except Dsv4Error as e:
        vocabulary = {"error": str(e)}
    dtypes: dict[str, dict[str, int]] = {}
    for t in checkpoint.tensors.values():
        entry = dtypes.setdefault(t.dtype, {"n_tensors": 0, "n_bytes": 0})
        entry["n_tensors"] += 1
        entry["n_bytes"] += t.n_bytes
    return {
        "kind": "checkpoint",
        "path": checkpoint.label,
        "name": checkpoint.card.name,
        "n_bytes": checkpoint.n_source_bytes,
        "n_tensors": len(checkpoint.tensors),
        "n_shards": len(checkpoint.shards),
        "dtypes": dtypes,
        "layers": {
            "n": n_layers,
            "by_compress_ratio": {str(r): n for r, n in sorted(Counter(c.compress_ratios[:n_layers]).items())},
            "hash_routed": [layer for layer in range(n_layers) if c.is_hash_layer(layer)],
        },
        "experts": {"routed": c.n_routed_experts, "per_token": c.num_experts_per_tok, "shared": c.n_shared_experts},
        "config": asdict(c),
        "tokenizer": vocabulary,
    }


def describe_gguf(file: GgufFile) -> dict[str, Any]:
    """What a GGUF holds; long arrays are shown by their length and first items."""
    types: dict[str, dict[str, int]] = {}
    for t in file.tensors.values():
        entry = types.setdefault(t.format.name, {"n_tensors": 0, "n_bytes": 0})
        entry["n_tensors"] += 1
        entry["n_bytes"] += t.n_bytes
    architecture = file.value("general.architecture")
    n_hash = file.value(f"{architecture}.hash_layer_count")
    experts = {"routed": "expert_count", "per_token": "expert_used_count", "shared": "expert_shared_count"}
    return {
        "kind": "gguf",
        "path": str(file.path),
        "files": [str(path) for path in file.paths],
        "n_bytes": file.n_file_bytes,
        "data_offset": file.data_offset,
        "alignment": file.alignment,
        "header_only": file.template,
        "architecture": _describe_value(architecture),
        "experts": {name: _describe_value(file.value(f"{architecture}.{key}")) for name, key in experts.items()},
        "hash_routed": list(range(n_hash)) if isinstance(n_hash, int) and n_hash <= len(file.tensors) else [],
        "types": types,
        "n_tensors": len(file.tensors),
        "metadata": {key: _describe_value(kv.value) for key, kv in file.kvs.items()},
        "tensors": [{"name": t.name, "ne": list(t.ne), "type": t.format.name, "offset": t.offset, "n_bytes": t.n_bytes}
                    for t in file.tensors.values()],
        "findings": [asdict(f) for f in file.findings],
    }


def describe_imatrix(file: ImatrixFile) -> dict[str, Any]:
    """What an importance matrix holds."""
    return {"kind": "imatrix"} | file.as_data() | {"entries": [
        {"name": e.name, "n_values": e.n_values, "n_counts": len(e.counts), "largest_count": int(e.counts.max()),
         "without_data": [] if file.legacy else [i for i, count in enumerate(e.counts) if not count]}
        for e in file.entries.values()]}


def _describe_value(value: Any) -> Any:  # noqa: ANN401  - metadata values are of any type
    items = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(items, list):
        shown = [_describe_value(item) for item in (items if len(items) <= 100 else items[:8])]
        return shown if len(items) <= 100 else {"n": len(items), "first": shown}
    return str(items) if isinstance(items, float) and not math.isfinite(items) else items   # JSON has no NaN
