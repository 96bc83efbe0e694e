"""On every rank: pushes between real optimizer steps, greedy answers and sampled trees."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from answers import greedy
from layouts import mini_batches, noise

from treepo_mcore.config import parse_config
from treepo_mcore.learn.loss import PolicyObjective
from treepo_mcore.trainer import Trainer
from treepo_mcore.tree.files import write_trees
from treepo_mcore.tree.tree import Tree
from treepo_mcore.weights import export
from treepo_mcore.weights.export import export_directory
from treepo_mcore.weights.hf import gather_tensors

from log_probs import no_advantages  # isort: skip
from treepo_mcore.learn.packing import pack_trees  # isort: skip


def run(config: dict[str, Any], trees: str, rounds: int, tokens: int, out: str) -> dict[str, Any]:
    """After each of `rounds` optimizer steps: export, push, answer every prompt greedily. Then sample trees."""
    trainer = Trainer(parse_config(config))
    answers = [push_and_answer(trainer, tokens, Path(out) / "round_0")]
    for number, batch in enumerate(mini_batches(trainer.policy.actor, trees, 2, "tree")[:rounds], 1):
        step(trainer, batch)
        answers.append(push_and_answer(trainer, tokens, Path(out) / f"round_{number}"))
    result = {"answers": answers, "stopped": stopped(trainer, answers[-1], tokens)}
    result |= sampled(trainer, Path(out))
    result |= {
        "one node": os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"] and trainer.policy.heartbeat is None
    }
    trainer.close()
    return result


export.SHARD_BYTES = 100_000  # so that all ranks have files to write


def step(trainer: Trainer, batch: list[Any]) -> None:
    """A real one; the rate is high enough to change every answer."""
    trainer.policy.actor.set_step(0)
    old = [out[0] + noise(sequence) for sequence, out in zip(batch, trainer.policy.actor.log_probs(batch), strict=True)]
    trainer.policy.actor.update(batch, old, PolicyObjective(trainer.config.actor))


def prompts(trainer: Trainer) -> list[list[int]]:
    """Token ids, the same on all ranks."""
    return [prompt.tokens for prompt in trainer.checked.held_out[0].prompts]


def push_and_answer(trainer: Trainer, tokens: int, folder: Path) -> list[list[int]]:
    """The engine's greedy answers with the actor's weights, which are exported as well."""
    actor = trainer.policy.actor
    trainer.policy.engine.wake(gather_tensors(trainer.checked.arch, actor.pieces, actor.tensors, torch.float32))
    answers = greedy(trainer.policy.engine, prompts(trainer), tokens)
    trainer.policy.engine.sleep()
    export_directory(
        trainer.checked.directory,
        folder,
        trainer.checked.arch,
        actor.pieces,
        actor.tensors,
        torch.float32,
        writers=list(range(dist.get_world_size()))[::-1],
    )
    return answers


def stopped(trainer: Trainer, answers: list[list[int]], tokens: int) -> dict[str, Any]:
    """Answers once more, with two tokens that occur in them declared to end them."""
    before = trainer.policy.engine.eos_ids
    ends = [answers[0][10], answers[1][20]]
    trainer.policy.push()
    with trainer.policy.phases.rollout():
        trainer.policy.engine.eos_ids = before + ends
        found = greedy(trainer.policy.engine, prompts(trainer), tokens)
        trainer.policy.engine.eos_ids = before
    return {"ends": ends, "answers": found}


def sampled(trainer: Trainer, out: Path) -> dict[str, Any]:
    """A rollout phase: how far the actor's log-probs are from the engine's, and the prefix cache's share."""
    trainer.policy.push()
    with trainer.policy.phases.rollout():
        batch = trainer.policy.rollout.collect(trainer.checked.prompts, trainer.step)
    trees = batch.deliver([batch.trees], 0)
    if dist.get_rank() == 0:
        write_trees(out / "trees.jsonl", trees)
    return {"gap": gap(trainer, trees), "counts": vars(batch.counts)}


def gap(trainer: Trainer, trees: list[Tree]) -> float:
    """Largest difference, nats."""
    sequences = pack_trees(trees, no_advantages(trees), 1024)
    outputs = trainer.policy.actor.log_probs(sequences)
    pairs = zip(sequences, outputs, strict=True)
    return max((out[0] - sequence.behaviour_logprob).abs().max().item() for sequence, out in pairs)
