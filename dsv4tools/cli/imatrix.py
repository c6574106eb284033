"""``dsv4tools imatrix``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from dsv4tools.checkpoint.strict_json import read_small_file
from dsv4tools.cli.output import EPILOG, json_option, progress_bar, say, shell_words, show, show_json, threads_option
from dsv4tools.cli.prompts import encode_text, read_tokens
from dsv4tools.cli.signals import graceful_stop
from dsv4tools.cli.sources import NEEDS_WEIGHTS, local_argument
from dsv4tools.collect import CHUNK_SIZE, collect_imatrix
from dsv4tools.errors import InputError, Interrupted
from dsv4tools.imatrix.write import form_of, write_imatrix
from dsv4tools.model import open_model
from dsv4tools.outfile import check_not_input, check_place
from dsv4tools.sizes import format_bytes, format_seconds
from dsv4tools.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.collect import Collection

MAX_TEXT_BYTES = 1_000_000_000
SHOWN = 8


@click.command(epilog=EPILOG)
@click.argument("source", metavar="MODEL", type=local_argument(NEEDS_WEIGHTS))
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="A file of text in UTF-8.")
@click.option("--tokens-file", type=click.Path(path_type=Path), metavar="F",
              help="Or a file of token ids: text with commas or spaces between them, or a .npy array.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, metavar="OUT.gguf|OUT.dat",
              help="Where it goes; the ending says in which of llama.cpp's forms.")
@click.option("--chunk-size", type=click.IntRange(2), default=CHUNK_SIZE, show_default=True, metavar="N",
              help="Tokens that the model reads at a time, each time anew.")
@click.option("--chunks", type=click.IntRange(1), metavar="N", help="Stop after so many chunks.")
@click.option("--no-bos", is_flag=True, help="Do not begin each chunk with the begin-of-sentence token.")
@click.option("--process-output", is_flag=True, help="Measure output.weight too.")
@click.option("--experts-per-token", type=click.IntRange(1), metavar="N", help="Route to N experts (checkpoints only).")
@click.option("--float64", is_flag=True, help="Compute in float64.")
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@json_option
def imatrix(source: Path, text: Path | None, tokens_file: Path | None, out: Path, chunk_size: int, chunks: int | None,
            no_bos: bool, process_output: bool, experts_per_token: int | None, float64: bool, threads: int | None,
            overwrite: bool, as_json: bool) -> None:
    """Measure an importance matrix of MODEL on a text, for `convert --imatrix`.

    MODEL is a checkpoint directory or a GGUF. The reference forward pass reads the text in chunks; for every matrix,
    and for every routed expert by itself, the squares of its inputs are added up, column by column. The file is one of
    llama.cpp's: llama-quantize and ds4's quantizer read it too.

    Ctrl-C lets the chunk in hand finish and writes what was measured until then (exit code 130).

    \b
    Examples:
      dsv4tools imatrix DeepSeek-V4-Flash --text calibration.txt -o flash.imatrix.gguf
      dsv4tools imatrix flash.gguf --text calibration.txt --chunks 20 -o flash.imatrix.dat
      dsv4tools imatrix DeepSeek-V4-Flash --tokens-file ids.npy --chunk-size 2048 -o flash.imatrix.gguf
    """
    form_of(out)
    check_not_input(out, [f for f in (source, text, tokens_file) if f is not None and f.is_file()])
    check_place(out, overwrite=overwrite)
    ids, bos_id = _read_ids(source, text, tokens_file, no_bos=no_bos)
    n_tokens = min(len(ids) // chunk_size, chunks or len(ids)) * chunk_size
    dataset = text or tokens_file
    with (
        open_model(source, experts_per_token=experts_per_token, dtype=np.float64 if float64 else np.float32,
                   threads=threads) as model,
        graceful_stop("the chunk in hand") as stop,
        progress_bar(n_tokens, out.name, unit="token") as advance,
    ):
        check_not_input(out, model.weights.paths)
        model.weights.prepare()
        started = time.monotonic()
        found = collect_imatrix(model, ids, chunk_size=chunk_size, max_chunks=chunks, bos_id=bos_id,
                                process_output=process_output, datasets=[dataset.name] if dataset else [],
                                progress=advance, stop=stop)
    n_bytes = write_imatrix(found.imatrix, out, overwrite=overwrite)
    seconds = time.monotonic() - started
    if as_json:
        show_json({
            "out": str(out), "n_bytes": n_bytes, "n_entries": len(found.imatrix.entries), "n_tokens": found.n_tokens,
            "n_chunks": found.imatrix.n_chunks, "chunk_size": chunk_size, "perplexity": found.perplexity,
            "experts_without_data": {name: list(numbers) for name, numbers in found.without_data.items()},
            "seconds": round(seconds, 3),
        })
    else:
        _show(source, out, found, n_bytes, seconds)
    if found.n_tokens < n_tokens:
        raise Interrupted(stop.signal_number, f"stopped after {found.imatrix.n_chunks} chunks of "
                          f"{n_tokens // chunk_size}", hint=f"{out} holds what was measured until then")


def _read_ids(
    source: Path, text: Path | None, tokens_file: Path | None, *, no_bos: bool
) -> tuple[NDArray[np.int64], int | None]:
    """The token ids, and the one that begins every chunk."""
    if (text is None) == (tokens_file is None):
        raise click.UsageError("give one of --text and --tokens-file")
    if text is None:
        ids = read_tokens(source, None, tokens_file, None, no_bos=True)
        return ids, None if no_bos else load_tokenizer(source).bos_id
    tokenizer = load_tokenizer(source)
    try:
        content = read_small_file(text, max_bytes=MAX_TEXT_BYTES).decode()
    except UnicodeDecodeError as e:
        raise InputError(text, f"is not valid UTF-8 at byte {e.start}") from None
    ids = np.array(encode_text(tokenizer, content, no_bos=no_bos), np.int64)
    return ids, None if no_bos else tokenizer.bos_id


def _show(source: Path, out: Path, found: Collection, n_bytes: int, seconds: float) -> None:
    matrix = found.imatrix
    show(f"wrote {out}: {len(matrix.entries)} entries, {format_bytes(n_bytes)}, measured on {found.n_tokens} tokens "
         f"({matrix.n_chunks} chunks of {matrix.chunk_size}) in {format_seconds(seconds)}")
    show(f"perplexity {found.perplexity:.4f}")
    if found.without_data:
        n = sum(map(len, found.without_data.values()))
        named = [f"{name} {', '.join(map(str, numbers))}" for name, numbers in found.without_data.items()]
        more = f" and {len(named) - SHOWN} more tensors" if len(named) > SHOWN else ""
        say(f"note: {n} experts were never chosen, more text would reach them: {'; '.join(named[:SHOWN])}{more}")
    if source.is_dir():
        show(f"next: {shell_words('dsv4tools', 'convert', source, 'OUT.gguf', '--imatrix', out)}")
