"""A plot of one value per position, as SVG text: enough to see where two models part."""

from __future__ import annotations

from html import escape
from math import ceil, floor, log10
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 900, 320, 70, 40, 40


def plot_positions(values: Sequence[float], title: str, label: str) -> str:
    """An SVG of non-negative `values` over their index, on a logarithmic scale; zeros lie on the axis."""
    positive = [v for v in values if v > 0]
    low = floor(log10(min(positive))) if positive else -1
    high = max(ceil(log10(max(positive))), low + 1) if positive else 0
    width, height = WIDTH - LEFT - 20, HEIGHT - TOP - BOTTOM

    def x(i: float) -> float:
        return LEFT + width * i / max(1, len(values) - 1)

    def y(exponent: float) -> float:
        return TOP + height * (high - exponent) / (high - low)

    points = " ".join(f"{x(i):.1f},{y(max(low, log10(v)) if v > 0 else low):.1f}" for i, v in enumerate(values))
    step = max(1, (high - low) // 8)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22">{escape(title)}</text>',
    ]
    for exponent in range(low, high + 1, step):
        lines.append(f'<path d="M{LEFT} {y(exponent):.1f}h{width}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y(exponent) + 4:.1f}" text-anchor="end">1e{exponent}</text>')
    last = max(0, len(values) - 1)
    lines += [
        *(f'<text x="{x(i):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{i}</text>'
          for i in sorted({0, last // 2, last})),
        f'<text x="{LEFT + width / 2}" y="{HEIGHT - 6}" text-anchor="middle">position</text>',
        f'<text transform="translate(16 {TOP + height / 2}) rotate(-90)" text-anchor="middle">{escape(label)}</text>',
        f'<polyline points="{points}" fill="none" stroke="#1f5fa8" stroke-width="1.2"/>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
