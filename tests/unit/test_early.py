"""The chance that more answers differ where the first ones agree."""

import json

import numpy as np
import pytest

from treepo_mcore.config import ContrastConfig
from treepo_mcore.grow.contrast import RarePaths
from treepo_mcore.grow.early import FIRST, Prior, goes_on
from treepo_mcore.tree.tree import EOS, Tree


def tree_of(*scores: float | None) -> Tree:
    """Independent answers; None is one whose reward call failed."""
    tree = Tree("p", [1])
    for score in scores:
        node = tree.add_node(0, 1)
        tree.nodes[node].tokens.append(5)
        tree.nodes[node].logprobs.append(-1.0)
        leaf = tree.leaves[tree.add_leaf(node, EOS)]
        leaf.score, leaf.correct, leaf.failed = score, bool(score and score > 0), score is None
    return tree


def seen(a: float, b: float, first: int, prompts: int = 20_000) -> list[Tree]:
    rng = np.random.default_rng(0)
    trees = []
    for share in rng.beta(a, b, prompts):
        trees.append(Tree("p", [1], {FIRST: [int(rng.binomial(first, share)), first]}))
    return trees


def test_before_anything_was_seen_shares_are_uniform():
    prior = Prior()
    for right in (0, 4):
        assert prior.chance(right, 4, 4) == pytest.approx(1 - 5 / 9)  # (n + 1) / (W + 1) that all agree
    assert prior.chance(0, 4, 0) == 0.0


@pytest.mark.parametrize(("a", "b", "first"), [(1.1, 0.7, 4), (5.0, 1.0, 2), (0.3, 0.2, 3)])
def test_the_chance_is_what_happens(a, b, first):
    """Prompts drawn anew from the same spread: of those whose first answers agree, how many go on to differ."""
    prior = Prior()
    prior.look(seen(a, b, first))
    rng = np.random.default_rng(1)
    shares = rng.beta(a, b, 200_000)
    begin, more = rng.binomial(first, shares), rng.binomial(8 - first, shares)
    for right in (0, first):
        agree = begin == right
        differ = np.mean(more[agree] != (8 - first if right else 0))
        assert prior.chance(right, first, 8 - first) == pytest.approx(differ, abs=0.03)


def test_one_kind_of_prompts_and_no_variance_at_all():
    for right in (0, 4):
        prior = Prior()
        prior.look([Tree("p", [1], {FIRST: [right, 4]})] * 64)
        assert prior.chance(right, 4, 4) < 0.01


def test_a_tree_goes_on_when_its_answers_differ_or_nothing_is_known():
    prior = Prior()
    assert goes_on(tree_of(1.0, 0.0), 8, 1.0, prior)
    assert goes_on(tree_of(0.2, 0.7), 8, 1.0, prior)  # both right, with scores that differ
    assert goes_on(tree_of(None, None), 8, 1.0, prior)
    assert not goes_on(tree_of(1.0, 1.0, None), 8, 1.0, prior)


def test_the_memory_is_saved_and_fades():
    prior = Prior()
    prior.look(seen(5.0, 1.0, 4, prompts=500))
    other = Prior()
    other.load_state_dict(json.loads(json.dumps(prior.state_dict())))
    assert other.beta() == prior.beta()
    for _ in range(60):
        other.look(seen(1.0, 5.0, 4, prompts=500))
    a, b = other.beta()
    assert a < b


def remember(rare, trees):
    rare.look([found for tree in trees if (found := rare.found_in(tree))])


def remembering(memory: int = 1000) -> RarePaths:
    return RarePaths(ContrastConfig(paths=4, cut=0.5, memory=memory))


def answered(prompt: str, right: int, of: int) -> Tree:
    tree = tree_of(*[1.0] * right, *[0.0] * (of - right))
    tree.prompt_id = prompt
    for leaf in tree.leaves:
        tree.nodes[leaf.node].tokens.extend([6, 7, 8])
        tree.nodes[leaf.node].logprobs.extend([-1.0] * 3)
    return tree


def test_the_newest_rare_answer_of_the_last_prompts_is_remembered():
    rare = remembering(memory=2)
    remember(rare, [answered("a", 1, 8), answered("b", 7, 8), answered("c", 4, 8), answered("d", 8, 8)])
    assert rare.contradicts("a", False)
    assert not rare.contradicts("a", True)  # the answer that is known of it was right, too
    assert rare.contradicts("b", True)
    assert not rare.contradicts("c", True)  # neither outcome was rare
    assert not rare.contradicts("d", True)
    assert rare.replay("a") == [5, 6]
    remember(rare, [answered("a", 7, 8), answered("e", 1, 8)])
    assert rare.contradicts("a", True)  # a newer one
    assert not rare.contradicts("b", True)  # forgotten
    other = remembering()
    other.load_state_dict(json.loads(json.dumps(rare.state_dict())))
    assert other.state_dict() == rare.state_dict()


def test_an_answer_too_short_to_cut_is_of_no_use():
    rare = remembering()
    tree = tree_of(1.0, 0.0, 0.0, 0.0)
    remember(rare, [tree])
    assert not rare.contradicts("p", False)
