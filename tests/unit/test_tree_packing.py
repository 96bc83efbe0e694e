"""Packing: tree edges equal flat edges, the mask is the ancestor relation, splits keep every edge once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_fake_engine import grow, keyed_draw
from trees import with_turns

from treepo_mcore.config import AdvantageConfig, TreeConfig
from treepo_mcore.learn.advantage import LeafAdvantage, advantages, tree_from_plain
from treepo_mcore.learn.deal import balance, forward_flops, tree_work
from treepo_mcore.learn.packing import pack_flat, pack_trees, split_leaves
from treepo_mcore.model.architecture import read_sizes
from treepo_mcore.model.shards import matrix_parameters
from treepo_mcore.records import PackedSequence
from treepo_mcore.tree.tree import EOS, Tree


def grown(seed: int, width: int = 8, hazard: float = 0.1) -> Tree:
    config = TreeConfig.model_validate(
        {"width": width, "segment_tokens": 4, "max_depth": 5, "fallback": {"cut": "min_logprob_token"}}
    )
    tree, _ = grow(config, keyed_draw(seed, hazard), order=seed)
    for index, leaf in enumerate(tree.leaves):
        leaf.reward = 1.0 if (seed + index) % 3 else -1.0
    return tree


def by_hand(spans: list[tuple[int, int]], leaves: list[int]) -> Tree:
    """Nodes as (parent, length) behind a prompt of two tokens, token ids counting up."""
    tree = Tree("hand", [1, 2])
    for parent, length in spans:
        node = tree.nodes[tree.add_node(parent, tree.nodes[parent].depth + 1)]
        node.tokens.extend(range(10, 10 + length))
        node.logprobs.extend([-0.5] * length)
    for number, node in enumerate(leaves):
        tree.leaves[tree.add_leaf(node, EOS)].reward = float(number)
    return tree


def plain(tree: Tree, values: list[float]) -> LeafAdvantage:
    return LeafAdvantage(np.array(values), np.ones(len(values)))


def edge_table(packed: list[PackedSequence], trees: list[Tree]) -> dict[tuple, list]:
    """(tree, node, offset) -> [multiplicity, A+, A-, target, context, behaviour log-prob], multiplicities summed."""
    table: dict[tuple, list] = {}
    for sequence in packed:
        contexts = contexts_of(sequence)
        for e, key in enumerate(map(tuple, sequence.edge_key.tolist())):
            context = contexts[int(sequence.source[e])]
            node = trees[key[0]].nodes[key[1]]
            assert len(context) == node.start + key[2]
            row = [
                int(sequence.multiplicity[e]),
                float(sequence.adv_pos[e]),
                float(sequence.adv_neg[e]),
                int(sequence.target[e]),
                context,
                float(sequence.behaviour_logprob[e]),
            ]
            if key in table:
                assert table[key][3:] == row[3:]
                table[key][:3] = [a + b for a, b in zip(table[key][:3], row[:3], strict=True)]
            else:
                table[key] = row
    return table


def contexts_of(sequence: PackedSequence) -> list[tuple[int, ...]]:
    """What each packed token sees, by the chain of predecessors."""
    contexts: list[tuple[int, ...]] = []
    for token, parent in zip(sequence.tokens.tolist(), sequence.parent.tolist(), strict=True):
        contexts.append((*(contexts[parent] if parent >= 0 else ()), token))
    return contexts


def visible(sequence: PackedSequence) -> torch.Tensor:
    index = torch.arange(len(sequence.tokens))
    return (index[None, :] <= index[:, None]) & (index[:, None] < sequence.subtree_end[None, :])


def assert_mask_is_ancestry(sequence: PackedSequence) -> None:
    size = len(sequence.tokens)
    expected = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        key = query
        while key >= 0:
            expected[query, key] = True
            key = int(sequence.parent[key])
    assert torch.equal(visible(sequence), expected)
    assert torch.equal(sequence.positions, expected.sum(dim=1) - 1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.sampled_from([{}, {"estimator": "segment"}, {"mass_loss_weight": True}]),
    st.integers(24, 200),
)
def test_tree_edges_equal_flat_edges_at_any_budget(seed, count, options, budget):
    trees = [grown(seed + number, hazard=0.05 * (number + 1)) for number in range(count)]
    values = advantages(trees, AdvantageConfig(**options))
    packed, flat = pack_trees(trees, values, budget), pack_flat(trees, values, budget)
    for sequence in packed + flat:
        assert len(sequence.tokens) <= budget
        assert_mask_is_ancestry(sequence)
    keys = [tuple(key) for sequence in packed for key in sequence.edge_key.tolist()]
    assert len(set(keys)) == len(keys) == sum(tree.unique_tokens for tree in trees)
    one, other = edge_table(packed, trees), edge_table(flat, trees)
    assert one.keys() == other.keys()
    for key, row in one.items():
        assert row[0] == other[key][0]
        assert row[1:3] == pytest.approx(other[key][1:3], abs=1e-5)
        assert row[3:] == other[key][3:]


def test_values_of_a_tree_by_hand():
    tree = by_hand([(0, 2), (1, 1), (1, 2), (0, 1)], [2, 3, 4])
    (packed,) = pack_trees([tree], [plain(tree, [1.0, -2.0, 3.0])], 100)
    assert packed.tokens.tolist() == [1, 2, 10, 11, 10, 10, 11, 10]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 4, 5, 2]
    assert packed.parent.tolist() == [-1, 0, 1, 2, 3, 3, 5, 1]
    assert packed.subtree_end.tolist() == [8, 8, 7, 7, 5, 7, 7, 8]
    assert packed.source.tolist() == [1, 2, 3, 3, 5, 1]
    assert packed.target.tolist() == [10, 11, 10, 10, 11, 10]
    assert packed.multiplicity.tolist() == [2, 2, 1, 1, 1, 1]
    assert packed.adv_pos.tolist() == [1, 1, 1, 0, 0, 3]
    assert packed.adv_neg.tolist() == [-2, -2, 0, -2, -2, 0]
    assert packed.edge_key.tolist() == [[0, 1, 0], [0, 1, 1], [0, 2, 0], [0, 3, 0], [0, 3, 1], [0, 4, 0]]
    assert packed.behaviour_logprob.tolist() == [-0.5] * 6
    assert {packed.tokens.dtype, packed.source.dtype, packed.edge_key.dtype} == {torch.int64}
    assert {packed.adv_pos.dtype, packed.adv_neg.dtype, packed.behaviour_logprob.dtype} == {torch.float32}


def test_only_stored_tokens_are_trained():  # masks come from lengths, never from looking for EOS or padding
    tree = by_hand([(0, 3), (0, 2)], [1, 2])
    for packed in (pack_trees, pack_flat):
        sequences = packed([tree], [plain(tree, [1.0, -1.0])], 100)
        assert sum(len(sequence.target) for sequence in sequences) == 5


def test_a_tree_is_split_where_the_fewest_tokens_repeat():
    # Two branches of 10 behind the prompt, each with two leaves of 3; both fit in 20, three leaves do not.
    tree = by_hand([(0, 10), (0, 10), (1, 3), (1, 3), (2, 3), (2, 3)], [3, 4, 5, 6])
    assert split_leaves(tree, [0, 1, 2, 3], 20) == [(0, 2), (2, 4)]
    packed = pack_trees([tree], [plain(tree, [1.0] * 4)], 20)
    assert sum(len(sequence.tokens) for sequence in packed) == 2 + 2 + tree.unique_tokens
    assert sum(len(sequence.target) for sequence in packed) == tree.unique_tokens


def test_a_cut_avoids_the_longer_shared_prefix():
    # Filling up from the left would part the last two leaves and repeat 12 tokens; parting the first two repeats 2.
    tree = by_hand([(0, 3), (0, 10), (2, 3), (2, 3)], [1, 3, 4])
    assert split_leaves(tree, [0, 1, 2], 18) == [(0, 1), (1, 3)]


def test_empty_nodes_do_not_break_the_chain():
    leaves = [{"path": [1, 2, 3], "reward": 1, "n_tokens": 2}, {"path": [4, 5], "reward": -1, "n_tokens": 1}]
    tree = tree_from_plain({"leaves": leaves})
    (packed,) = pack_trees([tree], [plain(tree, [1.0, -1.0])], 4)
    assert packed.parent.tolist() == [-1, 0, 1, 0]
    assert packed.source.tolist() == [0, 1, 0]
    assert_mask_is_ancestry(packed)


def test_a_split_branch_repeats_its_ancestors_without_edges():
    tree = by_hand([(0, 10), (1, 5), (1, 5)], [2, 3])
    packed = pack_trees([tree], [plain(tree, [1.0, -1.0])], 17)
    assert sorted(len(sequence.target) for sequence in packed) == [5, 15]
    first = max(packed, key=lambda sequence: len(sequence.target))
    assert first.adv_neg[:10].tolist() == [-1.0] * 10  # of both leaves, though one lies in another sequence
    assert first.multiplicity[:10].tolist() == [2] * 10


def test_small_trees_share_a_sequence_and_do_not_see_each_other():
    trees = [by_hand([(0, 3)], [1]) for _ in range(3)]
    packed = pack_trees(trees, [plain(tree, [1.0]) for tree in trees], 10)
    assert sorted(len(sequence.tokens) for sequence in packed) == [5, 10]
    for sequence in packed:
        assert_mask_is_ancestry(sequence)


def test_a_pipeline_gets_more_and_shorter_sequences():
    trees = [by_hand([(0, size)], [1]) for size in (3, 3, 3, 3, 9)]
    worth = [plain(tree, [1.0]) for tree in trees]
    for pack in (pack_trees, pack_flat):
        assert [len(s.tokens) for s in pack(trees, worth, 100)] == [31]
        assert [len(s.tokens) for s in pack(trees, worth, 100, 2)] == [15, 16]
        assert [len(s.tokens) for s in pack(trees, worth, 100, 4)] == [5, 10, 11, 5]  # short ones at both ends
        assert [len(s.tokens) for s in pack(trees, worth, 100, 9)] == [5, 5, 5, 11, 5]  # no tree is split
        assert [len(s.tokens) for s in pack(trees, worth, 12, 1)] == [10, 11, 10]


def test_a_path_longer_than_the_budget_is_named():
    tree = by_hand([(0, 10), (1, 5)], [2])
    for pack in (pack_trees, pack_flat):
        with pytest.raises(ValueError, match=r"prompt hand: a path of 17 tokens .* actor.micro_batch_tokens = 16"):
            pack([tree], [plain(tree, [1.0])], 16)


def test_dead_branches_are_left_out():
    tree = by_hand([(0, 2), (0, 7), (2, 1)], [1])
    (packed,) = pack_trees([tree], [plain(tree, [1.0])], 100)
    assert packed.tokens.tolist() == [1, 2, 10, 11]


def test_order_of_siblings_does_not_matter():
    spans, leaves = [(0, 2), (1, 1), (1, 2), (0, 4)], [2, 3, 4]
    tree = by_hand(spans, leaves)
    turned = by_hand([(0, 4), (0, 2), (2, 2), (2, 1)], [4, 3, 1])
    rows = []
    for one in (tree, turned):
        packed = pack_trees([one], [plain(one, [1.0, -2.0, 3.0])], 8)
        rows.append(sorted(map(repr, edge_table(packed, [one]).values())))
    assert rows[0] == rows[1]


def test_balance_is_even_and_deterministic():
    trees = [by_hand([(0, size)], [1]) for size in (50, 3, 20, 20, 41, 8)]
    assert [tree_work(tree, 0) for tree in trees[:2]] == [52 * 53 // 2, 5 * 6 // 2]
    for linear in (0, 1e6):
        shares = balance(trees, 2, linear)
        assert shares == balance(trees, 2, linear)
        assert sorted(shares[0] + shares[1]) == list(range(6))
        loads = [sum(tree_work(trees[index], linear) for index in share) for share in shares]
        assert max(loads) < 1.1 * min(loads)
    assert balance(trees[:1], 3, 0) == [[0], [], []]
    assert balance(trees[:2], 3, 0, first=2) == [[1], [], [0]]


def test_balance_weighs_what_is_packed():
    tree = by_hand([(0, 2), (0, 700), (2, 1)], [1])
    (packed,) = pack_trees([tree], [plain(tree, [1.0])], 100)
    seen = int((packed.positions + 1).sum())
    assert tree_work(tree, 10) == seen + 10 * len(packed.tokens)


def test_turns_of_the_environment_have_no_edges_and_arrays_lie_with_their_tokens():
    tree = with_turns()
    worth = LeafAdvantage(np.array([1.0, -1.0]), np.ones(2))
    for pack in (pack_trees, pack_flat):
        sequences = pack([tree], [worth], 100)
        targets = sorted({int(t) for s in sequences for t in s.target})
        assert targets == [10, 11, 12, 13, 30, 40, 41]  # nothing of node 2
        for sequence in sequences:
            first = sequence.source[sequence.target == 30]
            assert (sequence.tokens[first] == 22).all()  # the policy goes on behind the environment's last token
            assert sequence.arrays["version"].shape == sequence.tokens.shape
            assert (sequence.arrays["version"] == torch.where(sequence.tokens < 10, 0, sequence.tokens // 10)).all()
            assert sequence.arrays["experts"].shape == (len(sequence.tokens), 2)
    del tree.nodes[2].arrays["version"]
    with pytest.raises(ValueError, match="prompt turns: a node without the array 'version'"):
        pack_trees([tree], [worth], 100)


MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"


def test_flops_of_a_chain_and_of_what_a_tree_saves():
    """Two a weight and token, four a pair of query and key and element of all heads."""
    sizes = read_sizes(MODELS / "Llama-3.1-70B")
    prompt, answer = 2, 5
    chain = by_hand([(0, answer)], [1])
    tokens = prompt + answer
    pairs = tokens * (tokens + 1) // 2
    layer = 2 * tokens * matrix_parameters(sizes) / sizes.layers + 4 * pairs * sizes.heads * sizes.head_dim
    expected = sizes.layers * layer + 2 * answer * sizes.vocab * sizes.hidden
    assert forward_flops([chain], sizes) == pytest.approx(expected)
    assert forward_flops([chain, chain], sizes) == pytest.approx(2 * expected)
    forked = by_hand([(0, 3), (1, 2), (1, 2)], [2, 3])  # two such answers that share three tokens
    saved = 2 * expected - forward_flops([forked], sizes)
    shared = by_hand([(0, 3)], [1])
    assert saved == pytest.approx(forward_flops([shared], sizes))
