"""Two runs side by side: what they were told, what came out, what it took."""

from __future__ import annotations

from typing import Any

from treepo_mcore.config import ConfigError, differences
from treepo_mcore.report.run import Run

# Sums over the steps that both runs have; names as in metrics.jsonl.
SPENT = {"seconds of steps": "time/step", "seconds of rollout": "time/rollout", "seconds of updates": "time/update"}


def compare(one: Run, other: Run) -> dict[str, Any]:
    """Rows of numbers, {name: [of one, of the other]}, and keys of the configuration whose values differ.

    Held-out values are each run's last, with its best accuracy beside it. Raises `ConfigError` where the runs were not
    evaluated on the same sets.
    """
    check_comparable(one, other)
    pair = (one, other)
    rows: dict[str, list[Any]] = {"steps": [len(run.steps) for run in pair]}
    names = sorted({name for run in pair for row in run.evaluations[-1:] for name in row if name.startswith("eval/")})
    rows |= {f"last {name}": [_last(run, name) for run in pair] for name in names}
    rows["best eval/accuracy"] = [max((row["eval/accuracy"] for row in run.evaluations), default=None) for run in pair]
    common = min(len(run.steps) for run in pair)
    rows |= {
        f"{what}, first {common}": [round(sum(row.get(name, 0.0) for row in run.steps[:common]), 1) for run in pair]
        for what, name in SPENT.items()
    }
    told = differences(one.config, other.config)
    return {
        "runs": [str(run.folder) for run in pair],
        "rows": rows,
        "config": {key: [a, b] for key, a, b in told if key != "run.dir"},
    }


def check_comparable(one: Run, other: Run) -> None:
    """Raise `ConfigError` where the held-out sets differ: their numbers say nothing about each other."""
    sets = [{name: str(held_out.path) for name, held_out in run.config.held_out.items()} for run in (one, other)]
    if sets[0] != sets[1]:
        raise ConfigError(
            f"{one.folder}, {other.folder}: runs of different tasks, by data.eval: {sets[0]} and {sets[1]}"
        )


def _last(run: Run, name: str) -> Any:
    return run.evaluations[-1].get(name) if run.evaluations else None


def table(found: dict[str, Any]) -> str:
    """For people."""
    one, other = found["runs"]
    lines = [f"{'':34} {one:>24} {other:>24}"]
    lines += [f"{name:34} {_shown(a):>24} {_shown(b):>24}" for name, (a, b) in found["rows"].items()]
    lines += ["", "configuration" if found["config"] else "configuration: the same"]
    lines += [f"{key:34} {_shown(a):>24} {_shown(b):>24}" for key, (a, b) in found["config"].items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)
