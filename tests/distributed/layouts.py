"""On every rank: optimizer steps on the same saved trees under many layouts, results in Hugging Face coordinates."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from log_probs import by_edge, make_actor
from torch import Tensor

from treepo_mcore.actor.actor import Actor
from treepo_mcore.actor.layout import unwrap
from treepo_mcore.config import AdvantageConfig
from treepo_mcore.learn.advantage import advantages
from treepo_mcore.learn.deal import balance
from treepo_mcore.learn.loss import PolicyObjective
from treepo_mcore.learn.packing import pack_flat, pack_trees
from treepo_mcore.model.shards import token_work
from treepo_mcore.records import PackedSequence
from treepo_mcore.tree.files import read_trees
from treepo_mcore.tree.tree import Tree
from treepo_mcore.weights.hf import gather_tensors
from treepo_mcore.weights.layout import box

BUDGET = 256  # tokens of a sequence: several micro-batches a rank


def _share(trees: list[Tree], actor: Actor) -> list[int]:
    return balance(trees, actor.grid.dp, token_work(actor.arch))[actor.grid.dp_rank]


def mini_batches(actor: Actor, file: str, per_update: int, packing: str) -> list[list[PackedSequence]]:
    """This rank's share of the trees, as the trainer deals them; edge keys name trees by their line in the file."""
    trees = list(read_trees(file))
    worth = advantages(trees, AdvantageConfig())
    pack = pack_trees if packing == "tree" else pack_flat
    result = []
    for begin in range(0, len(trees), per_update):
        mine = [begin + i for i in _share(trees[begin : begin + per_update], actor)]
        sequences = pack([trees[i] for i in mine], [worth[i] for i in mine], BUDGET)
        for sequence in sequences:
            sequence.edge_key[:, 0] = torch.tensor(mine)[sequence.edge_key[:, 0]]
        result.append(sequences)
    return result


def noise(sequence: PackedSequence) -> Tensor:
    """What separates old from new log-probs: up to 0.6 nats, drawn from the edge's name."""
    digests = [hashlib.sha256(repr(key).encode()).digest() for key in sequence.edge_key.tolist()]
    return torch.tensor([int.from_bytes(d[:4], "big") / 2**32 * 1.2 - 0.6 for d in digests])


def in_hf(actor: Actor, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Full tensors under their Hugging Face names, and the largest difference between replicas of any of them."""
    named, gap = {}, 0.0
    for name, full in gather_tensors(actor.arch, actor.pieces, tensors, torch.float32):
        named[name] = full.clone()
        for piece in actor.pieces:
            if piece.tensor == name:
                part = piece.of_local(tensors) - box(full, piece.start, piece.shape)
                gap = max(gap, part.abs().nan_to_num(nan=torch.inf).max().item())
    return named, gap


def main_grads(actor: Actor) -> dict[str, Tensor]:
    """Local name -> this rank's reduced gradient."""
    return {
        f"{index}.{name}": parameter.main_grad.clone()
        for index, chunk in enumerate(actor.chunks)
        for name, parameter in unwrap(chunk).named_parameters()
    }


def look_before_stepping(actor: Actor) -> list[dict[str, Tensor]]:
    """Gradients of every update from now on, taken between the backward pass and the optimizer."""
    seen: list[dict[str, Tensor]] = []
    step = actor.optimizer.step

    def record() -> Any:
        seen.append(main_grads(actor))
        return step()

    actor.optimizer.step = record
    return seen


def one_case(directory: str, settings: dict[str, Any], trees: str, per_update: int) -> dict[str, Any]:
    """Log-probs, metrics, gradients and weights of one layout."""
    actor = make_actor(Path(directory), settings, temperature=0.7)
    batches = mini_batches(actor, trees, per_update, settings.get("packing", "tree"))
    sequences = [sequence for batch in batches for sequence in batch]
    outputs = actor.log_probs(sequences)
    old = iter([out[0] + noise(s) for s, out in zip(sequences, outputs, strict=True)])
    seen = look_before_stepping(actor)
    actor.set_step(0)
    result: dict[str, Any] = {"metrics": [], "weights": [], "gaps": []}
    for batch in batches:
        result["metrics"].append(actor.update(batch, [next(old) for _ in batch], PolicyObjective(actor.config)))
        actor.finish_updates()
        weights, gap = in_hf(actor, actor.tensors)
        result["weights"].append(weights)
        result["gaps"].append(gap)
    edges: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(edges, by_edge(sequences, outputs))
    result["log_probs"] = [table for table in edges if table is not None]
    if settings["optimizer"]["distributed"]:  # a rank then holds only its share of the reduced gradients
        return result
    result["gradients"] = []
    for grads in seen:
        named, gap = in_hf(actor, grads)
        result["gradients"].append(named)
        result["gaps"].append(gap)
    return result


def run(models: dict[str, str], layouts: dict[str, dict[str, Any]], trees: str, per_update: int, out: str) -> None:
    """Rank 0 saves {(layout, model): result}."""
    # Fills uninitialised memory with NaN: nothing may depend on what torch.empty finds.
    torch.use_deterministic_algorithms(True, warn_only=True)
    results = {
        (layout, name): one_case(directory, settings, trees, per_update)
        for layout, settings in layouts.items()
        for name, directory in models.items()
    }
    if dist.get_rank() == 0:
        torch.save(results, out)


def shares_of_two_ranks(directory: str, trees: str) -> dict[str, Any]:
    """Micro-batches of an update where a rank has 1 + its number of sequences, plain and in FP8 with delayed scaling;
    and what `Actor.update` says when another rank's advantages are not numbers."""
    actor = make_actor(Path(directory), {"optimizer": {"distributed": True}})
    (batch,) = mini_batches(actor, trees, 8, "tree")
    batch *= 2
    mine = 1 + actor.grid.rank
    counts = [actor._most(mine, backward=True)]
    actor.megatron.fp8 = "hybrid"
    counts.append(len(actor._micro_batches(batch[:mine], least=actor._most(mine, backward=True))))
    actor.megatron.fp8 = None
    return {"counts": counts} | _not_finite(actor, batch)


def idle_rank(directory: str, trees: str, settings: dict[str, Any]) -> float:
    """A first step in which the second rank has no tree; the mini-batch's tokens as it reports them."""
    actor = make_actor(Path(directory), {"optimizer": {"distributed": True}} | settings)
    (batch,) = mini_batches(actor, trees, 8, "tree")
    assert bool(batch) == (actor.grid.rank == 0)
    old = [out[0] for out in actor.log_probs(batch)]
    return actor.update(batch, old, PolicyObjective(actor.config))["tokens"]


def _not_finite(actor: Actor, batch: list[PackedSequence]) -> dict[str, Any]:
    """Two updates with advantages that are no numbers on one rank, and a good one."""
    good = [sequence.adv_pos.clone() for sequence in batch]
    before = {name: tensor.clone() for name, tensor in actor.tensors.items()}
    found: dict[str, Any] = {"skipped": []}

    def update() -> None:
        old = [sequence.behaviour_logprob for sequence in batch]
        found["skipped"].append(actor.update(batch, old, PolicyObjective(actor.config))["skipped"])
        actor.finish_updates()

    def spoil() -> None:
        if actor.grid.rank == 0:
            batch[0].adv_pos[:] = float("nan")

    spoil()
    update()
    update()
    found["moved"] = any(not torch.equal(tensor, before[name]) for name, tensor in actor.tensors.items())
    batch[0].adv_pos[:] = good[0]
    update()
    found["finite"] = all(bool(tensor.isfinite().all()) for tensor in actor.tensors.values())
    found["moved at last"] = any(not torch.equal(tensor, before[name]) for name, tensor in actor.tensors.items())
    return found
