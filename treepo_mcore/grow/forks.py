"""The best planned forks for a curve of where outcomes are decided (docs/algorithm.md 2.10), on paper."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

STEPS = 16  # an answer is this many stretches of equal length
LEVELS = 3  # forks on a path, at most
RIDGE = 1e-9


@dataclass(frozen=True)
class Plan:
    """Every path forks in two at each depth."""

    forks: tuple[tuple[float, int], ...]  # (share of the mean length, paths from there on), as branching.schedule
    gain: float  # signal of the gradient over its noise, per decoded token, over as many independent answers


def best_plan(decided: Sequence[float], width: int) -> Plan:
    """Of all doubling trees with `width` leaves, for the estimator of 4.10 with its best linear baseline.

    decided: C at 1/16, 2/16, ... of the answer, rising to 1 at its end. Answers are taken to be equally long.
    """
    curve = (0.0, *(min(max(float(value), 0.0), 1.0) for value in decided))
    flat = _noise(curve, width, ()) * width * STEPS
    best = Plan(((0.0, width),), 1.0)
    for levels in range(1, LEVELS + 1):
        roots, rest = divmod(width, 2**levels)
        if rest or roots < 2:
            break
        for forks in itertools.combinations(range(1, STEPS), levels):
            gain = flat / (_noise(curve, roots, forks) * _cost(roots, forks))
            if gain > best.gain:
                shares = [0.0, *(fork / STEPS for fork in forks)]
                best = Plan(tuple((share, roots * 2**level) for level, share in enumerate(shares)), gain)
    return best


def expected_gain(decided: Sequence[float], forks: Sequence[tuple[float, int]]) -> float:
    """Of forks of the form of `Plan.forks`, at multiples of 1/16, that double at each."""
    curve = (0.0, *(float(value) for value in decided))
    steps, width = tuple(round(share * STEPS) for share, _ in forks[1:]), forks[-1][1]
    flat = _noise(curve, width, ()) * width * STEPS
    return flat / (_noise(curve, forks[0][1], steps) * _cost(forks[0][1], steps))


def _cost(roots: int, forks: Sequence[int]) -> int:
    """Stretches that are decoded."""
    edges = [0, *forks, STEPS]
    return sum(roots * 2**level * (end - begin) for level, (begin, end) in enumerate(itertools.pairwise(edges)))


@lru_cache(maxsize=4096)
def _noise(curve: tuple[float, ...], roots: int, forks: tuple[int, ...]) -> float:
    """Variance of the estimate of the gradient of one token a stretch, in variances of the reward.

    A stretch of level l has N nodes; each adds the variance of its own value given where it starts, and the error of
    its baseline, the best linear prediction from the leaves outside of it.
    """
    edges = [0, *forks, STEPS]
    levels = len(forks)
    width = roots * 2**levels
    covariance = _covariance(curve, edges, width, levels)
    settled = np.diff(curve)
    nodes = np.concatenate([np.full(edges[i + 1] - edges[i], roots * 2**i) for i in range(levels + 1)])
    noise = 0.0
    for level in range(levels + 1):
        begin, below = edges[level], 2 ** (levels - level)
        value = float((settled[begin:] * nodes[begin] / nodes[begin:]).sum())
        baseline = _baseline_error(covariance, np.arange(width) < below, curve[begin])
        noise += (edges[level + 1] - begin) / nodes[begin] * (value + baseline)
    return noise


def _covariance(curve: Sequence[float], edges: Sequence[int], width: int, levels: int) -> np.ndarray:
    """Of the leaves' rewards: what is decided where they part."""
    leaves = np.arange(width)
    covariance = np.zeros((width, width))
    for level in range(levels + 1):
        group = leaves // 2 ** (levels - level)
        covariance[group[:, None] == group[None]] = curve[edges[level + 1]]
    np.fill_diagonal(covariance, 1.0)
    return covariance


def _baseline_error(covariance: np.ndarray, inside: np.ndarray, known: float) -> float:
    """Mean square error of the best linear prediction, with weights that sum to 1, of a value of variance `known`."""
    outside = ~inside
    towards = np.minimum(covariance[0, outside], known)
    matrix = covariance[np.ix_(outside, outside)] + RIDGE * np.eye(int(outside.sum()))
    ones, weights = np.linalg.solve(matrix, np.stack([np.ones(len(towards)), towards], axis=1)).T
    return float(max(known - towards @ weights, 0.0) + (1 - weights.sum()) ** 2 / ones.sum())
