"""Metrics of a run: wall time by part, what the rollout brought, one JSON object a step in metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treepo_mcore.config import Config
from treepo_mcore.observe.observer import Observer, Wish, run_values
from treepo_mcore.observe.trackers import Tracker, open_trackers
from treepo_mcore.records import Batch, Step
from treepo_mcore.tree.curve import CurveSums, decided_at
from treepo_mcore.tree.stats import informative, tree_stats
from treepo_mcore.tree.tree import Leaf, Tree


class Clock:
    """Wall seconds of the parts of a step, and of the whole, in which nothing is left out.

    `step` is the time since the clock was looked at last, so the sum over all steps is the time of the run. What comes
    behind a step's line (`observe`, `evaluate`, `save`) is counted in the next one's.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        """announce is called with a part's name when it begins."""
        self.announce = announce
        self.seconds: dict[str, float] = {}
        self.begin = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time inside the block to `name`."""
        self.announce(name)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def look(self) -> dict[str, float]:
        """Seconds by part and of the `step`, since the last call; begins anew."""
        now = time.perf_counter()
        seconds, self.seconds = self.seconds | {"step": now - self.begin}, {}
        self.begin = now
        return seconds


class Metrics(Observer):
    """metrics.jsonl and the trackers, which get its numbers. Rank 0 makes one."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.trackers: list[Tracker] = []

    def start(self, step: int) -> None:
        """Drop what the run will repeat, then open the trackers."""
        self.log = MetricsLog(self.config.run.dir, step, self.config.trainer.steps)
        self.trackers = open_trackers(self.config, step)

    def trained(self, step: Step) -> Wish:
        """One line."""
        self._write(step.number, run_values(step))
        return Wish.NOTHING

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """One line."""
        self._write(step, values)

    def close(self) -> None:
        """Of the trackers."""
        for tracker in self.trackers:
            tracker.close()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        self.log.write(step, values)
        for tracker in self.trackers:
            tracker.write(step, values)


class MetricsLog:
    """Appends to ``metrics.jsonl``; a resumed run drops the lines of the steps that it repeats."""

    def __init__(self, directory: Path, resume_at: int, steps: int) -> None:
        """steps: of the whole run, behind which it evaluates again, as before its first."""
        self.file = directory / "metrics.jsonl"
        lines = self._lines()
        if lines and not _is_whole(lines[-1]):  # the job died while it wrote
            lines.pop()
        stays = 0 < resume_at < steps
        kept = [line for line in lines if _is_before(json.loads(line), resume_at, stays)]
        self.file.write_text("".join(line + "\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line, JSON whatever happened: a number that is not finite is null."""
        known = {name: None if _is_not_finite(value) else value for name, value in values.items()}
        with self.file.open("a") as handle:
            handle.write(json.dumps({"step": step, **known}, allow_nan=False) + "\n")

    def _lines(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.is_file() else []


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _is_before(values: dict[str, Any], step: int, evaluation_stays: bool) -> bool:
    """An evaluation bears the number of the step before which it was made."""
    return bool(values["step"] < step or (values["step"] == step and evaluation_stays and "eval/accuracy" in values))


def _components(leaves: Sequence[Leaf]) -> dict[str, float]:
    """Means of what a reward function returned beside the score, over the leaves that have it."""
    found: dict[str, list[float]] = {}
    for leaf in leaves:
        for name, value in leaf.components.items():
            found.setdefault(name, []).append(value)
    return {f"reward/{name}/mean": sum(values) / len(values) for name, values in sorted(found.items())}


def _sets(trees: Sequence[Tree]) -> dict[str, float]:
    """Of several training sets: prompts of each, and the accuracy on them."""
    found: dict[str, list[float]] = {}
    for tree in trees:
        if name := tree.meta.get("set"):
            found.setdefault(name, []).append(sum(bool(leaf.correct) for leaf in tree.leaves) / len(tree.leaves))
    prompts = {f"data/{name}/prompts": float(len(values)) for name, values in sorted(found.items())}
    return prompts | {f"data/{name}/accuracy": sum(values) / len(values) for name, values in sorted(found.items())}


def rollout_metrics(batch: Batch, seconds: float) -> dict[str, Any]:
    """What a rollout of `seconds` brought; tokens are physical unless the name says logical."""
    trees, counts = batch.trees, batch.counts
    leaves = [leaf for tree in trees for leaf in tree.leaves]

    def by_prompt(value: Callable[[Leaf], float]) -> float:
        """Prompts count alike, also those whose budget was given back."""
        return sum(sum(map(value, tree.leaves)) / len(tree.leaves) for tree in trees) / len(trees)

    stats = tree_stats(trees)
    teaching = sum(informative(tree) for tree in [*trees, *batch.restarts])
    # All trees, before the filter. It looks at rewards, and what is left is no sample of independent answers; the curve
    # happens to bear it, as a prompt whose rewards are all equal adds nothing, but only while rewards are scores.
    decided = decided_at(CurveSums.of(trees).points(), 0.5)
    return {
        "reward/mean": by_prompt(lambda leaf: leaf.reward or 0.0),
        "reward/score": by_prompt(lambda leaf: leaf.score or 0.0),
        "reward/accuracy": by_prompt(lambda leaf: bool(leaf.correct)),
        **_components(leaves),
        **_sets(trees),
        "rollout/leaves": stats.leaves,
        "rollout/response_tokens_mean": stats.mean_length,
        "rollout/response_tokens_mass_mean": stats.mass_mean_length,
        "rollout/response_tokens_median": stats.median_length,
        "rollout/response_tokens_p95": stats.p95_length,
        "rollout/response_tokens_max": stats.longest,
        "rollout/physical_tokens": stats.physical_tokens,
        "rollout/logical_tokens": stats.logical_tokens,
        "rollout/effective_leaves": stats.effective_leaves,
        "rollout/fallback_share": stats.fallback_leaves / stats.leaves,
        **{f"rollout/ended_{reason}": count / stats.leaves for reason, count in sorted(stats.reasons.items())},
        **({} if decided is None else {"tree/decided": decided}),
        "rollout/decoded_tokens": counts.decoded_tokens,
        "rollout/tokens_per_informative": counts.decoded_tokens / max(teaching, 1),
        "rollout/tokens_per_second": counts.decoded_tokens / seconds,
        "rollout/engine_steps": counts.steps,
        "rollout/occupancy": counts.live_sum / max(counts.steps, 1),
        "rollout/requests": counts.requests,
        "rollout/prefix_hit_tokens": counts.cached_tokens,
        "rollout/prefill_tokens": counts.context_tokens - counts.cached_tokens,
        "rollout/preemptions": counts.preemptions,
        "rollout/drawn_prompts": counts.drawn_prompts,
        "rollout/failed_prompts": counts.failed_prompts,
        "reward/failed": counts.failed_rewards,
        "rollout/unfinished_prompts": counts.unfinished_prompts,
        "rollout/resumed_prompts": counts.resumed_prompts,
        "rollout/resumed_tokens": counts.resumed_tokens,
        "data/resting_prompts": counts.resting_prompts,
        "rollout/stopped_prompts": counts.stopped_prompts,
        "rollout/restarted_prompts": counts.restarted_prompts,
        "rollout/discarded_tokens": counts.discarded_tokens,
        "rollout/tail_steps": counts.tail_steps,
        "rollout/idle_seconds": counts.idle_seconds,
    }
