"""Writing a template: the header of a planned GGUF without its weights, marked as such."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dsv4tools.errors import UsageError
from dsv4tools.files import pwrite_all
from dsv4tools.gguf.header import TensorInfo, encode_header
from dsv4tools.gguf.values import KV
from dsv4tools.outfile import check_output, complete_file, explained
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
        `path` exists, is an input or lies beside the inputs.
    ResourceError
        It cannot be written.
    """
    if len(plan.files) > 1:
        raise UsageError(path, f"would be the template of {len(plan.files)} files", hint="do not split the plan")
    check_output(plan.checkpoint, path, overwrite=overwrite)
    kvs = (*plan.kvs, KV(TEMPLATE_KEY, "bool", value=True))
    infos = [TensorInfo(t.name, t.tensor.ne, t.format, t.offset) for t in plan.tensors]
    header = encode_header(kvs, infos, plan.template.alignment)
    n_bytes = len(header) + (plan.data_bytes if sparse else 0)
    with complete_file(path) as fd, explained(path):
        pwrite_all(fd, memoryview(header), 0)
        os.ftruncate(fd, n_bytes)
    return n_bytes
