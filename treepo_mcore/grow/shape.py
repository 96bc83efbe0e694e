"""Samplers: what is sampled for a prompt, as the shape of its tree."""

from __future__ import annotations

from collections.abc import Callable

from treepo_mcore.config import BranchingConfig, RolloutConfig, TreeConfig
from treepo_mcore.registry import resolve

Shape = Callable[[TreeConfig], TreeConfig]


def tree(config: TreeConfig) -> TreeConfig:
    """As it is configured."""
    return config


def flat(config: TreeConfig) -> TreeConfig:
    """W independent answers: a tree that forks at the prompt only."""
    branching = BranchingConfig(factor=(1, 1), first=(config.width, config.width))
    return config.model_copy(update={"branching": branching})


SAMPLERS: dict[str, Shape] = {"tree": tree, "flat": flat}


def sampled_shape(config: RolloutConfig) -> TreeConfig:
    """Of what `rollout.sampler` samples. Raises `ConfigError` where there is no such sampler."""
    return resolve("rollout.sampler", config.sampler, SAMPLERS, lambda function: function, ("config",))(config.tree)
