"""Estimators that are policy gradients on trees: a node's value minus what its relatives make of it (docs/algorithm.md
4.10 to 4.13).

All count leaves by their path mass without fallback (1.4), the only weights under which a tree's mean stays that of
independent answers whatever leaves others their budget. Leaves behind a fallback have no mass: they carry no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from treepo_mcore.config import AdvantageConfig
from treepo_mcore.tree.tree import PROMPT, Tree

KAPPA_NARROW, KAPPA_WIDE = 2.0, 4.0  # leaves that the outer mean counts as, up to W = 16 and beyond
RIDGE = 1e-9  # on the diagonal, where two leaves part behind their last token


@dataclass(frozen=True)
class Outside:
    """The leaves below one forked ancestor of a node that are not below the node."""

    value: float  # mean reward, weighted by mass
    leaves: int


class _Sums(NamedTuple):
    """Over the leaves below each node that have a mass."""

    mass: np.ndarray  # float64[nodes]
    reward: np.ndarray  # float64[nodes], weighted by mass
    leaves: np.ndarray  # float64[nodes]


def subtree(tree: Tree, rewards: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """Value of each node minus its baseline, which no leaf below the node takes part in: float64[nodes].

    0 where no leaf is outside, such as on a trunk before the first fork, and where only fallback leads.
    """
    masses = tree.masses(fallback=False)
    sums = _Sums(*(tree.sums_below(values) for values in (masses, masses * rewards, masses > 0)))
    blup = _Blup(tree, rewards, masses) if config.baseline == "blup" else None
    values = np.zeros(len(tree.nodes))
    for node in range(1, len(tree.nodes)):
        groups = _outside(tree, node, sums) if sums.mass[node] > 0 else []
        if groups:
            baseline = blup.baseline(node) if blup else BASELINES[config.baseline](groups, len(rewards))
            values[node] = sums.reward[node] / sums.mass[node] - baseline
    return values


def _outside(tree: Tree, node: int, sums: _Sums) -> list[Outside]:
    """One for each distinct set of leaves above, the nearest first."""
    groups = []
    inside = sums.leaves[node]
    above = tree.nodes[node].parent
    while above >= PROMPT:
        if sums.leaves[above] > inside:
            inside = sums.leaves[above]
            value = (sums.reward[above] - sums.reward[node]) / (sums.mass[above] - sums.mass[node])
            groups.append(Outside(value, round(inside - sums.leaves[node])))
        above = tree.nodes[above].parent
    return groups


def _mean(groups: Sequence[Outside], width: int) -> float:
    return sum(group.value for group in groups) / len(groups)


def _kin(groups: Sequence[Outside], width: int) -> float:
    """From the prompt inwards, each closer group in proportion to its leaves."""
    kappa = KAPPA_NARROW if width <= 16 else KAPPA_WIDE
    baseline = groups[-1].value
    for group in groups[-2::-1]:
        baseline = (group.leaves * group.value + kappa * baseline) / (group.leaves + kappa)
    return baseline


# (ancestors' groups without the node's own leaves, the nearest first; W) -> a combination whose weights sum to 1
BASELINES: dict[str, Callable[[Sequence[Outside], int], float]] = {
    "mean": _mean,
    "kin": _kin,
    "sibling": lambda groups, width: groups[0].value,
}


class _Blup:
    """The best linear prediction of a node's value at its first token, from leaves outside of it, when a reward is a
    sum of independent increments, as many as there are tokens."""

    def __init__(self, tree: Tree, rewards: np.ndarray, masses: np.ndarray) -> None:
        self._tree, self._rewards, self._grown = tree, rewards, masses > 0
        self._shared = shared_tokens(tree)
        self._below = [set() for _ in tree.nodes]  # type: list[set[int]]
        for index, leaf in enumerate(tree.leaves):
            for node in tree.path(leaf.node):
                self._below[node].add(index)

    def baseline(self, node: int) -> float:
        """Needs a leaf outside."""
        below = self._below[node]
        outside = [leaf for leaf in range(len(self._rewards)) if leaf not in below and self._grown[leaf]]
        start = self._tree.nodes[node].start - self._tree.nodes[PROMPT].end
        one = next(leaf for leaf in below if self._grown[leaf])
        covariance = self._shared[np.ix_(outside, outside)] + RIDGE * np.eye(len(outside))
        towards = np.minimum(self._shared[one, outside], start)
        ones, weights = np.linalg.solve(covariance, np.stack([np.ones(len(outside)), towards], axis=1)).T
        weights = weights + ones * (1 - weights.sum()) / ones.sum()  # an unknown mean costs the weights their freedom
        return float(weights @ self._rewards[outside])


def brownian(tree: Tree, rewards: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    """What the leaves below each node say about its own increments, float64[nodes]; not exactly unbiased.

    Rewards are taken for a mean and independent increments, as many as there are tokens. With leaves that share nothing
    and are equally long, a leaf's value is its reward minus the mean; with others it is divided by the length.
    """
    grown = np.flatnonzero(tree.masses(fallback=False) > 0)
    shared = shared_tokens(tree)[np.ix_(grown, grown)]
    covariance = shared / np.diag(shared).mean() + RIDGE * np.eye(len(grown))
    by_ones, by_rewards = np.linalg.solve(covariance, np.stack([np.ones(len(grown)), rewards[grown]], axis=1)).T
    alpha = np.zeros(len(rewards))
    alpha[grown] = by_rewards - by_ones * by_rewards.sum() / by_ones.sum()  # minus the mean, by least squares
    return tree.sums_below(alpha)


def shared_tokens(tree: Tree) -> np.ndarray:
    """Response tokens that every two leaves share, and of a leaf with itself its length: float64[leaves, leaves]."""
    begin = tree.nodes[PROMPT].end
    paths = [tree.path(leaf.node) for leaf in tree.leaves]
    shared = np.zeros((len(paths), len(paths)))
    for one, path in enumerate(paths):
        on_path = set(path)
        for other in range(one + 1):
            meet = next(node for node in reversed(paths[other]) if node in on_path)
            shared[one, other] = shared[other, one] = tree.nodes[meet].end - begin
    return shared
