"""A run, or several side by side, as one HTML file that needs no other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from treepo_mcore.observe.health import Finding, history
from treepo_mcore.report.charts import Line, bars_chart, lines_chart
from treepo_mcore.report.curve import curve_picture, curve_row
from treepo_mcore.report.forest import forest, saved_trees
from treepo_mcore.report.run import Row, Run
from treepo_mcore.tree.curve import CurveSums
from treepo_mcore.tree.stats import tree_stats
from treepo_mcore.tree.tree import Tree

# Title of a chart -> metrics of a step in it.
CHARTS: dict[str, tuple[str, ...]] = {
    "Accuracy while sampling": ("reward/accuracy",),
    "Reward": ("reward/mean",),
    "Prompts that teach, share": ("filter/kept",),
    "Response length, tokens": (
        "rollout/response_tokens_mean",
        "rollout/response_tokens_median",
        "rollout/response_tokens_p95",
    ),
    "Tokens of a step": ("rollout/logical_tokens", "rollout/physical_tokens"),
    "Decoded tokens a second": ("rollout/tokens_per_second",),
    "Outcomes decided at half length": ("tree/decided",),
    "Entropy, nats a token": ("actor/entropy",),
    "Loss": ("actor/loss",),
    "Gradient norm": ("actor/grad_norm",),
    "Engine against actor, nats a token": ("mismatch/logprob_abs_mean",),
    "Clipped share of tokens": ("actor/clipped",),
}
PARTS = ("push", "rollout", "choose", "update", "observe", "evaluate", "save", "export")


def page(runs: Sequence[Run], most: int) -> str:
    """HTML. most: trees of a step that can be opened; those of the first run's first and last saved step are there."""
    first = runs[0]
    shown = [first.saved[index] for index in sorted({0, len(first.saved) - 1})] if first.saved else []
    trees = {folder: saved_trees(folder) for folder in shown}
    opened = [forest(first, folder, found, most) for folder, found in trees.items()]
    environment = Environment(loader=PackageLoader("treepo_mcore.report"), undefined=StrictUndefined, autoescape=True)
    return environment.get_template("report.html.j2").render(
        title=" and ".join(run.name for run in runs),
        runs=[_facts(run) for run in runs],
        health=_health(runs),
        charts=_charts(runs),
        sharing=_sharing(trees[shown[-1]]) if shown else [],
        curve=_curve(trees[shown[-1]]) if shown else "",
        steps=[entry["step"] for entry in opened],
        data=opened,
    )


def _facts(run: Run) -> dict[str, Any]:
    """The head of the page."""
    config = run.config
    width = config.rollout.tree.width
    return {
        "name": run.name,
        "rows": {
            "folder": str(run.folder),
            "model": config.model.path,
            "sampling": f"{config.rollout.sampler}, {width} answers a prompt",
            "estimator": config.advantage.estimator,
            "steps": f"{len(run.steps)} of {config.trainer.steps}",
            "accuracy before": _known(run.summary.get("accuracy_before")),
            "accuracy after": _known(run.summary.get("accuracy_after")),
            "layout": run.summary.get("layout", "not ended"),
            "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items() if version),
        },
    }


def _health(runs: Sequence[Run]) -> list[tuple[str, Finding]]:
    """What was found in the course of the runs, and when."""
    return [
        (f"step {row['step'] + 1}{_of(run, runs)}", finding)
        for run in runs
        for row, fresh in history(run.steps)
        for finding in fresh
    ]


def _charts(runs: Sequence[Run]) -> list[str]:
    charts = []
    if lines := _evaluations(runs):
        charts.append(lines_chart("Held-out accuracy", lines))
    for title, names in CHARTS.items():
        lines = [Line(_named(run, name, names, runs), _points(run.steps, name)) for run in runs for name in names]
        if any(line.points for line in lines):
            charts.append(lines_chart(title, lines))
    for run in runs:
        parts = [name for name in PARTS if any(f"time/{name}" in row for row in run.steps)]
        steps = [(row["step"], [row.get(f"time/{name}", 0.0) for name in parts]) for row in run.steps]
        if steps:
            charts.append(bars_chart(f"Seconds of a step{_of(run, runs)}", parts, steps))
    return charts


def _evaluations(runs: Sequence[Run]) -> list[Line]:
    names = sorted({name for run in runs for row in run.evaluations for name in row if name.endswith("accuracy")})
    lines = [Line(_named(run, name, names, runs), _points(run.evaluations, name)) for run in runs for name in names]
    return [line for line in lines if line.points]


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    return [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]


def _named(run: Run, name: str, names: Sequence[str], runs: Sequence[Run]) -> str:
    return name + _of(run, runs) if len(names) > 1 or len(runs) == 1 else run.name


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f", {run.name}" if len(runs) > 1 else ""


def _sharing(trees: Sequence[Tree]) -> list[dict[str, Any]]:
    """How many answers share a token, segment by segment."""
    stats = tree_stats(trees)
    return [
        {"depth": depth, "sharing": f"{share:.2f}", "ended": stats.depths.get(depth, 0)}
        for depth, share in enumerate(stats.sharing, start=1)
    ]


def _curve(trees: Sequence[Tree]) -> str:
    """When outcomes are decided, where the trees can tell."""
    if any(leaf.reward is None for tree in trees for leaf in tree.leaves):
        return ""
    row = curve_row(CurveSums.of(trees))
    return curve_picture(row) if row["points"] else ""


def _known(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"
