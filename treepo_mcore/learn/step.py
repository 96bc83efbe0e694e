"""What a step does with its trees: advantages, mini-batches, old and reference log-probs, optimizer steps."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from torch import Tensor

from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.parallel import Grid
from treepo_mcore.config import Config
from treepo_mcore.learn.advantage import advantages
from treepo_mcore.learn.correction import check_mismatch, leaf_factors
from treepo_mcore.learn.loss import PolicyObjective
from treepo_mcore.learn.packing import balance, pack_flat, pack_trees
from treepo_mcore.model.architecture import Sizes
from treepo_mcore.model.shards import matrix_parameters
from treepo_mcore.records import Advantage, PackedSequence
from treepo_mcore.tree.stats import informative
from treepo_mcore.tree.tree import Tree


@dataclass(frozen=True)
class MiniBatch:
    """This rank's share of one optimizer step."""

    trees: list[Tree]
    worth: list[Advantage]
    sequences: list[PackedSequence]
    normaliser: float | None  # of the loss over all ranks; None: the sum of all edges' weights


def choose(trees: Sequence[Tree], config: Config, step: int) -> list[Tree]:
    """What a step trains on: under the filter, trees whose leaves differ.

    The control experiment permutes rewards only among these: it trains on what the experiment trains on.
    """
    kept = [tree for tree in trees if informative(tree)] if config.filter.enabled else list(trees)
    if config.reward.shuffle:
        _shuffle_rewards(kept, random.Random(f"{config.run.seed}/{step}"))
    return kept


def _shuffle_rewards(trees: Sequence[Tree], rng: random.Random) -> None:
    leaves = [leaf for tree in trees for leaf in tree.leaves]
    verdicts = [(leaf.reward, leaf.score, leaf.correct) for leaf in leaves]
    rng.shuffle(verdicts)
    for leaf, verdict in zip(leaves, verdicts, strict=True):
        leaf.reward, leaf.score, leaf.correct = verdict


def learn(actor: Actor, trees: Sequence[Tree], config: Config, step: int) -> dict[str, float]:
    """Optimizer steps over mini-batches of whole prompts. Every rank gets all trees; returns equal metrics on all.

    Old log-probs are those before the first of these steps. Raises `MismatchError` on all ranks together.
    """
    actor.set_step(step)
    batches = mini_batches(trees, config, actor.grid, token_work(actor.arch))
    sequences = [sequence for batch in batches for sequence in batch.sequences]
    old = iter(_old_log_probs(actor, sequences, config))
    reference = iter(actor.reference_log_probs(sequences) if config.actor.reference == "host" else ())
    objective = PolicyObjective(config.actor)
    results: list[dict[str, float]] = []
    for batch in batches:
        old_logp = [next(old) for _ in batch.sequences]
        reference_logp = [next(reference) for _ in batch.sequences] if config.actor.reference == "host" else None
        factors = None
        if config.actor.correction.startswith("sequence"):
            factors = leaf_factors(batch.trees, batch.sequences, old_logp, config.actor)
            batch = _corrected(batch, factors, config)
        results.append(
            actor.update(
                batch.sequences, old_logp, objective, reference_logp=reference_logp, normaliser=batch.normaliser
            )
        )
        if factors is not None:  # which are in the advantages, where the actor does not see them
            results[-1]["correction"] = _mean_factor(actor, batch.trees, factors)
        if config.actor.old_logprobs == "recompute" or len(results) == 1:
            check_mismatch(results[-1]["mismatch/logprob_abs_mean"], config.actor, step)
    actor.finish_updates()
    return _step_metrics(results, config) | {"actor/lr": actor.learning_rate, "actor/updates": len(results)}


def token_work(sizes: Sizes) -> float:
    """Query-key pairs that take as many multiplications as one token in the linear layers: 52,000 in Llama 70B."""
    return matrix_parameters(sizes) / (2 * sizes.heads * sizes.head_dim)


def mini_batches(trees: Sequence[Tree], config: Config, grid: Grid, work: float) -> list[MiniBatch]:
    """This data-parallel rank's share of every mini-batch. work: see `token_work`.

    As few as `trainer.prompts_per_update` allows, and evenly: a few prompts too many do not get a step of their own.
    """
    worth = advantages(trees, config.advantage, config.actor.loss.aggregation)
    count = math.ceil(len(trees) / config.trainer.prompts_per_update)
    ends = [math.ceil(len(trees) * number / max(count, 1)) for number in range(count + 1)]
    batches = []
    for number, (begin, end) in enumerate(pairwise(ends)):
        part, values = trees[begin:end], worth[begin:end]
        mine = balance(part, grid.dp, work, first=number)[grid.dp_rank]
        my_trees, my_worth = [part[i] for i in mine], [values[i] for i in mine]
        batches.append(MiniBatch(my_trees, my_worth, _pack(my_trees, my_worth, config), _normaliser(values, config)))
    return batches


def _pack(trees: Sequence[Tree], worth: Sequence[Advantage], config: Config) -> list[PackedSequence]:
    pack = pack_trees if config.actor.packing == "tree" else pack_flat
    return pack(trees, worth, config.actor.micro_batch_tokens, config.actor.least_micro_batches)


def _normaliser(worth: Sequence[Advantage], config: Config) -> float | None:
    """Token and sequence mean divide by the sum of the weights of all edges, which the actor adds up by itself."""
    if config.actor.loss.aggregation != "fixed_length":
        return None
    return config.rollout.tree.response_tokens * sum(float(value.weights.sum()) for value in worth)


def _old_log_probs(actor: Actor, sequences: list[PackedSequence], config: Config) -> list[Tensor]:
    if config.actor.old_logprobs == "engine":
        return [sequence.behaviour_logprob for sequence in sequences]
    return [output[0] for output in actor.log_probs(sequences)]


def _corrected(batch: MiniBatch, factors: list[np.ndarray], config: Config) -> MiniBatch:
    """Packed anew with scaled advantages; sequences and edges come out in the same order."""
    worth = [value.scaled(factor) for value, factor in zip(batch.worth, factors, strict=True)]
    return replace(batch, worth=worth, sequences=_pack(batch.trees, worth, config))


def _mean_factor(actor: Actor, trees: Sequence[Tree], factors: list[np.ndarray]) -> float:
    """Over the logical tokens of the mini-batch, on all ranks."""
    lengths = [np.array([tree.leaf_tokens(leaf) for leaf in range(len(tree.leaves))]) for tree in trees]
    scaled = sum(float((length * factor).sum()) for length, factor in zip(lengths, factors, strict=True))
    scaled, tokens = actor.sum_over_replicas(scaled, sum(float(length.sum()) for length in lengths))
    return scaled / max(tokens, 1.0)


def _step_metrics(results: list[dict[str, float]], config: Config) -> dict[str, float]:
    """Means over the updates. The mismatch is that of the old policy: with the engine's log-probs the actor's own are
    known for the first update only."""
    values: dict[str, float] = {}
    for name in results[0] if results else ():
        known = results[:1] if name.startswith("mismatch/") and config.actor.old_logprobs == "engine" else results
        column = [result[name] for result in known]
        value = max(column) if name.endswith("_max") else sum(column) / len(column)
        values[name if name.startswith("mismatch/") else f"actor/{name}"] = value
    return values
