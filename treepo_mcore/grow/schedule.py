"""Where paths fork when forks are planned: depths with widths instead of a factor at every boundary (docs/algorithm.md
2.8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from treepo_mcore.config import TreeConfig
from treepo_mcore.tree.tree import Tree

MEMORY = 10  # steps that the running mean of the response length looks back
FIRST_SHARE = 0.5  # of the longest response: the mean length before anything was sampled


class Fork(NamedTuple):
    """Paths that live at `tokens` response tokens fork until, with those that ended before, there are `width`."""

    tokens: int
    width: int


Forks = tuple[Fork, ...]  # ascending; the first is the prompt's, at 0 tokens


class Schedule:
    """The planned forks of each step. Depths given as shares follow the mean response length of the last steps."""

    def __init__(self, config: TreeConfig) -> None:
        self._config = config
        self._mean = FIRST_SHARE * config.response_tokens
        self._steps = 0

    def forks(self) -> Forks | None:
        """For the next step; None where paths fork at every boundary."""
        planned = self._config.branching.schedule
        return None if planned is None else resolve_forks(planned, self._config, self._mean)

    def look(self, trees: Sequence[Tree]) -> None:
        """Take a step's trees in."""
        lengths = [mean_length(tree) for tree in trees]
        weight = max(1 / (self._steps + 1), 1 / MEMORY)  # a plain mean at first
        self._mean += weight * (sum(lengths) / len(lengths) - self._mean)
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {"mean_length": self._mean, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._mean, self._steps = state["mean_length"], state["steps"]


def resolve_forks(planned: Sequence[tuple[float, int]], config: TreeConfig, mean: float) -> Forks:
    """Depths in tokens. A share that falls on another depth, or behind the longest response, leaves its width to it."""
    last = config.response_tokens - 1
    widths: dict[int, int] = {}
    for depth, width in planned:
        tokens = depth * (config.segment_tokens if depth >= 1 else mean)
        widths[min(max(round(tokens), depth > 0), last)] = width
    return tuple(Fork(*fork) for fork in sorted(widths.items()))


def mean_length(tree: Tree) -> float:
    """Response tokens of an independent answer to the prompt, as the tree's masses have it."""
    lengths = [tree.leaf_tokens(leaf) for leaf in range(len(tree.leaves))]
    return float(tree.masses(fallback=False) @ lengths)
