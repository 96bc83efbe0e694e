"""Where answers have their tokens, and where the policy is undecided in them (docs/algorithm.md 1.9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from treepo_mcore.tree.tree import PROMPT, Tree

STEPS = 16  # stretches of one mean response length
LENGTHS = 4  # mean lengths that are told apart; the last stretch takes everything deeper


class Profile(NamedTuple):
    """Of an independent answer, by sixteenths of the mean length."""

    alive: tuple[float, ...]  # the probability that it goes on behind the stretch's beginning
    tokens: tuple[float, ...]  # that lie in the stretch
    noise: tuple[float, ...]  # 1 - p summed over these tokens, p the probability that each was sampled with


# As long as each other, and everywhere as undecided.
EVEN = Profile((1.0,) * STEPS, (1.0,) * STEPS, (1.0,) * STEPS)


class ProfileSums:
    """Sums over trees; those of several batches add up."""

    def __init__(self) -> None:
        self._sums = np.zeros((3, LENGTHS * STEPS))
        self._mass = 0.0

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> ProfileSums:
        """Of one batch, whose mean response length is the unit of depth. By mass without fallback (1.4)."""
        sums = cls()
        masses = [tree.masses(fallback=False) for tree in trees]
        lengths = [np.array([tree.leaf_tokens(leaf) for leaf in range(len(tree.leaves))], float) for tree in trees]
        sums._mass = float(sum(mass.sum() for mass in masses))
        if not sums._mass:
            return sums
        mean = sum(float(mass @ length) for mass, length in zip(masses, lengths, strict=True)) / sums._mass
        begins = np.arange(LENGTHS * STEPS) * mean / STEPS
        for tree, mass, length in zip(trees, masses, lengths, strict=True):
            sums._sums[0] += mass @ (length[:, None] > begins[None])
            below = tree.sums_below(mass)
            for number, node in enumerate(tree.nodes):
                if number == PROMPT or not below[number] or not len(node.logprobs):
                    continue
                depths = node.start - tree.nodes[PROMPT].end + np.arange(len(node.tokens)) + 0.5
                stretch = np.minimum((depths * STEPS / mean).astype(int), LENGTHS * STEPS - 1)
                np.add.at(sums._sums[1], stretch, below[number])
                np.add.at(sums._sums[2], stretch, below[number] * -np.expm1(np.asarray(node.logprobs, float)))
        return sums

    def __add__(self, other: ProfileSums) -> ProfileSums:
        both = ProfileSums()
        both._sums, both._mass = self._sums + other._sums, self._mass + other._mass
        return both

    def faded(self, share: float) -> ProfileSums:
        """The same, counting less."""
        less = ProfileSums()
        less._sums, less._mass = self._sums * share, self._mass * share
        return less

    def profile(self) -> Profile:
        """Of an answer; `EVEN` where there was none, or no token that could have been another."""
        if not self._mass or not self._sums[2].sum():
            return EVEN
        alive, tokens, noise = (tuple(map(float, row / self._mass)) for row in self._sums)
        return Profile(alive, tokens, noise)

    def state_dict(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {"sums": self._sums.tolist(), "mass": self._mass}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ProfileSums:
        """Go on from `state_dict`."""
        sums = cls()
        sums._sums, sums._mass = np.array(state["sums"]), state["mass"]
        return sums
