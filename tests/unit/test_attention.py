"""Tree attention: chain equals dense in values and gradients, and nothing leaks between siblings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import random_tree

from treepo_mcore.actor.attention import ChainAttention, ancestor_mask, dense_attention, find_chains
from treepo_mcore.learn.advantage import LeafAdvantage
from treepo_mcore.learn.packing import pack_trees
from treepo_mcore.tree.tree import PROMPT, Tree

HEAD = 8
SCALE = HEAD**-0.5


def packed(trees):
    worth = [LeafAdvantage(torch.zeros(len(t.leaves)).numpy(), torch.ones(len(t.leaves)).numpy()) for t in trees]
    (sequence,) = pack_trees(trees, worth, 10**6)
    return sequence


def inputs(size, heads, groups, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, h, HEAD, generator=draw).requires_grad_() for h in (heads, groups, groups)]


def attend(name, sequence, q, k, v):
    index = torch.arange(len(sequence.tokens))
    if name == "dense":
        return dense_attention(q, k, v, ancestor_mask(sequence.subtree_end, index), SCALE)
    short = {"chain": 64, "chain in parts": 0}[name]
    follows = (sequence.parent == index - 1) & (index > 0)
    return ChainAttention.apply(q, k, v, find_chains(follows, sequence.subtree_end, index, short), SCALE)


def by_hand(sequence, q, k, v):
    """Every query walks up to its root."""
    repeat = q.shape[1] // k.shape[1]
    rows = []
    for index in range(len(sequence.parent)):
        seen, at = [], index
        while at >= 0:
            seen.append(at)
            at = int(sequence.parent[at])
        keys = k[seen].repeat_interleave(repeat, 1)
        weights = torch.einsum("hd,khd->hk", q[index], keys).mul(SCALE).softmax(-1)
        rows.append(torch.einsum("hk,khd->hd", weights, v[seen].repeat_interleave(repeat, 1)))
    return torch.stack(rows)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
    st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)]),
    st.integers(1, 9),
)
def test_chain_dense_and_the_definition_agree(seeds, heads, leaves):
    sequence = packed([random_tree(seed, leaves=leaves) for seed in seeds])
    gradients, outputs = [], []
    for name in ("dense", "chain", "chain in parts", "by hand"):
        q, k, v = inputs(len(sequence.tokens), *heads, seed=seeds[0])
        out = by_hand(sequence, q, k, v) if name == "by hand" else attend(name, sequence, q, k, v)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
        outputs.append(out.detach())
        gradients.append([q.grad, k.grad, v.grad])
    for out, grads in zip(outputs[:-1], gradients[:-1], strict=True):
        torch.testing.assert_close(out, outputs[-1], rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(grads, gradients[-1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "chain", "chain in parts"])
def test_a_token_changes_only_what_descends_from_it(name):
    sequence = packed([random_tree(3, leaves=8), random_tree(4)])
    q, k, v = inputs(len(sequence.tokens), 4, 2, seed=0)
    with torch.no_grad():
        before = attend(name, sequence, q, k, v)
        for changed in range(0, len(sequence.tokens), 3):
            new_k, new_v = k.clone(), v.clone()
            new_k[changed] += 3
            new_v[changed] -= 5
            after = attend(name, sequence, q, new_k, new_v)
            differs = (after != before).flatten(1).any(1).nonzero()[:, 0].tolist()
            assert differs == list(range(changed, int(sequence.subtree_end[changed])))


@pytest.mark.parametrize("name", ["dense", "chain", "chain in parts"])
def test_the_order_of_siblings_changes_nothing(name):
    trees = random_tree(5, leaves=8), reversed_children(random_tree(5, leaves=8))
    tables = []
    for tree in trees:
        sequence = packed([tree])
        contexts = [context(sequence, i) for i in range(len(sequence.tokens))]
        # Queries, keys and values that depend on nothing but a token's context.
        made = [inputs(1, 4, 2, seed=hash(c) % 2**31) for c in contexts]
        q, k, v = (torch.cat([one[part] for one in made]) for part in range(3))
        with torch.no_grad():
            out = attend(name, sequence, q, k, v)
        tables.append(dict(zip(contexts, out, strict=True)))
    assert list(tables[0]) != list(tables[1])
    assert tables[0].keys() == tables[1].keys()
    for key in tables[0]:
        torch.testing.assert_close(tables[0][key], tables[1][key], rtol=1e-5, atol=1e-6)


def context(sequence, index):
    tokens = []
    while index >= 0:
        tokens.append(int(sequence.tokens[index]))
        index = int(sequence.parent[index])
    return tuple(tokens)


def reversed_children(tree):
    other = Tree(tree.prompt_id, tree.nodes[PROMPT].tokens)
    copy_below(tree, PROMPT, other, PROMPT)
    return other


def copy_below(tree, node, other, target):
    for child in reversed(tree.children(node)):
        new = other.add_node(target, tree.nodes[child].depth)
        other.nodes[new].tokens, other.nodes[new].logprobs = tree.nodes[child].tokens, tree.nodes[child].logprobs
        leaf = tree.leaf_at(child)
        if leaf is None:
            copy_below(tree, child, other, new)
        else:
            other.leaves[other.add_leaf(new, tree.leaves[leaf].reason)].reward = tree.leaves[leaf].reward
