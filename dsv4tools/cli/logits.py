"""``dsv4tools logits``."""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

from dsv4tools.cli.output import EPILOG, json_option, progress_bar, show, show_json, threads_option
from dsv4tools.cli.prompts import read_tokens, token_options
from dsv4tools.cli.sources import NEEDS_WEIGHTS, local_argument
from dsv4tools.logits import write_logits
from dsv4tools.model import open_model


@click.command(epilog=EPILOG)
@click.argument("source", metavar="MODEL", type=local_argument(NEEDS_WEIGHTS))
@token_options
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="F.npy", help="Where the logits go.")
@click.option("--experts-per-token", type=click.IntRange(1), metavar="N", help="Route to N experts (checkpoints only).")
@click.option("--float64", is_flag=True, help="Compute in float64; the file is float32 all the same.")
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@json_option
def logits(source: Path, tokens: str | None, tokens_file: Path | None, text: str | None, no_bos: bool, out: Path,
           experts_per_token: int | None, float64: bool, threads: int | None, overwrite: bool, as_json: bool) -> None:
    """Write the logits of a prompt: float32 [tokens, vocabulary], by the reference forward pass.

    MODEL is a checkpoint directory or a GGUF. Weights are read as they are needed: a full-size GGUF runs from disk, in
    less than 1 GB of memory.

    \b
    Examples:
      dsv4tools logits flash.gguf --tokens 0,671,6102 --out logits.npy
      dsv4tools logits DeepSeek-V4-Flash --text "The capital of France is" --out logits.npy
      dsv4tools logits DeepSeek-V4-Flash --tokens-file prompt.txt --experts-per-token 4 --out four.npy
    """
    ids = read_tokens(source, tokens, tokens_file, text, no_bos=no_bos)
    dtype = np.float64 if float64 else np.float32
    with (
        open_model(source, experts_per_token=experts_per_token, dtype=dtype, threads=threads) as model,
        progress_bar(len(ids), out.name, unit="token") as advance,
    ):
        model.weights.prepare()
        started = time.monotonic()
        shape = write_logits(model, ids, out, overwrite=overwrite, progress=advance)
        seconds = time.monotonic() - started
    if as_json:
        show_json({"out": str(out), "shape": list(shape), "tokens": ids.tolist(), "seconds": round(seconds, 3)})
        return
    show(f"wrote {out}: float32 {list(shape)}, {shape[0] / seconds:.1f} tokens/s")
