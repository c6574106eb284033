"""Writing a template: the header of a planned GGUF without its weights, marked as such."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dsv4tools.errors import ResourceError, UsageError
from dsv4tools.gguf.header import TensorInfo, encode_header
from dsv4tools.gguf.values import KV
from dsv4tools.plan import TEMPLATE_KEY

if TYPE_CHECKING:
    from pathlib import Path

    from dsv4tools.plan import Plan


def write_template(plan: Plan, path: Path, *, sparse: bool = False, overwrite: bool = False) -> int:
    """Write the header of `plan` to `path`; returns the file's size in bytes.

    Parameters
    ----------
    sparse:
        Extend the file to its full size as a hole, so that readers which check extents open it.

    Raises
    ------
    UsageError
        `path` exists.
    ResourceError
        It cannot be written.
    """
    if path.exists() and not overwrite:
        raise UsageError(path, "exists", hint="--overwrite replaces it")
    kvs = (*plan.kvs, KV(TEMPLATE_KEY, "bool", value=True))
    infos = [TensorInfo(t.name, t.tensor.ne, t.format, t.offset) for t in plan.tensors]
    header = encode_header(kvs, infos, plan.template.alignment)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as f:
            f.write(header)
            if sparse:
                f.truncate(len(header) + plan.data_bytes)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise ResourceError(path, f"cannot be written: {e.strerror}") from None
    return len(header) + (plan.data_bytes if sparse else 0)
