"""``dsv4tools template``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dsv4tools.cli.output import EPILOG, json_option, shell_words, show, show_json
from dsv4tools.cli.planning import plan_from_options, plan_options
from dsv4tools.cli.sources import output_argument, source_argument
from dsv4tools.sizes import format_bytes
from dsv4tools.template_file import write_template

if TYPE_CHECKING:
    from pathlib import Path

    from dsv4tools.hub import HubReference


@click.command(epilog=EPILOG)
@click.argument("source", metavar="SRC", type=source_argument)
@click.argument("out", metavar="OUT.gguf", type=output_argument)
@plan_options
@click.option("--sparse", is_flag=True, help="Extend the file to full size as a hole, so that any reader opens it.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@json_option
def template(source: Path | HubReference, out: Path, sparse: bool, overwrite: bool, as_json: bool,
             **options: Any) -> None:
    """Write what a GGUF of SRC, a checkpoint or another GGUF, says before its weights.

    The file can be given to `convert --template`, to the C quantizer, and (with --sparse) to the header checks of
    gguf-py, ds4 and llama.cpp, without converting anything.

    \b
    Examples:
      dsv4tools template DeepSeek-V4-Flash header.gguf
      dsv4tools template DeepSeek-V4-Flash full-size.gguf --sparse && ds4 --cpu --inspect -m full-size.gguf
    """
    plan = plan_from_options(source, **options)
    n_bytes = write_template(plan, out, sparse=sparse, overwrite=overwrite)
    if as_json:
        show_json({"out": str(out), "n_bytes": n_bytes, "sparse": sparse, "n_tensors": len(plan.tensors),
                   "total_bytes": plan.total_bytes, "notes": list(plan.notes)})
        return
    kind = "extended as a hole" if sparse else "header only"
    show(f"wrote {out}: {len(plan.tensors)} tensors described, {format_bytes(n_bytes)}, {kind}")
    show(f"next: {shell_words('dsv4tools', 'convert', source, 'MODEL.gguf', '--template', out)}")
