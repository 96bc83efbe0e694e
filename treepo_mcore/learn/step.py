"""What a step does with its trees: advantages, mini-batches, old and reference log-probs, optimizer steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from torch import Tensor

from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.parallel import Grid
from treepo_mcore.config import Config
from treepo_mcore.learn.advantage import advantages
from treepo_mcore.learn.correction import find_correction, leaf_factors
from treepo_mcore.learn.deal import balance, forward_flops
from treepo_mcore.learn.loss import PolicyObjective
from treepo_mcore.learn.packing import find_packing
from treepo_mcore.model.shards import token_work
from treepo_mcore.records import Advantage, Deliver, PackedSequence, Step, all_are_here
from treepo_mcore.tree.tree import Tree


@dataclass(frozen=True)
class MiniBatch:
    """This rank's share of one optimizer step."""

    trees: list[Tree]
    worth: list[Advantage]
    sequences: list[PackedSequence]
    normaliser: float | None  # of the loss over all ranks; None: the sum of all edges' weights


def learn(actor: Actor, step: Step, config: Config) -> None:
    """Optimizer steps over mini-batches of the whole prompts that the step kept, whose trees go to who trains on them.

    Old log-probs are those before the first of these steps. Writes the step's advantages, mini-batches, updates and
    values, which are equal on all ranks, but for the rank's own `time/tflops`.
    """
    begin = time.perf_counter()
    actor.set_step(step.number)
    step.advantages = advantages(step.kept, config.advantage, config.actor.loss.aggregation)
    step.mini_batches = mini_batch_sizes(len(step.kept), config.trainer.prompts_per_update)
    batches = mini_batches(step.kept, step.advantages, config, actor.grid, token_work(actor.arch), step.batch.deliver)
    sequences = [sequence for batch in batches for sequence in batch.sequences]
    old = iter(_old_log_probs(actor, sequences, config))
    reference = iter(actor.reference_log_probs(sequences) if config.actor.reference == "host" else ())
    objective = PolicyObjective(config.actor)
    for batch in batches:
        old_logp = [next(old) for _ in batch.sequences]
        reference_logp = [next(reference) for _ in batch.sequences] if config.actor.reference == "host" else None
        factors = None
        if find_correction(config.actor.correction).level == "sequence":
            factors = leaf_factors(batch.trees, batch.sequences, old_logp, config.actor)
            batch = _corrected(batch, factors, config)
        step.updates.append(
            actor.update(
                batch.sequences, old_logp, objective, reference_logp=reference_logp, normaliser=batch.normaliser
            )
        )
        if factors is not None:  # which are in the advantages, where the actor does not see them
            step.updates[-1]["correction"] = _mean_factor(actor, batch.trees, factors)
    actor.finish_updates()
    step.values |= _step_metrics(step.updates, config)
    step.values |= {"actor/lr": actor.learning_rate, "actor/updates": len(step.updates)}
    # An update is a forward pass and twice as much backward; what recomputation repeats is not counted.
    passes = 3 + (config.actor.old_logprobs == "recompute") + (config.actor.reference == "host")
    flops = passes * forward_flops(step.kept, actor.arch)
    step.values["time/tflops"] = flops / (time.perf_counter() - begin) / actor.grid.world / 1e12


def mini_batch_sizes(trees: int, most: int) -> list[int]:
    """Trees of each mini-batch, at most `most`: as few as that allows, and evenly, in place of a small last one."""
    count = math.ceil(trees / most)
    ends = [math.ceil(trees * number / max(count, 1)) for number in range(count + 1)]
    return [end - begin for begin, end in pairwise(ends)]


def mini_batches(
    trees: Sequence[Tree],
    worth: Sequence[Advantage],
    config: Config,
    grid: Grid,
    work: float,
    deliver: Deliver = all_are_here,
) -> list[MiniBatch]:
    """This data-parallel rank's share of every mini-batch. worth: of each tree; work: see `model.shards.token_work`.

    trees may be outlines, where `deliver` brings whole ones; it is called once.
    """
    begin, deals = 0, []  # of each mini-batch, the indices of every data-parallel rank
    for number, size in enumerate(mini_batch_sizes(len(trees), config.trainer.prompts_per_update)):
        part = balance(trees[begin : begin + size], grid.dp, work, first=number)
        deals.append([[begin + index for index in share] for share in part])
        begin += size
    mine = iter(deliver([[trees[i] for deal in deals for i in deal[rank]] for rank in range(grid.dp)], grid.dp_rank))
    batches = []
    for deal in deals:
        my_worth = [worth[i] for i in deal[grid.dp_rank]]
        my_trees = [next(mine) for _ in my_worth]
        everyone = [worth[i] for i in sorted(i for share in deal for i in share)]
        batches.append(MiniBatch(my_trees, my_worth, _pack(my_trees, my_worth, config), _normaliser(everyone, config)))
    return batches


def _pack(trees: Sequence[Tree], worth: Sequence[Advantage], config: Config) -> list[PackedSequence]:
    pack = find_packing(config.actor.packing)
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
    lengths = [np.array([tree.trained_tokens(leaf) for leaf in range(len(tree.leaves))]) for tree in trees]
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
        if name == "skipped":
            value = sum(column)
        values[name if "/" in name else f"actor/{name}"] = value
    return values
