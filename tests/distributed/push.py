"""On every rank: direct pushes between real optimizer steps, next to gathered ones of the same weights."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from answers import greedy
from layouts import mini_batches, noise
from log_probs import engine_rank, make_actor
from models import EOS_IDS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from treepo_mcore.actor.actor import Actor
from treepo_mcore.config import parse_config
from treepo_mcore.engine.vllm.engine import VllmEngine
from treepo_mcore.engine.vllm.layout import fp8_shapes, vllm_layout, vllm_padding, vllm_pieces, vllm_shapes
from treepo_mcore.learn.loss import PolicyObjective
from treepo_mcore.model.facts import FP8_BLOCK as BLOCK
from treepo_mcore.weights.export import export_directory
from treepo_mcore.weights.fp8 import FP8, SCALE, quantise, scale_shape
from treepo_mcore.weights.hf import gather_tensors
from treepo_mcore.weights.layout import box
from treepo_mcore.weights.transfer import Push, TransferError, plan_push


def make_push(
    actor: Actor, parameters: dict[str, Tensor], rollout_tp: int, staging_bytes: int, expert_parallel: bool = False
) -> tuple[Push, int]:
    """From an actor into parameters beside it; and the most bytes that tensors made by binding the plan took."""
    where = (parameters, actor.arch, rollout_tp, engine_rank(rollout_tp))
    plan = plan_push(actor.pieces, vllm_layout(*where, expert_parallel))
    padding = vllm_padding(*where)
    with Allocations() as made:
        push = Push(plan, actor.tensors, parameters, padding=padding, staging_bytes=staging_bytes)
    return push, made.peak


def run(
    config: dict[str, Any], prompts: list[list[int]], trees: str, rounds: int, tokens: int, staging: int, out: str
) -> dict[str, Any]:
    """After each of `rounds` optimizer steps: direct push, greedy answers, gathered push, export. At last, damage.

    staging: bytes.
    """
    settings = parse_config(config)
    source = Path(settings.model.path)
    actor = make_actor(source, config["actor"])
    engine = VllmEngine(settings, actor.arch, source, EOS_IDS)
    rollout = settings.rollout
    push, bound = make_push(actor, engine.parameters(), rollout.tp, staging, rollout.expert_parallel)
    result: dict[str, Any] = {"answers": [], "different": [], "reports": [], "made_binding": bound, "made": []}
    result |= described(push)
    addresses = {name: tensor.data_ptr() for name, tensor in engine.parameters().items()}
    for number, batch in enumerate(mini_batches(actor, trees, 2, "tree")[:rounds]):
        step(actor, batch)
        spoil(engine.parameters())
        engine.sleep()
        engine.wake_weights()
        with Allocations() as made:
            result["reports"].append(vars(push.run()))
        result["made"].append(made.peak)
        engine.wake_cache()
        result["answers"].append(greedy(engine, prompts, tokens))
        direct = {name: tensor.clone() for name, tensor in engine.parameters().items()}
        spoil(engine.parameters())
        engine.sleep()
        engine.wake(named(actor))
        result["different"] += different(direct, engine.parameters())
        export_directory(source, Path(out) / f"round_{number}", actor.arch, actor.pieces, actor.tensors, torch.float32)
    result["moved"] = sum(tensor.data_ptr() != addresses[n] for n, tensor in engine.parameters().items())
    result["damage"] = [damaged(push, scale) for scale in (False, True)]
    return result


def run_blocks(
    directory: str, settings: dict[str, Any], rollout_tp: int, trees: str, rounds: int, staging: int
) -> dict[str, Any]:
    """FP8 pushes into parameters of vLLM's shapes without its kernels, which not every CPU has.

    After each of `rounds` optimizer steps, compared with the gathered tensors, cut and quantised here.
    """
    actor = make_actor(Path(directory), settings)
    quantised = fp8_shapes(actor.arch, rollout_tp)
    parameters = {
        name: torch.zeros(shape, dtype=FP8 if name in quantised else torch.bfloat16)
        for name, shape in vllm_shapes(actor.arch, rollout_tp).items()
    }
    parameters |= {name + SCALE: torch.zeros(scale_shape(shape)) for name, shape in quantised.items()}
    push, bound = make_push(actor, parameters, rollout_tp, staging)
    result: dict[str, Any] = {"different": [], "reports": [], "made_binding": bound, "made": []}
    result |= described(push)
    for batch in mini_batches(actor, trees, 2, "tree")[:rounds]:
        step(actor, batch)
        spoil(parameters)
        with Allocations() as made:
            result["reports"].append(vars(push.run()))
        result["made"].append(made.peak)
        result["different"] += different(sliced(actor, parameters, rollout_tp), parameters)
    result["damage"] = [damaged(push, scale) for scale in (False, True)]
    return result


def sliced(actor: Actor, parameters: dict[str, Tensor], rollout_tp: int) -> dict[str, Tensor]:
    """What should stand in the parameters."""
    whole = {name: torch.zeros(tensor.shape) for name, tensor in parameters.items()}
    full = dict(named(actor))
    for piece in vllm_pieces(actor.arch, rollout_tp, engine_rank(rollout_tp)):
        piece.of_local(whole).copy_(box(full[piece.tensor], piece.start, piece.shape))
    expected = {name: tensor.to(parameters[name].dtype) for name, tensor in whole.items()}
    for name in fp8_shapes(actor.arch, rollout_tp):
        expected[name], expected[name + SCALE] = quantise(whole[name].bfloat16())
    return expected


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still there; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in known:
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return out

    def _count(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def described(push: Push) -> dict[str, Any]:
    """What the plan says of this rank.

    plain_bytes: received if nothing were quantised; boxes: sent and received; cut_bytes: of those FP8 blocks of a
    parameter that come in parts, in the rollout's dtype, for the parameter that has most; strip: elements of the
    largest box that is quantised.
    """
    mine = [t for t in push.plan if push.rank in (t.source, t.target)]
    cut: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for t in mine:
        if t.form == "cut" and t.target == push.rank:
            ends = [first + size for first, size in zip(t.target_start, t.shape, strict=True)]
            spans = [range(a // BLOCK, -(-b // BLOCK)) for a, b in zip(t.target_start, ends, strict=True)]
            cut[t.target_local] |= set(itertools.product(*spans))
    return {
        "plain_bytes": push.dtype.itemsize * sum(t.numel for t in mine if not t.local and t.target == push.rank),
        "quantisers": push.quantisers,
        "boxes": sum(len(message.parts) for r in push.rounds for message in (*r.sends, *r.receives)),
        "cut_bytes": BLOCK**2 * push.dtype.itemsize * max(map(len, cut.values()), default=0),
        "strip": max((t.numel for t in mine if t.form == "blocks"), default=0),
    }


def step(actor: Actor, batch: list[Any]) -> None:
    """A real one; the rate is high enough to change every answer."""
    actor.set_step(0)
    old = [out[0] + noise(sequence) for sequence, out in zip(batch, actor.log_probs(batch), strict=True)]
    actor.update(batch, old, PolicyObjective(actor.config))


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


def damaged(push: Push, scale: bool) -> list[str | None]:
    """Flip one bit of what arrives on rank 1; what the push says about it, and what it should say there.

    scale: a bit of the last FP8 block's scale, otherwise one of the last box of the first message.
    """
    finish, chosen = push._finish, None
    if push.rank == 1:
        messages = [message for current in push.rounds for message in current.receives]
        parts = [part for message in messages for part in message.parts if part.scale_slot is not None]
        if not scale and messages:
            parts = messages[0].parts
        chosen = parts[-1] if parts else None

    def flip(number: int, works: list[Any], sums: Any) -> None:
        for work in works:
            work.wait()
        for part in (part for message in push.rounds[number].receives for part in message.parts):
            if part is chosen:
                slot = part.scale_slot if scale else part.slot
                slot.view(torch.uint8).view(-1)[-1] ^= 1
        finish(number, [], sums)

    push._finish = flip
    found = expected = None
    if chosen is not None:
        bad = chosen.transfer
        expected = f"push: {bad.tensor} from rank {bad.source} arrived damaged in {bad.target_local} on rank 1"
    try:
        push.run()
    except TransferError as error:
        found = str(error)
    push._finish = finish
    return [found, expected]
