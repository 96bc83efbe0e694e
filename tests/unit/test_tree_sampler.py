"""The sampler against a fake engine: docs/algorithm.md 2 and 3, and what the released code does otherwise."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_fake_engine import EOS_TOKEN, decode, grow, keyed_draw

from treepo_mcore.config import EarlyStopConfig, TreeConfig
from treepo_mcore.grow.sampler import TreeSampler, stable_seed
from treepo_mcore.grow.stopping import BoxDetector, RuleStopper
from treepo_mcore.tree.tree import BOXED, DEPTH, EOS, FINISHED, LENGTH, PRUNED, REPETITION, Tree

PLAIN = {"boxed": "none", "repetition_count": 0}


def config_of(**values) -> TreeConfig:
    return TreeConfig.model_validate({"width": 8, "segment_tokens": 4, "max_depth": 5, "stopping": PLAIN} | values)


def sampler_of(config: TreeConfig, prompt: str = "p") -> TreeSampler:
    return TreeSampler(Tree(prompt, [1, 2]), config, RuleStopper(config.stopping, BoxDetector(decode)), (0, 0, 0))


def letters(name, offset):
    return 5 + (len(name) + offset) % 3, -1.0


@st.composite
def configs(draw):
    low = draw(st.integers(1, 3))
    first = draw(st.one_of(st.none(), st.integers(1, 9)))
    return config_of(
        width=draw(st.integers(1, 12)),
        segment_tokens=draw(st.integers(1, 6)),
        max_depth=draw(st.integers(1, 6)),
        max_response_tokens=draw(st.one_of(st.none(), st.integers(1, 25))),
        branching={
            "factor": [low, low + draw(st.integers(0, 2))],
            "first": first,
            "allocation": draw(st.sampled_from(["even", "low_logprob", "high_logprob"])),
        },
        stopping={
            "boxed": draw(st.sampled_from(["none", "boxed", "boxed_and_eos"])),
            "repetition_count": draw(st.sampled_from([0, 2])),
            "repetition_period": 3,
            "repetition_min_tokens": 4,
        },
        fallback={
            "candidates": draw(st.sampled_from(["soft_boxed_and_eos", "random_all"])),
            "cut": draw(st.sampled_from(["random", "min_logprob_token", "from_start"])),
        },
        pruning={"min_mean_logprob": draw(st.sampled_from([None, -2.5]))},
    )


TREES = given(configs(), st.integers(0, 10**6), st.sampled_from([0.0, 0.05, 0.3, 0.9]), st.sampled_from([6, 10]))


@settings(max_examples=300, deadline=None)
@TREES
def test_any_order_and_both_expansions_give_the_same_tree(config, seed, hazard, vocabulary):
    check_trees(config, seed, hazard, vocabulary)


@pytest.mark.long
@settings(max_examples=2000, deadline=None)
@TREES
def test_ten_thousand_trees(config, seed, hazard, vocabulary):
    check_trees(config, seed, hazard, vocabulary)


def check_trees(config, seed, hazard, vocabulary):
    """Five trees that must be one, complete and within the budgets."""
    draw = keyed_draw(seed, hazard, vocabulary)
    tree, engine = grow(config, draw, order=seed, chunk=1 + seed % 7)
    assert len(tree.leaves) == config.width
    assert tree.masses().sum() == pytest.approx(1.0)
    assert sorted(engine.leaves) == list(range(config.width))
    assert len(set(engine.seeds)) == len(engine.seeds)
    for index, leaf in enumerate(tree.leaves):
        assert not tree.children(leaf.node)
        assert 1 <= tree.leaf_tokens(index) <= config.response_tokens
        assert tree.nodes[leaf.node].depth <= config.max_depth
        assert len(tree.response_logprobs(index)) == tree.leaf_tokens(index)
        assert (EOS_TOKEN in tree.response(index)) == (leaf.reason in (EOS, FINISHED))
    assert tree.masses(fallback=False).sum() == pytest.approx(1.0)
    for node in tree.nodes[1:]:
        assert 1 <= len(node.tokens) <= config.segment_tokens
        assert node.start == tree.nodes[node.parent].end
    other, _ = grow(config, draw, order=seed + 1)
    waits, _ = grow(config.model_copy(update={"expansion": "stop_and_fork"}), draw, order=seed + 2)
    assert tree.to_json() == other.to_json()
    assert tree.to_json() == waits.to_json()
    looks, _ = grow(config.model_copy(update={"early_stop": EarlyStopConfig(leaves=2)}), draw, order=seed + 3)
    assert tree.to_json() == looks.to_json()
    resumed, _ = grow(config, draw, order=seed + 4, suspends=0.1)
    assert tree.to_json() == resumed.to_json()


def test_seeds_and_ids_do_not_depend_on_arrival():
    config = config_of(segment_tokens=2, max_depth=8, width=12)
    runs = [grow(config, keyed_draw(3, 0.1), order) for order in range(4)]
    assert len({tuple(sorted(engine.seeds)) for _, engine in runs}) == 1
    assert stable_seed((1, 2, 3), "request", (0, 1), 5) == 5038479786748673258  # the same in every process


def test_divergence_is_drawn_for_every_prompt_and_wave():
    config = config_of(width=100, segment_tokens=1, branching={"factor": [1, 3], "first": [2, 8]})
    first, factors = set(), set()
    for prompt in range(60):
        sampler = TreeSampler(Tree("p", [1, 2]), config, RuleStopper(config.stopping, None), (0, 0, prompt))
        live = [request.id for request in sampler.start().submit]
        first.add(len(live))
        drawn = []
        for _ in range(2):
            new = [r.id for name in live for r in sampler.on_tokens(name, [5], [-1.0], None).submit]
            drawn.append(1 + len(new) / len(live))
            live += new
        factors.add(tuple(drawn))
    assert first == set(range(2, 9))
    assert factors == {(one, other) for one in (1, 2, 3) for other in (1, 2, 3)}


def test_without_branching_paths_are_independent():
    config = config_of(branching={"factor": 1, "first": 8})
    draw = keyed_draw(1, 0.1)
    tree, _ = grow(config, draw)
    found = sorted(tree.response(leaf) for leaf in range(8))
    expected = []
    for root in range(8):
        tokens: list[int] = []
        while len(tokens) < 20 and EOS_TOKEN not in tokens:
            name = (root,) + (0,) * (len(tokens) // 4)
            tokens.append(draw(name, len(tokens) % 4)[0])
        expected.append(tokens)
    assert found == sorted(expected)


@pytest.mark.parametrize(("hazards", "share"), [((0.02, 0.10, 0.12, 0.08), 0.05), ((0.15, 0.12, 0.10, 0.08), 0.5)])
def test_mass_weighted_length_is_unbiased(hazards, share):
    """Also where fallback, which looks at how paths ended, is frequent."""
    config = config_of(width=8, segment_tokens=4, max_depth=10)

    def draw_of(seed):
        rng = random.Random(seed)

        def draw(name, offset):
            return (EOS_TOKEN if rng.random() < hazards[min(len(name) - 1, 3)] else 5), -1.0

        return draw

    weighted, with_fallback, plain, fallbacks = [], [], [], 0
    for seed in range(800):
        tree, _ = grow(config, draw_of(seed), chunk=40)
        lengths = [tree.leaf_tokens(leaf) for leaf in range(8)]
        weighted.append(float(tree.masses(fallback=False) @ lengths))
        with_fallback.append(float(tree.masses() @ lengths))
        plain.append(np.mean(lengths))
        fallbacks += any(leaf.from_fallback for leaf in tree.leaves)
    survive, expected = 1.0, 0.0
    for position in range(40):
        expected += survive
        survive *= 1 - hazards[min(position // 4, 3)]
    error = np.std(weighted) / np.sqrt(len(weighted))
    print(f"{fallbacks} trees with fallback, bias of its masses {np.mean(with_fallback) - expected:.2f} +- {error:.2f}")
    assert abs(fallbacks / 800 - share) < 0.05 + share / 2
    assert abs(np.mean(weighted) - expected) < 3 * error
    assert np.mean(plain) - expected > 5 * error  # leaves alone over-represent long paths


def test_first_token_eos_ends_the_path():
    tree, _ = grow(config_of(), lambda name, offset: (EOS_TOKEN, -1.0))
    assert [tree.response(leaf) for leaf in range(8)] == [[EOS_TOKEN]] * 8
    assert {leaf.reason for leaf in tree.leaves} == {EOS}


def test_any_eos_id_ends_the_path():  # the engine decides, the id is kept
    sampler = sampler_of(config_of(width=2))
    ids = [request.id for request in sampler.start().submit]
    sampler.on_tokens(ids[0], [50], [-1.0], "stop")
    sampler.on_tokens(ids[1], [60], [-1.0], "stop")
    assert sampler.done
    assert [sampler.tree.response(leaf) for leaf in (0, 1)] == [[50], [60]]


def test_eos_on_the_boundary_is_a_leaf_and_not_a_survivor():
    sampler = sampler_of(config_of(width=1))
    (request,) = sampler.start().submit
    actions = sampler.on_tokens(request.id, [5, 6, 7, 0], [-1.0] * 4, "stop")
    assert sampler.done
    assert actions.abort == []
    assert sampler.tree.leaves[0].reason == EOS


def test_only_repetition_stops_restart_from_the_prompt():
    config = config_of(
        width=6,
        segment_tokens=32,
        stopping={"boxed": "none", "repetition_count": 2, "repetition_period": 1, "repetition_min_tokens": 8},
        branching={"factor": 2},
    )
    tree, _ = grow(config, lambda name, offset: (5, -1.0))
    assert {leaf.reason for leaf in tree.leaves} == {REPETITION}
    assert len(tree.children(0)) == 6
    assert sorted(leaf.from_fallback for leaf in tree.leaves) == [False] * 2 + [True] * 4


def test_fallback_leaves_are_marked_with_everything_below_the_restart():
    config = config_of(width=8, segment_tokens=2, max_depth=6)
    seen = 0
    for seed in range(20):
        tree, _ = grow(config, keyed_draw(seed, 0.3))
        for leaf in tree.leaves:
            assert leaf.from_fallback == any(tree.nodes[node].from_fallback for node in tree.path(leaf.node))
            seen += leaf.from_fallback
    assert seen > 20


def test_length_and_depth_limits():
    tree, _ = grow(config_of(), letters)
    assert {leaf.reason for leaf in tree.leaves} == {LENGTH}  # D x L = R: length first
    assert {tree.leaf_tokens(leaf) for leaf in range(8)} == {20}
    short, _ = grow(config_of(max_response_tokens=10), letters)
    assert {leaf.reason for leaf in short.leaves} == {LENGTH}
    assert {short.leaf_tokens(leaf) for leaf in range(8)} == {10}


def test_depth_limit_behind_a_cut_inside_a_segment():
    config = config_of(width=8, segment_tokens=4, max_depth=2, fallback={"cut": "min_logprob_token"})

    def draw(name, offset):  # the first paths end at once; their lowest log-prob is the second token
        return (EOS_TOKEN if name in ((0,), (1,)) and offset == 2 else 5), (-9.0 if offset == 1 else -1.0)

    tree, _ = grow(config, draw)
    behind_cut = [tree.leaf_tokens(i) for i, leaf in enumerate(tree.leaves) if leaf.from_fallback]
    assert set(behind_cut) == {1 + 4}  # one kept token, then the one segment that is left
    assert {leaf.reason for leaf in tree.leaves if leaf.from_fallback} == {DEPTH}


def test_our_own_stop_aborts_the_request_and_drops_what_follows():
    config = config_of(width=1, segment_tokens=8, stopping={"boxed": "boxed"})
    sampler = sampler_of(config)
    (request,) = sampler.start().submit
    assert sampler.on_tokens(request.id, [5, 1], [-1.0, -2.0], None).leaves == []
    actions = sampler.on_tokens(request.id, [2, 6, 3, 7, 7], [-3.0, -4.0, -5.0, -6.0, -7.0], None)
    assert actions.abort == [request.id]
    assert actions.leaves == [0]
    assert sampler.tree.leaves[0].reason == BOXED
    assert sampler.tree.response(0) == [5, 1, 2, 6, 3]
    assert sampler.tree.response_logprobs(0) == [-1.0, -2.0, -3.0, -4.0, -5.0]
    late = sampler.on_tokens(request.id, [7], [-1.0], "abort")
    assert (late.submit, late.abort, late.leaves) == ([], [], [])
    assert sampler.done
    assert not sampler.failed


def test_a_box_before_eos_in_one_chunk_needs_no_abort():
    sampler = sampler_of(config_of(width=1, segment_tokens=8, stopping={"boxed": "boxed"}))
    (request,) = sampler.start().submit
    actions = sampler.on_tokens(request.id, [8, 0], [-1.0, -1.0], "stop")
    assert actions.abort == []
    assert sampler.tree.response(0) == [8]


def test_a_box_across_boundaries_is_seen():
    boxes = {0: 1, 1: 2, 2: 5, 3: 3}  # "\bo" "xed{" "a" "}", one token a segment

    def draw(name, offset):
        return (boxes.get(len(name) - 1, EOS_TOKEN)), -1.0

    for mode, reason, length in (("boxed", BOXED, 4), ("boxed_and_eos", FINISHED, 5)):
        config = config_of(segment_tokens=1, max_depth=8, stopping={"boxed": mode, "repetition_count": 0})
        for expansion in ("fork_behind", "stop_and_fork"):
            tree, _ = grow(config.model_copy(update={"expansion": expansion}), draw)
            straight = [leaf for leaf in range(8) if not tree.leaves[leaf].from_fallback]
            assert {tree.leaves[leaf].reason for leaf in straight} == {reason}
            assert {tree.leaf_tokens(leaf) for leaf in straight} == {length}


def test_pruning_on_boundaries():
    def draw(name, offset):
        return 5, (-9.0 if name[0] == 0 else -1.0)

    tree, _ = grow(config_of(width=4, pruning={"min_mean_logprob": -5.0}), draw)
    pruned = [i for i, leaf in enumerate(tree.leaves) if leaf.reason == PRUNED]
    assert pruned
    assert {tree.leaf_tokens(leaf) for leaf in pruned} == {4}
    assert all(tree.response_logprobs(leaf)[0] == -9.0 for leaf in pruned)
    assert {leaf.reason for i, leaf in enumerate(tree.leaves) if i not in pruned} == {LENGTH}


def test_run_ahead_siblings_start_from_the_recorded_prefix():
    sampler = sampler_of(config_of(width=4, segment_tokens=2, max_depth=4))
    fast, slow = sampler.start().submit
    assert sampler.on_tokens(fast.id, [10, 11, 12, 13, 14], [-1.0] * 5, None).submit == []
    late = sampler.on_tokens(slow.id, [20, 21], [-1.0] * 2, None).submit
    assert sorted(request.context for request in late) == [[1, 2, 10, 11], [1, 2, 20, 21]]
    assert sampler.live == 4


def test_a_leaf_counts_in_its_own_wave_however_early_it_ended():
    sampler = sampler_of(config_of(width=4, segment_tokens=2, max_depth=4))
    fast, slow = sampler.start().submit
    sampler.on_tokens(fast.id, [10, 11, 12, 0], [-1.0] * 4, "stop")  # ended in wave 2
    late = sampler.on_tokens(slow.id, [20, 21], [-1.0] * 2, None).submit
    assert len(late) == 2  # wave 1 had no leaves: two survivors, two children each


def test_engine_abort_fails_the_prompt():
    sampler = sampler_of(config_of(width=4, branching={"first": 3}))
    ids = [request.id for request in sampler.start().submit]
    actions = sampler.on_tokens(ids[1], [], [], "abort")
    assert sorted(actions.abort) == sorted([ids[0], ids[2]])
    assert sampler.failed
    assert not sampler.done
    assert sampler.live == 0
    assert sampler.on_tokens(ids[0], [5], [-1.0], None).submit == []


def test_engine_limit_is_a_length_leaf():
    sampler = sampler_of(config_of(width=1))
    (request,) = sampler.start().submit
    sampler.on_tokens(request.id, [5, 6, 7, 5], [-1.0] * 4, "length")
    assert sampler.done
    assert sampler.tree.leaves[0].reason == LENGTH


def test_bad_events_are_errors():
    sampler = sampler_of(config_of())
    request = sampler.start().submit[0]
    with pytest.raises(KeyError, match="no request nobody"):
        sampler.on_tokens("nobody", [5], [-1.0], None)
    with pytest.raises(ValueError, match="2 tokens with 1 log-probs"):
        sampler.on_tokens(request.id, [5, 6], [-1.0], None)
    with pytest.raises(ValueError, match="finish stop"):
        sampler.on_tokens(request.id, [], [], "stop")
