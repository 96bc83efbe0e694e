"""How long the phases of a step take, rollout apart: log-probs, update, push, sleep and wake."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from treepo_mcore.actor.costs import actor_state, expert_replicas, in_fp8
from treepo_mcore.config import ActorConfig, Config
from treepo_mcore.engine.costs import EngineMemory
from treepo_mcore.model.facts import ELEMENT, padded
from treepo_mcore.model.shards import (
    Stage,
    dense_share,
    expert_parameters,
    matrix_parameters,
    model_parameters,
    sparse_layers,
    stage_parameters,
    stages,
    tensors,
)
from treepo_mcore.model.sizes import Sizes
from treepo_mcore.plan import constants
from treepo_mcore.plan.constants import LINK_EFFICIENCY
from treepo_mcore.plan.hardware import Cluster
from treepo_mcore.plan.workload import Workload


@dataclass(frozen=True)
class PassTime:
    """Forward, or forward and backward, over some tokens on the pipeline."""

    seconds: float
    micro_batches: int  # of one data-parallel rank, in one pass
    bubble: float  # share of the time in which the mean stage waits


@dataclass(frozen=True)
class UpdateTime:
    """All optimizer steps of a step."""

    seconds: float
    passes: PassTime  # of one optimizer step
    reduce_seconds: float  # gradients and parameters over data-parallel ranks, all optimizer steps
    optimizer_seconds: float


@dataclass(frozen=True)
class PushTime:
    """Weights into the engines, as we do it and as a gathered push would."""

    seconds: float
    received: int  # bytes of one GPU from others
    received_remote: int  # of these, from other nodes
    gather_seconds: float
    gather_received: int


def pass_time(
    config: Config,
    sizes: Sizes,
    cluster: Cluster,
    work: Workload,
    prompts: float,
    *,
    backward: bool,
    limit: int | None = None,
) -> PassTime:
    """One pass over the trees of `prompts` prompts; `limit` is the length of a micro-batch in tokens."""
    actor = config.actor
    dp = cluster.world // actor.replica
    tokens = prompts * work.packed / dp
    pieces = prompts / dp * (work.profile.leaves if actor.packing == "flat" else 1)
    least = min(actor.least_micro_batches, max(1, int(pieces)))  # as learn/step.py packs
    count = max(least, math.ceil(tokens / (limit or actor.micro_batch_tokens)))
    if actor.vpp:
        count = padded(count, actor.pp)
    each = tokens / count
    rows = each * work.predicted / work.packed
    split = stages(actor, sizes.layers)
    share = each / actor.cp, rows / actor.cp
    busy = [_stage_seconds(config, sizes, cluster, stage, *share, work.attended, backward) for stage in split]
    # Of the path to a rank's first token, which is as long as others, the part that is not its own.
    fetched = min(2 * work.attended, each) * (actor.cp - 1) / actor.cp
    ways = 3 if backward and actor.recompute == "full" else 2 if backward else 1
    exchanges = [ways * stage.layers * _exchange_seconds(actor, sizes, cluster, fetched) for stage in split]
    busy = [arithmetic + exchange for arithmetic, exchange in zip(busy, exchanges, strict=True)]
    slowest, mean = max(busy), sum(busy) / len(busy)
    seconds = (count + (actor.pp - 1) / (actor.vpp or 1)) * slowest
    return PassTime(seconds, count, 1 - count * mean / seconds)


def _stage_flops(sizes: Sizes, stage: Stage, tokens: float, rows: float, attended: float) -> float:
    """Forward, the whole stage over all its tensor-parallel ranks."""
    products = 2 * tokens * matrix_parameters(sizes, stage)
    head = 2 * rows * sizes.vocab * sizes.hidden if stage.head else 0.0
    return products + stage.layers * _attention_flops(sizes, tokens, attended) + head


def _attention_flops(sizes: Sizes, tokens: float, attended: float) -> float:
    return 4 * tokens * attended * sizes.heads * sizes.head_dim


def _stage_seconds(
    config: Config,
    sizes: Sizes,
    cluster: Cluster,
    stage: Stage,
    tokens: float,
    rows: float,
    attended: float,
    backward: bool,
) -> float:
    """One rank's tokens of a micro-batch through one stage: arithmetic, tensor-parallel messages, the hand-over to the
    next stage."""
    actor = config.actor
    flops = _stage_flops(sizes, stage, tokens, rows, attended)
    again = {
        "none": 0.0,
        "selective": stage.layers * _attention_flops(sizes, tokens, attended),
        "full": _stage_flops(sizes, replace(stage, head=False), tokens, rows, attended),
    }
    efficiency = constants.UPDATE_EFFICIENCY if backward else constants.LOG_PROB_EFFICIENCY
    seconds = (
        (3 * flops + again[actor.recompute] if backward else flops)
        / actor.tp
        / (actor_peak(actor, cluster) * efficiency)
    )
    ways, sparse = 2 if backward else 1, sparse_layers(sizes, stage)
    # Of a layer with experts only the attention is tensor-parallel.
    seconds += ways * (stage.layers - sparse / 2) * _tensor_parallel_seconds(actor, sizes, cluster, tokens)
    seconds += (
        (ways + (backward and actor.recompute == "full")) * sparse * _all_to_all_seconds(actor, sizes, cluster, tokens)
    )
    if actor.pp > 1:
        spread = actor.tp if actor.sequence_parallel else 1
        message = tokens * sizes.hidden * ELEMENT[actor.dtype] / spread
        link = cluster.link(2, cluster.world // actor.pp)
        seconds += ways * message / (link * LINK_EFFICIENCY) * (actor.vpp or 1)
    return seconds


def actor_peak(actor: ActorConfig, cluster: Cluster) -> float:
    """Operations a second of one GPU in the actor's matrix products."""
    return cluster.gpu.bf16 * (constants.FP8_GAIN if in_fp8(actor) else 1.0)


def _tensor_parallel_seconds(actor: ActorConfig, sizes: Sizes, cluster: Cluster, tokens: float) -> float:
    """Two all-reduces a layer and direction, or as much in gathers and scatters under sequence parallelism."""
    if actor.tp == 1:
        return 0.0
    moved = 2 * (actor.tp - 1) / actor.tp * tokens * sizes.hidden * ELEMENT[actor.dtype]
    return 2 * moved / (cluster.link(actor.tp) * LINK_EFFICIENCY)


def _all_to_all_seconds(actor: ActorConfig, sizes: Sizes, cluster: Cluster, tokens: float) -> float:
    """One pass through a layer's experts: each of a token's copies there and back, to another rank mostly."""
    if sizes.experts is None or actor.ep == 1:
        return 0.0
    copies = tokens / actor.tp * sizes.experts.topk * (actor.ep - 1) / actor.ep
    moved = 2 * copies * sizes.hidden * ELEMENT[actor.dtype]
    return moved / (cluster.link(actor.ep * actor.etp) * LINK_EFFICIENCY)


def _exchange_seconds(actor: ActorConfig, sizes: Sizes, cluster: Cluster, keys: float) -> float:
    """Keys and values of the tokens above a rank's own, in one layer and pass (actor/context.py)."""
    if actor.cp == 1:
        return 0.0
    moved = 2 * keys * max(1.0, sizes.kv_heads / actor.tp) * sizes.head_dim * ELEMENT[actor.dtype]
    return moved / (cluster.link(actor.cp, actor.tp) * LINK_EFFICIENCY)


def update_time(
    config: Config, sizes: Sizes, cluster: Cluster, work: Workload, *, limit: int | None = None
) -> UpdateTime:
    """All optimizer steps over the trained prompts."""
    actor = config.actor
    prompts = work.trained / work.updates
    passes = pass_time(config, sizes, cluster, work, prompts, backward=True, limit=limit)
    dp = cluster.world // (actor.tp * actor.pp)
    fullest = max(stages(actor, sizes.layers), key=lambda stage: stage_parameters(sizes, stage, actor))
    state = actor_state(actor, sizes, fullest, dp)
    of_experts = expert_parameters(sizes, fullest, actor) / stage_parameters(sizes, fullest, actor)
    reduce = (1 - of_experts) * _reduce_seconds(actor, cluster, dp, actor.tp, state)
    reduce += of_experts * _reduce_seconds(actor, cluster, expert_replicas(actor, dp), actor.ep * actor.etp, state)
    # Read gradients and state, write state and weights.
    optimizer = (2 * state["optimizer"] + state["parameters"] + state["gradients"]) / cluster.gpu.hbm
    seconds = work.updates * (passes.seconds + reduce + optimizer)
    return UpdateTime(seconds, passes, work.updates * reduce, work.updates * optimizer)


def _reduce_seconds(actor: ActorConfig, cluster: Cluster, dp: int, stride: int, state: dict[str, int]) -> float:
    """Gradients to the ranks that update them and weights back, or gradients to all; nothing overlaps by default.

    dp: ranks that hold the same weights, every `stride`-th rank.
    """
    if dp == 1:
        return 0.0
    link = cluster.link(dp, stride) * LINK_EFFICIENCY
    part = (dp - 1) / dp
    gradients = 0.0 if actor.megatron.get("overlap_grad_reduce") else part * state["gradients"]
    parameters = 0.0 if actor.megatron.get("overlap_param_gather") else part * state["parameters"]
    if not actor.optimizer.distributed:
        return 2 * gradients / link
    return (gradients + parameters) / link


def log_prob_time(config: Config, sizes: Sizes, cluster: Cluster, work: Workload, *, limit: int | None = None) -> float:
    """Old log-probs and, with a reference policy, its own; its weights change places over the host's link."""
    actor = config.actor
    reference = actor.reference == "host"
    one = pass_time(config, sizes, cluster, work, work.trained, backward=False, limit=limit)
    weights = max(stage_parameters(sizes, stage, actor) for stage in stages(actor, sizes.layers))
    swap = 3 * weights * ELEMENT[actor.dtype] / cluster.gpu.host if reference else 0.0
    return ((actor.old_logprobs == "recompute") + reference) * one.seconds + swap


def push_time(config: Config, sizes: Sizes, cluster: Cluster, engine: EngineMemory) -> PushTime:
    """Shard to shard: what the own shard does not hold. Gathered: every tensor in full on every GPU."""
    actor, tp = config.actor, config.rollout.tp
    of_experts = 1 - dense_share(sizes)
    # Experts: the same runs of them, or of each that the rank has the part that the engine's rank wants.
    experts_kept = _own_share(actor.ep, tp) if config.rollout.expert_parallel else 1 / actor.ep
    kept = ((1 - of_experts) * _own_share(actor.tp, tp) + of_experts * experts_kept) / actor.pp
    received = engine.weights * (1 - kept)
    remote = min(received, engine.weights * (1 - _stages_in_node(actor, cluster) / actor.pp))
    seconds = (
        remote / (cluster.network.bandwidth * LINK_EFFICIENCY)
        + (received - remote) / (cluster.gpu.nvlink * LINK_EFFICIENCY)
        + constants.COPY_PASSES * engine.weights / cluster.gpu.hbm
        + math.ceil(received / (config.rollout.push_staging_mb * (1 << 20) / 4)) * constants.ROUND_SECONDS
    )
    whole = model_parameters(sizes) * ELEMENT[config.rollout.dtype]
    inside = _stages_in_node(actor, cluster) / actor.pp
    # One tensor after the other: gathered over its tensor-parallel ranks, then broadcast from its stage to the others.
    broadcast = 0.0
    if actor.pp > 1:
        link = cluster.gpu.nvlink if inside == 1 else cluster.network.bandwidth
        broadcast = whole / (link * LINK_EFFICIENCY)
    gathered = whole * (actor.tp - 1) / actor.tp / (cluster.link(actor.tp) * LINK_EFFICIENCY)
    # Peers count moving optimizer and weights to the host, one way, into the push.
    moved = _host_seconds(config, sizes, cluster, ("optimizer", "parameters"))
    gather = tensors(sizes) * constants.TENSOR_SECONDS + broadcast + gathered + moved
    gather_received = whole * (1 - 1 / (actor.tp * actor.pp))
    return PushTime(seconds, round(received), round(remote), gather, round(gather_received))


def _own_share(actor_tp: int, engine_tp: int) -> float:
    """Mean share of an engine shard's rows that the same rank's actor shard holds, in the layers it has."""
    total = math.lcm(actor_tp, engine_tp)
    shared = 0.0
    for rank in range(total):
        have, want = rank % actor_tp, rank % engine_tp
        low = max(have / actor_tp, want / engine_tp)
        high = min((have + 1) / actor_tp, (want + 1) / engine_tp)
        shared += max(0.0, high - low) * engine_tp
    return shared / total


def _stages_in_node(actor: ActorConfig, cluster: Cluster) -> float:
    """Pipeline stages with ranks in the same node: neighbours in a stage come before the next stage."""
    per_stage = cluster.world // actor.pp
    return min(float(actor.pp), max(1.0, cluster.gpus_per_node / per_stage))


def offload_seconds(config: Config, sizes: Sizes, cluster: Cluster) -> float:
    """The actor's state to the host and back, once a step; gradients are only dropped."""
    return 2 * _host_seconds(config, sizes, cluster, config.memory.offloaded(gpu=True))


def _host_seconds(config: Config, sizes: Sizes, cluster: Cluster, names: Collection[str]) -> float:
    actor = config.actor
    dp = cluster.world // (actor.tp * actor.pp)
    states = [actor_state(actor, sizes, stage, dp) for stage in stages(actor, sizes.layers)]
    moved = max(sum(state[name] for name in names if name != "gradients") for state in states)
    return moved / cluster.gpu.host


def wake_seconds(engine: EngineMemory, cluster: Cluster) -> float:
    """Sleep and wake: pages unmapped and mapped again, at about the memory's own rate; an empty cache is not copied."""
    return 2 * (engine.weights + engine.cache) / cluster.gpu.hbm + 0.2
