"""Importance weights and masks, by hand."""

import math

import numpy as np
import pytest
import torch
from trees import random_tree, step_of

from treepo_mcore.config import ActorConfig, ConfigError, parse_config
from treepo_mcore.learn.advantage import LeafAdvantage
from treepo_mcore.learn.correction import leaf_factors, token_factors
from treepo_mcore.learn.packing import pack_flat, pack_trees
from treepo_mcore.observe.guard import MismatchError, MismatchGuard, rounding_bound

LOG_RHO = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token_tis", [math.exp(-2), math.exp(-0.5), 1.0, math.exp(0.5), 2.0]),
        ("token_mask", [0.0, 1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_token_factors(kind, expected):
    factors = token_factors(LOG_RHO - 1, torch.full((5,), -1.0), ActorConfig(correction=kind))
    torch.testing.assert_close(factors, torch.tensor(expected))


@pytest.mark.parametrize("kind", ["none", "sequence_tis", "sequence_mask"])
def test_no_token_factors(kind):
    assert token_factors(LOG_RHO, LOG_RHO, ActorConfig(correction=kind)) is None


@pytest.mark.parametrize("pack", [pack_trees, pack_flat])
@pytest.mark.parametrize("kind", ["sequence_tis", "sequence_mask"])
def test_leaf_factors_are_of_whole_responses_in_any_packing(pack, kind):
    trees = [random_tree(seed, leaves=5) for seed in range(3)]
    worth = [LeafAdvantage(np.zeros(len(t.leaves)), np.ones(len(t.leaves))) for t in trees]
    sequences = pack(trees, worth, 48)
    # rho grows by 1 + offset hundredths of a nat a token
    own = [s.behaviour_logprob + 0.01 * (1 + s.edge_key[:, 2]) for s in sequences]
    found = leaf_factors(trees, sequences, own, ActorConfig(correction=kind, correction_threshold=1.5))
    for tree, factors in zip(trees, found, strict=True):
        for leaf, factor in zip(tree.leaves, factors, strict=True):
            sizes = [len(tree.nodes[node].tokens) for node in tree.path(leaf.node)[1:]]
            log_rho = 0.01 * sum(size * (size + 1) / 2 for size in sizes)
            inside = log_rho <= math.log(1.5)
            expected = min(math.exp(log_rho), 1.5) if kind == "sequence_tis" else float(inside)
            assert factor == pytest.approx(expected, abs=1e-6)


def guard(**actor):
    return MismatchGuard(parse_config({"model": {"path": "m"}, "data": {"train": "t"}, "actor": LARGE | actor}))


def updated(*means):
    step = step_of([], 3)
    step.updates = [{"mismatch/logprob_abs_mean": mean} for mean in means]
    return step


LARGE = {"micro_batch_tokens": 16384}


@pytest.mark.parametrize("mean", [0.2, math.nan, math.inf])
def test_a_mismatch_beyond_the_bound_is_named(mean):
    guard(max_mismatch=0.1).trained(updated(0.05, 0.05))
    guard(max_mismatch=0.1, old_logprobs="engine").trained(updated(0.05, mean))  # the second's is of moved weights
    with pytest.raises(MismatchError, match=r"step 3: .* actor.max_mismatch = 0.1"):
        guard(max_mismatch=0.1).trained(updated(0.05, mean))


@pytest.mark.parametrize("mean", [0.2, math.nan])
def test_by_default_the_first_step_has_to_be_explained_by_rounding(mean):
    with pytest.raises(MismatchError, match=r"step 3: .* more than 0.1; rounding does not explain that"):
        guard().trained(updated(mean))
    looked = guard()
    looked.trained(updated())  # nothing was informative
    looked.trained(updated(0.05))
    looked.trained(updated(mean))  # later it is a matter of training
    fp8 = guard(fp8="current")
    fp8.trained(updated(0.2))


@pytest.mark.parametrize(
    ("actor", "message"),
    [
        ({"loss": {"kl_coef": 0.1}}, "actor: loss.kl_coef: 0.1 needs reference: host"),
        ({"old_logprobs": "engine", "correction": "token_tis"}, "actor: correction: token_tis needs old_logprobs"),
    ],
)
def test_settings_that_contradict_each_other(actor, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"model": {"path": "m"}, "data": {"train": "t"}, "actor": actor})


@pytest.mark.parametrize(
    ("rollout", "bound"),
    [
        ({"dtype": "float32"}, 0.01),
        ({"dtype": "bfloat16"}, 0.1),
        ({"dtype": "float32", "engine": {"quantization": "fp8_per_block"}}, 0.5),
        ({"dtype": "float32", "engine": {"kv_cache_dtype": "fp8_e4m3"}}, 0.5),
        ({"dtype": "float32", "engine": {"kv_cache_dtype": "auto"}}, 0.01),
        ({"dtype": "float32", "temperature": 0.5}, 0.02),
        ({"dtype": "float32", "temperature": 2.0}, 0.01),
    ],
)
def test_what_rounding_may_explain(rollout, bound):
    sections = {"model": {"path": "m"}, "data": {"train": "t"}, "rollout": rollout}
    sections["actor"] = LARGE | {"dtype": "float32"}
    assert rounding_bound(parse_config(sections)) == pytest.approx(bound)
