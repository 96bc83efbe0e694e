"""Trees to packed sequences: every unique token once, with the two loss scalars of each edge (docs/algorithm.md 5).

A sequence holds nodes in depth-first order. A key is visible to a query iff it lies on the query's path, which in
this order is an interval test: ``key <= query < subtree_end[key]``. The token behind a node depends on the child, so
predictions are edges: from the packed index of the last token of the context to the target token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from treepo_mcore.records import Advantage, PackedSequence
from treepo_mcore.registry import resolve
from treepo_mcore.tree.tree import Tree


@dataclass(frozen=True)
class _Span:
    """A node in a piece."""

    node: int
    parent: int  # index of the parent's span in the piece, -1 for the prompt
    trained: bool  # its edges are in this piece


@dataclass(frozen=True)
class _Piece:
    """Part of a tree that goes into one sequence as a whole: spans in depth-first order."""

    tree: int
    spans: list[_Span]
    tokens: int
    values: tuple[np.ndarray, ...]  # multiplicity, A+, A-, weight of each span


def pack_trees(
    trees: Sequence[Tree], advantages: Sequence[Advantage], budget_tokens: int, least: int = 1
) -> list[PackedSequence]:
    """Pack unique tokens, at most `budget_tokens` a sequence; every edge is in exactly one sequence.

    Small trees share a sequence. A larger one is split where the fewest ancestor tokens repeat; a repeated token
    carries no edge. What no leaf is below of is left out. Raises ValueError when one path exceeds the budget.

    least: sequences to aim at, so that the stages of a pipeline have something to do; no tree is split for it.
    """
    pieces: list[_Piece] = []
    for index, (tree, advantage) in enumerate(zip(trees, advantages, strict=True)):
        positive, negative = advantage.node_sums(tree)
        counts, weights = tree.leaf_counts(), tree.sums_below(advantage.weights)
        leaves = _leaves_in_order(tree)
        seen: set[int] = set()
        for first, last in split_leaves(tree, leaves, budget_tokens):
            spans = _spans(tree, leaves[first:last], seen)
            nodes = [span.node for span in spans]
            seen.update(nodes)
            values = (counts[nodes], positive[nodes], negative[nodes], weights[nodes])
            pieces.append(_Piece(index, spans, _size(tree, spans), values))
    return [_lay_out(trees, group) for group in _fill(pieces, budget_tokens, least)]


def pack_flat(
    trees: Sequence[Tree], advantages: Sequence[Advantage], budget_tokens: int, least: int = 1
) -> list[PackedSequence]:
    """Pack every leaf with its own copy of prompt and response: the baseline that `pack_trees` has to equal.

    An edge of a shared node comes once per leaf, with that leaf's advantage and multiplicity 1.
    Raises ValueError when one path exceeds the budget.
    """
    pieces: list[_Piece] = []
    for index, (tree, advantage) in enumerate(zip(trees, advantages, strict=True)):
        for leaf in _leaves_in_order(tree):
            _check_fits(tree, leaf, budget_tokens)
            spans = _spans(tree, [leaf], set())
            along = advantage.along(tree, leaf)
            ones = np.ones(len(spans), dtype=np.int64)
            values = (ones, np.maximum(along, 0), np.minimum(along, 0), ones * advantage.weights[leaf])
            pieces.append(_Piece(index, spans, _size(tree, spans), values))
    return [_lay_out(trees, group) for group in _fill(pieces, budget_tokens, least)]


PACKINGS = {"tree": pack_trees, "flat": pack_flat}
Pack = Callable[[Sequence[Tree], Sequence[Advantage], int, int], list[PackedSequence]]  # see `pack_trees`


def find_packing(name: str) -> Pack:
    """Of `PACKINGS`, or a function of the user's. Raises `ConfigError` where there is none."""
    parameters = ("trees", "advantages", "budget_tokens", "least")
    return resolve("actor.packing", name, PACKINGS, lambda function: function, parameters)


def split_leaves(tree: Tree, leaves: Sequence[int], budget_tokens: int) -> list[tuple[int, int]]:
    """Cut depth-first ordered leaves into ranges whose paths together fit the budget, repeating the fewest tokens.

    A cut repeats the tokens that its two neighbours share, so this is a shortest path over the cuts.
    """
    lengths = [tree.nodes[tree.leaves[leaf].node].end for leaf in leaves]
    shared = [0] + [_shared_tokens(tree, a, b) for a, b in pairwise(leaves)]
    total = len(leaves)
    cost = [0.0] + [float("inf")] * total  # tokens repeated by the best cut of the first leaves
    begin = [0] * (total + 1)
    for first in range(total):
        _check_fits(tree, leaves[first], budget_tokens)
        size = shared[first]
        for last in range(first, total):
            size += lengths[last] - shared[last]
            if size > budget_tokens:
                break
            if cost[first] + shared[first] < cost[last + 1]:
                cost[last + 1], begin[last + 1] = cost[first] + shared[first], first
    ranges = []
    last = total
    while last:
        ranges.append((begin[last], last))
        last = begin[last]
    return ranges[::-1]


def _shared_tokens(tree: Tree, one: int, other: int) -> int:
    shared = 0
    for a, b in zip(tree.path(tree.leaves[one].node), tree.path(tree.leaves[other].node), strict=False):
        if a != b:
            break
        shared = tree.nodes[a].end
    return shared


def _leaves_in_order(tree: Tree) -> list[int]:
    found = (tree.leaf_at(node) for node in tree.depth_first())
    return [leaf for leaf in found if leaf is not None]


def _spans(tree: Tree, leaves: Sequence[int], seen: set[int]) -> list[_Span]:
    """The union of the leaves' paths, depth first; nodes of `seen` are not trained again, and some never are."""
    index: dict[int, int] = {-1: -1}
    spans: list[_Span] = []
    for leaf in leaves:
        for node in tree.path(tree.leaves[leaf].node):
            if node not in index:
                index[node] = len(spans)
                trained = tree.nodes[node].trained and node not in seen
                spans.append(_Span(node, index[tree.nodes[node].parent], trained))
    return spans


def _size(tree: Tree, spans: Sequence[_Span]) -> int:
    return sum(len(tree.nodes[span.node].tokens) for span in spans)


def _check_fits(tree: Tree, leaf: int, budget_tokens: int) -> None:
    length = tree.nodes[tree.leaves[leaf].node].end
    if length > budget_tokens:
        raise ValueError(
            f"prompt {tree.prompt_id}: a path of {length} tokens exceeds actor.micro_batch_tokens = {budget_tokens}"
        )


def _fill(pieces: Sequence[_Piece], budget_tokens: int, least: int) -> list[list[_Piece]]:
    """Largest first, each into the group with most room; `least` groups, if there are as many pieces, and as many more
    as the budget takes. The smallest group comes first and the next one last: a pipeline fills and drains with them.
    """
    total = sum(piece.tokens for piece in pieces)
    count = max(math.ceil(total / budget_tokens), min(least, len(pieces)))
    groups: list[list[_Piece]] = [[] for _ in range(count)]
    loads = [0] * count
    for piece in sorted(pieces, key=lambda piece: -piece.tokens):
        group = loads.index(min(loads))
        if loads[group] + piece.tokens > budget_tokens:
            group = len(groups)
            groups.append([])
            loads.append(0)
        groups[group].append(piece)
        loads[group] += piece.tokens
    ordered = [groups[i] for i in sorted(range(len(groups)), key=lambda i: loads[i])]
    return ordered[:1] + ordered[2:] + ordered[1:2]


def _lay_out(trees: Sequence[Tree], pieces: Sequence[_Piece]) -> PackedSequence:
    """Concatenate pieces. Work per node is a handful of array calls, so large trees stay cheap."""
    tokens: list[np.ndarray] = []
    logprobs: list[np.ndarray] = []
    table: list[tuple[int, ...]] = []  # see `columns`
    values: list[np.ndarray] = []
    base = 0
    for piece in pieces:
        nodes = trees[piece.tree].nodes
        ends = _subtree_ends(piece, trees[piece.tree], base)
        last: list[int] = []  # packed index of the last token at or above each span
        for span, end in zip(piece.spans, ends, strict=True):
            node = nodes[span.node]
            size = len(node.tokens)
            before = last[span.parent] if span.parent >= 0 else -1
            table.append((size, base, before, node.start, end, piece.tree, span.node, span.trained))
            tokens.append(np.frombuffer(node.tokens, dtype=np.int32))
            if span.trained:
                logprobs.append(np.frombuffer(node.logprobs, dtype=np.float32))
            base += size
            last.append(base - 1 if size else before)
        values.append(np.stack(piece.values, axis=1))
    columns = np.array(table, dtype=np.int64)
    sizes, trained = columns[:, 0], columns[:, 7] > 0
    per_token = np.repeat(columns[:, 1:5], sizes, axis=0)
    offset = np.arange(base) - per_token[:, 0]
    parent = np.where(offset == 0, per_token[:, 1], np.arange(base) - 1)
    token_ids = np.concatenate(tokens).astype(np.int64)
    edges = np.repeat(trained, sizes)
    edge_values = np.repeat(np.concatenate(values)[trained], sizes[trained], axis=0)
    edge_key = np.column_stack([np.repeat(columns[trained, 5:7], sizes[trained], axis=0), offset[edges]])
    return PackedSequence(
        arrays=_joined_arrays(trees, pieces),
        tokens=torch.from_numpy(token_ids),
        positions=torch.from_numpy(per_token[:, 2] + offset),
        parent=torch.from_numpy(parent),
        subtree_end=torch.from_numpy(per_token[:, 3].copy()),
        source=torch.from_numpy(parent[edges]),
        target=torch.from_numpy(token_ids[edges]),
        multiplicity=torch.from_numpy(edge_values[:, 0].astype(np.int64)),
        adv_pos=torch.from_numpy(edge_values[:, 1].astype(np.float32)),
        adv_neg=torch.from_numpy(edge_values[:, 2].astype(np.float32)),
        weight=torch.from_numpy(edge_values[:, 3].astype(np.float32)),
        behaviour_logprob=torch.from_numpy(np.concatenate([*logprobs, np.empty(0, np.float32)])),
        edge_key=torch.from_numpy(edge_key),
    )


def _joined_arrays(trees: Sequence[Tree], pieces: Sequence[_Piece]) -> dict[str, torch.Tensor]:
    """Named per-token arrays of all spans, in order. Raises ValueError where some nodes have one and others lack it."""
    nodes = [(trees[piece.tree], trees[piece.tree].nodes[span.node]) for piece in pieces for span in piece.spans]
    names = sorted({name for _, node in nodes for name in node.arrays})
    for tree, node in nodes:
        for name in names:
            if name not in node.arrays:
                raise ValueError(f"prompt {tree.prompt_id}: a node without the array {name!r}, which others have")
    return {name: torch.from_numpy(np.concatenate([node.arrays[name] for _, node in nodes])) for name in names}


def _subtree_ends(piece: _Piece, tree: Tree, base: int) -> list[int]:
    """One past the last packed index below each span, when the piece starts at `base`."""
    ends = []
    for span in piece.spans:
        base += len(tree.nodes[span.node].tokens)
        ends.append(base)
    for index in range(len(ends) - 1, 0, -1):
        above = piece.spans[index].parent
        if above >= 0:
            ends[above] = max(ends[above], ends[index])
    return ends
