"""A study's results as figures: means over seeds, ratios to the baseline over pairs, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from treepo_mcore.study.definition import Study
from treepo_mcore.study.runs import Run

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; 1.96 stands for more.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)

SECONDS, TOKENS, ACCURACY = 1, 2, 3  # of a point


@dataclass(frozen=True)
class Interval:
    """A mean over n seeds with its 95 % interval; without bounds where n is 1."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval | None:
        """By Student's t; None without values."""
        if not values:
            return None
        mean = fmean(values)
        if len(values) == 1:
            return cls(mean, None, None, 1)
        t = T95[len(values) - 2] if len(values) - 2 < len(T95) else 1.96
        half = t * stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half, len(values))

    def through(self, function: Callable[[float], float]) -> Interval:
        """The interval of a rising function of what it is of."""
        low, high = (None if bound is None else function(bound) for bound in (self.low, self.high))
        return Interval(function(self.mean), low, high, self.n)

    def show(self, digits: int = 3) -> str:
        """As text."""
        if self.low is None or self.high is None:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def smoothed(points: Sequence[Sequence[float]]) -> list[list[float]]:
    """Accuracies as means of three neighbours, two at the ends: one evaluation is good to a few hundredths."""
    accuracies = [point[ACCURACY] for point in points]
    means = [fmean(accuracies[max(0, i - 1) : i + 2]) for i in range(len(points))]
    return [[*point[:ACCURACY], mean] for point, mean in zip(points, means, strict=True)]


def first_reached(run: Run, axis: int, target: float) -> float | None:
    """Seconds or tokens at which the smoothed accuracy first has the target, between evaluations by a straight line;
    None where it never has."""
    before: list[float] | None = None
    for point in smoothed(run["points"]):
        if point[ACCURACY] >= target:
            if before is None:
                return point[axis]
            share = (target - before[ACCURACY]) / (point[ACCURACY] - before[ACCURACY])
            return before[axis] + share * (point[axis] - before[axis])
        before = point
    return None


def ratio(study: Study, runs: Sequence[Run], arm: str, axis: int) -> tuple[Interval | None, int]:
    """The geometric mean over pairs of what arm and baseline need to reach the target, and how many pairs did not.

    Where only one of a pair has reached it, the other one is counted with what it had used up at its end: the ratio is
    then nearer to 1 than the truth.
    """
    logs, lost = [], 0
    for seed in study.seeds:
        pair = [_of(runs, name, seed) for name in (arm, study.baseline)]
        if None in pair:
            continue
        reached = [first_reached(run, axis, study.target) for run in pair if run]
        if reached == [None, None]:
            lost += 1
            continue
        lost += None in reached
        mine, theirs = (
            run["points"][-1][axis] if value is None else value
            for run, value in zip(pair, reached, strict=True)
            if run is not None
        )
        logs.append(math.log(mine / theirs))
    found = Interval.of(logs)
    return (found.through(math.exp) if found else None), lost


def table(study: Study, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One mapping an arm."""
    rows = []
    for arm in study.arms:
        mine = [run for run in runs if run["arm"] == arm]
        if not mine:
            continue
        last = [fmean(point[ACCURACY] for point in run["points"][-3:]) for run in mine]
        row: dict[str, Any] = {
            "arm": arm,
            "seeds": len(mine),
            "accuracy": Interval.of(last),
            "seconds a step": Interval.of([run["seconds"] / run["steps"] for run in mine]),
            "tokens a step": Interval.of([run["decoded_tokens"] / run["steps"] for run in mine]),
            "informative": Interval.of([run["informative"] for run in mine]),
            "tokens an informative prompt": Interval.of([run["tokens_per_informative"] for run in mine]),
        }
        for name, axis in (("seconds", SECONDS), ("tokens", TOKENS)):
            row[f"{name} / {study.baseline}"], row[f"{name} lost"] = ratio(study, runs, arm, axis)
        rows.append(row)
    return rows


def markdown(study: Study, runs: Sequence[Run]) -> str:
    """The table, with what its columns are."""
    rows = table(study, runs)
    lines = [
        f"## {study.title}",
        "",
        f"Held-out accuracy is the mean of a run's last three evaluations; *to {study.target:g}* is the ratio to "
        f"`{study.baseline}` of what is needed to reach that accuracy, the geometric mean over seeds. Intervals: 95 %. "
        "Informative prompts: of the later half.",
        "",
        f"| arm | seeds | accuracy | seconds to {study.target:g} | tokens to {study.target:g} | not reached "
        "| seconds a step | tokens a step | tokens an informative prompt |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds, tokens = row[f"seconds / {study.baseline}"], row[f"tokens / {study.baseline}"]
        cells = [
            row["arm"],
            row["seeds"],
            row["accuracy"].show(),
            seconds.show(2) if seconds else "",
            tokens.show(2) if tokens else "",
            row["seconds lost"],
            f"{row['seconds a step'].mean:.2f}",
            f"{row['tokens a step'].mean:.0f}",
            f"{row['tokens an informative prompt'].mean:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


def _of(runs: Sequence[Run], arm: str, seed: int) -> Run | None:
    return next((run for run in runs if run["arm"] == arm and run["seed"] == seed), None)
