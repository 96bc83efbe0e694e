"""On an automaton whose policy gradient is known exactly: which estimators have it as their mean, on which trees."""

import random
from functools import cache
from itertools import product

import numpy as np
import pytest

from treepo_mcore.config import AdvantageConfig, TreeConfig
from treepo_mcore.grow.sampler import TreeSampler
from treepo_mcore.grow.schedule import Fork
from treepo_mcore.grow.stopping import RuleStopper
from treepo_mcore.learn.advantage import advantages
from treepo_mcore.tree.tree import Tree

EOS_TOKEN, LONGEST, TREES = 0, 8, 2000
# Logits of EOS, of staying and of changing sides, by position and side. Whoever is on side 0 at the end is right; on
# side 1 answers are longer, so that budget goes from right answers to wrong ones.
LOGITS = np.zeros((LONGEST, 2, 3))
LOGITS[:, 0, EOS_TOKEN], LOGITS[:, 1, EOS_TOKEN] = -0.8, -2.0
LOGITS[0, :, EOS_TOKEN] = -6.0
LOGITS[:, 0, 2], LOGITS[:, 1, 2] = np.linspace(0.6, -1.5, LONGEST), -0.4
POLICY = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)


def exact_gradient():
    """Of the probability of a right answer, by dynamic programming: float64[position, side, token]."""
    value = np.zeros((LONGEST + 1, 2))
    value[LONGEST] = 1.0, 0.0
    q = np.zeros((LONGEST, 2, 3))
    for t in reversed(range(LONGEST)):
        for side in (0, 1):
            q[t, side] = 1.0 - side, value[t + 1, side], value[t + 1, 1 - side]
        value[t] = (POLICY[t] * q[t]).sum(-1)
    reached = np.zeros((LONGEST + 1, 2))
    reached[0, 0] = 1.0
    for t in range(LONGEST):
        stay, change = reached[t] * POLICY[t, :, 1], reached[t] * POLICY[t, :, 2]
        reached[t + 1] = stay + change[::-1]
    return reached[:LONGEST, :, None] * POLICY * (q - value[:LONGEST, :, None])


def states(response):
    """(position, side, token) of each token."""
    side, found = 0, []
    for t, token in enumerate(response):
        found.append((t, side, token))
        side ^= token == 2
    return found


def grown(config, forks, seed):
    """A tree of the automaton, scored."""
    rng = random.Random(seed)
    sampler = TreeSampler(Tree("p", [9]), config, RuleStopper(config.stopping, None), (seed, 0, 0), forks=forks)
    waiting = list(sampler.start().submit)
    while waiting:
        request = waiting.pop(0)
        response = list(request.context[1:])
        side, tokens, finish = sum(token == 2 for token in response) % 2, [], None
        while finish is None:
            token = rng.choices((0, 1, 2), POLICY[len(response), side])[0]
            response.append(token)
            tokens.append(token)
            side ^= token == 2
            finish = "stop" if token == EOS_TOKEN else "length" if len(tokens) == request.max_tokens else None
        waiting += sampler.on_tokens(request.id, tokens, [-1.0] * len(tokens), finish).submit
    for index, leaf in enumerate(sampler.tree.leaves):
        leaf.reward = leaf.score = float(sum(token == 2 for token in sampler.tree.response(index)) % 2 == 0)
    return sampler.tree


def scores(tree, direction):
    """Of each node's tokens, the gradients of their log-probs along a direction: float64[nodes, positions]."""
    found = np.zeros((len(tree.nodes), LONGEST))
    for node in range(1, len(tree.nodes)):
        before = tree.context(tree.nodes[node].parent)[1:]
        for t, side, token in states([*before, *tree.nodes[node].tokens])[len(before) :]:
            found[node, t] = direction[t, side, token] - POLICY[t, side] @ direction[t, side]
    return found


SHAPES = {
    "flat": ({}, [(0, 6)]),
    "fork once": ({}, [(0, 3), (2, 6)]),
    "late forks": ({}, [(0, 2), (2, 3), (4, 6)]),
    "budget transfer": ({"max_response_tokens": LONGEST}, None),
    "heaviest": ({"branching": {"allocation": "heaviest"}}, [(0, 2), (2, 5), (3, 6)]),
    "uneven": ({"branching": {"factor": [2, 3], "first": [2, 4]}}, None),
    "fallback": ({"fallback": {"candidates": "random_all"}}, None),
}


@cache
def forest(shape):
    """Trees with the scores of their nodes along the exact gradient, over its own size at each position."""
    options, forks = SHAPES[shape]
    fallback = {"candidates": "none"} if shape != "fallback" else {}
    tree = {"width": 6, "segment_tokens": 2, "max_depth": 4, "fallback": fallback} | options
    config = TreeConfig.model_validate(tree | {"stopping": {"repetition_count": 0, "boxed": "none"}})
    trees = [grown(config, forks and tuple(Fork(*fork) for fork in forks), seed) for seed in range(TREES)]
    exact = exact_gradient()
    return [(tree, scores(tree, exact) / (exact**2).sum((1, 2))) for tree in trees]


def deviations(shape, **estimator):
    """Of the estimates' mean from the exact gradient, along it, in standard errors by position."""
    config = AdvantageConfig(whiten="none", **estimator)
    found = []
    for tree, along in forest(shape):
        (worth,) = advantages([tree], config)
        found.append(sum(worth.node_sums(tree)) @ along / len(tree.leaves))
    return (np.mean(found, 0) - 1) / (np.std(found, 0) / np.sqrt(len(found)))


@pytest.mark.parametrize(
    ("shape", "baseline"),
    [(shape, "mean") for shape in ("flat", "fallback", "budget transfer")]
    + [
        pytest.param(*case, marks=pytest.mark.long)
        for case in [
            *product(["fork once", "late forks", "heaviest", "uneven"], ["mean"]),
            *product(["fork once", "budget transfer"], ["kin", "sibling", "blup"]),
        ]
    ],
)
def test_subtree_is_the_policy_gradient(shape, baseline):
    found = deviations(shape, estimator="subtree", baseline=baseline)
    assert np.abs(found).max() < 3, found


@pytest.mark.parametrize("shape", ["fork once", "budget transfer"])
def test_the_papers_average_is_not(shape):
    assert deviations(shape, estimator="treepo").min() < -3
