"""Ending low-value paths early. The paper does not prune; pruned leaves count towards W and are trained as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from treepo_mcore.config import PruningConfig
from treepo_mcore.registry import import_function
from treepo_mcore.tree.tree import PROMPT, Tree


@dataclass(frozen=True)
class PathView:
    """A live path on a boundary. Read its own tokens only: other paths may have run ahead by chance."""

    tree: Tree
    node: int  # the segment that just filled up

    def response(self) -> list[int]:
        """Token ids without the prompt."""
        return self.tree.context(self.node)[self.tree.nodes[PROMPT].end :]

    def mean_logprob(self) -> float:
        """Mean log-prob of the response so far."""
        spans = [self.tree.nodes[node].logprobs for node in self.tree.path(self.node)[1:]]
        return math.fsum(value for span in spans for value in span) / sum(map(len, spans))


# The slot for a policy: True ends the path.
Prune = Callable[[PathView], bool]


def make_pruner(config: PruningConfig) -> Prune | None:
    """The configured rules as one function, or None. Raises `ConfigError` when `function` cannot be imported."""
    rules: list[Prune] = []
    minimum = config.min_mean_logprob
    if minimum is not None:
        rules.append(lambda view: view.mean_logprob() < minimum)
    if config.function is not None:
        rules.append(import_function("rollout.tree.pruning.function", config.function, ("view",)))
    if not rules:
        return None
    return lambda view: any(rule(view) for rule in rules)
