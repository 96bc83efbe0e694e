"""The curve of where outcomes are decided, as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from treepo_mcore.tree.curve import Point

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 520, 320, 56, 16, 504, 276
BLUE = "#4878a8"


def draw_curve(points: Sequence[Point]) -> str:
    """An SVG: the curve from the prompt on, where nothing is decided, with its intervals; dashed what is even."""
    longest = max(1.0, points[-1].share)
    low, high = min(0.0, *(p.low for p in points)), max(1.0, *(p.high for p in points))

    def at(share: float, decided: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * share / longest
        return round(x, 1), round(BOTTOM - (BOTTOM - TOP) * (decided - low) / (high - low), 1)

    def path(*ends: tuple[float, float]) -> str:
        return " ".join(f"{x},{y}" for x, y in (at(*end) for end in ends))

    line = path((0, 0), *((p.share, p.decided) for p in points))
    band = path((0, 0), *((p.share, p.high) for p in points), *((p.share, p.low) for p in reversed(points)))
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        (x, _), (_, y) = at(tick, low), at(0, tick)
        parts.append(f'<path d="M{LEFT} {y}H{RIGHT}" stroke="#ddd"/>')
        parts.append(_text(tick, x, BOTTOM + 16, "middle"))
        parts.append(_text(tick, LEFT - 8, y + 4, "end"))
    parts.append(f'<polygon points="{band}" fill="{BLUE}" opacity="0.2"/>')
    parts.append(f'<polyline points="{path((0, 0), (1, 1))}" stroke="#888" stroke-dasharray="4 4"/>')
    parts.append(f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="2"/>')
    for point in points:
        x, y = at(point.share, point.decided)
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{BLUE}"/>')
    parts.append(_text("share of the mean response length", (LEFT + RIGHT) / 2, HEIGHT - 10, "middle"))
    middle = (TOP + BOTTOM) / 2
    parts.append(f'<g transform="translate(14 {middle}) rotate(-90)">{_text("variance decided", 0, 0, "middle")}</g>')
    style = 'font-family="sans-serif" font-size="12" fill="#333"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>'
    return "\n".join([head, *parts, "</svg>", ""])


def _text(text: object, x: float, y: float, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
