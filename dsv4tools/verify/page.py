"""The report as one self-contained page: no scripts, nothing loaded from anywhere, light and dark.

The page is well-formed XML too, so that a test can read it back. It says nothing of when or where it was made: the
same report gives the same page.
"""

from __future__ import annotations

import os
from importlib import resources
from typing import TYPE_CHECKING

from dsv4tools import __version__
from dsv4tools.files import pwrite_all
from dsv4tools.outfile import complete_file, explained
from dsv4tools.sizes import format_bytes
from dsv4tools.verify.charts import Square, draw_bars, draw_histogram, draw_map, safe
from dsv4tools.verify.histograms import Bars, error_histogram, exponent_histogram
from dsv4tools.verify.roles import FAMILIES, family_of, place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from dsv4tools.formats.measure import ErrorSums
    from dsv4tools.verify.report import DepthCheck, Report, TensorCheck

# A relative RMSE below the first of these has the look h1, below the second h2 and so on; 0 has h0.
_ERROR_STEPS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
_MAX_PROBLEMS = 500   # spelled out; more are counted
_N_TYPE_LOOKS = 8


def write_page(report: Report, path: Path) -> None:
    """Write the page to `path`, complete or not at all; ResourceError if it cannot be written."""
    with complete_file(path) as fd, explained(path):
        pwrite_all(fd, memoryview(os.fsencode(make_page(report))), 0)


def make_page(report: Report) -> str:
    """The page as text."""
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    sections = (
        _summary, _problems, _engines, _sizes, _error_map, _depth_map, _histograms, _behaviour, _tensor_table,
        _depth_table, _footer,
    )
    body = "\n".join(filter(None, (section(report) for section in sections)))
    return f"""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'" />
<title>{safe(report.path.name)}: {_verdict(report)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _verdict(report: Report) -> str:
    return "right" if report.ok else "NOT right"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


# --------------------------------------------------------------------------------------------------- what was found


def _summary(report: Report) -> str:
    n = report.n_errors
    said = f"<b>{_verdict(report)}</b>" + (f": {_count(n, 'error')}" if n else "")
    facts = [
        ("File", f"<code>{safe(report.path)}</code>"),
        ("Holds", f"{_count(report.n_tensors, 'tensor')}, {format_bytes(report.n_file_bytes)}"),
        ("Structure", _structure(report)),
        ("Source", _source(report)),
        ("Blocks", f"all of {_count(len(report.depth), 'tensor')} were scanned" if report.depth else "not scanned"),
        ("Manifest", "not checked" if report.manifest is None else
         f"{report.manifest.n_right:,} of {report.manifest.n_hashes:,} hashes agree "
         f"({', '.join(report.manifest.algorithms)})"),
        ("Engines", _deciding(report)),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts)
    return (f"<h1>{safe(report.path.name)}</h1>\n"
            f'<div class="verdict {"right" if report.ok else "wrong"}">{said}</div>\n<dl class="facts">{rows}</dl>')


def _structure(report: Report) -> str:
    if report.template:
        return "a template: no weights"
    n = sum(f.code not in {"block-scale", "value", "manifest", "forward"} for f in report.errors)
    return f'<span class="bad">{_count(n, "error")}</span>' if n else "in order"


def _source(report: Report) -> str:
    if not report.tensors:
        return "not compared"
    counts = [(sum(t.judgement == j for t in report.tensors), text) for j, text in (
        ("identical", "byte-identical"), ("within", "encoded otherwise and within bounds"), ("wrong", "wrong"))]
    said = ", ".join(f"{n:,} {text}" for n, text in counts if n)
    part = "" if report.sample is None else f" (a sample of {report.sample:g} % of each)"
    return f"{_count(len(report.tensors), 'tensor')} compared{part}: {said}"


def _deciding(report: Report) -> str:
    if not report.deciding:
        return "informed below, not asked to decide" if report.engines else "not asked"
    return ", ".join(safe(name) for name in report.deciding) + " must take it"


def _problems(report: Report) -> str:
    items = [f'<li class="error"><span class="name">{safe(t.name)}</span> ({safe(t.format)}): {safe(t.reason)}'
             f"{_faults(t)}</li>" for t in report.wrong]
    ordered = sorted(report.findings, key=lambda f: f.severity != "error")
    items += [f'<li class="{safe(f.severity)}"><span class="name">{safe(f.where)}</span>: {safe(f.message)}</li>'
              for f in ordered]
    items += [f'<li class="error">engine {safe(v.summary)}</li>' for v in report.objecting]
    if report.behaviour is not None and not report.behaviour.ok:
        items.append(f'<li class="error">predictions: the mean KL divergence is {report.behaviour.mean_kl:.4g} nats, '
                     f"allowed are {report.behaviour.allowed_kl:g}</li>")
    if not items:
        return ""
    more = f"<p>{len(items) - _MAX_PROBLEMS:,} more are not listed here.</p>" if len(items) > _MAX_PROBLEMS else ""
    return f'<h2>What is wrong or odd</h2>\n<ul class="problems">{"".join(items[:_MAX_PROBLEMS])}</ul>{more}'


def _faults(t: TensorCheck) -> str:
    lines = [f"<li>{safe(fault)}</li>" for fault in t.faults]
    if t.difference:
        lines.append(f'<li class="quiet">{t.n_different:,} of {t.n_compared:,} bytes differ from our encoding, first '
                     f"{safe(t.difference)}</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _engines(report: Report) -> str:
    if not report.engines:
        return ""
    rows = []
    for v in report.engines:
        look, word = ("good", "loads and computes") if v.ok else ("warn", "loads, computes wrongly") if v.loads else (
            "bad", "refuses")
        reasons = "<br />".join(f"{safe(f.severity)}: {safe(f.text)}" for f in v.findings) or "no objection"
        rows.append((f'<td class="short">{safe(v.engine)}</td>', f"<td><code>{safe(v.commit[:7])}</code></td>",
                     f'<td class="{look}">{word}</td>', f"<td>{reasons}</td>"))
    return "<h2>Engines</h2>\n" + _table(("engine", "commit", "verdict", "because"), rows, look="engines")


def _behaviour(report: Report) -> str:
    b = report.behaviour
    if b is None:
        return ""
    allowed = "" if b.allowed_kl is None else f"; {'within' if b.ok else 'above'} the {b.allowed_kl:g} allowed"
    facts = [
        ("Mean KL divergence", f"{b.mean_kl:.4g} nats{allowed}"), ("Largest", f"{b.largest_kl:.4g} nats"),
        ("Same top token", f"{b.same_top:.1%} of {b.n_positions:,} positions in {_count(b.n_prompts, 'prompt')}"),
    ]
    if b.perplexity_source is not None and b.perplexity_file is not None:
        facts.append(("Perplexity", f"source {b.perplexity_source:.4f}, file {b.perplexity_file:.4f}"))
    facts.append(("Layers", "none differs by more than rounding" if b.parting_layer is None else
                  f"layer {b.parting_layer} is the first whose residual streams differ by more than rounding"))
    rows = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in facts)
    return f'<h2>Predictions beside the source</h2>\n<dl class="facts">{rows}</dl>'


# ----------------------------------------------------------------------------------------------------------- charts


def _sizes(report: Report) -> str:
    if not report.contents:
        return ""
    sizes: dict[str, dict[str, int]] = {}
    for name, info in report.contents.items():
        of_family = sizes.setdefault(family_of(name), {})
        of_family[info.format.name] = of_family.get(info.format.name, 0) + info.n_bytes
    types = _type_looks(report)
    bars = []
    for family in sorted(sizes, key=lambda f: (-sum(sizes[f].values()), FAMILIES.index(f))):
        parts = [(types[kind], float(n), f"{family}, {kind}: {format_bytes(n)}") for kind, n in sizes[family].items()]
        bars.append((family, format_bytes(sum(sizes[family].values())), parts))
    legend = _legend((look, kind) for kind, look in types.items())
    return f"<h2>Sizes by role</h2>\n{draw_bars(bars)}{legend}"


def _type_looks(report: Report) -> dict[str, str]:
    """Types, those that take most bytes first, each with a class."""
    totals: dict[str, int] = {}
    for info in report.contents.values():
        totals[info.format.name] = totals.get(info.format.name, 0) + info.n_bytes
    return {kind: f"t{i % _N_TYPE_LOOKS}" for i, kind in enumerate(sorted(totals, key=lambda k: -totals[k]))}


def _error_map(report: Report) -> str:
    checks = {t.name: t for t in report.tensors}
    if not checks:
        return ""

    def square(name: str) -> Square | None:
        t = checks.get(name)
        if t is None:
            return None
        title = f"{name} ({t.format}): {t.judgement}"
        if t.error is not None:
            title += f", relative RMSE {t.error.relative_rmse:.3g}"
        if t.judgement == "wrong":
            return Square("wrongcell", f"{title}; {t.reason}", "×")
        look = _error_look(t.error.relative_rmse) if t.error is not None else "h0"
        return Square(look, title, "•" if t.judgement == "within" else "")

    steps = ["exact", *(f"up to {step:g}" for step in _ERROR_STEPS), f"above {_ERROR_STEPS[-1]:g}"]
    legend = _legend([*((f"h{i}", text) for i, text in enumerate(steps)), ("wrongcell", "× wrong")])
    return ("<h2>Error map</h2>\n<p>Relative root mean square error against the source, by layer and role. Point at a "
            f"square to see its tensor. A dot: encoded otherwise than we do.</p>\n"
            f"{_draw_layers(checks, square)}{legend}")


def _error_look(error: float) -> str:
    return "h0" if error == 0 else f"h{1 + sum(error >= step for step in _ERROR_STEPS)}"


def _depth_map(report: Report) -> str:
    checks = {d.name: d for d in report.depth if d.values is not None and d.values.n}
    if not checks or report.tensors:   # one map is enough, and errors say more
        return ""
    faulty = {f.where for f in report.errors}
    steps = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1.0)

    def square(name: str) -> Square | None:
        d = checks.get(name)
        if d is None or d.values is None:
            return None
        rms = d.values.rms
        title = f"{name} ({d.format}): root mean square {rms:.3g}, {d.values.lowest:.3g} to {d.values.highest:.3g}"
        if name in faulty:
            return Square("wrongcell", title, "×")
        return Square("h0" if rms == 0 else f"h{1 + sum(rms >= step for step in steps)}", title)

    texts = ["zero", *(f"up to {step:g}" for step in steps), f"above {steps[-1]:g}"]
    legend = _legend([*((f"h{i}", text) for i, text in enumerate(texts)), ("wrongcell", "× faulty")])
    return ("<h2>Magnitudes</h2>\n<p>Root mean square of the values, by layer and role.</p>\n"
            f"{_draw_layers(checks, square)}{legend}")


def _draw_layers(names: Iterable[str], square: Callable[[str], Square | None]) -> str:
    """A map of tensors: roles down, layers across, those of the whole model first."""
    places = {name: place_of(name) for name in names}
    layers = sorted({layer for layer, _ in places.values() if layer is not None})
    column_of = {None: 0} | {layer: i + 1 for i, layer in enumerate(layers)}
    roles = list(dict.fromkeys(role for _, role in places.values()))
    row_of = {role: i for i, role in enumerate(roles)}
    squares = {}
    for name, (layer, role) in places.items():
        found = square(name)
        if found is not None:
            squares[row_of[role], column_of[layer]] = found
    return draw_map(roles, ["model", *map(str, layers)], squares)


def _histograms(report: Report) -> str:
    looks = _type_looks(report)
    errors, magnitudes = [], []
    for kind, look in looks.items():
        of_kind = [e for t in report.tensors if t.format == kind for e in t.by_matrix]
        bars = error_histogram(of_kind)
        if bars is not None:
            noun = "expert or matrix" if len(of_kind) == 1 else "experts and matrices"
            errors.append(_chart(f"{kind}: {len(of_kind):,} {noun}", bars, look))
        bars = exponent_histogram([d for d in report.depth if d.format == kind])
        if bars is not None:
            magnitudes.append(_chart(kind, bars, look))
    out = ""
    if errors:
        out += f'<h2>Relative RMSE by type</h2>\n<div class="charts">{"".join(errors)}</div>'
    if magnitudes:
        out += ("<h2>Magnitudes by type</h2>\n<p>Share of a sample of the values between one power of two and the "
                f'next.</p><div class="charts">{"".join(magnitudes)}</div>')
    return out


def _chart(title: str, bars: Bars, look: str) -> str:
    return f"<div><h3>{safe(title)}</h3>{draw_histogram(bars.counts, bars.labels, bars.titles, look)}</div>"


def _legend(entries: Iterable[tuple[str, str]]) -> str:
    parts = [f'<span><svg width="12" height="12" viewBox="0 0 12 12"><rect width="12" height="12" rx="2" '
             f'class="{look}"/></svg>{safe(text)}</span>' for look, text in entries]
    return f'<div class="legend">{"".join(parts)}</div>'


# ----------------------------------------------------------------------------------------------------------- tables


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0, look: str = "list") -> str:
    """Cells come as whole <td> elements; the last `numbers` heads stand over numbers."""
    first = len(head) - numbers
    heads = "".join(f'<th class="number">{h}</th>' if i >= first else f"<th>{h}</th>" for i, h in enumerate(head))
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{look}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(text: object) -> str:
    return f'<td class="number">{text}</td>'


def _error_cell(errors: ErrorSums | None, name: str, form: str = ".3g") -> str:
    return _number("" if errors is None else format(getattr(errors, name), form))


def _tensor_table(report: Report) -> str:
    if not report.tensors:
        return ""
    looks = {"identical": "good", "within": "warn", "wrong": "bad"}
    rows = [(
        f'<td class="name">{safe(t.name)}</td>', f"<td>{safe(t.format)}</td>",
        f'<td class="{looks[t.judgement]}">{t.judgement}</td>', _number(f"{t.bits_per_weight:.4g}"),
        _error_cell(t.error, "relative_rmse"), _error_cell(t.own, "relative_rmse"),
        _error_cell(t.error, "largest_error"), _error_cell(t.error, "cosine", ".6f"),
        _number(f"{t.n_blocks_different:,}"), _number(f"{t.n_blocks:,}"),
    ) for t in report.worst_first()]
    head = ("tensor", "type", "is", "bits per weight", "relative RMSE", "our own", "largest error", "cosine",
            "blocks that differ", "of")
    return (f"<h2>Tensors, worst first</h2>\n<details><summary>{_count(len(rows), 'tensor')}</summary>"
            f"{_table(head, rows, numbers=7)}</details>")


def _depth_table(report: Report) -> str:
    if not report.depth:
        return ""
    head = ("tensor", "type", "lowest", "highest", "mean", "root mean square", "zeros", "blocks", "all-zero blocks",
            "subnormal scales")
    rows = [_depth_row(d) for d in report.depth]
    return (f"<h2>Blocks and values</h2>\n<details><summary>{_count(len(rows), 'tensor')}</summary>"
            f"{_table(head, rows, numbers=8)}</details>")


def _depth_row(d: DepthCheck) -> tuple[str, ...]:
    v, s = d.values, d.scales
    numbers = [f"{n:.4g}" for n in (v.lowest, v.highest, v.mean, v.rms)] + [f"{v.n_zero:,}"] if v else [""] * 5
    numbers += [f"{n:,}" for n in (s.n_blocks, s.n_zero, s.n_subnormal)] if s.n_blocks else [""] * 3
    return (f'<td class="name">{safe(d.name)}</td>', f"<td>{safe(d.format)}</td>", *map(_number, numbers))


def _footer(_report: Report) -> str:
    return (f"<footer><p>Made by dsv4tools {safe(__version__)}. Errors are those of the decoded values against the "
            "decoded source. A tensor is wrong where its relative RMSE is over twice that of our own encoding in the "
            "same type, its cosine below 0.99 where ours is not, a run of 256 values off by over four times our own "
            "error, or a block differs in a file that is otherwise our own encoding. Where bytes are identical, errors "
            "are measured on an eighth of the values.</p></footer>")
