"""On every rank: bytes that a live actor holds, and that an update holds at its height."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from log_probs import make_actor
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from treepo_mcore.actor.actor import Actor
from treepo_mcore.learn.loss import PolicyObjective
from treepo_mcore.records import PackedSequence


def sequence(tokens: int, vocab: int) -> PackedSequence:
    """One path, every token but the last predicts the next."""
    index = torch.arange(tokens)
    edges = tokens - 1
    return PackedSequence(
        tokens=index % vocab,
        positions=index,
        parent=index - 1,
        subtree_end=torch.full((tokens,), tokens),
        source=index[:-1],
        target=index[1:] % vocab,
        multiplicity=torch.ones(edges, dtype=torch.int64),
        adv_pos=torch.rand(edges),
        adv_neg=-torch.rand(edges),
        weight=torch.ones(edges),
        behaviour_logprob=torch.full((edges,), -5.0),
        edge_key=torch.zeros(edges, 3, dtype=torch.int64),
    )


def optimizers(actor: Actor) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(actor.optimizer, "chained_optimizers", [actor.optimizer]):
        yield part.optimizer


def state(actor: Actor) -> dict[str, int]:
    """Bytes of distinct storages: parameters, gradients, and what the optimizer has beside them."""
    parameters = [p for chunk in actor.chunks for p in chunk.parameters()]
    seen: dict[int, int] = {}

    def fresh(tensors: Iterator[Tensor]) -> int:
        new = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                new[storage.data_ptr()] = storage.nbytes()
        seen.update(new)
        return sum(new.values())

    return {
        "parameters": fresh(p.data for p in parameters),
        "gradients": fresh(p.main_grad for p in parameters),
        "optimizer": fresh(
            tensor
            for optimizer in optimizers(actor)
            for tensor in [
                *(p for group in optimizer.param_groups for p in group["params"]),
                *(v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)),
            ]
        ),
    }


def peak_of(actor: Actor, batch: list[PackedSequence], old: list[Tensor]) -> int:
    """Bytes above those at the start that the allocator has given out at the height of an update."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        actor.update(batch, old, PolicyObjective(actor.config))
    level = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def measure(directory: str, layouts: dict[str, dict[str, Any]], tokens: int, vocab: int) -> dict[str, dict[str, int]]:
    """Layout -> bytes on this rank."""
    results = {}
    for name, settings in layouts.items():
        actor = make_actor(Path(directory), settings)
        batch = [sequence(tokens, vocab)]
        old = [torch.full((tokens - 1,), -5.0)]
        actor.set_step(0)
        actor.update(batch, old, PolicyObjective(actor.config))  # the optimizer's state is made by its first step
        results[name] = state(actor) | {"peak": peak_of(actor, batch, old)}
    return results
