"""The decidedness curve as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from treepo_mcore.tree.curve import CurveSums, decided_at, monotone

LEFT, TOP, WIDTH, HEIGHT = 62, 24, 600, 320  # of the plot, in pixels
LOWEST, HIGHEST = -0.25, 1.25  # C; estimates outside are drawn at the edge


def curve_row(sums: CurveSums) -> dict[str, Any]:
    """The curve and what it was measured on; None where it is not known."""
    points = sums.points()
    rising = [point.decided for point in monotone(points)]
    return {
        "trees": sums.trees,
        "mean_response_tokens": sums.mean_length,
        "decided_at_half": decided_at(points, 0.5),
        "points": [
            asdict(point) | {"tokens": point.share * sums.mean_length, "monotone": value}
            for point, value in zip(points, rising, strict=True)
        ],
    }


def curve_picture(row: Mapping[str, Any]) -> str:
    """An SVG of what `trees curve --json` prints: estimates with intervals, the rising line through them."""
    points = row["points"]
    longest = max(1.0, *(point["share"] for point in points)) * 1.04

    def at(share: float, decided: float) -> tuple[float, float]:
        inside = min(max(decided, LOWEST), HIGHEST)
        return LEFT + WIDTH * share / longest, TOP + HEIGHT * (HIGHEST - inside) / (HIGHEST - LOWEST)

    ends = [(1.0, 1.0)] if points[-1]["share"] < 1 else []
    line = [(0.0, 0.0), *((point["share"], point["monotone"]) for point in points), *ends]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 18} {TOP + HEIGHT + 76}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13">',
        f'<rect width="{LEFT + WIDTH + 18}" height="{TOP + HEIGHT + 76}" fill="#fff"/>',
        *_axes(longest, at),
        f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*pair) for pair in line))}" '
        'fill="none" stroke="#1d4b8f" stroke-width="2"/>',
    ]
    for point in points:
        x, y = at(point["share"], point["decided"])
        if point["low"] is not None:
            (_, low), (_, high) = at(point["share"], point["low"]), at(point["share"], point["high"])
            bar = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 5:.1f} {low:.1f}h10M{x - 5:.1f} {high:.1f}h10"
            parts.append(f'<path d="{bar}" stroke="#c0392b" fill="none"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#c0392b"/>')
    told = f"{row['trees']} trees, answers of {row['mean_response_tokens']:.1f} tokens; "
    told += "estimates with 90 % intervals, and the nearest rising curve"
    parts.append(f'<text x="{LEFT}" y="{TOP + HEIGHT + 64}" font-size="12" fill="#555">{told}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _axes(longest: float, at: Any) -> list[str]:
    """Grid, numbers and titles."""
    parts = []
    for decided in (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25):
        x, y = at(0.0, decided)
        stroke = "#888" if decided in (0.0, 1.0) else "#ddd"
        parts.append(f'<path d="M{x:.1f} {y:.1f}h{WIDTH}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{decided:g}</text>')
    every = 0.25 if longest <= 2.5 else 1.0 if longest <= 10 else 10.0
    for number in range(int(longest / every) + 1):
        x, y = at(number * every, LOWEST)
        parts.append(f'<path d="M{x:.1f} {y:.1f}v5" stroke="#555"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 19:.1f}" text-anchor="middle">{number * every:g}</text>')
    middle = TOP + HEIGHT / 2
    parts.append(
        f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 40}" text-anchor="middle">depth / mean response length</text>'
    )
    parts.append(
        f'<text x="18" y="{middle}" transform="rotate(-90 18 {middle})" text-anchor="middle">'
        "share of the reward's variance that is settled</text>"
    )
    return parts
