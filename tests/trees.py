"""Random trees with rewards, and their paths."""

from __future__ import annotations

import random
from array import array

import numpy as np

from treepo_mcore.records import Batch, Counts, Step
from treepo_mcore.tree.tree import ENVIRONMENT, EOS, POLICY, PROMPT, Tree

VOCAB = 330


def random_tree(seed: int, leaves: int = 6, segment: int = 6, prompt: int = 8, first_token: int = 4) -> Tree:
    """Up to `leaves` leaves below nodes of 1 to `segment` tokens; rewards of both signs, whatever the path is."""
    draw = random.Random(seed)
    tree = Tree(f"tree-{seed}", _tokens(draw, draw.randint(2, prompt), first_token))
    open_nodes = [PROMPT]
    while open_nodes:
        parent = open_nodes.pop(draw.randrange(len(open_nodes)))
        room = leaves - len(tree.leaves) - len(open_nodes)
        children = draw.choice((1, 2, 2, 3)) if room > 1 else 1
        for _ in range(max(1, min(children, room))):
            node = tree.add_node(parent, tree.nodes[parent].depth + 1)
            size = draw.randint(1, segment)
            tree.nodes[node].tokens = array("i", _tokens(draw, size, first_token))
            tree.nodes[node].logprobs = array("f", [-draw.random() for _ in range(size)])
            if (tree.nodes[node].depth >= 2 and draw.random() < 0.4) or tree.nodes[node].depth == 5:
                tree.add_leaf(node, EOS)
            else:
                open_nodes.append(node)
    for index, leaf in enumerate(tree.leaves):
        leaf.correct = index == 0 or (index > 1 and draw.random() < 0.4)
        leaf.score = float(leaf.correct)
        leaf.reward = 1.0 if leaf.correct else -1.0
    return tree.canonical()


def path_of(tree: Tree, leaf: int) -> list[int]:
    """Tokens of prompt and response."""
    return tree.context(tree.leaves[leaf].node)


def _tokens(draw: random.Random, count: int, first: int) -> list[int]:
    return [draw.randrange(first, VOCAB) for _ in range(count)]


def step_of(trees, number=0):
    """A step that keeps all of its trees."""
    return Step(number, Batch(trees, number, Counts()), kept=trees)


def with_turns() -> Tree:
    """A prompt, a policy's segment, an environment's answer, two policy's segments behind it; arrays on every node."""
    tree = Tree("turns", [1, 2])
    asked = tree.add_node(PROMPT, 1)
    told = tree.add_node(asked, 2, source=ENVIRONMENT)
    ends = [tree.add_node(told, 3) for _ in range(2)]
    for node, size in ((asked, 4), (told, 3), (ends[0], 1), (ends[1], 2)):
        tree.nodes[node].tokens = array("i", range(10 * node, 10 * node + size))
        if tree.nodes[node].source == POLICY:
            tree.nodes[node].logprobs = array("f", [-0.5] * size)
    for node in tree.nodes[2:]:
        node.start = tree.nodes[node.parent].end
    for number, node in enumerate(tree.nodes):
        size = len(node.tokens)
        node.arrays = {
            "version": np.full(size, number, np.int64),
            "experts": np.arange(2 * size, dtype=np.int16).reshape(size, 2),
        }
    for end in ends:
        tree.leaves[tree.add_leaf(end, EOS)].reward = float(end)
    return tree
