"""Charts of the report as SVG: classes and no colours, which are the page's. Every text is escaped here."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from dsv4tools.errors import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CELL = 15            # pixels of a square of the map, its gap included
LABEL_WIDTH = 210
BAR_WIDTH, BAR_HEIGHT = 560, 20
HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT = 320, 120


@dataclass(frozen=True, slots=True)
class Square:
    """One square of a map: a class for its colour, a mark on it, and what it is."""

    look: str
    title: str
    mark: str = ""


def safe(text: object) -> str:
    """`text` for a page: no markup, no control characters, no directions of writing."""
    return escape(printable(str(text)))


def draw_map(rows: Sequence[str], columns: Sequence[str], squares: Mapping[tuple[int, int], Square]) -> str:
    """Squares by (row, column); column labels stand over the first and every fifth behind it."""
    width, height = LABEL_WIDTH + CELL * len(columns) + 4, 22 + CELL * len(rows) + 4
    parts = [_open(width, height, "map")]
    for number, column in enumerate(columns):
        if number == 0 or (number - 1) % 5 == 0:   # the first may be long: it reaches over the row labels
            x, anchor = LABEL_WIDTH + CELL * number + CELL / 2 - 1, "middle" if number else "end"
            parts.append(f'<text x="{x + 6 * (not number):g}" y="14" text-anchor="{anchor}">{safe(column)}</text>')
    for number, row in enumerate(rows):
        label = row if len(row) <= 30 else row[:29] + "…"
        y = 22 + CELL * number + 11
        parts.append(f'<text x="{LABEL_WIDTH - 8}" y="{y}" text-anchor="end">{safe(label)}</text>')
    for (at_row, at_column), square in squares.items():
        x, y = LABEL_WIDTH + CELL * at_column, 22 + CELL * at_row
        parts.append(f'<g><title>{safe(square.title)}</title><rect x="{x}" y="{y}" width="{CELL - 2}" '
                     f'height="{CELL - 2}" rx="2" class="{square.look}"/>')
        if square.mark:
            parts.append(f'<text x="{x + CELL / 2 - 1:g}" y="{y + 11}" text-anchor="middle" class="mark">'
                         f"{safe(square.mark)}</text>")
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def draw_bars(bars: Sequence[tuple[str, str, Sequence[tuple[str, float, str]]]]) -> str:
    """Horizontal bars: label, what stands behind the bar, and its parts (class, size, title), on one scale."""
    largest = max((sum(size for _, size, _ in parts) for _, _, parts in bars), default=0) or 1
    pitch = BAR_HEIGHT + 6
    out = [_open(LABEL_WIDTH + BAR_WIDTH + 200, pitch * len(bars) + 4, "bars")]
    for number, (label, note, parts) in enumerate(bars):
        x, y = float(LABEL_WIDTH), pitch * number
        out.append(f'<text x="{LABEL_WIDTH - 8}" y="{y + 15}" text-anchor="end">{safe(label)}</text>')
        for look, size, title in parts:
            width = max(0.5, BAR_WIDTH * size / largest)
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT}" class="{look}">'
                       f"<title>{safe(title)}</title></rect>")
            x += width
        out.append(f'<text x="{x + 8:.1f}" y="{y + 15}" class="quiet">{safe(note)}</text>')
    return "".join([*out, "</svg>"])


def draw_histogram(counts: Sequence[float], labels: Sequence[str], titles: Sequence[str], look: str) -> str:
    """Upright bars over `labels`, of which first, middle and last are written."""
    width, height = HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT
    largest = max(counts, default=0) or 1
    each = width / max(1, len(counts))
    out = [_open(width + 20, height + 24, "histogram")]
    for number, (count, title) in enumerate(zip(counts, titles, strict=True)):
        tall = (height - 4) * count / largest
        if count:
            tall = max(3.0, tall)   # a single wrong expert among thousands must be seen
        out.append(f'<rect x="{10 + each * number:.1f}" y="{height - tall:.1f}" width="{max(1, each - 1):.1f}" '
                   f'height="{tall:.1f}" class="{look}"><title>{safe(title)}</title></rect>')
    out.append(f'<path d="M10 {height + 0.5}h{width}" class="axis"/>')
    last = len(labels) - 1
    for number in sorted({0, last // 2, last}) if labels else ():
        anchor = "start" if number == 0 else "end" if number == last else "middle"
        x = 10 + (each * number if number == 0 else each * (number + 1) if number == last else each * (number + 0.5))
        out.append(f'<text x="{x:.1f}" y="{height + 17}" text-anchor="{anchor}">{safe(labels[number])}</text>')
    return "".join([*out, "</svg>"])


def _open(width: float, height: float, name: str) -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="{name}" width="{width:g}" height="{height:g}" '
            f'viewBox="0 0 {width:g} {height:g}" role="img">')
