"""What trees look like: sharing, effective leaves, endings, diversity (docs/algorithm.md 1.4 to 1.6).

Physical tokens are those stored and decoded, logical tokens those counted once per leaf; a speed claim in logical
tokens alone flatters trees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from treepo_mcore.tree.tree import Tree


@dataclass(frozen=True)
class TreeStats:
    """Sums and means over one or more trees."""

    trees: int
    leaves: int
    fallback_leaves: int
    physical_tokens: int  # of responses
    logical_tokens: int
    mean_length: float  # of leaves, tokens
    median_length: float
    p95_length: float  # that 95 of 100 leaves do not pass
    longest: int
    mass_mean_length: float  # weighted by path mass without fallback: unbiased for independent sampling
    effective_leaves: float  # mean over trees of 1 / sum of squared path masses
    reasons: dict[str, int]  # leaves by the reason of their end
    depths: dict[int, int]  # leaves by the segment they ended in
    sharing: list[float]  # logical / physical tokens of segments 1, 2, ...; W for a common first segment
    distinct_answers: float | None  # mean over trees
    mean_reward: float | None  # of leaves, as the next three; None where a leaf has none
    mean_score: float | None  # before any penalty
    accuracy: float | None
    informative: float | None  # share of trees


def informative(tree: Tree) -> bool:
    """Whether the leaves' scores differ. Neither penalties for length count nor leaves whose reward call failed: both
    say nothing about the answers."""
    return len({leaf.score for leaf in tree.leaves if not leaf.failed}) > 1


def tree_stats(trees: Sequence[Tree], answer_of: Callable[[str], str | None] | None = None) -> TreeStats:
    """Statistics of finished trees. `answer_of` extracts the answer of a leaf's text; without it none are counted.

    Raises ValueError on an empty list.
    """
    if not trees:
        raise ValueError("tree_stats: no trees")
    leaves = [leaf for tree in trees for leaf in tree.leaves]
    masses = [tree.masses(fallback=False) for tree in trees]
    lengths = [np.array([tree.leaf_tokens(leaf) for leaf in range(len(tree.leaves))]) for tree in trees]
    return TreeStats(
        trees=len(trees),
        leaves=len(leaves),
        fallback_leaves=sum(leaf.from_fallback for leaf in leaves),
        physical_tokens=sum(tree.unique_tokens for tree in trees),
        logical_tokens=sum(tree.logical_tokens for tree in trees),
        mean_length=float(np.concatenate(lengths).mean()),
        median_length=float(np.median(np.concatenate(lengths))),
        p95_length=float(np.percentile(np.concatenate(lengths), 95)),
        longest=int(max(map(max, lengths))),
        mass_mean_length=float(np.mean([mass @ length for mass, length in zip(masses, lengths, strict=True)])),
        effective_leaves=float(np.mean([1 / (mass**2).sum() for mass in masses])),
        reasons=dict(Counter(leaf.reason for leaf in leaves)),
        depths=dict(sorted(Counter(tree.nodes[leaf.node].depth for tree in trees for leaf in tree.leaves).items())),
        sharing=_sharing(trees),
        distinct_answers=_distinct(trees, answer_of) if answer_of else None,
        mean_reward=_mean([leaf.reward for leaf in leaves]),
        mean_score=_mean([leaf.score for leaf in leaves]),
        accuracy=_mean([leaf.correct for leaf in leaves]),
        informative=None if None in [leaf.score for leaf in leaves] else _mean([informative(tree) for tree in trees]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _sharing(trees: Sequence[Tree]) -> list[float]:
    physical: Counter[int] = Counter()
    logical: Counter[int] = Counter()
    for tree in trees:
        for node, count in zip(tree.nodes[1:], tree.leaf_counts()[1:].tolist(), strict=True):
            physical[node.depth] += len(node.tokens)
            logical[node.depth] += len(node.tokens) * count
    return [logical[depth] / max(physical[depth], 1) for depth in sorted(physical)]


def _distinct(trees: Sequence[Tree], answer_of: Callable[[str], str | None]) -> float:
    counts = []
    for tree in trees:
        answers = {answer_of(leaf.text) for leaf in tree.leaves if leaf.text is not None}
        counts.append(len(answers - {None}))
    return float(np.mean(counts))
