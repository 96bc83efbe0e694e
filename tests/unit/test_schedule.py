"""Planned forks: where they come to lie, and the trees that grow by them (docs/algorithm.md 2.9)."""

import json
import math
import random

import numpy as np
import pytest

from treepo_mcore.config import TreeConfig
from treepo_mcore.grow.forks import _cost, _nodes, best_plan, expected_gain
from treepo_mcore.grow.sampler import TreeSampler
from treepo_mcore.grow.schedule import Fork, Schedule, resolve_forks
from treepo_mcore.grow.stopping import RuleStopper
from treepo_mcore.tree.profile import ProfileSums
from treepo_mcore.tree.tree import Tree

TREE = {"width": 8, "segment_tokens": 4, "max_depth": 8, "stopping": {"boxed": "none", "repetition_count": 0}}


def config(**changes):
    return TreeConfig.model_validate(TREE | changes)


def grow(tree_config, forks, lengths, chunk):
    """Paths end after as many tokens as the next of `lengths`, which reads the number of the request."""
    sampler = TreeSampler(Tree("p", [9]), tree_config, RuleStopper(tree_config.stopping, None), (0, 0, 0), forks=forks)
    running, ends = {}, {}

    def obey(actions):
        for request in actions.submit:
            done = len(request.context) - 1
            wanted = lengths(len(sampler.tree.leaves), done)
            running[request.id] = min(wanted, request.max_tokens)
            ends[request.id] = "stop" if wanted <= request.max_tokens else "length"
        for gone in actions.abort:
            running.pop(gone, None)

    obey(sampler.start())
    while running:
        name = random.Random(len(running)).choice(sorted(running))
        count = min(chunk, running[name])
        running[name] -= count
        finish = None if running[name] else ends[name]
        if finish:
            del running[name]
        obey(sampler.on_tokens(name, [1] * count, [-1.0] * count, finish))
    assert sampler.done
    return sampler.tree


@pytest.mark.parametrize(
    ("planned", "mean", "expected"),
    [
        ([(0, 4), (0.45, 8)], 20, [(0, 4), (9, 8)]),
        ([(0, 4), (2, 8)], 20, [(0, 4), (8, 8)]),  # two segments
        ([(0, 2), (0.5, 4), (3, 8)], 20, [(0, 2), (10, 4), (12, 8)]),
        ([(0, 2), (0.01, 8)], 20, [(0, 2), (1, 8)]),  # behind the first token at least
        ([(0, 2), (0.9, 8)], 100, [(0, 2), (31, 8)]),  # before the last one of the longest response, of 32
        ([(0, 2), (0.5, 4), (0.51, 8)], 20, [(0, 2), (10, 8)]),  # two on one token
    ],
)
def test_depths_in_tokens(planned, mean, expected):
    assert resolve_forks(planned, config(), mean) == tuple(Fork(*fork) for fork in expected)


@pytest.mark.parametrize("expansion", ["fork_behind", "stop_and_fork"])
@pytest.mark.parametrize("chunk", [1, 5, 40])
def test_boundaries_lie_where_forks_are_planned(chunk, expansion):
    forks = (Fork(0, 2), Fork(6, 4), Fork(11, 8))  # neither on a segment's boundary
    tree = grow(config(expansion=expansion), forks, lambda leaf, done: 20 - done, chunk)
    assert sorted((node.start - 1, node.end - 1) for node in tree.nodes[1:]) == (
        [(0, 6)] * 2 + [(6, 11)] * 4 + [(11, 20)] * 8
    )
    assert [len(tree.path(leaf.node)) for leaf in tree.leaves] == [4] * 8


def test_paths_that_end_early_hand_their_budget_on():
    """Two of four first paths end before the fork: the others share eight minus two."""
    ends = iter([3, 3, 20, 20])
    tree = grow(config(), (Fork(0, 4), Fork(6, 8)), lambda leaf, done: next(ends) if done == 0 else 10, 40)
    assert len(tree.leaves) == 8
    assert sorted(len(tree.children(node)) for node in tree.children(0)) == [0, 0, 3, 3]


def test_without_fallback_a_tree_may_have_fewer_leaves():
    forks = (Fork(0, 4), Fork(6, 8))
    none = config(fallback={"candidates": "none"})
    assert len(grow(none, forks, lambda leaf, done: 3, 40).leaves) == 4
    again = grow(config(), forks, lambda leaf, done: 3, 40)
    assert len(again.leaves) == 8
    assert sum(leaf.from_fallback for leaf in again.leaves) == 4


def answered(length):
    tree = Tree("p", [9])
    node = tree.add_node(0, 1)
    tree.nodes[node].tokens.extend([1] * length)
    tree.nodes[node].logprobs.extend([-1.0] * length)
    tree.add_leaf(node, "eos")
    return tree


def test_shares_follow_the_mean_length_and_a_checkpoint_keeps_it():
    planned = config(branching={"schedule": [[0, 4], [0.5, 8]]})
    schedule = Schedule(planned)
    assert schedule.forks() == (Fork(0, 4), Fork(8, 8))  # half of half of the longest response of 32
    schedule.look([answered(10), answered(14)])
    assert schedule.forks() == (Fork(0, 4), Fork(6, 8))  # the first steps count alike
    for _ in range(100):
        schedule.look([answered(20)])
    assert schedule.forks() == (Fork(0, 4), Fork(10, 8))
    other = Schedule(planned)
    other.load_state_dict(schedule.state_dict())
    assert other.forks() == schedule.forks()
    assert Schedule(config()).forks() is None


def forked(rewards):
    """Two first paths of 10 tokens that fork once, and leaves of 10 more."""
    tree = Tree(str(rewards), [9])
    for pair in rewards:
        root = tree.add_node(0, 1)
        for reward in pair:
            node = tree.add_node(root, 2)
            tree.leaves[tree.add_leaf(node, "eos")].reward = reward
    for node in tree.nodes[1:]:
        node.tokens.extend([1] * 10)
        node.logprobs.extend([-1.0] * 10)
    for node in tree.nodes[1:]:
        node.start = 1 if node.parent == 0 else 11
    return tree


EARLY = [forked([(1.0, 1.0), (0.0, 0.0)])] * 4  # all is decided at the fork


def automatic(**changes):
    return config(branching={"schedule": "auto", "replan_every": 2}, **changes)


def test_auto_plans_by_the_curve_and_says_what_it_expects():
    schedule = Schedule(automatic())
    assert schedule.forks() == (Fork(0, 4), Fork(7, 8))  # at first, at 0.45 of a guess
    assert schedule.look(EARLY) is None
    told = schedule.look(EARLY)
    assert told.startswith(
        "forks: 1.00 of the variance is decided at half of the mean length of 20: [[0.0, 4], [0.375, 8]]"
    )
    assert "expected gain over flat 1." in told
    assert schedule.forks() == (Fork(0, 4), Fork(8, 8))
    resumed = Schedule(automatic())
    resumed.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert resumed.forks() == schedule.forks()
    assert [resumed.look(EARLY), resumed.look(EARLY)][1] == told


def test_auto_samples_flat_where_a_tree_gains_nothing_and_looks_again():
    schedule = Schedule(automatic(width=3))  # three paths have no two halves
    schedule.look(EARLY)
    assert "flat sampling is as good and is used" in schedule.look(EARLY)
    assert schedule.forks() == (Fork(0, 3),)
    schedule.look(EARLY)
    assert schedule.forks() == (Fork(0, 2), Fork(9, 3))  # the step before the next plan measures


def test_auto_without_rewards_that_differ_keeps_its_plan():
    schedule = Schedule(automatic())
    alike = [forked([(1.0, 1.0), (1.0, 1.0)])] * 4
    schedule.look(alike)
    assert "no two leaves of one tree have differed" in schedule.look(alike)


@pytest.mark.parametrize(
    ("decided", "width", "gain", "roots"),
    [
        (np.arange(1, 17) / 16, 16, 1.16, 4),
        (np.minimum(1, np.arange(1, 17) / 4), 16, 2.13, 8),
        ((np.arange(1, 17) / 16) ** 3, 16, 1.29, 4),
        (np.maximum(0, np.arange(1, 17) / 4 - 3), 16, 1.88, 4),
    ],
)
def test_gains_on_paper(decided, width, gain, roots):
    """Of an exhaustive search with the same formulas, done elsewhere."""
    plan = best_plan(decided, width)
    assert plan.gain == pytest.approx(gain, abs=0.006)
    assert plan.forks[0] == (0.0, roots)
    assert expected_gain(decided, plan.forks) == pytest.approx(plan.gain)


def doubtful(at: dict[int, float], length: int = 32) -> Tree:
    """Two answers whose tokens are certain but for some."""
    tree = Tree("p", [9])
    for _ in range(2):
        node = tree.nodes[tree.add_node(0, 1)]
        node.tokens.extend([1] * length)
        node.logprobs.extend([math.log(at.get(index, 1.0)) for index in range(length)])
    for node in (1, 2):
        tree.add_leaf(node, "eos")
    return tree


def test_a_profile_is_of_an_independent_answer():
    trees = [doubtful({0: 0.5, 31: 0.25}), doubtful({0: 0.5}, length=32)]
    profile = ProfileSums.of(trees).profile()
    assert profile.alive[:17] == (1.0,) * 16 + (0.0,)
    assert profile.tokens[:16] == (2.0,) * 16
    assert sum(profile.tokens) == 32
    assert profile.noise[0] == pytest.approx(0.5)
    assert profile.noise[15] == pytest.approx(0.375)
    assert sum(profile.noise) == pytest.approx(0.875)
    assert (ProfileSums.of(trees) + ProfileSums.of(trees).faded(0.5)).profile() == profile
    short = ProfileSums.of([doubtful({}, length=8), doubtful({0: 0.5}, length=24)]).profile()
    assert (short.alive[0], short.alive[7], short.alive[8], short.alive[23]) == (1.0, 1.0, 0.5, 0.5)
    assert sum(short.tokens) == 16


LINE = np.arange(1, 17) / 16


def test_forks_behind_the_doubt_gain_and_forks_within_it_lose():
    """Noise is where the policy could have gone another way: what is shared there has few draws."""
    first = ProfileSums.of([doubtful({0: 0.5})]).profile()
    assert best_plan(LINE, 8, first).forks == ((0.0, 8),)
    assert expected_gain(LINE, [(0, 4), (0.5, 8)], first) < 0.85
    last = ProfileSums.of([doubtful({31: 0.5})]).profile()
    plan = best_plan(LINE, 8, last)
    assert plan.forks[-1][0] > 0.8
    assert plan.gain > 1.5


def test_budget_that_moves_to_the_living_is_counted():
    """Half of the answers end before the fork: four paths become two, and six of eight leaves are theirs."""
    even = ProfileSums.of([doubtful(dict.fromkeys(range(32), 0.5))]).profile()
    short = dict.fromkeys(range(8), 0.5)
    mixed = ProfileSums.of([doubtful(short, length=8), doubtful(dict.fromkeys(range(24), 0.5), length=24)]).profile()
    assert _nodes(4, (8,), even) == [4.0, 8.0]
    assert _nodes(4, (9,), mixed) == [4.0, 12.0]
    assert _cost(4, (9,), mixed) == pytest.approx(4 * sum(mixed.tokens[:9]) + 12 * sum(mixed.tokens[9:]))
