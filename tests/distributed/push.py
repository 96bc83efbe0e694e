"""On every rank: direct pushes between real optimizer steps, next to gathered ones of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine import prompts, step
from layouts import mini_batches
from torch import Tensor

from treepo_mcore.config import parse_config
from treepo_mcore.trainer import Trainer
from treepo_mcore.weights.hf import export_directory, gather_tensors
from treepo_mcore.weights.transfer import Push, TransferError, plan_push
from treepo_mcore.weights.vllm import vllm_layout, vllm_padding


def make_push(trainer: Trainer, staging_bytes: int) -> Push:
    """From the trainer's actor into its engine."""
    parameters = trainer.engine.parameters()
    where = (parameters, trainer.arch, trainer.config.rollout.tp, trainer.grid.engine_rank)
    plan = plan_push(trainer.actor.pieces, vllm_layout(*where))
    sources = trainer.actor.tensors
    return Push(plan, sources, parameters, padding=vllm_padding(*where), staging_bytes=staging_bytes)


def run(config: dict[str, Any], trees: str, rounds: int, tokens: int, staging: int, out: str) -> dict[str, Any]:
    """After each of `rounds` optimizer steps: direct push, greedy answers, gathered push, export. At last, damage."""
    trainer = Trainer(parse_config(config))
    push = make_push(trainer, staging)
    result: dict[str, Any] = {"answers": [], "different": [], "reports": [], "prompts": prompts(trainer)}
    addresses = {name: tensor.data_ptr() for name, tensor in trainer.engine.parameters().items()}
    for number, batch in enumerate(mini_batches(trainer.actor, trees, 2, "tree")[:rounds]):
        step(trainer, batch)
        spoil(trainer.engine.parameters())
        trainer.engine.wake_weights()
        result["reports"].append(vars(push.run()))
        trainer.engine.wake_cache()
        result["answers"].append(trainer.engine.greedy(prompts(trainer), tokens))
        direct = {name: tensor.clone() for name, tensor in trainer.engine.parameters().items()}
        spoil(trainer.engine.parameters())
        trainer.engine.wake(named(trainer))
        result["different"] += different(direct, trainer.engine.parameters())
        export_directory(trainer.directory, Path(out) / f"round_{number}", named(trainer))
    result["moved"] = sum(tensor.data_ptr() != addresses[n] for n, tensor in trainer.engine.parameters().items())
    result["damage"] = damaged(push)
    trainer.close()
    return result


def named(trainer: Trainer) -> Any:
    """The full tensors, for the reference way."""
    return gather_tensors(trainer.arch, trainer.actor.pieces, trainer.actor.tensors, torch.float32)


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
            push.inbox[0].view(torch.uint8)[0] ^= 1
        finish(number, [], sums)

    push._finish = flip
    try:
        push.run()
    except TransferError as error:
        return str(error)
    return None
