"""Every loss is the same loss on trees, on flattened leaves, and in plain `transformers` with autograd.

The third party knows nothing of trees: one leaf at a time, each token with the textbook form of the loss.
"""

from __future__ import annotations

import math
import random
from array import array

import numpy as np
import pytest
import torch
from harness import launch
from losses import TEMPERATURE, configuration, shift
from models import Reference
from trees import path_of, random_tree

from treepo_mcore.learn.advantage import advantages
from treepo_mcore.tree.files import write_trees

CASES = {
    "token mean": {},
    "sequence mean": {"actor": {"loss": {"aggregation": "sequence_mean"}}},
    "fixed length": {"actor": {"loss": {"aggregation": "fixed_length"}}},
    "entropy": {"actor": {"loss": {"entropy_coef": 0.3}}},
    "reference kl": {"actor": {"loss": {"kl_coef": 0.5}, "reference": "host"}},
    "path mass": {"advantage": {"mass_loss_weight": True}},
    "token tis": {"actor": {"correction": "token_tis", "correction_threshold": 1.2}},
    "token mask": {"actor": {"correction": "token_mask", "correction_threshold": 1.5}},
    "sequence tis": {"actor": {"correction": "sequence_tis"}},
    "sequence mask": {"actor": {"correction": "sequence_mask", "correction_threshold": 3.0}},
    "engine": {"actor": {"old_logprobs": "engine"}},
    "engine, token mask": {
        "actor": {"old_logprobs": "engine", "correction": "token_mask", "correction_threshold": 1.5}
    },
    "segments, sequence tis": {"advantage": {"estimator": "segment"}, "actor": {"correction": "sequence_tis"}},
    "everything": {
        "advantage": {"mass_loss_weight": True},
        "actor": {
            "loss": {"aggregation": "sequence_mean", "entropy_coef": 0.1, "kl_coef": 0.2},
            "reference": "host",
            "correction": "sequence_tis",
        },
    },
}
LAYOUTS = {
    1: {
        "tree": {"micro_batch_tokens": 256},
        "tree, split": {"micro_batch_tokens": 48},
        "flat": {"packing": "flat", "micro_batch_tokens": 256},
    },
    # Two trees, then one: in the second update a rank has nothing to do.
    2: {
        "dp2": {"micro_batch_tokens": 48},
        "cp2": {"cp": 2, "micro_batch_tokens": 64},
        "tp2": {"tp": 2, "sequence_parallel": True, "micro_batch_tokens": 64},
        "pp2": {"pp": 2, "micro_batch_tokens": 64},
    },
}
BETWEEN_LAYOUTS = 1e-5  # gradients, relative, each parameter; losses, absolute (they are near 0.1)
TO_TRANSFORMERS = 3e-5  # the same, from float64: what float32 costs in any layout


@pytest.fixture(scope="module")
def directory(model_directory):
    return model_directory("qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def trees(directory):
    """Three, sampled by an engine that disagrees with the actor by up to 0.6 nats a token."""
    reference, result = Reference(directory), []
    for seed in range(3):
        tree, draw = random_tree(seed, leaves=7), random.Random(seed)
        seen = set()
        for index in range(len(tree.leaves)):
            logp, _ = reference.log_probs(path_of(tree, index), TEMPERATURE)
            for number in tree.path(tree.leaves[index].node)[1:]:
                node = tree.nodes[number]
                if number not in seen:
                    own = logp[node.start - 1 : node.end - 1].tolist()
                    node.logprobs = array("f", [value + draw.uniform(-0.6, 0.6) for value in own])
                    seen.add(number)
        result.append(tree)
    return result


@pytest.fixture(scope="module")
def expected(directory, trees):
    return {name: by_transformers(directory, trees, case) for name, case in CASES.items()}


@pytest.mark.parametrize("processes", LAYOUTS)
def test_equal_transformers(processes, directory, trees, expected, tmp_path):
    write_trees(tmp_path / "trees.jsonl", trees)
    arguments = {
        "directory": str(directory),
        "trees": str(tmp_path / "trees.jsonl"),
        "cases": CASES,
        "layouts": LAYOUTS[processes],
        "out": str(tmp_path / "out.pt"),
    }
    launch("losses:run", processes, arguments, limit=500)
    results = torch.load(tmp_path / "out.pt", weights_only=False)
    first = next(iter(LAYOUTS[processes]))
    between = {key: difference(found, results[key[0], first]) for key, found in results.items()}
    theirs = {key: difference(found, expected[key[0]]) for key, found in results.items()}
    print(f"largest differences: layouts {max(between.values()):.1e}, transformers {max(theirs.values()):.1e}")
    assert not {key: error for key, error in between.items() if not error < BETWEEN_LAYOUTS}
    assert not {key: error for key, error in theirs.items() if not error < TO_TRANSFORMERS}


def difference(found, other):
    """The larger of the relative error of any gradient of any update and the absolute error of the loss."""
    errors = [abs(found["metrics"]["actor/loss"] - other["metrics"]["actor/loss"])]
    for mine, theirs in zip(found["gradients"], other["gradients"], strict=True):
        assert mine.keys() == theirs.keys()
        errors += [((mine[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs]
    return max(errors)


def test_cases_differ(expected):
    """Otherwise the comparison above would compare one loss many times."""
    name = "model.layers.1.mlp.up_proj.weight"
    found = [result["gradients"][0][name] for result in expected.values()]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert (one - other).norm() / one.norm() > 1e-3


def test_the_reference_policy_changes_places(directory, trees, tmp_path):
    write_trees(tmp_path / "trees.jsonl", trees)
    (found,) = launch("losses:swap", 1, {"directory": str(directory), "trees": str(tmp_path / "trees.jsonl")})
    assert found["moved"] > 0.05
    assert found["reference"] == 0
    assert found["restored"]


def test_a_mismatch_stops_the_run(directory, trees, tmp_path):
    write_trees(tmp_path / "trees.jsonl", trees)
    (found,) = launch("losses:mismatch", 1, {"directory": str(directory), "trees": str(tmp_path / "trees.jsonl")})
    assert found.startswith("step 7: the log-probs of engine and actor differ by 0.")
    assert "actor.max_mismatch = 0.01" in found


def by_transformers(directory, trees, case):
    """Mean loss of the updates and gradients of each, in the form of `losses.one_case`."""
    config = configuration(str(directory), case, {})
    worth = advantages(trees, config.advantage)
    losses, gradients = [], []
    size = config.trainer.prompts_per_update
    for begin in range(0, len(trees), size):
        model = Reference(directory).model.double()
        total, weight = 0.0, 0.0
        for tree, value in zip(trees[begin : begin + size], worth[begin : begin + size], strict=True):
            masses = tree.masses() * len(tree.leaves)
            for leaf in range(len(tree.leaves)):
                mass = masses[leaf] if config.advantage.mass_loss_weight else 1.0
                tokens = leaf_losses(model, tree, leaf, value, config)
                total, weight = add(total, weight, tokens, mass, config)
        loss = total / weight
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.float() for name, p in model.named_parameters()})
    return {"metrics": {"actor/loss": sum(losses) / len(losses)}, "gradients": gradients}


def add(total, weight, tokens, mass, config):
    """One more leaf in the sum and in what it is divided by."""
    kind = config.actor.loss.aggregation
    if kind == "token_mean":
        return total + mass * tokens.sum(), weight + mass * len(tokens)
    if kind == "sequence_mean":
        return total + mass * tokens.mean(), weight + mass
    return total + mass * tokens.sum() / config.rollout.tree.response_tokens, weight + mass


def leaf_losses(model, tree, leaf, value, config):
    """Loss of each response token of one leaf, float64 [T]."""
    actor, limits = config.actor, config.actor.loss
    path, first = path_of(tree, leaf), len(tree.nodes[0].tokens)
    logits = model(torch.tensor([path])).logits[0, first - 1 : -1] / TEMPERATURE
    every = logits.log_softmax(-1)
    logp = every.gather(1, torch.tensor(path[first:])[:, None])[:, 0]
    behaviour = torch.tensor(tree.response_logprobs(leaf), dtype=torch.float32)
    moved = logp.detach() + shift(behaviour)  # of the old policy, and of the reference
    engine = actor.old_logprobs == "engine"
    old, own = (behaviour, logp.detach()) if engine else (moved, moved)
    nodes = tree.path(tree.leaves[leaf].node)
    sizes = [len(tree.nodes[node].tokens) for node in nodes]
    values = value.values[nodes] if len(value.values) == len(tree.nodes) else np.full(len(nodes), value.values[leaf])
    worth = torch.from_numpy(np.repeat(values, sizes)[first:])
    loss = clipped((logp - old).exp(), worth, limits) * correction(own - behaviour, actor)
    kl = (moved - logp).exp() - (moved - logp) - 1
    return loss + limits.entropy_coef * (every.exp() * every).sum(-1) + limits.kl_coef * kl


def clipped(ratio, worth, limits):
    """PPO with clip-higher and dual clip as papers write it (docs/algorithm.md 5.2)."""
    loss = torch.maximum(-worth * ratio, -worth * ratio.clamp(1 - limits.clip_low, 1 + limits.clip_high))
    return torch.where(worth < 0, torch.minimum(loss, -worth * limits.dual_clip), loss)


def correction(gap, actor):
    bound = math.log(actor.correction_threshold)
    level, _, kind = actor.correction.partition("_")
    rho = gap.sum() if level == "sequence" else gap
    if kind == "tis":
        return rho.clamp(max=bound).exp()
    return (rho.abs() <= bound).double() if kind == "mask" else 1.0
