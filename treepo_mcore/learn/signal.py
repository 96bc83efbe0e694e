"""Settings under which no step could ever teach anything, whatever the model answers."""

from __future__ import annotations

import numpy as np

from treepo_mcore.config import Config, ConfigError, TreeConfig
from treepo_mcore.learn.advantage import ESTIMATORS, advantages, tree_from_plain
from treepo_mcore.tree.tree import Tree


def check_signal(config: Config, shape: TreeConfig) -> None:
    """Raise `ConfigError` where nothing could be learned. shape: what the sampler makes of `rollout.tree`."""
    reward, filtering, name = config.reward, config.filter.enabled, config.advantage.estimator
    if reward.verdict and reward.correct <= reward.wrong:
        raise ConfigError(
            f"reward.correct: {reward.correct:g} is not more than reward.wrong = {reward.wrong:g}: a right answer "
            "would earn nothing"
        )
    if most_leaves(shape) > 1:
        return
    one = "a prompt gets one answer" if shape.width == 1 else "a path never forks and none restarts"
    key = "rollout.tree.width" if shape.width == 1 else "rollout.tree.branching"
    if filtering:
        raise ConfigError(
            f"{key}: {one}, and filter.enabled keeps prompts whose answers differ: nothing would ever be trained on; "
            "expected two answers or more, or filter.enabled: false"
        )
    if name in ESTIMATORS and _all_zero(config):
        raise ConfigError(
            f"{key}: {one}, for which advantage.estimator: {name} is always 0 with trainer.prompts_per_step: "
            f"{config.trainer.prompts_per_step} and advantage.whiten: {config.advantage.whiten}"
        )


def most_leaves(shape: TreeConfig) -> int:
    """That a tree of this shape can have."""
    branching = shape.branching
    if branching.schedule or shape.fallback.candidates != "none":
        return shape.width
    first, later = (branching.first or branching.factor)[1], branching.factor[1]
    return 1 if first == 1 and (later == 1 or shape.max_depth == 1) else shape.width


def _all_zero(config: Config) -> bool:
    """Of one right and one wrong answer, each to a prompt of its own; of one alone where a step has no more."""
    trees = [_single(reward) for reward in (1.0, -1.0)[: config.trainer.prompts_per_step]]
    worth = advantages(trees, config.advantage)
    return not any(np.any(value.along(tree, 0)) for tree, value in zip(trees, worth, strict=True))


def _single(reward: float) -> Tree:
    return tree_from_plain({"leaves": [{"path": ["answer"], "reward": reward, "n_tokens": 1}]})
