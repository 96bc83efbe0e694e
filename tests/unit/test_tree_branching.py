"""Budget and allocation (docs/algorithm.md 2.3 to 2.5)."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_mcore.config import BranchingConfig, TreeConfig
from treepo_mcore.grow.branching import (
    allocate_evenly,
    allocate_to_heaviest,
    first_children,
    make_allocation,
    temperature_at,
    total_children,
)
from treepo_mcore.tree.tree import Tree


def wave(*means: float) -> tuple[Tree, list[int]]:
    tree = Tree("p", [1])
    for mean in means:
        node = tree.nodes[tree.add_node(0, 1)]
        node.tokens.extend([2, 3])
        node.logprobs.extend([mean - 0.25, mean + 0.25])
    return tree, list(range(1, len(means) + 1))


@pytest.mark.parametrize(
    ("leaves", "new", "survivors", "factor", "expected"),
    [
        (0, 0, 2, 2, 4),  # plain doubling
        (1, 1, 1, 2, 4),  # a leaf of this wave donates its budget
        (1, 0, 1, 2, 2),  # an older one does not
        (10, 0, 5, 2, 6),  # capped by the width
        (10, 2, 6, 2, 6),  # saturated: nobody branches
        (0, 0, 3, 1, 3),  # every survivor continues
    ],
)
def test_budget(leaves, new, survivors, factor, expected):
    assert total_children(16, leaves, new, survivors, factor) == expected


def test_first_children_are_clipped_to_the_width():
    rng = random.Random(0)

    def first(width, **branching):
        return first_children(TreeConfig(width=width, branching=BranchingConfig(**branching)), rng)

    drawn = Counter(first(16, factor=2, first=(2, 8)) for _ in range(400))
    assert set(drawn) == set(range(2, 9))  # the range is really used
    assert {first(4, first=(9, 12)) for _ in range(20)} == {4}
    clipped = Counter(first(4, first=(2, 8)) for _ in range(600))
    assert set(clipped) == {2, 3, 4}
    assert max(clipped.values()) < 260  # the range is clipped, not what is drawn from it: 4 is no likelier than 2
    assert first(16, factor=3) == 3


@given(st.integers(1, 20), st.integers(0, 40), st.integers(0, 1000))
def test_even_allocation_is_even(survivors, extra, seed):  # in the released code 16 over 9 gave one path 8
    tree, nodes = wave(*[-1.0] * survivors)
    counts = allocate_evenly(tree, nodes, survivors + extra, random.Random(seed))
    assert sum(counts) == survivors + extra
    assert max(counts) - min(counts) <= 1


def test_the_remainder_goes_to_random_survivors():
    tree, nodes = wave(-1.0, -1.0, -1.0)
    rng = random.Random(0)
    lucky = Counter(allocate_evenly(tree, nodes, 4, rng).index(2) for _ in range(300))
    assert min(lucky.values()) > 60


@pytest.mark.parametrize(("policy", "expected"), [("low_logprob", [1, 2, 7]), ("high_logprob", [7, 2, 1])])
def test_logprob_allocation_favours_its_side(policy, expected):
    tree, nodes = wave(-0.5, -1.9, -3.3)
    allocate = make_allocation(BranchingConfig(allocation=policy, temperature=1.0), progress=0.0)
    # Seven extra children by weights 1, 0.247, 0.061: quotas 5.35, 1.32, 0.33, the remainder to the first.
    assert allocate(tree, nodes, 10, random.Random(0)) == expected


@pytest.mark.parametrize("policy", ["low_logprob", "high_logprob"])
def test_logprob_allocation_gives_everyone_a_child_and_spends_all(policy):
    tree, nodes = wave(-0.1, -50.0, -2.0, -2.0)
    for temperature in (0.01, 2.0, 100.0):
        allocate = make_allocation(BranchingConfig(allocation=policy, temperature=temperature), 0.0)
        for total in range(4, 12):
            counts = allocate(tree, nodes, total, random.Random(total))
            assert sum(counts) == total
            assert min(counts) >= 1


def test_equal_scores_break_ties_at_random():
    tree, nodes = wave(-1.0, -1.0)
    allocate = make_allocation(BranchingConfig(allocation="low_logprob"), 0.0)
    rng = random.Random(0)
    assert len({tuple(allocate(tree, nodes, 3, rng)) for _ in range(30)}) == 2


def test_temperature_schedule_is_half_a_cosine():
    config = BranchingConfig(temperature=5.0, temperature_end=1.0)
    assert [temperature_at(config, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([5.0, 3.0, 1.0])
    assert temperature_at(config, 0.25) > 4.0
    assert temperature_at(BranchingConfig(temperature=2.0), 0.7) == pytest.approx(2.0)


def test_the_heaviest_path_gets_the_next_child():
    """Of masses 1/2, 1/6, 1/6 and 1/6."""
    tree = Tree("p", [1])
    light = tree.add_node(0, 1)
    nodes = [tree.add_node(0, 1), *(tree.add_node(light, 2) for _ in range(3))]
    counts = allocate_to_heaviest(tree, nodes, 6, random.Random(0))
    assert counts == [3, 1, 1, 1]
    most = {tuple(allocate_to_heaviest(tree, nodes, 7, random.Random(seed))) for seed in range(60)}
    assert most == {(4, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 1), (3, 1, 1, 2)}  # a tie of all four
