"""Draw the pictures of docs/scaling.md from the planner, as plain SVG.

python tools/plot_scaling.py          # rewrite docs/scaling_*.svg
python tools/plot_scaling.py --check  # exit status 1 when one is out of date
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_mcore.config import parse_config
from treepo_mcore.model.architecture import read_sizes
from treepo_mcore.plan.hardware import make_cluster
from treepo_mcore.plan.plan import Plan, plan_run
from treepo_mcore.plan.workload import Assumptions

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
PHASES = {
    "step": ("#333333", lambda plan: plan.total),
    "rollout": ("#3b6fb6", lambda plan: plan.seconds["rollout"]),
    "update": ("#c27a1a", lambda plan: plan.seconds["update"]),
    "log-probs": ("#8d6bb0", lambda plan: plan.seconds["log-probs"]),
    "push": ("#2e8b57", lambda plan: plan.seconds["push"]),
}
MEMORY = {
    "update": ("#c27a1a", lambda plan: plan.memory.total("update") / GIB),
    "rollout": ("#3b6fb6", lambda plan: plan.memory.total("rollout") / GIB),
    "optimizer": ("#8d6bb0", lambda plan: plan.memory.phases["update"]["optimizer"] / GIB),
    "activations": ("#b4493f", lambda plan: plan.memory.phases["update"]["activations"] / GIB),
}
BYTES = {
    "shard to shard": ("#2e8b57", lambda plan: plan.push.received / GIB),
    "gathered": ("#b4493f", lambda plan: plan.push.gather_received / GIB),
}
PUSHES = {
    "shard to shard": ("#2e8b57", lambda plan: plan.push.seconds),
    "gathered": ("#b4493f", lambda plan: plan.push.gather_seconds),
}
Series = dict[str, tuple[str, Callable[[Plan], float]]]


@dataclass(frozen=True)
class Case:
    """What is held while one thing varies: Llama-3.1-70B or Qwen2.5-7B, trees of width 16."""

    model: str = "Llama-3.1-70B"
    nodes: int = 8
    prompts: int = 512
    prompts_per_update: int = 64
    width: int = 16
    segment: int = 512
    prompt: int = 256  # mean; the longest is four times that
    answer: int = 1792  # mean; the longest is four times that, or so many segments
    depth: int | None = None

    def plan(self) -> Plan:
        """Layout by model: the 70B in tp8 pp4 with engines of 4, the 7B in tp2 with engines of 1."""
        large = self.model == "Llama-3.1-70B"
        depth = self.depth or math.ceil(4 * self.answer / self.segment)
        longest = 4 * self.prompt + depth * self.segment
        actor: dict[str, Any] = {"tp": 8, "pp": 4} if large else {"tp": 2}
        raw = {
            "model": {"path": self.model},
            "data": {"train": "-", "max_prompt_tokens": 4 * self.prompt},
            "rollout": {
                "tp": 4 if large else 1,
                "tree": {"width": self.width, "segment_tokens": self.segment, "max_depth": depth},
                "engine": {"gpu_memory_utilization": 0.75},
            },
            "actor": actor | {"sequence_parallel": True, "recompute": "full", "micro_batch_tokens": max(8192, longest)},
            "trainer": {"prompts_per_step": self.prompts, "prompts_per_update": self.prompts_per_update},
        }
        assumed = Assumptions(self.prompt, min(self.answer, depth * self.segment))
        cluster = make_cluster("h100", "ib400", self.nodes, 8)
        return plan_run(parse_config(raw), read_sizes(ROOT / "examples/models" / self.model), cluster, assumed)


@dataclass(frozen=True)
class Panel:
    """One plot: lines over a doubling x."""

    title: str
    x_name: str
    y_name: str
    xs: Sequence[int]
    plans: Sequence[Plan]
    series: Series
    log_y: bool = True


def gpu_panels() -> list[Panel]:
    """8 to 1024 GPUs: the same work, and work that grows with them."""
    small, large = [8, 16, 32, 64, 128, 256, 512, 1024], [32, 64, 128, 256, 512, 1024]
    seven = [Case("Qwen2.5-7B", gpus // 8).plan() for gpus in small]
    seventy = [Case(nodes=gpus // 8).plan() for gpus in large]
    weak = [Case(nodes=gpus // 8, prompts=8 * gpus, prompts_per_update=gpus).plan() for gpus in large]
    return [
        Panel("Qwen2.5-7B, 512 prompts a step", "GPUs", "s", small, seven, PHASES),
        Panel("Llama-3.1-70B, 512 prompts a step", "GPUs", "s", large, seventy, PHASES),
        Panel("Llama-3.1-70B, 8 prompts a GPU", "GPUs", "s", large, weak, PHASES),
        Panel("Llama-3.1-70B, memory of a GPU", "GPUs", "GiB", large, seventy, MEMORY, log_y=False),
        Panel("Llama-3.1-70B, received in a push", "GPUs", "GiB", large, seventy, BYTES),
        Panel("Llama-3.1-70B, a push", "GPUs", "s", large, seventy, PUSHES),
    ]


def shape_panels() -> list[Panel]:
    """Llama-3.1-70B on 64 GPUs: width, depth, prompt and answer."""
    widths, depths = [2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32]
    prompts, answers = [128, 256, 512, 1024, 2048, 4096], [128, 256, 512, 1024, 2048, 4096]
    by_width = [Case(width=width).plan() for width in widths]
    by_depth = [Case(segment=8192 // depth, depth=depth).plan() for depth in depths]
    by_prompt = [Case(prompt=prompt).plan() for prompt in prompts]
    by_answer = [Case(answer=answer).plan() for answer in answers]
    return [
        Panel("Width: leaves of a tree", "width", "s", widths, by_width, PHASES),
        Panel("Depth: segments of at most 8192 tokens", "depth", "s", depths, by_depth, PHASES),
        Panel("Prompt", "mean tokens", "s", prompts, by_prompt, PHASES),
        Panel("Answer", "mean tokens", "s", answers, by_answer, PHASES),
        Panel("Memory of a GPU, by prompt", "mean tokens", "GiB", prompts, by_prompt, MEMORY, log_y=False),
        Panel("Memory of a GPU, by answer", "mean tokens", "GiB", answers, by_answer, MEMORY, log_y=False),
    ]


WIDTH, HEIGHT, LEFT, TOP, PLOT_W, PLOT_H = 320, 250, 48, 34, 250, 165


def picture(panels: list[Panel]) -> str:
    """Three panels a row."""
    rows = math.ceil(len(panels) / 3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * WIDTH} {rows * HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f'<rect width="{3 * WIDTH}" height="{rows * HEIGHT}" fill="#ffffff"/>',
    ]
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate({index % 3 * WIDTH} {index // 3 * HEIGHT})">{_panel(panel)}</g>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel) -> str:
    values = {name: [read(plan) for plan in panel.plans] for name, (_, read) in panel.series.items()}
    low, high = _range([v for column in values.values() for v in column], panel.log_y)
    span = max(len(panel.xs) - 1, 1)

    def x(index: int) -> float:
        return LEFT + PLOT_W * index / span

    def y(value: float) -> float:
        part = math.log(value / low) / math.log(high / low) if panel.log_y else (value - low) / (high - low)
        return TOP + PLOT_H * (1 - part)

    parts = [
        f'<text x="{LEFT}" y="18" font-size="12.5" font-weight="bold" fill="#333">{panel.title}, {panel.y_name}</text>'
    ]
    for tick in _ticks(low, high, panel.log_y):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}h{PLOT_W}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#666">{tick:g}</text>')
    for index, value in enumerate(panel.xs):
        parts.append(
            f'<text x="{x(index):.1f}" y="{TOP + PLOT_H + 15}" text-anchor="middle" fill="#666">{value}</text>'
        )
    parts.append(f'<path d="M{LEFT} {TOP}v{PLOT_H}h{PLOT_W}" fill="none" stroke="#999"/>')
    legend = TOP + PLOT_H + 31
    at = float(LEFT)
    for name, (colour, _) in panel.series.items():
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values[name]))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="2.4" fill="{colour}"/>' for i, v in enumerate(values[name])
        ]
        parts.append(f'<path d="M{at:.0f} {legend - 4}h12" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{at + 15:.0f}" y="{legend}" fill="#333">{name}</text>')
        at += 20 + 5.4 * len(name)
    return "".join(parts)


def _range(values: list[float], log_y: bool) -> tuple[float, float]:
    if not log_y:
        return 0.0, max(80.0, 20.0 * math.ceil(max(values) / 20))
    return 10 ** math.floor(math.log10(min(v for v in values if v > 0))), 10 ** math.ceil(math.log10(max(values)))


def _ticks(low: float, high: float, log_y: bool) -> list[float]:
    if log_y:
        return [10**power for power in range(round(math.log10(low)), round(math.log10(high)) + 1)]
    return [low + 20 * index for index in range(round((high - low) / 20) + 1)]


def print_table() -> None:
    """The 70B by GPUs, in numbers."""
    print("Llama-3.1-70B, 512 prompts a step, tp8 pp4, engines of 4, H100, NDR 400 Gb/s")
    print(f"{'GPUs':>5}{'step s':>9}{'rollout':>9}{'tail':>7}{'log-probs':>11}{'update':>8}{'push':>6}", end="")
    print(f"{'gathered':>10}{'update GiB':>12}{'rollout GiB':>13}")
    for gpus in (32, 64, 128, 256, 512, 1024):
        plan = Case(nodes=gpus // 8).plan()
        seconds = plan.seconds
        print(f"{gpus:5}{plan.total:9.0f}{seconds['rollout']:9.0f}{plan.rollout.tail_seconds:7.0f}", end="")
        print(f"{seconds['log-probs']:11.0f}{seconds['update']:8.0f}{seconds['push']:6.1f}", end="")
        print(f"{plan.push.gather_seconds:10.1f}", end="")
        print(f"{plan.memory.total('update') / GIB:12.1f}{plan.memory.total('rollout') / GIB:13.1f}")


def main() -> int:
    """Rewrite, check, or print the table; returns the exit status."""
    if "--table" in sys.argv:
        print_table()
        return 0
    stale = []
    for name, panels in (("gpus", gpu_panels()), ("shape", shape_panels())):
        file = ROOT / "docs" / f"scaling_{name}.svg"
        text = picture(panels)
        if not file.is_file() or file.read_text() != text:
            stale.append(file.name)
            if "--check" not in sys.argv:
                file.write_text(text)
    if "--check" in sys.argv and stale:
        print(f"out of date, run tools/plot_scaling.py: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
