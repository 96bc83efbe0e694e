"""A study's table and pictures as one HTML file that needs no other."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from treepo_mcore.report.charts import COLOURS
from treepo_mcore.study.definition import Study
from treepo_mcore.study.report import ACCURACY, SECONDS, TOKENS, markdown
from treepo_mcore.study.runs import Run

LEFT, RIGHT, TOP, WIDTH, HEIGHT, LEGEND = 56, 44, 16, 640, 330, 20  # of a plot, in pixels
STYLE = (
    "body{font-family:Helvetica,Arial,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:4px 8px;text-align:left}"
)


def page(study: Study, runs: Sequence[Run]) -> str:
    """HTML."""
    lines = markdown(study, runs).splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("|"))
    head, *body = [line for line in lines[begin:] if line.startswith("|") and not line.startswith("|---")]
    table = [_row(head, "th"), *(_row(line, "td") for line in body)]
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(study.title)}</title>',
            f"<style>{STYLE}</style><h1>{escape(study.title)}</h1><p>{escape(lines[2])}</p>",
            "<table>",
            *table,
            "</table>",
            "<p>Means over seeds, with the spread from the lowest to the highest seed; points are evaluations.</p>",
            plot(study, runs, SECONDS, "seconds of training"),
            plot(study, runs, TOKENS, "decoded tokens"),
            "</html>",
            "",
        ]
    )


def plot(study: Study, runs: Sequence[Run], axis: int, title: str) -> str:
    """Held-out accuracy of every arm over seconds or tokens, as SVG."""
    longest = _round_up(max(run["points"][-1][axis] for run in runs))
    highest = max(point[ACCURACY] for run in runs for point in run["points"])
    lowest = min(point[ACCURACY] for run in runs for point in run["points"])
    low, high = max(0.0, lowest - 0.02), min(1.0, highest + 0.02)

    def at(value: float, accuracy: float) -> tuple[float, float]:
        return LEFT + WIDTH * value / longest, TOP + HEIGHT * (high - accuracy) / (high - low)

    arms = [arm for arm in study.arms if any(run["arm"] == arm for run in runs)]
    total = TOP + HEIGHT + 52 + LEGEND * len(arms)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {total}" font-size="13" '
        'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{LEFT + WIDTH + RIGHT}" height="{total}" fill="#fff"/>',
    ]
    for accuracy in np.arange(np.ceil(low * 10) / 10, high, 0.1):
        x, y = at(0, float(accuracy))
        parts.append(f'<path d="M{x:.1f} {y:.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{accuracy:.1f}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = at(share * longest, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{share * longest:,.0f}</text>')
    (begin, y), (end, _) = at(0, study.target), at(longest, study.target)
    parts.append(f'<path d="M{begin:.1f} {y:.1f}H{end:.1f}" stroke="#888" stroke-dasharray="4 4"/>')
    for number, arm in enumerate(arms):
        colour = COLOURS[number % len(COLOURS)]
        middle, lower, upper = _curves([run for run in runs if run["arm"] == arm], axis)
        band = [at(*point) for point in [*upper, *reversed(lower)]]
        parts.append(f'<polygon points="{_points(band)}" fill="{colour}" opacity="0.12"/>')
        line = [at(*point) for point in middle]
        parts.append(f'<polyline points="{_points(line)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = TOP + HEIGHT + 48 + LEGEND * number
        parts.append(f'<path d="M{LEFT} {y}h24" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{LEFT + 32}" y="{y + 4}">{escape(arm)}</text>')
    parts.append(f'<text x="{LEFT + WIDTH}" y="{TOP + HEIGHT + 40}" text-anchor="end">{escape(title)}</text>')
    return "\n".join([*parts, "</svg>"])


def _round_up(value: float) -> float:
    """To two digits that four divides."""
    unit = 4 * 10.0 ** (np.floor(np.log10(max(value, 1.0))) - 1)
    return float(np.ceil(value / unit) * unit) or 1.0


Line = list[tuple[float, float]]


def _curves(runs: Sequence[Run], axis: int) -> tuple[Line, Line, Line]:
    """Mean, lowest and highest accuracy where all runs of an arm still train, on a common grid."""
    end = min(run["points"][-1][axis] for run in runs)
    begin = max(run["points"][0][axis] for run in runs)
    grid = np.linspace(begin, max(end, begin), 60)
    rows = np.array([np.interp(grid, *np.array([[p[axis], p[ACCURACY]] for p in run["points"]]).T) for run in runs])
    return tuple(  # type: ignore[return-value]
        [(float(x), float(y)) for x, y in zip(grid, values, strict=True)]
        for values in (rows.mean(0), rows.min(0), rows.max(0))
    )


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _row(line: str, tag: str) -> str:
    cells = [escape(cell.strip()) for cell in line.strip("|").split("|")]
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
