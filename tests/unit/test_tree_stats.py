"""Statistics of a small tree worked out by hand."""

import pytest

from treepo_mcore.tree.stats import tree_stats
from treepo_mcore.tree.tree import EOS, LENGTH, Tree


def small() -> Tree:
    tree = Tree("p", [1, 2, 3])
    for parent, length in ((0, 4), (1, 2), (1, 4), (0, 1)):
        node = tree.nodes[tree.add_node(parent, tree.nodes[parent].depth + 1, from_fallback=length == 1)]
        node.tokens.extend([9] * length)
        node.logprobs.extend([-1.0] * length)
    for node, reason, text in ((2, EOS, "a"), (3, LENGTH, None), (4, EOS, "b")):
        tree.leaves[tree.add_leaf(node, reason)].text = text
    return tree


def test_numbers_of_one_tree():
    stats = tree_stats([small()], lambda text: text)
    assert (stats.trees, stats.leaves, stats.fallback_leaves) == (1, 3, 1)
    assert (stats.physical_tokens, stats.logical_tokens) == (11, 6 + 8 + 1)
    assert stats.mean_length == pytest.approx(5.0)
    assert stats.mass_mean_length == pytest.approx(6 / 2 + 8 / 2)  # the restarted leaf has no mass
    assert stats.effective_leaves == pytest.approx(1 / (1 / 4 + 1 / 4))
    assert stats.reasons == {EOS: 2, LENGTH: 1}
    assert stats.depths == {1: 1, 2: 2}
    assert stats.sharing == pytest.approx([(2 * 4 + 1) / 5, 1.0])
    assert stats.distinct_answers == 2


def test_a_batch_adds_up():
    one, two = tree_stats([small()]), tree_stats([small(), small()])
    assert two.physical_tokens == 2 * one.physical_tokens
    assert two.effective_leaves == pytest.approx(one.effective_leaves)
    assert two.sharing == pytest.approx(one.sharing)
    assert two.distinct_answers is None


def test_answers_that_differ_only_in_writing_are_one():
    assert tree_stats([small()], lambda text: None).distinct_answers == 0
    assert tree_stats([small()], lambda text: "same").distinct_answers == 1


def test_no_trees_is_an_error():
    with pytest.raises(ValueError, match="no trees"):
        tree_stats([])
