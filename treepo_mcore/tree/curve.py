"""Where in an answer its outcome is decided: the curve C(d), from the trees themselves (docs/algorithm.md 1.8).

Two leaves that part at depth d share everything up to there, so the mean product of their rewards is the mean square of
the value that a path has at d. Leaves that part at the prompt give the square of the prompt's own value. The difference
is the variance of the reward that is settled by depth d; C(d) is its share of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treepo_mcore.tree.tree import PROMPT, Tree

BINS = 16  # of the mean response length; the last one holds all that lies behind
RESAMPLES = 400


@dataclass(frozen=True)
class Point:
    """Of a bin with pairs in it."""

    share: float  # mean depth at which its pairs part, of the mean response length
    decided: float  # C
    low: float  # 90 % interval, by resampling prompts
    high: float
    pairs: int


@dataclass
class CurveSums:
    """Sums over trees, by bin; they may be added up over steps, older steps counting less."""

    settled: np.ndarray = field(default_factory=lambda: np.zeros(BINS))  # variance that is settled, times the weight
    whole: np.ndarray = field(default_factory=lambda: np.zeros(BINS))  # all of it, in the same trees
    weight: np.ndarray = field(default_factory=lambda: np.zeros(BINS))  # mass of the pairs
    share: np.ndarray = field(default_factory=lambda: np.zeros(BINS))  # of the mean length, times the weight

    def add(self, trees: Sequence[Tree], keep: float = 1.0) -> None:
        """Take trees in. keep: what earlier sums are multiplied by."""
        for name, rows in vars(_rows(trees)).items():
            if name != "pairs":
                setattr(self, name, getattr(self, name) * keep + rows.sum(0))

    def at(self, share: float) -> float | None:
        """C at a share of the mean length, between the depths that were seen; None where nothing was."""
        seen = (self.weight > 0) & (self.whole > 0)
        if not seen.any():
            return None
        shares = [
            0.0,
            *(self.share[seen] / self.weight[seen]),
            max(1.0, (self.share[seen] / self.weight[seen])[-1] + 0.1),
        ]
        decided = np.clip([0.0, *(self.settled[seen] / self.whole[seen]), 1.0], 0.0, 1.0)
        return float(np.interp(share, shares, np.maximum.accumulate(decided)))

    def state_dict(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> CurveSums:
        """The inverse of `state_dict`."""
        return cls(**{name: np.array(values, dtype=np.float64) for name, values in state.items()})


@dataclass(frozen=True)
class _Rows:
    """As `CurveSums`, one row a tree: float64[trees, bins]."""

    settled: np.ndarray
    whole: np.ndarray
    weight: np.ndarray
    share: np.ndarray
    pairs: np.ndarray


def curve(trees: Sequence[Tree], seed: int = 0) -> list[Point]:
    """C at every depth where leaves of these trees part, the prompt left out. Needs a reward on every leaf.

    Only differences between leaves of one tree count. Leaves behind a fallback and those whose reward call failed are
    left out, trees with one first path say nothing.
    """
    rows = _rows(trees)
    draws = np.random.default_rng(seed).integers(0, len(trees), (RESAMPLES, len(trees)))
    points = []
    for index in np.flatnonzero((rows.weight.sum(0) > 0) & (rows.whole.sum(0) > 0)):
        settled, whole = rows.settled[:, index], rows.whole[:, index]
        again = settled[draws].sum(1), whole[draws].sum(1)
        known = again[1] > 0
        low, high = np.quantile(again[0][known] / again[1][known], [0.05, 0.95])
        weight = rows.weight[:, index].sum()
        share = rows.share[:, index].sum() / weight
        decided = settled.sum() / whole.sum()
        points.append(Point(float(share), float(decided), float(low), float(high), int(rows.pairs[:, index].sum())))
    return points


def mean_length(tree: Tree) -> float:
    """Response tokens of an independent answer to the prompt, as the tree's masses have it."""
    lengths = [tree.leaf_tokens(leaf) for leaf in range(len(tree.leaves))]
    return float(tree.masses(fallback=False) @ lengths)


def _rows(trees: Sequence[Tree]) -> _Rows:
    found = _Rows(*(np.zeros((len(trees), BINS)) for _ in range(5)))
    mean = float(np.mean([mean_length(tree) for tree in trees])) if trees else 1.0
    for index, tree in enumerate(trees):
        _add_tree(found, index, tree, mean)
    return found


def _add_tree(found: _Rows, index: int, tree: Tree, mean: float) -> None:
    """A node's pairs are those of leaves below two of its children: (sum of all)^2 - sum of squares, by child."""
    counted = np.array([not leaf.failed for leaf in tree.leaves])
    masses = tree.masses(fallback=False) * counted
    rewards = np.array([0.0 if leaf.reward is None else leaf.reward for leaf in tree.leaves])
    below = [tree.sums_below(values) for values in (masses, masses * rewards, (masses > 0).astype(float))]
    products, pair_mass = _pairs(tree, PROMPT, below[1]), _pairs(tree, PROMPT, below[0])
    if pair_mass <= 0:
        return
    apart = products / pair_mass
    variance = float(masses @ rewards**2) / float(masses.sum()) - apart
    for node in range(1, len(tree.nodes)):
        mass = _pairs(tree, node, below[0])
        if mass <= 1e-12:
            continue
        share = (tree.nodes[node].end - tree.nodes[PROMPT].end) / mean
        place = min(int(share * BINS), BINS - 1)
        found.settled[index, place] += _pairs(tree, node, below[1]) - mass * apart
        found.whole[index, place] += mass * variance
        found.weight[index, place] += mass
        found.share[index, place] += mass * share
        found.pairs[index, place] += _pairs(tree, node, below[2]) / 2


def _pairs(tree: Tree, node: int, below: np.ndarray) -> float:
    parts = below[tree.children(node)]
    return float(parts.sum() ** 2 - (parts**2).sum())
