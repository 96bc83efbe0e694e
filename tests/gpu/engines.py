"""On every rank: a trainer's phases in turn, and what must be the same afterwards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from trees import step_of

from treepo_mcore.actor import checkpoint
from treepo_mcore.actor.saver import save
from treepo_mcore.config import parse_config
from treepo_mcore.learn.packing import pack_trees
from treepo_mcore.learn.step import learn
from treepo_mcore.records import PackedSequence
from treepo_mcore.trainer import Trainer
from treepo_mcore.tree.files import write_trees
from treepo_mcore.tree.tree import Tree
from treepo_mcore.weights.export import export_directory

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))


def run(config: dict[str, Any], rounds: int, out: str) -> dict[str, Any]:
    """In each of `rounds`: export, sample twice with a sleep and a push between, update.

    Returns whether both samples were equal, and largest differences of log-probs, nats: the reference policy's to the
    actor's first ones, and of a checkpoint that was loaded over later weights to those that it was made of.
    """
    from log_probs import no_advantages

    trainer, folder = Trainer(parse_config(config)), Path(out)
    actor, same = trainer.policy.actor, []
    for number in range(rounds):
        with trainer.policy.training():
            export_directory(
                trainer.checked.directory,
                folder / f"round_{number}",
                trainer.checked.arch,
                actor.pieces,
                actor.tensors,
                torch.float32,
            )
        trees = sample(trainer)
        same.append([tree.to_json() for tree in trees] == [tree.to_json() for tree in sample(trainer)])
        if dist.get_rank() == 0:
            write_trees(folder / f"round_{number}.jsonl", trees)
        with trainer.policy.phases.train():
            if number == 0:
                sequences = pack_trees(trees, no_advantages(trees), 1024)
                first = log_probs(trainer, sequences)
            learn(actor, step_of(trees, number), trainer.config)
    with trainer.policy.phases.train():
        before = log_probs(trainer, sequences)
        save(folder / "checkpoints", rounds, actor, {}, keep=1)
        learn(actor, step_of(trees, rounds), trainer.config)
        later = log_probs(trainer, sequences)
        newest = checkpoint.newest(folder / "checkpoints")
        assert newest is not None
        checkpoint.load(newest, actor)
        found = {
            "same_seeds": same,
            "reference": distance(actor.reference_log_probs(sequences), first),
            "changed": min(distance(first, before), distance(before, later)),
            "checkpoint": distance(log_probs(trainer, sequences), before),
        }
    trainer.close()
    return found


def sample(trainer: Trainer) -> list[Tree]:
    """A push and a rollout phase over the same prompts with the same seeds, however often it is called."""
    state = trainer.checked.prompts.state_dict()
    trainer.policy.push()
    batch = trainer.policy.collect(trainer.checked.prompts, 0)
    trees = batch.deliver([batch.trees], 0)
    trainer.checked.prompts.load_state_dict(state)
    return trees


def log_probs(trainer: Trainer, sequences: list[PackedSequence]) -> list[Tensor]:
    """The actor's."""
    return [output[0].clone() for output in trainer.policy.actor.log_probs(sequences)]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
