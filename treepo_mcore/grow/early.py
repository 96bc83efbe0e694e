"""When first answers agree: how probable it is that more of them would differ (docs/algorithm.md 2.11)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treepo_mcore.tree.stats import informative
from treepo_mcore.tree.tree import Tree

MEMORY = 10  # steps that the running moments look back
FIRST = "first_answers"  # in a tree's meta: [right ones, all] of the first answers whose reward call did not fail
LEAST, MOST = 0.1, 1000.0  # bounds of a + b, which no two moments of few prompts may leave


class Prior:
    """How the shares of right answers are spread over prompts: Beta(a, b), from the first answers of the last steps.

    Before the first step it is uniform, a = b = 1.
    """

    def __init__(self) -> None:
        self._sums = [0.0, 0.0, 0.0]  # prompts; right answers of one; pairs of answers that are both right

    def look(self, trees: Sequence[Tree]) -> None:
        """Take a step's trees in: those whose first answers were looked at."""
        self._sums = [(1 - 1 / MEMORY) * value for value in self._sums]
        for tree in trees:
            right, all_ = tree.meta.get(FIRST, (0, 0))
            if all_ > 1:
                pairs = right * (right - 1) / (all_ * (all_ - 1))
                for index, value in enumerate((1.0, right / all_, pairs)):
                    self._sums[index] += value

    def beta(self) -> tuple[float, float]:
        """(a, b) whose first two moments are those that were seen."""
        prompts, right, pairs = self._sums
        if not prompts:
            return 1.0, 1.0
        mean = min(max(right / prompts, 1e-3), 1 - 1e-3)
        second = pairs / prompts
        spread = second - mean * mean
        size = MOST if spread <= 0 else (mean - second) / spread
        size = min(max(size, LEAST), MOST)
        return mean * size, (1 - mean) * size

    def chance(self, right: int, first: int, more: int) -> float:
        """The probability that of `more` further answers one differs, when `first` agree: `right` is 0 or `first`."""
        a, b = self.beta()
        if not right:
            a, b = b, a
        same = 1.0
        for index in range(first, first + more):
            same *= (a + index) / (a + b + index)
        return 1 - same

    def state_dict(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {"sums": list(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._sums = list(state["sums"])


def looked_at(tree: Tree) -> tuple[int, int]:
    """(right ones, all) of the answers so far whose reward call did not fail."""
    known = [leaf for leaf in tree.leaves if not leaf.failed]
    return sum(bool(leaf.correct) for leaf in known), len(known)


def agrees(tree: Tree) -> bool | None:
    """Whether all answers so far are right, or none is; None where their scores differ, or nothing is known of them."""
    right, known = looked_at(tree)
    if informative(tree) or 0 < right < known or not known:
        return None
    return right > 0


def goes_on(tree: Tree, width: int, min_chance: float, prior: Prior) -> bool:
    """Whether a tree with nothing but its first answers, all scored, gets its other ones."""
    if agrees(tree) is None:
        return True
    return prior.chance(*looked_at(tree), width - len(tree.leaves)) >= min_chance
