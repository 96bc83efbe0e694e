"""How many children, for whom (docs/algorithm.md 2.3 to 2.5; paper section 2.2).

The budget transfers what early leaves leave over to the survivors (`by_response_traj`). Which survivor gets more
hardly matters: the paper found even allocation best. Favouring low log-probs was worst (highest entropy, longest
answers), favouring high ones gave lower entropy and shorter answers, and a schedule from one to the other brought
nothing (paper section 4.4). A larger first divergence raised the ceiling (+1.3 over all benchmarks).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial

from treepo_mcore.config import BranchingConfig, TreeConfig
from treepo_mcore.registry import resolve
from treepo_mcore.tree.tree import Tree

# The slot for a policy: (tree, survivors, children in all, rng) -> children of each survivor, each at least 1.
# Paths may have run ahead of the wave: a policy reads the survivors and their ancestors only, or the tree would
# depend on timing.
Allocation = Callable[[Tree, Sequence[int], int, random.Random], list[int]]


def first_children(config: TreeConfig, rng: random.Random) -> int:
    """Paths that start from the prompt, `k0`."""
    low, high = config.branching.first or config.branching.factor
    return rng.randint(min(low, config.width), min(high, config.width))


def total_children(width: int, leaves: int, new_leaves: int, survivors: int, factor: int) -> int:
    """`B = max(n, min(W - F, b (f + n)))` for one prompt and one wave."""
    return max(survivors, min(width - leaves, factor * (new_leaves + survivors)))


def make_allocation(config: BranchingConfig, progress: float) -> Allocation:
    """The configured policy; `progress` in [0, 1] is how much of the run has passed.

    Raises `ConfigError` where there is no such policy.
    """
    key, parameters = "rollout.tree.branching.allocation", ("tree", "survivors", "children", "rng")
    make = resolve(key, config.allocation, ALLOCATIONS, lambda function: lambda *_: function, parameters)
    return make(config, progress)


def allocate_evenly(tree: Tree, survivors: Sequence[int], children: int, rng: random.Random) -> list[int]:
    """Everyone gets the same; the remainder goes to random survivors, one each."""
    share, rest = divmod(children, len(survivors))
    counts = [share] * len(survivors)
    for index in rng.sample(range(len(survivors)), rest):
        counts[index] += 1
    return counts


def allocate_to_heaviest(tree: Tree, survivors: Sequence[int], children: int, rng: random.Random) -> list[int]:
    """Each to the path with the largest mass a child, a random one of several: masses stay as equal as can be."""
    masses = [tree.mass_of(node) for node in survivors]
    counts = [1] * len(survivors)
    ties = [rng.random() for _ in survivors]
    for _ in range(children - len(survivors)):
        heaviest = max(range(len(survivors)), key=lambda i: (masses[i] / counts[i], ties[i]))
        counts[heaviest] += 1
    return counts


def allocate_by_logprob(
    tree: Tree, survivors: Sequence[int], children: int, rng: random.Random, scale: float
) -> list[int]:
    """One each; the others by largest remainder of softmax(scale x mean log-prob of the last segment)."""
    scores = [scale * _mean(tree.nodes[node].logprobs) for node in survivors]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    extra = children - len(survivors)
    quotas = [extra * weight / sum(weights) for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    order = sorted(range(len(survivors)), key=lambda i: (counts[i] - quotas[i], rng.random()))
    for index in order[: extra - sum(counts)]:
        counts[index] += 1
    return [1 + count for count in counts]


def _by_logprob(sign: float) -> Callable[[BranchingConfig, float], Allocation]:
    """Favours high log-probs for a sign of 1, low ones for -1."""

    def make(config: BranchingConfig, progress: float) -> Allocation:
        return partial(allocate_by_logprob, scale=sign / temperature_at(config, progress))

    return make


def temperature_at(config: BranchingConfig, progress: float) -> float:
    """Half a cosine from `temperature` to `temperature_end` over the run."""
    start = config.temperature
    end = start if config.temperature_end is None else config.temperature_end
    return (start + end) / 2 + (start - end) / 2 * math.cos(math.pi * progress)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# (configuration, progress) -> the policy
ALLOCATIONS: dict[str, Callable[[BranchingConfig, float], Allocation]] = {
    "even": lambda config, progress: allocate_evenly,
    "heaviest": lambda config, progress: allocate_to_heaviest,
    "low_logprob": _by_logprob(-1.0),
    "high_logprob": _by_logprob(1.0),
}
