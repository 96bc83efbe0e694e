"""Where to restart when a prompt has no live path and fewer than W leaves (docs/algorithm.md 2.7).

The paper restarts from finished leaves (a box or EOS) at random segment boundaries. It measured that cuts which are
not aligned with the segments hurt (lower AIME accuracy, strongly growing length); here a cut inside a node splits
it, so sub-groups stay exact for every policy. Fallback looks at how paths ended, so path masses are no longer
exactly unbiased below it (docs/algorithm.md 1.4); such leaves are marked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from treepo_mcore.config import FallbackConfig
from treepo_mcore.tree.tree import BOXED, EOS, FINISHED, PROMPT, Tree


@dataclass(frozen=True)
class Restart:
    """New paths from a position of a finished one."""

    leaf: int  # index into tree.leaves; positions below are on its path
    position: int  # tokens kept, counted from the start of the prompt
    copies: int


# The slot for a cut policy: (tree, index of the leaf, max_depth, rng) -> position, at a depth below max_depth.
Cut = Callable[[Tree, int, int, random.Random], int]


def plan_restarts(
    tree: Tree, config: FallbackConfig, missing: int, max_depth: int, draw_factor: Callable[[], int], rng: random.Random
) -> list[Restart]:
    """Restarts with at most `missing` copies in all, at least one.

    Each candidate in random order gets up to `draw_factor()` copies. Without a candidate, or from the start, the
    prompt gets them: all that are missing in the first case, one factor in the second.
    """
    if config.cut == "from_start":
        return [Restart(0, tree.nodes[PROMPT].end, min(draw_factor(), missing))]
    candidates = _candidates(tree, config)
    if not candidates:
        return [Restart(0, tree.nodes[PROMPT].end, missing)]
    rng.shuffle(candidates)
    cut = CUTS[config.cut]
    restarts: list[Restart] = []
    for leaf in candidates:
        copies = min(draw_factor(), missing)
        restarts.append(Restart(leaf, cut(tree, leaf, max_depth, rng), copies))
        missing -= copies
        if not missing:
            break
    return restarts


def _candidates(tree: Tree, config: FallbackConfig) -> list[int]:
    leaves: Iterable[int] = range(len(tree.leaves))
    if config.candidates == "soft_boxed_and_eos":
        leaves = (leaf for leaf in leaves if tree.leaves[leaf].reason in (BOXED, FINISHED, EOS))
    # Leaves are numbered by arrival: order them by name, so that the shuffle does not depend on timing.
    return sorted(leaves, key=lambda leaf: tree.key(tree.leaves[leaf].node))


def cut_at_random(tree: Tree, leaf: int, max_depth: int, rng: random.Random) -> int:
    """Uniform over the boundaries of the path before its last node, the prompt's end included."""
    path = tree.path(tree.leaves[leaf].node)[:-1]
    return tree.nodes[rng.choice([node for node in path if tree.nodes[node].depth < max_depth])].end


def cut_at_min_logprob(tree: Tree, leaf: int, max_depth: int, rng: random.Random) -> int:
    """Before the token with the lowest log-prob, the first of several."""
    logprobs = tree.response_logprobs(leaf)
    position = tree.nodes[PROMPT].end + logprobs.index(min(logprobs))
    # A cut inside the deepest segment would leave no depth for the new one: keep all segments before it.
    path = tree.path(tree.leaves[leaf].node)
    return min(position, max(tree.nodes[node].end for node in path if tree.nodes[node].depth < max_depth))


CUTS: dict[str, Cut] = {"random": cut_at_random, "min_logprob_token": cut_at_min_logprob}
