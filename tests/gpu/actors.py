"""In a process with the GPU: the same updates in another precision."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from treepo_mcore.learn.loss import PolicyObjective

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))


def gradients(directory: str, cases: dict[str, dict[str, Any]], trees: str) -> dict[str, dict[str, float]]:
    """Against the first case: cosine of all gradients together, and mean difference of log-probs in nats."""
    from layouts import look_before_stepping, mini_batches
    from log_probs import make_actor

    results = {}
    for name, settings in cases.items():
        actor = make_actor(Path(directory), settings)
        seen = look_before_stepping(actor)
        (batch,) = mini_batches(actor, trees, 100, "tree")
        logp = [out[0] for out in actor.log_probs(batch)]
        actor.update(batch, logp, PolicyObjective(actor.config))
        flat = torch.cat([grad.flatten().double() for _, grad in sorted(actor_grads(actor, seen[0]).items())])
        results[name] = (flat, torch.cat(logp))
    first = results[next(iter(cases))]
    return {
        name: {
            "cosine": float(torch.cosine_similarity(flat, first[0], dim=0)),
            "logp": float((logp - first[1]).abs().mean()),
        }
        for name, (flat, logp) in results.items()
    }


def updates(directory: str, cases: dict[str, dict[str, Any]], trees: str) -> dict[str, dict[str, Any]]:
    """Against the first case, with everything offloaded between two updates: readable tensors, and log-probs.

    The largest difference of log-probs, nats, before the first update, after it, and after the second.
    """
    from layouts import mini_batches
    from log_probs import make_actor

    results = {}
    for name, settings in cases.items():
        actor = make_actor(Path(directory), settings)
        (batch,) = mini_batches(actor, trees, 100, "tree")
        logp = [torch.cat([out[0] for out in actor.log_probs(batch)])]
        for _ in range(2):
            old = [out[0] for out in actor.log_probs(batch)]
            actor.update(batch, old, PolicyObjective(actor.config))
            actor.finish_updates()
            actor.memory.keep(set())
            actor.memory.keep({"parameters", "gradients", "optimizer"})
            logp.append(torch.cat([out[0] for out in actor.log_probs(batch)]))
        with actor.readable():
            tensors = {tensor: values.float().cpu() for tensor, values in actor.tensors.items()}
        results[name] = (logp, tensors, len(actor.copies.tensors))
    first, other, _ = results[next(iter(cases))]
    return {
        name: {
            "logp": [float((mine - theirs).abs().max()) for mine, theirs in zip(logp, first, strict=True)],
            "read": max(float((t - other[key]).abs().max() / other[key].abs().max()) for key, t in tensors.items()),
            "quantised": quantised,
        }
        for name, (logp, tensors, quantised) in results.items()
    }


def actor_grads(actor: Any, grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In Hugging Face coordinates: TransformerEngine's layers have other names."""
    from layouts import in_hf

    return in_hf(actor, grads)[0]
