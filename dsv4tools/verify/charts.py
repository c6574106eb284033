"""Charts of the report as SVG: classes and no colours, which are the page's. Every text is escaped here."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from dsv4tools.errors import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CELL = 15            # pixels of a square of the map, its gap included
GAP = 30             # between the first column of a map, with its label, and the others
LETTER = 6.7         # average width of a letter of 11 pixels
BAR_WIDTH = 1000     # of the longest bar, in its own units
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
    """Squares by (row, column); column labels stand over the second and every fifth behind it.

    The row labels are an image of their own, which stays where it is when the squares are scrolled sideways. The first
    column belongs to none of the others: it is set off.
    """
    labels = [row if len(row) <= 30 else row[:29] + "…" for row in rows]
    label_width = LETTER * max(map(len, labels), default=0) + 10
    height = 22 + CELL * len(rows) + 4
    parts = ['<div class="map">', _open(label_width, height, "labels")]
    for number, label in enumerate(labels):
        y = 22 + CELL * number + 11
        parts.append(f'<text x="{label_width - 8:g}" y="{y}" text-anchor="end">{safe(label)}</text>')
    parts += ["</svg>", '<div class="wide">', _open(GAP + CELL * len(columns) + 24, height, "squares")]
    for number, column in enumerate(columns):
        if number == 0 or (number - 1) % 5 == 0:
            x, anchor = (0.0, "start") if number == 0 else (GAP + CELL * number + CELL / 2 - 1, "middle")
            parts.append(f'<text x="{x:g}" y="14" text-anchor="{anchor}">{safe(column)}</text>')
    for (at_row, at_column), square in squares.items():
        x, y = CELL * at_column + (GAP if at_column else 0), 22 + CELL * at_row
        parts.append(f'<g><title>{safe(square.title)}</title><rect x="{x:g}" y="{y}" width="{CELL - 2}" '
                     f'height="{CELL - 2}" rx="2" class="{square.look}"/>')
        if square.mark:
            parts.append(f'<text x="{x + CELL / 2 - 1:g}" y="{y + 11}" text-anchor="middle" class="mark">'
                         f"{safe(square.mark)}</text>")
        parts.append("</g>")
    return "".join([*parts, "</svg></div></div>"])


def draw_bars(bars: Sequence[tuple[str, str, Sequence[tuple[str, float, str]]]]) -> str:
    """Horizontal bars: label, what stands beside the bar, and its parts (class, size, title), on one scale.

    Bars stretch with the page; texts are the page's own, so that they keep their size.
    """
    largest = max((sum(size for _, size, _ in parts) for _, _, parts in bars), default=0) or 1
    out = ['<div class="bars">']
    for label, note, parts in bars:
        out.append(f'<div class="row"><div class="label">{safe(label)}</div><svg xmlns="http://www.w3.org/2000/svg" '
                   f'class="bar" viewBox="0 0 {BAR_WIDTH} 1" preserveAspectRatio="none" role="img">')
        x = 0.0
        for look, size, title in parts:
            width = max(1.0, BAR_WIDTH * size / largest)
            out.append(f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="1" class="{look}">'
                       f"<title>{safe(title)}</title></rect>")
            x += width
        out.append(f'</svg><div class="note">{safe(note)}</div></div>')
    return "".join([*out, "</div>"])


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
