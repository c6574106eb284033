"""``dsv4tools generate``."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Literal

import click

from dsv4tools.cli.output import EPILOG, json_option, say, show_json, threads_option
from dsv4tools.cli.prompts import encode_text, no_bos_option
from dsv4tools.cli.sources import NEEDS_WEIGHTS, local_argument
from dsv4tools.errors import printable
from dsv4tools.model import Sampling, open_model
from dsv4tools.model import generate as generate_tokens
from dsv4tools.sizes import format_bytes
from dsv4tools.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dsv4tools.tokenizer import Tokenizer

_EFFORTS: dict[str, Literal["high", "max"]] = {"high": "high", "max": "max"}


@click.command(epilog=EPILOG)
@click.argument("source", metavar="MODEL", type=local_argument(NEEDS_WEIGHTS))
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="What the model continues, or with --chat answers.")
@click.option("-n", "n_tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N",
              help="How many tokens at most.")
@click.option("--temp", type=float, default=0.0, show_default=True, help="Temperature; 0 takes the most likely token.")
@click.option("--top-p", type=float, default=1.0, show_default=True,
              help="Draw from the most likely tokens that together have this probability.")
@click.option("--min-p", type=float, default=0.0, show_default=True,
              help="Draw from tokens that have this share of the most likely one's probability.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random numbers.")
@click.option("--chat", is_flag=True, help="Take the prompt as a user's message, in DeepSeek's chat format.")
@click.option("--thinking", type=click.Choice(["off", *_EFFORTS]), default=None,
              help="With --chat: whether the model reasons before it answers.  [default: high]")
@click.option("--system", metavar="TEXT", help="With --chat: the system message.")
@no_bos_option
@click.option("--experts-per-token", type=click.IntRange(1), metavar="N", help="Route to N experts (checkpoints only).")
@click.option("--routing", is_flag=True, help="Also print which experts were used, by layer.")
@threads_option
@json_option
def generate(source: Path, prompt: str, n_tokens: int, temp: float, top_p: float, min_p: float, seed: int, chat: bool,
             thinking: str | None, system: str | None, no_bos: bool, experts_per_token: int | None, routing: bool,
             threads: int | None, as_json: bool) -> None:
    """Continue a text with the reference forward pass: right rather than fast.

    The text goes to standard output as it comes, everything else to standard error. Without --temp the same prompt
    always gives the same text.

    \b
    Examples:
      dsv4tools generate flash.gguf -p "Once upon a time" -n 20
      dsv4tools generate flash.gguf --chat -p "What is a hash layer?" --thinking off
      dsv4tools generate DeepSeek-V4-Flash -p "1, 2, 3," -n 8 --experts-per-token 4 --routing
    """
    if not chat and (thinking is not None or system is not None):
        raise click.UsageError("--thinking and --system need --chat")
    sampling = Sampling(temp, top_p, min_p)
    tokenizer = load_tokenizer(source)
    ids = _chat_ids(tokenizer, prompt, system, thinking or "high") if chat else \
        encode_text(tokenizer, prompt, no_bos=no_bos)
    used: dict[int, Counter[int]] = defaultdict(Counter)

    def note_experts(what: str, layer: int, array: NDArray[Any]) -> None:
        if what == "experts":
            used[layer].update(array.reshape(-1).tolist())

    stream, times = tokenizer.stream(), [time.monotonic()]
    generated: list[int] = []
    with open_model(source, experts_per_token=experts_per_token, threads=threads) as model:
        stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        tokens = generate_tokens(model, ids, n_tokens, sampling=sampling, seed=seed, stop=stop, observe=note_experts)
        for token in tokens:
            times.append(time.monotonic())
            generated.append(token)
            if not as_json and token not in stop:
                _write(stream.feed(token))
        n_bytes_read = sum(model.weights.n_bytes_read.values())
    # The first token comes with the prompt; the rate is that of the others.
    rate = (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else None
    if as_json:
        show_json({
            "text": tokenizer.decode(generated), "prompt_tokens": len(ids), "tokens": generated,
            "prompt_seconds": round(times[1] - times[0], 3), "tokens_per_second": rate and round(rate, 3),
            "bytes_read": n_bytes_read,
            "routing": {layer: dict(sorted(used[layer].items())) for layer in sorted(used)} if routing else None,
        })
        return
    _write(stream.finish() + "\n")
    say(f"prompt: {len(ids)} tokens in {times[1] - times[0]:.1f} s; generated: {len(generated)} tokens"
        + (f", {rate:.2f} tokens/s" if rate else "") + f"; weights read: {format_bytes(n_bytes_read)}")
    if routing:
        for layer, counts in sorted(used.items()):
            say(f"layer {layer:2}: {len(counts)} experts: " + " ".join(f"{e}x{n}" for e, n in counts.most_common()))


def _chat_ids(tokenizer: Tokenizer, prompt: str, system: str | None, thinking: str) -> list[int]:
    from dsv4tools.chat import encode_messages  # noqa: PLC0415  - plain text needs none

    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    mode: Literal["chat", "thinking"] = "chat" if thinking == "off" else "thinking"
    return tokenizer.encode(encode_messages(messages, mode, reasoning_effort=_EFFORTS.get(thinking)))


def _write(text: str) -> None:
    click.echo(printable(text, keep="\n\t"), nl=False)
