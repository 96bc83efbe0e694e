"""Who trains what: whole trees dealt to data-parallel ranks, evened out by what they cost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from treepo_mcore.model.shards import token_work
from treepo_mcore.model.sizes import Sizes
from treepo_mcore.tree.tree import Tree


def balance(trees: Sequence[Tree], ranks: int, token_work: float, first: int = 0) -> list[list[int]]:
    """Indices of whole trees for each data-parallel rank, evened out by `tree_work`.

    The largest tree goes to the least loaded rank, and so on; ties go by index, from rank `first` on: another one in
    every mini-batch, or the same ranks would have the remainder each time. A rank's indices are in order.
    """
    work = [tree_work(tree, token_work) for tree in trees]
    loads = [(0.0, turn) for turn in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(trees)), key=lambda i: -work[i]):
        load, turn = heapq.heappop(loads)
        shares[(first + turn) % ranks].append(index)
        heapq.heappush(loads, (load + work[index], turn))
    return [sorted(share) for share in shares]


def tree_work(tree: Tree, token_work: float) -> float:
    """What a packed tree costs, in query-key pairs: the tokens that each of its tokens sees, itself included, and
    `token_work` for the linear layers of each.
    """
    work = 0.0
    for node, leaves in zip(tree.nodes, tree.leaf_counts(), strict=True):
        if leaves:
            size = len(node.tokens)
            work += size * node.start + size * (size + 1) // 2 + size * token_work
    return work


def forward_flops(trees: Sequence[Tree], sizes: Sizes) -> float:
    """Of one pass over packed trees: layers for every unique token, the output layer for those that are predicted."""
    pairs = sum(tree_work(tree, token_work(sizes)) for tree in trees)
    predicted = sum(tree.unique_tokens for tree in trees)
    return 4 * pairs * sizes.heads * sizes.head_dim * sizes.layers + 2 * predicted * sizes.vocab * sizes.hidden
