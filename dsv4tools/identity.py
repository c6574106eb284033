"""What the bytes of an output depend on, field by field: the name of a plan across runs, hosts and parts."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4tools import __version__, formats

if TYPE_CHECKING:
    from dsv4tools.plan import Plan

SOURCE_REVISION = "general.source.revision"


@cache
def kernel_version() -> str:
    """Hash of the sources of all encoders and decoders."""
    digest = hashlib.sha256()
    for path in sorted(Path(formats.__path__[0]).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def plan_identity(plan: Plan) -> dict[str, Any]:
    """Field -> value; two plans with equal fields write the same bytes.

    A shard is named by size and the hash of its header: the same on every host, whatever its path and times.
    """
    identity: dict[str, Any] = {
        "tool": __version__,
        "kernels": kernel_version(),
        "policy": f"{plan.policy.name} ({plan.policy.sha256[:16]})",
        "nan": plan.nan,
        "importance matrix": "none" if plan.imatrix is None else f"sha256 {plan.imatrix.sha256[:16]}",
        "experts per token": plan.checkpoint.config.num_experts_per_tok,
        "output bytes": plan.total_bytes,
        "template": hashlib.sha256(b"".join(file.header for file in plan.files)).hexdigest()[:16],
    }
    revisions = [kv.value for kv in plan.kvs if kv.key == SOURCE_REVISION]
    if revisions:   # the template says it too, but in no words
        identity["source commit"] = revisions[0]
    if len(plan.files) > 1:
        identity["files"] = f"{' + '.join(str(file.n_bytes) for file in plan.files)} bytes"
    for name, shard in plan.checkpoint.shards.items():
        identity[f"shard {name}"] = f"{shard.n_file_bytes} bytes, header {shard.header_sha256[:16]}"
    return identity


def shard_states(plan: Plan) -> dict[str, list[int | str]]:
    """Shard name -> what says cheaply that a shard was not touched: [mtime_ns, inode] of a file."""
    return {name: shard.state for name, shard in plan.checkpoint.shards.items()}
