"""When outcomes are decided: C, the share of a prompt's reward variance that is settled by a depth (docs/algorithm.md
1.8).

Two leaves that part at a depth are two draws behind the same prefix, so the mean product of their rewards estimates the
mean square of that prefix's value. Forks tell C for free; flat sampling tells nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from treepo_mcore.tree.tree import PROMPT, Tree

BINS_A_LENGTH = 8  # bins of depth in one mean response length, around its eighths
BINS = 2 * BINS_A_LENGTH + 1  # the last takes everything deeper
REPLICATES = 400  # of the bootstrap
TAILS = 5, 95  # per cent: a 90 % interval
ROUNDING = 1e-9  # relative: smaller differences are none
NEAR = 0.25  # of the mean length: how far from a share the next fork may be for C to be known there


@dataclass(frozen=True)
class Point:
    """C where paths forked: all forks of one bin of depth."""

    share: float  # depth over the mean response length, mean over the bin's forks
    decided: float  # C: 0 at the prompt, 1 at the end; an estimate may lie outside
    low: float | None  # of the 90 % interval; None where it comes from one prompt, or from prompts that do not differ
    high: float | None
    trees: int  # that say something about this depth
    pairs: int  # of leaves that part here


class CurveSums:
    """Sums over trees, of which the curve is the quotient. Those of several batches add up in the same memory (110 kB):
    a mean over ten steps is the sum of the last ten.

    The bootstrap is over prompts: a replicate gives each an exponential weight, the same wherever the prompt comes
    again. So nothing depends on the order of leaves, trees or batches.
    """

    def __init__(self) -> None:
        self.trees = 0
        self._tokens = np.zeros(2)  # response tokens of leaves times their mass, this mass
        # Variance settled by a bin's depth, and all of it; the first row is unweighted.
        self._variances = np.zeros((1 + REPLICATES, BINS, 2))
        self._counts = np.zeros((BINS, 4))  # share times mass of the forks, this mass, trees, pairs

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> CurveSums:
        """Of one batch, whose mean response length is the unit of depth.

        Raises ValueError on a leaf without a reward.
        """
        sums = cls()
        for tree in trees:
            sums.trees += 1
            sums._tokens += _tokens(tree)
        told = [found for tree in trees if (found := _Told.by(tree, sums.mean_length))]
        for found in told:
            for fork in found.forks:
                sums._counts[fork.bin] += fork.mass * fork.share, fork.mass, 0, fork.pairs
        for bin_ in np.flatnonzero(sums._counts[:, 1]):
            sums._add(int(bin_), told)
        return sums

    def __add__(self, other: CurveSums) -> CurveSums:
        both = CurveSums()
        both.trees, both._tokens = self.trees + other.trees, self._tokens + other._tokens
        both._variances, both._counts = self._variances + other._variances, self._counts + other._counts
        return both

    def faded(self, share: float) -> CurveSums:
        """The same, counting less."""
        less = CurveSums()
        less.trees, less._tokens = self.trees, self._tokens * share
        less._variances, less._counts = self._variances * share, self._counts * share
        return less

    def state_dict(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint; the bootstrap is not kept."""
        return {
            "trees": self.trees,
            "tokens": self._tokens.tolist(),
            "variances": self._variances[0].tolist(),
            "counts": self._counts.tolist(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> CurveSums:
        """The estimates of `state_dict`, without their intervals."""
        sums = cls()
        sums.trees, sums._tokens = state["trees"], np.array(state["tokens"])
        sums._variances[:] = np.array(state["variances"])
        sums._counts = np.array(state["counts"])
        return sums

    @property
    def mean_length(self) -> float:
        """Response tokens of an independent answer; 0 where there was none."""
        tokens, mass = self._tokens.tolist()
        return tokens / mass if mass else 0.0

    def points(self) -> list[Point]:
        """The curve where it was measured, the shallowest depth first; empty where nothing was."""
        found = []
        for bin_ in range(BINS):
            settled, whole = self._variances[:, bin_].T
            if whole[0] > 0:
                share_sum, mass, trees, pairs = self._counts[bin_]
                low, high = _interval(settled[whole > 0] / whole[whole > 0])
                decided = float(settled[0] / whole[0])
                found.append(Point(float(share_sum / mass), decided, low, high, int(trees), int(pairs)))
        return found

    def _add(self, bin_: int, told: Sequence[_Told]) -> None:
        """One bin of a batch."""
        depth = self._counts[bin_, 0] / self._counts[bin_, 1]
        forked = [tree for tree in told if any(fork.bin == bin_ for fork in tree.forks)]
        ended = [tree for tree in told if tree.ended_by(depth) and tree not in forked]
        # A tree that is full lives here and does not fork: it is missing. As large a share of those that ended is left
        # out, or there would be too many settled ones.
        present = len(forked) / (len(told) - len(ended))
        for tree in forked:
            self._variances[:, bin_] += np.outer(_weights(tree), (tree.settled(bin_), tree.variance))
        for tree in ended:
            self._variances[:, bin_] += np.outer(_weights(tree), 2 * [tree.variance * present])
        self._counts[bin_, 2] += len(forked) + len(ended)


class _Fork(NamedTuple):
    """A node below the prompt whose children lead to different leaves."""

    share: float  # depth over the mean response length
    mass: float  # of the leaves below
    product: (
        float  # of the rewards of two leaves that part here: mean by mass, estimates the square of the node's value
    )
    pairs: int

    @property
    def bin(self) -> int:
        return min(int(self.share * BINS_A_LENGTH + 0.5), BINS - 1)


@dataclass(frozen=True, eq=False)
class _Told:
    """What one tree tells."""

    prompt_id: str
    forks: list[_Fork]
    apart: float  # as a fork's product, of leaves that part at the prompt: the square of the prompt's value
    variance: float  # of the reward
    ends: np.ndarray  # shares at which the leaves end, float64[leaves]
    masses: np.ndarray  # of the leaves, adding up to 1
    squares: np.ndarray  # of their rewards

    @classmethod
    def by(cls, tree: Tree, length: float) -> _Told | None:
        """None where no two leaves part at the prompt: their variance is not known then.

        Leaves behind a fallback have no mass (docs/algorithm.md 1.4), those whose reward call failed say nothing.
        """
        masses, rewards = tree.masses(fallback=False), _rewards(tree)
        masses[[leaf.failed for leaf in tree.leaves]] = 0
        masses /= max(masses.sum(), 1e-300)
        below = np.stack([tree.sums_below(values) for values in (masses, masses * rewards, masses > 0)])
        begin = tree.nodes[PROMPT].end
        forks, apart = [], None
        for node in range(len(tree.nodes)):
            children = [child for child in tree.children(node) if below[0, child] > 0]
            if len(children) > 1:
                mass, reward, leaves = (values.sum() ** 2 - (values**2).sum() for values in below[:, children])
                share = (tree.nodes[node].end - begin) / length
                fork = _Fork(share, float(below[0, node]), float(reward / mass), round(leaves / 2))
                if node == PROMPT:
                    apart = fork.product
                else:
                    forks.append(fork)
        if apart is None:
            return None
        square = float(masses @ rewards**2)
        variance = square - apart if square - apart > ROUNDING * square else 0.0
        return cls(tree.prompt_id, forks, apart, variance, _lengths(tree) / length, masses, rewards**2)

    def ended_by(self, depth: float) -> bool:
        """Whether all answers have ended, which settles them."""
        return bool(self.ends[self.masses > 0].max() <= depth * (1 + ROUNDING))

    def settled(self, bin_: int) -> float:
        """Variance settled by the forks in a bin, of which there must be one.

        An answer that has ended is settled wholly. Living paths count as those that fork, whom the past alone chose.
        """
        forks = [fork for fork in self.forks if fork.bin == bin_]
        total = 0.0
        for share in sorted({fork.share for fork in forks}):
            here = [fork for fork in forks if fork.share == share]
            mass = sum(fork.mass for fork in here)
            alive = self.ends > share
            product = sum(fork.mass * fork.product for fork in here) / mass
            square = self.masses[alive].sum() * product + self.masses[~alive] @ self.squares[~alive]
            total += mass * (square - self.apart)
        return float(total / sum(fork.mass for fork in forks))


def monotone(points: Sequence[Point]) -> list[Point]:
    """The same with C rising and between 0 and 1, by least squares with each point's trees as its weight.

    Intervals stay those of the points alone.
    """
    blocks: list[list[float]] = []  # value, weight, points
    for point in points:
        blocks.append([point.decided, point.trees, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            value, weight, count = blocks.pop()
            before = blocks[-1]
            before[0] = (before[0] * before[1] + value * weight) / (before[1] + weight)
            before[1:] = before[1] + weight, before[2] + count
    values = [min(max(value, 0.0), 1.0) for value, _, count in blocks for _ in range(int(count))]
    return [replace(point, decided=value) for point, value in zip(points, values, strict=True)]


def decided_at(points: Sequence[Point], share: float) -> float | None:
    """C at a share of the mean response length, linear between 0 at the prompt, the points, and 1 at the mean length.

    None where no path forked within a quarter of the mean length: a line between the ends is no measurement.
    """
    if not any(abs(point.share - share) <= NEAR for point in points):
        return None
    known = [(point.share, point.decided) for point in points]
    ending = [(1.0, 1.0)] if known[-1][0] < 1 else []
    shares, values = zip((0.0, 0.0), *known, *ending, strict=True)
    return float(np.interp(share, shares, values))


def rising(points: Sequence[Point], shares: Sequence[float]) -> list[float]:
    """A rising C at shares of the mean length, linear between 0 at the prompt, `monotone`, and 1 behind the last point.

    Needs a point.
    """
    known = [(point.share, point.decided) for point in monotone(points)]
    end = max(1.0, known[-1][0] + 1 / BINS_A_LENGTH)
    depths, values = zip((0.0, 0.0), *known, (end, 1.0), strict=True)
    return [float(value) for value in np.interp(shares, depths, values)]


def mean_length(tree: Tree) -> float:
    """Response tokens of an independent answer to the prompt, as the tree's masses have it."""
    return float(tree.masses(fallback=False) @ _lengths(tree))


def _weights(tree: _Told) -> np.ndarray:
    """In the sums, and in each replicate of the bootstrap: float64[1 + replicates]."""
    rng = np.random.default_rng(zlib.crc32(tree.prompt_id.encode()))
    return np.concatenate([[1.0], rng.standard_exponential(REPLICATES)])


def _interval(ratios: np.ndarray) -> tuple[float | None, float | None]:
    """Of the replicates; the first is the estimate itself."""
    low, high = (float(value) for value in np.percentile(ratios[1:], TAILS))
    return (low, high) if high - low > 1e-9 else (None, None)


def _tokens(tree: Tree) -> np.ndarray:
    masses = tree.masses(fallback=False)
    return np.array([masses @ _lengths(tree), masses.sum()])


def _lengths(tree: Tree) -> np.ndarray:
    return np.array([tree.leaf_tokens(leaf) for leaf in range(len(tree.leaves))], dtype=np.float64)


def _rewards(tree: Tree) -> np.ndarray:
    for index, leaf in enumerate(tree.leaves):
        if leaf.reward is None and not leaf.failed:
            raise ValueError(f"prompt {tree.prompt_id}: leaf {index} has no reward")
    return np.array([leaf.reward or 0.0 for leaf in tree.leaves])
