"""``dsv4tools compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from dsv4tools.checkpoint.strict_json import read_small_file
from dsv4tools.cli.output import EPILOG, json_option, progress_bar, show, show_json, show_table, threads_option
from dsv4tools.cli.prompts import encode_text, read_tokens, token_options
from dsv4tools.cli.sources import NEEDS_WEIGHTS, local_argument
from dsv4tools.compare import Comparison
from dsv4tools.compare import compare as run_comparison
from dsv4tools.errors import InputError, VerifyError
from dsv4tools.model import open_model
from dsv4tools.outfile import check_place, complete_file
from dsv4tools.svg import plot_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_PROMPTS_BYTES = 100_000_000
SHOWN = 16   # positions in the table; --json has all


@click.command(epilog=EPILOG)
@click.argument("a", metavar="A", type=local_argument(NEEDS_WEIGHTS))
@click.argument("b", metavar="B", type=local_argument(NEEDS_WEIGHTS))
@token_options
@click.option("--prompts", type=click.Path(path_type=Path), metavar="FILE", help="Texts, one a line.")
@click.option("--experts-per-token-a", type=click.IntRange(1), metavar="N",
              help="Route A to N experts (checkpoints only).")
@click.option("--experts-per-token-b", type=click.IntRange(1), metavar="N",
              help="Route B to N experts (checkpoints only).")
@click.option("--float64", is_flag=True, help="Compute in float64.")
@click.option("--layers", is_flag=True, help="Also compare residual streams and routing, layer by layer.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="F.svg", help="Draw the divergence at each position.")
@click.option("--max-kl", type=click.FloatRange(min=0), metavar="X",
              help="Exit with 5 if the mean divergence is above X.")
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace an existing plot.")
@json_option
@click.pass_context
def compare(ctx: click.Context, a: Path, b: Path, tokens: str | None, tokens_file: Path | None, text: str | None,
            no_bos: bool, prompts: Path | None, experts_per_token_a: int | None, experts_per_token_b: int | None,
            float64: bool, layers: bool, plot: Path | None, max_kl: float | None, threads: int | None, overwrite: bool,
            as_json: bool) -> None:
    """Compare two models on the same tokens: checkpoints, re-routed views of them, or GGUFs.

    Prints the divergence of B's predictions from A's in nats, how often both find the same token most likely, by how
    much logits differ, and the perplexity of both. Text is encoded with A's tokenizer.

    \b
    Examples:
      dsv4tools compare DeepSeek-V4-Flash flash.gguf --text "The capital of France is Paris." --layers
      dsv4tools compare DeepSeek-V4-Flash DeepSeek-V4-Flash --experts-per-token-b 4 --prompts prompts.txt --json
      dsv4tools compare q8.gguf q4k.gguf --tokens-file prompt.npy --max-kl 0.1 --plot divergence.svg
    """
    if prompts is not None and [tokens, tokens_file, text] != [None, None, None]:
        raise click.UsageError("give either --prompts or one of --tokens, --tokens-file and --text")
    sequences = [read_tokens(a, tokens, tokens_file, text, no_bos=no_bos)] if prompts is None else \
        _read_prompts(a, prompts, no_bos=no_bos)
    if plot is not None:
        check_place(plot, overwrite=overwrite)
    dtype = np.float64 if float64 else np.float32
    with (
        open_model(a, experts_per_token=experts_per_token_a, dtype=dtype, threads=threads) as model_a,
        open_model(b, experts_per_token=experts_per_token_b, dtype=dtype, threads=threads) as model_b,
        progress_bar(sum(map(len, sequences)), "compare", unit="token") as advance,
    ):
        result = run_comparison(model_a, model_b, sequences, layers=layers, progress=advance)
    if plot is not None:
        title = f"{a.name} and {b.name}: mean KL {result.mean_kl:.3g} nats"
        with complete_file(plot) as fd, open(fd, "w", encoding="utf-8", closefd=False) as file:
            file.write(plot_positions(result.all("kl").tolist(), title, "KL divergence, nats"))
    if as_json:
        show_json(_as_data(a, b, result, max_kl))
    else:
        _show(a, b, result, layers=layers)
        if plot is not None:
            show(f"wrote {plot}")
        if max_kl is not None:
            verdict = "above" if result.mean_kl > max_kl else "within"
            show(f"mean KL divergence {result.mean_kl:.4g} is {verdict} --max-kl {max_kl}")
    if max_kl is not None and result.mean_kl > max_kl:
        ctx.exit(VerifyError.exit_code)


def _read_prompts(model: Path, path: Path, *, no_bos: bool) -> Sequence[NDArray[np.int64]]:
    from dsv4tools.tokenizer import load_tokenizer  # noqa: PLC0415  - ids need no tokenizer

    try:
        lines = read_small_file(path, max_bytes=MAX_PROMPTS_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise InputError(path, f"is not valid UTF-8 at byte {e.start}") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise InputError(path, "has no lines", hint="expected one prompt a line")
    tokenizer = load_tokenizer(model)
    return [np.array(encode_text(tokenizer, text, no_bos=no_bos), np.int64) for text in texts]


def _overall(result: Comparison) -> dict[str, Any]:
    kl = result.all("kl")
    return {
        "positions": len(kl), "prompts": len(result.prompts),
        "mean_kl": result.mean_kl, "max_kl": float(kl.max()),
        "same_top": float(result.all("same_top").mean()), "common_top5": float(result.all("common_top").mean()),
        "max_difference": float(result.all("max_difference").max()),
        "mean_difference": float(result.all("mean_difference").mean()),
        "perplexity_a": result.perplexity("a"), "perplexity_b": result.perplexity("b"),
    }


def _as_data(a: Path, b: Path, result: Comparison, max_kl: float | None) -> dict[str, Any]:
    layers = [{"layer": entry.layer, "ratio": entry.ratio, "stream_difference": entry.difference,
               "routing_agreement": entry.routing} for entry in result.layers]
    return {
        "a": str(a), "b": str(b), **_overall(result),
        "within_max_kl": None if max_kl is None else result.mean_kl <= max_kl,
        "layers": layers or None, "first_different_layer": result.parting_layer, "rounding": result.rounding,
        "positions_by_prompt": [
            {"tokens": p.tokens.tolist(), "kl": p.agreement.kl.tolist(), "same_top": p.agreement.same_top.tolist(),
             "common_top5": p.agreement.common_top.tolist(), "max_difference": p.agreement.max_difference.tolist(),
             "mean_difference": p.agreement.mean_difference.tolist()}
            for p in result.prompts
        ],
    }


def _show(a: Path, b: Path, result: Comparison, *, layers: bool) -> None:
    _show_positions(result)
    overall = _overall(result)
    show()
    show(f"A                {a}")
    show(f"B                {b}")
    show(f"positions        {overall['positions']} in {overall['prompts']} prompt{'s' * (overall['prompts'] > 1)}")
    show(f"KL divergence    mean {overall['mean_kl']:.4g}, largest {overall['max_kl']:.4g} nats")
    show(f"same top token   {overall['same_top']:.1%}")
    show(f"common top 5     {overall['common_top5']:.1%}")
    show(f"logits           differ by {overall['max_difference']:.4g} at most, "
         f"{overall['mean_difference']:.4g} on average")
    if overall["perplexity_a"] is not None:
        show(f"perplexity       A {overall['perplexity_a']:.4f}, B {overall['perplexity_b']:.4f}")
    if layers:
        show()
        _show_layers(result)


def _show_positions(result: Comparison) -> None:
    rows = [(n, i, p) for n, p in enumerate(result.prompts) for i in range(len(p.tokens))]
    worst = sorted(rows, key=lambda row: -row[2].agreement.kl[row[1]])[:SHOWN]
    if len(rows) > SHOWN:
        show(f"the {SHOWN} positions that differ most, of {len(rows)} (--json has all):")
    table: list[tuple[object, ...]] = [("prompt", "position", "token", "KL", "max |d|", "mean |d|", "top", "top 5")]
    for n, i, p in sorted(worst, key=lambda row: row[:2]):
        g = p.agreement
        table.append((n, i, p.tokens[i], f"{g.kl[i]:.3g}", f"{g.max_difference[i]:.3g}", f"{g.mean_difference[i]:.3g}",
                      "same" if g.same_top[i] else "other", f"{g.common_top[i]:.0%}"))
    show_table(table, right="rrrrrrlr")


def _show_layers(result: Comparison) -> None:
    table: list[tuple[object, ...]] = [("layer", "ratio", "streams differ by", "same experts")]
    table += [(e.layer, e.ratio, f"{e.difference:.3g}", f"{e.routing:.1%}") for e in result.layers]
    show_table(table, right="rrrr")
    parting = result.parting_layer
    rounding = f"rounding ({result.rounding:.1g})"
    show(f"the residual streams differ by {rounding} only" if parting is None else
         f"layer {parting} is the first after which the residual streams differ by more than {rounding}")
