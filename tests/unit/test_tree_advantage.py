"""Every number of data/advantage_cases.json, and the properties behind them."""

import json
from pathlib import Path

import numpy as np
import pytest

from treepo_mcore.config import AdvantageConfig
from treepo_mcore.learn.advantage import (
    NodeAdvantage,
    advantages,
    raw_values,
    tree_from_plain,
    whiten,
)
from treepo_mcore.tree.tree import Tree

CASES = json.loads((Path(__file__).parent / "data" / "advantage_cases.json").read_text())

RAW = {
    "average": {},
    "average_reject": {"reject_uniform_subgroups": True},
    "group_size": {"aggregation": "group_size"},
    "group_size_reject": {"aggregation": "group_size", "reject_uniform_subgroups": True},
    "average_no_root": {"include_root": False},
    "average_loo": {"leave_one_out": True},
    "average_distinct_groups": {"distinct_groups": True},
    "average_mass_baseline": {"mass_baseline": True},
}
FLAT = {
    "grpo_std": {"estimator": "grpo"},
    "grpo_mean_only": {"estimator": "reinforce_pp_baseline", "whiten": "none"},
    "reinforce_pp_baseline_whitened": {"estimator": "reinforce_pp_baseline"},
    "rloo": {"estimator": "rloo"},
}


def case_tree(case: str) -> Tree:
    return tree_from_plain({"prompt_id": case, "leaves": CASES[case]["leaves"]})


def node_of(tree: Tree, case: str, name: str) -> int:
    wanted = name.split("/")
    leaf = next(i for i, leaf in enumerate(CASES[case]["leaves"]) if leaf["path"][: len(wanted)] == wanted)
    return tree.path(tree.leaves[leaf].node)[len(wanted)]


def test_all_keys_of_the_cases_are_covered():
    for case in CASES.values():
        assert set(case["raw"]) == set(RAW)
        assert set(case["flat"]) == set(FLAT)
        assert set(case["whitened"]) == {"average", "group_size"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", RAW)
def test_raw_values(case, name):
    found = raw_values(case_tree(case), AdvantageConfig(**RAW[name]))
    np.testing.assert_allclose(found, CASES[case]["raw"][name], atol=2e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["average", "group_size"])
def test_whitened_values(case, name):
    (found,) = advantages([case_tree(case)], AdvantageConfig(aggregation=name))
    np.testing.assert_allclose(found.values, CASES[case]["whitened"][name], atol=2e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FLAT)
def test_flat_estimators(case, name):
    (found,) = advantages([case_tree(case)], AdvantageConfig(**FLAT[name]))
    np.testing.assert_allclose(found.values, CASES[case]["flat"][name], atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_path_masses(case):
    np.testing.assert_allclose(case_tree(case).masses(), CASES[case]["path_mass"], atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_node_sums(case):
    tree = case_tree(case)
    (found,) = advantages([tree], AdvantageConfig(whiten="none"))
    positive, negative = found.node_sums(tree)
    counts = tree.leaf_counts()
    for name, expected in CASES[case]["node_scalars_from_raw_average"].items():
        node = node_of(tree, case, name)
        assert counts[node] == expected["n_leaves"]
        assert positive[node] == pytest.approx(expected["A_pos"], abs=2e-6)
        assert negative[node] == pytest.approx(expected["A_neg"], abs=2e-6)


@pytest.mark.parametrize(("estimator", "key"), [("segment", "treeseg_raw_segment_adv"), ("spo", "spo_segment_adv")])
def test_segment_estimators(estimator, key):
    tree = case_tree("A")
    values = raw_values(tree, AdvantageConfig(estimator=estimator))
    for leaf, expected in zip(tree.leaves, CASES["A"][key], strict=True):
        np.testing.assert_allclose(values[tree.path(leaf.node)[1:]], expected, atol=2e-6)


@pytest.mark.parametrize("estimator", ["segment", "spo"])
def test_a_chain_without_forks_is_one_unit(estimator):
    """Case C has chains, which the released code gives 0 or another scale; every node gets its unit's value."""
    tree = case_tree("C")
    units = [[node for node in tree.path(leaf.node)[1:] if _begins_a_unit(tree, node)] for leaf in tree.leaves]
    merged = tree_from_plain(
        {
            "leaves": [
                {"path": unit, "reward": leaf.reward, "n_tokens": 1}
                for unit, leaf in zip(units, tree.leaves, strict=True)
            ]
        }
    )
    values, expected = (raw_values(one, AdvantageConfig(estimator=estimator)) for one in (tree, merged))
    for index, leaf in enumerate(tree.leaves):
        found = dict(zip(units[index], expected[merged.path(merged.leaves[index].node)[1:]], strict=True))
        unit = None
        for node in tree.path(leaf.node)[1:]:
            unit = found.get(node, unit)
            assert values[node] == pytest.approx(unit)


def _begins_a_unit(tree, node):
    parent = tree.nodes[node].parent
    return parent == 0 or len(tree.children(parent)) > 1


def test_max_levels_one_is_the_mean_baseline():
    tree = case_tree("A")
    np.testing.assert_allclose(
        raw_values(tree, AdvantageConfig(max_levels=1)),
        raw_values(tree, AdvantageConfig(estimator="reinforce_pp_baseline")),
    )


def test_single_leaf_keeps_its_reward_under_every_option():  # the root level is always there
    tree = tree_from_plain({"leaves": [{"path": ["a", "b"], "reward": -1, "n_tokens": 3}]})
    for options in RAW.values():
        np.testing.assert_array_equal(raw_values(tree, AdvantageConfig(**options)), [-1.0])
    assert raw_values(tree, AdvantageConfig(estimator="grpo"))[0] == pytest.approx(-1.0, abs=2e-6)


def test_unsplit_tree_has_finite_advantages():  # ids without inner nodes gave 0 or NaN
    leaves = [{"path": [i], "reward": r, "n_tokens": 2} for i, r in enumerate([1, -1, -1, -1])]
    tree = tree_from_plain({"leaves": leaves})
    for options in RAW.values():
        expected = [2.0, -2 / 3, -2 / 3, -2 / 3] if "leave_one_out" in options else [1.5, -0.5, -0.5, -0.5]
        np.testing.assert_allclose(raw_values(tree, AdvantageConfig(**options)), expected)


def test_whitening_is_over_the_whole_batch_and_weighted_by_tokens():
    one, two = np.array([1.0, -1.0]), np.array([3.0])
    found = whiten([one, two], [np.array([1, 2]), np.array([3])], shift=True)
    flat = np.array([1, -1, -1, 3, 3, 3.0])
    expected = (flat - flat.mean()) / flat.std(ddof=1)
    np.testing.assert_allclose(np.concatenate(found), expected[[0, 1, 3]])
    unshifted = whiten([one, two], [np.array([1, 2]), np.array([3])], shift=False)
    np.testing.assert_allclose(
        np.concatenate(unshifted), [1 / flat.std(ddof=1), -1 / flat.std(ddof=1), 3 / flat.std(ddof=1)]
    )


def test_segment_whitening_uses_real_lengths():  # the released code takes L tokens for every segment
    tree = case_tree("A")
    for number, node in enumerate(tree.nodes[1:]):
        node.tokens.extend([1] * number)
    config = AdvantageConfig(estimator="segment")
    (found,) = advantages([tree], config)
    raw = raw_values(tree, config)
    flat = [raw[n] for leaf in tree.leaves for n in tree.path(leaf.node)[1:] for _ in tree.nodes[n].tokens]
    expected = (raw[1:] - np.mean(flat)) / np.std(flat, ddof=1)
    np.testing.assert_allclose(found.values[1:], expected, atol=1e-6)


def test_mass_loss_weight_scales_each_leaf():
    tree = case_tree("C")
    (plain,) = advantages([tree], AdvantageConfig())
    (weighted,) = advantages([tree], AdvantageConfig(mass_loss_weight=True))
    np.testing.assert_array_equal(weighted.values, plain.values)
    np.testing.assert_allclose(weighted.weights, 6 * tree.masses())
    for leaf in range(6):
        np.testing.assert_allclose(weighted.along(tree, leaf), plain.along(tree, leaf) * weighted.weights[leaf])


@pytest.mark.parametrize("options", [{}, {"estimator": "segment"}, {"mass_loss_weight": True}])
def test_node_sums_are_sums_over_leaves(options):
    tree = case_tree("C")
    (found,) = advantages([tree], AdvantageConfig(**options))
    positive, negative = np.zeros(len(tree.nodes)), np.zeros(len(tree.nodes))
    for index, leaf in enumerate(tree.leaves):
        path, along = tree.path(leaf.node), found.along(tree, index)
        positive[path] += np.maximum(along, 0)
        negative[path] += np.minimum(along, 0)
    for got, expected in zip(found.node_sums(tree), (positive, negative), strict=True):
        np.testing.assert_allclose(got[1:], expected[1:], atol=1e-12)
    assert isinstance(found, NodeAdvantage) == (options.get("estimator") == "segment")


def test_leave_one_out_with_masses_is_the_mean_of_the_others():
    tree = case_tree("C")
    config = AdvantageConfig(leave_one_out=True, mass_baseline=True, max_levels=1)
    rewards, masses = np.array([leaf.reward for leaf in tree.leaves]), tree.masses()
    expected = [
        rewards[i] - np.average(np.delete(rewards, i), weights=np.delete(masses, i)) for i in range(len(rewards))
    ]
    np.testing.assert_allclose(raw_values(tree, config), expected)


def test_missing_reward_and_bad_plain_forms_are_errors():
    tree = case_tree("A")
    tree.leaves[3].reward = None
    with pytest.raises(ValueError, match="prompt A: leaf 3 has no reward"):
        advantages([tree], AdvantageConfig())
    with pytest.raises(ValueError, match="missing field 'n_tokens'"):
        tree_from_plain({"leaves": [{"path": ["a"], "reward": 1}]})
    twice = [{"path": p, "reward": 1, "n_tokens": 1} for p in (["a", "b"], ["a", "b"])]
    with pytest.raises(ValueError, match="prompt 0: leaf 1: path: the same as that of leaf 0"):
        tree_from_plain({"leaves": twice})


@pytest.mark.parametrize("options", [{}, {"mass_loss_weight": True}])
def test_sequence_mean_weighs_every_leaf_alike(options):
    tree = case_tree("A")
    (found,) = advantages([tree], AdvantageConfig(**options), "sequence_mean")
    masses = tree.masses() * 8 if options else np.ones(8)
    lengths = np.array([4, 6, 8, 2, 5, 3, 7, 5])
    np.testing.assert_allclose(found.weights * lengths, masses)


@pytest.mark.parametrize("estimator", ["treepo", "segment"])
def test_scaled_values_leave_the_weights(estimator):
    tree = case_tree("C")
    (found,) = advantages([tree], AdvantageConfig(estimator=estimator))
    factors = np.linspace(0, 2, 6)
    scaled = found.scaled(factors)
    np.testing.assert_array_equal(scaled.weights, found.weights)
    positive = np.zeros(len(tree.nodes))
    for leaf in range(6):
        np.testing.assert_allclose(scaled.along(tree, leaf), found.along(tree, leaf) * factors[leaf])
        positive[tree.path(tree.leaves[leaf].node)] += np.maximum(scaled.along(tree, leaf), 0)
    np.testing.assert_allclose(scaled.node_sums(tree)[0][1:], positive[1:], atol=1e-12)


def forked_tree(*rewards, roots=2):
    """Roots of 4 tokens that fork once, children of 4 tokens."""
    tree = Tree("p", [1])
    leaves = []
    for _ in range(roots):
        root = tree.add_node(0, 1)
        tree.nodes[root].tokens.extend([2] * 4)
        leaves += [tree.add_node(root, 2) for _ in range(len(rewards) // roots)]
    for node, reward in zip(leaves, rewards, strict=True):
        tree.nodes[node].tokens.extend([3] * 4)
        tree.leaves[tree.add_leaf(node, "eos")].reward = reward
    return tree


def test_subtree_compares_a_node_with_what_is_outside():
    tree = forked_tree(1.0, 0.0, 0.0, 0.0)
    found = {
        baseline: raw_values(tree, AdvantageConfig(estimator="subtree", baseline=baseline))[1:].tolist()
        for baseline in ("mean", "sibling", "kin")
    }
    # Nodes 1 and 2 are the first root and its children, in order of creation: root, leaf, leaf, root, leaf, leaf.
    assert found["sibling"] == pytest.approx([0.5, 1.0, -1.0, -0.5, 0.0, 0.0])
    # A leaf's ancestors: its root without it (one leaf) and the prompt without it (three, of mass 3/4).
    assert found["mean"] == pytest.approx([0.5, 1.0, -2 / 3, -0.5, -1 / 6, -1 / 6])
    assert found["kin"][1] == pytest.approx(1.0 - (1 * 0.0 + 2 * 0.0) / 3)
    assert found["kin"][2] == pytest.approx(0.0 - (1 * 1.0 + 2 * 1 / 3) / 3)


@pytest.mark.parametrize("baseline", ["mean", "sibling", "kin", "blup"])
def test_subtree_of_independent_answers_is_rloo(baseline):
    tree = forked_tree(1.0, 0.0, 0.5, roots=3)
    values = raw_values(tree, AdvantageConfig(estimator="subtree", baseline=baseline))
    expected = raw_values(tree, AdvantageConfig(estimator="rloo"))
    for leaf, value in zip(tree.leaves, expected, strict=True):
        assert values[tree.path(leaf.node)[1:]] == pytest.approx([value, value])


def test_leaves_behind_a_fallback_carry_no_loss():
    tree = forked_tree(1.0, 0.0, 0.0, 0.0)
    (without,) = advantages([tree], AdvantageConfig(estimator="subtree", whiten="none"))
    node = tree.add_node(1, 2, from_fallback=True)
    tree.nodes[node].tokens.extend([3] * 4)
    tree.leaves[tree.add_leaf(node, "eos")].reward = 1.0
    (worth,) = advantages([tree], AdvantageConfig(estimator="subtree", whiten="none"))
    assert worth.weights[-1] == 0
    assert worth.values[:-1] == pytest.approx(without.values)
    assert worth.values[-1] == 0


def test_brownian_values_follow_from_increments():
    """Two roots of two leaves each share 4 of 8 tokens: K = [[1, 1/2], [1/2, 1]] twice, and the mean 1/4."""
    tree = forked_tree(1.0, 0.0, 0.0, 0.0)
    values = raw_values(tree, AdvantageConfig(estimator="brownian"))
    block = np.linalg.inv(np.array([[1, 0.5], [0.5, 1]]))
    alpha = np.concatenate([block @ [0.75, -0.25], block @ [-0.25, -0.25]])
    expected = [alpha[:2].sum(), alpha[0], alpha[1], alpha[2:].sum(), alpha[2], alpha[3]]
    assert values[1:] == pytest.approx(expected, abs=1e-6)


def test_packing_of_trees_and_of_leaves_agree_under_subtree():
    tree = forked_tree(1.0, 0.0, 0.0, 1.0)
    (worth,) = advantages([tree], AdvantageConfig(estimator="subtree"))
    along = np.zeros(len(tree.nodes))
    for leaf in range(len(tree.leaves)):
        along[tree.path(tree.leaves[leaf].node)] += worth.along(tree, leaf)
    assert along == pytest.approx(sum(worth.node_sums(tree)))
