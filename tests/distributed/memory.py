"""On every rank: the same updates with and without moving the actor out of the way between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from layouts import mini_batches, noise
from log_probs import make_actor
from megatron.core.distributed import DistributedDataParallel

from treepo_mcore.actor import checkpoint
from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.memory import storages
from treepo_mcore.actor.saver import save
from treepo_mcore.config import ActorConfig, parse_config
from treepo_mcore.learn.loss import PolicyObjective
from treepo_mcore.supervised import SupervisedTrainer

EVERYTHING = {"parameters", "gradients", "optimizer"}


def run(directory: str, layouts: dict[str, dict[str, Any]], trees: str, out: str) -> dict[str, Any]:
    """Weights must be equal bit for bit; returns bytes on the device in between, and the size of the host buffers."""
    found = {}
    for name, settings in layouts.items():
        still, _ = updates(directory, settings, trees, move=False, out=Path(out) / f"{name} still")
        moved, sizes = updates(directory, settings, trees, move=True, out=Path(out) / f"{name} moved")
        assert still.keys() == moved.keys()
        found[name] = sizes | {"equal": all(torch.equal(still[key], moved[key]) for key in still)}
    return found


def updates(
    directory: str, settings: dict[str, Any], trees: str, move: bool, out: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Three updates, with a checkpoint saved and loaded after the second."""
    actor = make_actor(Path(directory), settings)
    memory, sizes = actor.memory, {}
    memory.keep(set() if move else EVERYTHING)
    pinned = memory.host_bytes()  # before Adam has moments
    for number, batch in enumerate(mini_batches(actor, trees, 4, "tree")):
        memory.keep(EVERYTHING)
        actor.set_step(0)
        old = [o[0] + noise(s) for s, o in zip(batch, actor.log_probs(batch), strict=True)]
        actor.update(batch, old, PolicyObjective(actor.config))
        if number == 1:
            save(out, 2, actor, {}, keep=1)
            newest = checkpoint.newest(out)
            assert newest is not None
            checkpoint.load(newest, actor)
        if move:
            memory.keep(set())
            sizes = {
                "device": [sum(s.nbytes() for s in storages(tensors)) for tensors in held(actor)],
                "host": memory.host_bytes(),
                "pinned": pinned,
                "predicted": memory.bytes,
            }
    memory.keep(EVERYTHING)
    return {name: tensor.clone() for name, tensor in actor.tensors.items()}, sizes


def weights_alone(directory: str, trees: str, out: str) -> dict[str, Any]:
    """What an actor that only answers holds, and what it reads of a checkpoint of one that has learnt."""
    actor = make_actor(Path(directory), {})
    (batch,) = mini_batches(actor, trees, 100, "tree")
    actor.update(batch, [o[0] for o in actor.log_probs(batch)], PolicyObjective(actor.config))
    save(Path(out), 1, actor, {}, keep=1)
    newest = checkpoint.newest(Path(out))
    assert newest is not None
    settings = {"temperature": 1.0, "total_steps": 1, "learns": False}
    reader = Actor(ActorConfig(dtype="float32"), actor.arch, Path(directory), actor.grid, **settings)
    before = {name: tensor.clone() for name, tensor in reader.tensors.items()}
    checkpoint.load(newest, reader)
    reader.memory.keep(set())
    reader.memory.keep({"parameters"})
    return {
        "learner": actor.memory.bytes,
        "reader": reader.memory.bytes,
        "wrapped": any(isinstance(chunk, DistributedDataParallel) for chunk in reader.chunks),
        "changed": any(not torch.equal(before[name], tensor) for name, tensor in reader.tensors.items()),
        "equal": all(torch.equal(actor.tensors[name], tensor) for name, tensor in reader.tensors.items()),
    }


def warm_up(config: dict[str, Any]) -> dict[str, Any]:
    """Supervised steps, with gradients and optimizer away between them as by default on a GPU."""
    trainer = SupervisedTrainer(parse_config(config))
    before = {name: tensor.clone() for name, tensor in trainer.policy.actor.tensors.items()}
    trainer.run()
    after = trainer.policy.actor.tensors
    gone = [sum(s.nbytes() for s in storages(tensors)) for tensors in held(trainer.policy.actor)[1:]]
    return {"gone": gone, "changed": [name for name in before if not torch.equal(before[name], after[name])]}


def held(actor: Any) -> list[list[torch.Tensor]]:
    """Parameters, gradients, optimizer state."""
    gradients = [buffer.grad_data for chunk in actor.chunks for buffer in chunk.buffers]
    return [list(actor.tensors.values()), gradients, list(actor.memory._optimizer_tensors())]
