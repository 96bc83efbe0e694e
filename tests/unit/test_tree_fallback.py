"""Who restarts, and where (docs/algorithm.md 2.7)."""

import random
from collections import Counter

from treepo_mcore.config import FallbackConfig
from treepo_mcore.grow.fallback import CUTS, plan_restarts
from treepo_mcore.tree.tree import BOXED, EOS, FINISHED, LENGTH, PRUNED, REPETITION, Tree


def chains(*reasons: str, segments: int = 3) -> Tree:
    """One chain of segments of two tokens per reason; token 1 of segment 2 is the least likely."""
    tree = Tree("p", [1, 2, 3])
    for reason in reasons:
        node = 0
        for depth in range(1, segments + 1):
            node = tree.add_node(node, depth)
            tree.nodes[node].tokens.extend([4, 5])
            tree.nodes[node].logprobs.extend([-1.0, -9.0 if depth == 2 else -2.0])
        tree.add_leaf(node, reason)
    return tree


def plan(tree: Tree, missing: int, seed: int = 0, factor: int = 2, max_depth: int = 9, **config: str):
    return plan_restarts(tree, FallbackConfig(**config), missing, max_depth, lambda: factor, random.Random(seed))


def test_only_finished_leaves_are_candidates():
    tree = chains(LENGTH, EOS, REPETITION, BOXED, PRUNED, FINISHED)
    chosen = {restart.leaf for seed in range(40) for restart in plan(tree, 2, seed)}
    assert chosen == {1, 3, 5}
    everyone = {restart.leaf for seed in range(80) for restart in plan(tree, 2, seed, candidates="random_all")}
    assert everyone == set(range(6))


def test_copies_go_by_the_factor_and_cover_what_is_missing():
    restarts = plan(chains(EOS, EOS, EOS), 5)
    assert [restart.copies for restart in restarts] == [2, 2, 1]
    assert len({restart.leaf for restart in restarts}) == 3
    assert [restart.copies for restart in plan(chains(EOS), 5)] == [2]  # the next wave brings the others


def test_without_candidates_the_prompt_restarts_with_all_that_is_missing():
    restarts = plan(chains(REPETITION, LENGTH), 5)
    assert [(restart.position, restart.copies) for restart in restarts] == [(3, 5)]


def test_from_start():
    assert [(r.position, r.copies) for r in plan(chains(EOS, EOS), 5, cut="from_start")] == [(3, 2)]


def test_random_cut_is_uniform_over_boundaries_and_includes_the_prompt():
    tree = chains(EOS)
    positions = Counter(plan(tree, 1, seed)[0].position for seed in range(600))
    assert set(positions) == {3, 5, 7}  # never the end, so something is always removed
    assert min(positions.values()) > 150


def test_random_cut_respects_the_depth():
    tree = chains(EOS)
    tree.split(tree.leaves[0].node, 1)  # a boundary inside segment 3: nothing could follow it at max_depth 3
    assert {plan(tree, 1, seed, max_depth=3)[0].position for seed in range(100)} == {3, 5, 7}
    assert {plan(tree, 1, seed, max_depth=4)[0].position for seed in range(100)} == {3, 5, 7, 8}


def test_min_logprob_cut_is_before_the_token():
    tree = chains(EOS)
    assert CUTS["min_logprob_token"](tree, 0, 9, random.Random(0)) == 6
    assert CUTS["min_logprob_token"](tree, 0, 2, random.Random(0)) == 5  # depth guard: whole segments only


def test_the_plan_does_not_depend_on_the_order_of_leaves():
    one, other = Tree("p", [1]), Tree("p", [1])
    for tree, order in ((one, (1, 2, 3)), (other, (3, 1, 2))):
        for _ in range(3):
            tree.nodes[tree.add_node(0, 1)].tokens.extend([7])
        for node in order:
            tree.add_leaf(node, EOS)
    for seed in range(20):
        plans = [
            [(tree.leaves[r.leaf].node, r.position, r.copies) for r in plan(tree, 3, seed, factor=1)]
            for tree in (one, other)
        ]
        assert plans[0] == plans[1]
