"""The observers that every run has."""

from __future__ import annotations

from treepo_mcore.config import Config
from treepo_mcore.observe.guard import MismatchGuard, PatienceGuard, RewardGuard
from treepo_mcore.observe.metrics import Metrics
from treepo_mcore.observe.observer import Observer
from treepo_mcore.observe.progress import Progress
from treepo_mcore.observe.trees import TreeWriter


def usual_observers(config: Config, reports: bool) -> list[Observer]:
    """Of this rank. reports: whether it speaks and writes for the job.

    The guards are on every rank, and come last: by then the values that one ends a run for are written.
    """
    guards: list[Observer] = [
        RewardGuard(config.reward),
        MismatchGuard(config),
        PatienceGuard(config.filter),
    ]
    if not reports:
        return guards
    every = config.trainer.save_trees_every
    trees: list[Observer] = [TreeWriter(config.run.dir, every)] if every else []
    return [Metrics(config), *trees, Progress(config.trainer.steps), *guards]
