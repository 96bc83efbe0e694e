"""The observers that every run has."""

from __future__ import annotations

from treepo_mcore.config import Config
from treepo_mcore.observe.guard import EntropyGuard, MismatchGuard, PatienceGuard, RewardGuard, SkippedGuard
from treepo_mcore.observe.health import Health
from treepo_mcore.observe.metrics import Metrics
from treepo_mcore.observe.observer import Observer
from treepo_mcore.observe.profiler import Profiler
from treepo_mcore.observe.progress import Progress
from treepo_mcore.observe.stuck import StuckWatch
from treepo_mcore.observe.trees import TreeWriter
from treepo_mcore.system.placement import Placement


def usual_observers(config: Config, placement: Placement, supervised: bool) -> list[Observer]:
    """Of this rank: the one that reports speaks and writes for the job, the first one of each engine writes its trees.

    The guards are on every rank, and come last: by then the values that one ends a run for are written.
    supervised: nothing is sampled, so there are no trees, rewards or engines to look at.
    """
    guards: list[Observer] = [SkippedGuard(config.actor.max_skipped)]
    if not supervised:
        guards += [RewardGuard(config.reward), MismatchGuard(config), PatienceGuard(config.filter)]
    if config.actor.min_entropy is not None:
        guards.append(EntropyGuard(config.actor.min_entropy))
    trainer, folder = config.trainer, config.run.dir
    watchers: list[Observer] = [StuckWatch(config.comm.stuck_seconds)]
    if trainer.save_trees_every and placement.leads_engine and not supervised:
        watchers.append(TreeWriter(folder, trainer.save_trees_every, placement))
    if trainer.profile_steps and placement.rank in trainer.profile_ranks:
        watchers.append(Profiler(folder / "profile", trainer.profile_steps, placement.rank))
    if not placement.reports:
        return [*watchers, *guards]
    health = [] if supervised else [Health()]
    return [Metrics(config), *watchers, Progress(trainer.steps), *health, *guards]
