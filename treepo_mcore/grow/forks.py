"""The best planned forks, on paper (docs/algorithm.md 2.10).

For a curve of where outcomes are decided, and a profile of where answers have their tokens and the policy its doubts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from treepo_mcore.tree.profile import EVEN, STEPS, Profile

LEVELS = 3  # forks on a path, at most
RIDGE = 1e-9

Curve = tuple[float, ...]  # C at 0, 1/16, ... of the mean length
Steps = tuple[int, ...]  # where paths fork, in sixteenths of the mean length


@dataclass(frozen=True)
class Plan:
    """Every path forks in two at each depth."""

    forks: tuple[tuple[float, int], ...]  # (share of the mean length, paths from there on), as branching.schedule
    gain: float  # signal of the gradient over its noise, per decoded token, over as many independent answers


def best_plan(decided: Sequence[float], width: int, profile: Profile = EVEN) -> Plan:
    """Of all doubling trees with `width` leaves, for the estimator of 4.10 with its best linear baseline.

    decided: C at 1/16, 2/16, ... of the mean length, rising to 1.
    """
    curve = (0.0, *(min(max(float(value), 0.0), 1.0) for value in decided))
    best = Plan(((0.0, width),), 1.0)
    for levels in range(1, LEVELS + 1):
        roots, rest = divmod(width, 2**levels)
        if rest or roots < 2:
            break
        for steps in itertools.combinations(range(1, STEPS), levels):
            gain = _gain(curve, roots, steps, profile)
            if gain > best.gain:
                shares = [0.0, *(step / STEPS for step in steps)]
                best = Plan(tuple((share, roots * 2**level) for level, share in enumerate(shares)), gain)
    return best


def expected_gain(decided: Sequence[float], forks: Sequence[tuple[float, int]], profile: Profile = EVEN) -> float:
    """Of forks of the form of `Plan.forks`, at multiples of 1/16, that double at each."""
    curve = (0.0, *(float(value) for value in decided))
    return _gain(curve, forks[0][1], tuple(round(share * STEPS) for share, _ in forks[1:]), profile)


def _gain(curve: Curve, roots: int, steps: Steps, profile: Profile) -> float:
    width = roots * 2 ** len(steps)
    flat = _noise(curve, width, (), profile) * _cost(width, (), profile)
    return flat / (_noise(curve, roots, steps, profile) * _cost(roots, steps, profile))


def _nodes(roots: int, steps: Steps, profile: Profile) -> list[float]:
    """One over the mass of a path of each level, as expected: paths that ended hand their budget to those that live."""
    nodes, alive, ended, before = [float(roots)], float(roots), 0.0, 0
    for level, step in enumerate(steps, start=1):
        share = profile.alive[step] / profile.alive[before] if profile.alive[before] else 0.0
        living = alive * share
        ended += alive - living
        if living <= 0:
            nodes.append(nodes[-1])
            continue
        alive = roots * 2**level - ended
        nodes.append(nodes[-1] * alive / living)
        before = step
    return nodes


def _stretches(values: Sequence[float], steps: Steps) -> list[float]:
    """Sums of a profile's row over the levels of a tree."""
    edges = [0, *steps, len(values)]
    return [sum(values[begin:end]) for begin, end in itertools.pairwise(edges)]


def _cost(roots: int, steps: Steps, profile: Profile) -> float:
    """Tokens that are decoded."""
    nodes, tokens = _nodes(roots, steps, profile), _stretches(profile.tokens, steps)
    return sum(count * length for count, length in zip(nodes, tokens, strict=True))


@lru_cache(maxsize=8192)
def _noise(curve: Curve, roots: int, steps: Steps, profile: Profile) -> float:
    """Variance of the estimate of the gradient, in variances of the reward.

    A token's part is in proportion to 1 - p of it, the variance of its own gradient, over the nodes of its level; times
    the variance of a node's value given where it starts, and the error of its baseline, the best linear prediction from
    the leaves outside of it.
    """
    levels = len(steps)
    width = roots * 2**levels
    edges = [*(curve[step] for step in (0, *steps)), 1.0]
    covariance = _covariance(edges, width, levels)
    settled, nodes = np.diff(edges), np.array(_nodes(roots, steps, profile))
    noise = 0.0
    for level, doubt in enumerate(_stretches(profile.noise, steps)):
        value = float((settled[level:] * nodes[level] / nodes[level:]).sum())
        baseline = _baseline_error(covariance, np.arange(width) < 2 ** (levels - level), edges[level])
        noise += doubt / nodes[level] * (value + baseline)
    return noise


def _covariance(edges: Sequence[float], width: int, levels: int) -> np.ndarray:
    """Of the leaves' rewards: what is decided where they part."""
    leaves = np.arange(width)
    covariance = np.zeros((width, width))
    for level in range(levels + 1):
        group = leaves // 2 ** (levels - level)
        covariance[group[:, None] == group[None]] = edges[level + 1]
    np.fill_diagonal(covariance, 1.0)
    return covariance


def _baseline_error(covariance: np.ndarray, inside: np.ndarray, known: float) -> float:
    """Mean square error of the best linear prediction, with weights that sum to 1, of a value of variance `known`."""
    outside = ~inside
    towards = np.minimum(covariance[0, outside], known)
    matrix = covariance[np.ix_(outside, outside)] + RIDGE * np.eye(int(outside.sum()))
    ones, weights = np.linalg.solve(matrix, np.stack([np.ones(len(towards)), towards], axis=1)).T
    return float(max(known - towards @ weights, 0.0) + (1 - weights.sum()) ** 2 / ones.sum())
