"""Lines and stacked bars over steps, as SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#1d4b8f", "#c0392b", "#2e8b57", "#b8860b", "#6a3d9a", "#0e7c86", "#8b4513", "#555555")
LEFT, RIGHT, TOP, WIDTH, HEIGHT, BELOW, LEGEND = 58, 14, 26, 390, 170, 24, 17  # pixels


@dataclass(frozen=True)
class Line:
    """A name and its points: step, value."""

    name: str
    points: list[tuple[float, float]]


def lines_chart(title: str, lines: Sequence[Line]) -> str:
    """Lines in one picture; those without a point are left out."""
    lines = [line for line in lines if line.points]
    values = [value for line in lines for _, value in line.points]
    low, high = _around(min(values), max(values))
    first = min(line.points[0][0] for line in lines)
    last = max(max(line.points[-1][0] for line in lines), first + 1)

    def at(step: float, value: float) -> tuple[float, float]:
        return LEFT + WIDTH * (step - first) / (last - first), TOP + HEIGHT * (high - value) / (high - low)

    parts = _frame(title, low, high, first, last, len(lines))
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(line.points) == 1:
            x, y = at(*line.points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>')
    return "\n".join([*parts, *_legend([line.name for line in lines]), "</svg>"])


def bars_chart(title: str, names: Sequence[str], steps: Sequence[tuple[float, Sequence[float]]]) -> str:
    """A bar a step, made of its parts from below. steps: number of the step, a value for each name."""
    high = max(sum(values) for _, values in steps) or 1.0
    first, last = steps[0][0], max(steps[-1][0], steps[0][0] + 1)
    width = WIDTH / (last - first + 1)
    parts = _frame(title, 0.0, high, first, last, len(names))
    for step, values in steps:
        x, y = LEFT + width * (step - first), float(TOP + HEIGHT)
        for number, value in enumerate(values):
            tall = HEIGHT * value / high
            y -= tall
            colour = COLOURS[number % len(COLOURS)]
            wide = max(width * 0.9, 0.5)
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" fill="{colour}"/>')
    return "\n".join([*parts, *_legend(names), "</svg>"])


def _frame(title: str, low: float, high: float, first: float, last: float, names: int) -> list[str]:
    """Title, grid and numbers."""
    width, height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BELOW + LEGEND * ((names + 1) // 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-size="11" '
        'font-family="Helvetica, Arial, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = TOP + HEIGHT * (1 - share)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#ddd"/>')
        number = _number(low + share * (high - low))
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number}</text>')
        x, step = LEFT + WIDTH * share, first + share * (last - first)
        if step == round(step):
            parts.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{step:.0f}</text>')
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    parts = []
    for number, name in enumerate(names):
        x, y = LEFT + WIDTH / 2 * (number % 2), TOP + HEIGHT + BELOW + 10 + LEGEND * (number // 2)
        parts.append(f'<path d="M{x:.0f} {y - 4}h16" stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="4"/>')
        parts.append(f'<text x="{x + 22:.0f}" y="{y}">{escape(name)}</text>')
    return parts


def _around(low: float, high: float) -> tuple[float, float]:
    """Some room above and below."""
    room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if low == 0 else low - room), high + room


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 4)}f}".rstrip("0").rstrip(".") if digits else f"{value:,.0f}"
