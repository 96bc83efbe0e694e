"""Where outcomes are decided, against trees whose curve is known."""

import numpy as np
import pytest

from treepo_mcore.tree.curve import CurveSums, curve
from treepo_mcore.tree.tree import Tree

LENGTH = 16


def grown(rng, increments, forks=(4, 8, 12), roots=2):
    """Rewards are sums of independent steps, one at each token; paths fork in two where told."""
    tree = Tree("p", [1])

    def extend(parent, depth, begin, sum_so_far):
        end = next((fork for fork in forks if fork > begin), LENGTH)
        node = tree.add_node(parent, depth)
        tree.nodes[node].tokens.extend([2] * (end - begin))
        total = sum_so_far + (rng.standard_normal(end - begin) * np.sqrt(increments[begin:end])).sum()
        if end == LENGTH:
            tree.leaves[tree.add_leaf(node, "eos")].reward = total
        else:
            for _ in range(2):
                extend(node, depth + 1, end, total)

    base = rng.standard_normal() * 3  # of the prompt, which must not matter
    for _ in range(roots):
        extend(0, 1, 0, base)
    return tree


PROFILES = {
    "early": np.r_[np.full(4, 1.0), np.full(12, 0.1)],
    "even": np.full(LENGTH, 0.5),
    "late": np.r_[np.full(12, 0.05), np.full(4, 2.0)],
}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_curve_of_known_increments(profile):
    increments, rng = PROFILES[profile], np.random.default_rng(0)
    points = curve([grown(rng, increments) for _ in range(400)])
    exact = np.cumsum(increments) / increments.sum()
    assert [point.share for point in points] == pytest.approx([0.25, 0.5, 0.75])
    for point, true in zip(points, exact[[3, 7, 11]], strict=True):
        assert point.low - 0.02 < true < point.high + 0.02
        assert point.high - point.low < 0.3
    assert [point.pairs for point in points] == [400 * 2 * 16, 400 * 4 * 4, 400 * 8]


def hand_tree():
    """Two first paths of 2 tokens fork once and end at 4: rewards 1, 1, 0, 0."""
    tree = Tree("p", [1])
    for reward in (1.0, 0.0):
        root = tree.add_node(0, 1)
        tree.nodes[root].tokens.extend([2, 2])
        for _ in range(2):
            node = tree.add_node(root, 2)
            tree.nodes[node].tokens.extend([2, 2])
            tree.leaves[tree.add_leaf(node, "eos")].reward = reward
    return tree


def test_by_hand():
    """Pairs apart: 0 of 8. All four: mean square 1/2. Siblings: 1 of 2 pairs, so all is decided at the fork."""
    (point,) = curve([hand_tree()])
    assert (point.share, point.decided, point.pairs) == (0.5, 1.0, 2)
    sums = CurveSums()
    assert sums.at(0.5) is None
    sums.add([hand_tree()])
    assert sums.at(0.5) == 1.0
    assert sums.at(0.25) == 0.5  # between the prompt and the fork
    assert CurveSums.from_state_dict(sums.state_dict()).at(0.25) == 0.5


def test_trees_that_say_nothing():
    flat = Tree("p", [1])
    for reward in (1.0, 0.0):
        node = flat.add_node(0, 1)
        flat.nodes[node].tokens.extend([2] * 4)
        flat.leaves[flat.add_leaf(node, "eos")].reward = reward
    assert curve([flat]) == []
    trunk = grown(np.random.default_rng(0), PROFILES["even"], roots=1)
    assert curve([trunk]) == []
    failed = hand_tree()
    for leaf in failed.leaves[1:3]:
        leaf.failed = True  # one leaf is left on either side
    assert curve([failed]) == []


def test_older_steps_count_less():
    early, late = (
        [grown(np.random.default_rng(seed), PROFILES[name]) for seed in range(200)] for name in ("early", "late")
    )
    sums = CurveSums()
    sums.add(early)
    before = sums.at(0.25)
    for _ in range(30):
        sums.add(late, keep=0.9)
    assert before > 0.6
    assert sums.at(0.25) < 0.2
