"""On every rank: direct pushes between real optimizer steps, next to gathered ones of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layouts import mini_batches, noise
from log_probs import make_actor
from models import EOS_IDS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treepo_mcore.actor.actor import Actor
from treepo_mcore.config import parse_config
from treepo_mcore.rollout.vllm_engine import VllmEngine
from treepo_mcore.weights.fp8 import quantisers
from treepo_mcore.weights.hf import export_directory, gather_tensors
from treepo_mcore.weights.transfer import Push, TransferError, plan_push
from treepo_mcore.weights.vllm import vllm_layout, vllm_padding


def make_push(actor: Actor, engine: VllmEngine, staging_bytes: int) -> tuple[Push, int]:
    """From an actor into the engine beside it; and the bytes of the largest tensor that binding the plan made."""
    parameters = engine.parameters()
    where = (parameters, actor.arch, engine.config.tp, actor.grid.engine_rank)
    plan = plan_push(actor.pieces, vllm_layout(*where))
    padding = vllm_padding(*where)
    with Allocations() as made:
        push = Push(plan, actor.tensors, parameters, padding=padding, staging_bytes=staging_bytes)
    return push, made.largest


def run(
    config: dict[str, Any], prompts: list[list[int]], trees: str, rounds: int, tokens: int, staging: int, out: str
) -> dict[str, Any]:
    """After each of `rounds` optimizer steps: direct push, greedy answers, gathered push, export. At last, damage.

    staging: bytes.
    """
    settings = parse_config(config)
    source = Path(settings.model.path)
    actor = make_actor(source, config["actor"], rollout_tp=settings.rollout.tp)
    engine = VllmEngine(settings, actor.arch, source, EOS_IDS)
    push, largest = make_push(actor, engine, staging)
    result: dict[str, Any] = {"answers": [], "different": [], "reports": [], "largest_made": largest}
    result |= described(push)
    addresses = {name: tensor.data_ptr() for name, tensor in engine.parameters().items()}
    for number, batch in enumerate(mini_batches(actor, trees, 2, "tree")[:rounds]):
        step(actor, batch)
        spoil(engine.parameters())
        engine.sleep()
        engine.wake_weights()
        with Allocations() as made:
            result["reports"].append(vars(push.run()))
        result["largest_made"] = max(result["largest_made"], made.largest)
        engine.wake_cache()
        result["answers"].append(engine.greedy(prompts, tokens))
        direct = {name: tensor.clone() for name, tensor in engine.parameters().items()}
        spoil(engine.parameters())
        engine.sleep()
        engine.wake(named(actor))
        result["different"] += different(direct, engine.parameters())
        export_directory(source, Path(out) / f"round_{number}", named(actor))
    result["moved"] = sum(tensor.data_ptr() != addresses[n] for n, tensor in engine.parameters().items())
    result["damage"] = damaged(push)
    return result


class Allocations(TorchDispatchMode):
    """Remembers the bytes of the largest storage that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def described(push: Push) -> dict[str, Any]:
    """What the plan says of this rank: bytes it would receive unquantised, and who quantises what."""
    received = [t for t in push.plan if not t.local and t.target == push.rank]
    return {"plain_bytes": push.dtype.itemsize * sum(t.numel for t in received), "quantisers": quantisers(push.plan)}


def step(actor: Actor, batch: list[Any]) -> None:
    """A real one; the rate is high enough to change every answer."""
    actor.set_step(0)
    old = [out[0] + noise(sequence) for sequence, out in zip(batch, actor.log_probs(batch), strict=True)]
    actor.update(batch, old)


def named(actor: Actor) -> Any:
    """The full tensors, for the reference way."""
    return gather_tensors(actor.arch, actor.pieces, actor.tensors, torch.float32)


def spoil(parameters: dict[str, Tensor]) -> None:
    """What a push does not write stays visible."""
    for tensor in parameters.values():
        tensor.fill_(7.0)


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal byte for byte."""
    return [name for name in one if not torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))]


def damaged(push: Push) -> str | None:
    """Flip one bit of the first byte that arrives on rank 1; what the push says about it."""
    finish = push._finish

    def flip(number: int, works: list[Any], sums: Any) -> None:
        for work in works:
            work.wait()
        if dist.get_rank() == 1 and number == 0:
            push.rounds[0].receives[0].parts[0].slot.view(torch.uint8).view(-1)[0] ^= 1
        finish(number, [], sums)

    push._finish = flip
    try:
        push.run()
    except TransferError as error:
        return str(error)
    return None
