"""Which trees of a rollout a step trains on."""

from __future__ import annotations

import random
from collections.abc import Sequence

from treepo_mcore.config import Config
from treepo_mcore.tree.stats import informative
from treepo_mcore.tree.tree import Tree


def choose(trees: Sequence[Tree], config: Config, step: int) -> list[Tree]:
    """What a step trains on: under the filter, trees whose leaves differ.

    The control experiment permutes rewards only among these: it trains on what the experiment trains on.
    """
    kept = [tree for tree in trees if informative(tree)] if config.filter.enabled else list(trees)
    if config.reward.shuffle:
        _shuffle_rewards(kept, random.Random(f"{config.run.seed}/{step}"))
    return kept


def _shuffle_rewards(trees: Sequence[Tree], rng: random.Random) -> None:
    leaves = [leaf for tree in trees for leaf in tree.leaves]
    verdicts = [(leaf.reward, leaf.score, leaf.correct) for leaf in leaves]
    rng.shuffle(verdicts)
    for leaf, verdict in zip(leaves, verdicts, strict=True):
        leaf.reward, leaf.score, leaf.correct = verdict
