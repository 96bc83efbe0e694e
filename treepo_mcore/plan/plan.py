"""One configuration on one cluster: memory, time, and what will not fit or will starve."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from treepo_mcore.actor.costs import in_fp8
from treepo_mcore.config import Config, check_grid
from treepo_mcore.engine.costs import BLOCK_FP8, EngineMemory, engine_in_fp8
from treepo_mcore.model.facts import FP8_BLOCK
from treepo_mcore.model.shards import check_layout, model_parameters, stages
from treepo_mcore.model.sizes import Sizes
from treepo_mcore.plan import constants
from treepo_mcore.plan.decode import RolloutTime, rollout_time
from treepo_mcore.plan.hardware import Cluster, Gpu
from treepo_mcore.plan.memory import PHASES, Memory, longest_path, plan_memory
from treepo_mcore.plan.seconds import (
    PushTime,
    UpdateTime,
    log_prob_time,
    offload_seconds,
    push_time,
    update_time,
    wake_seconds,
)
from treepo_mcore.plan.workload import Assumptions, Workload, make_workload

BUBBLE = 0.2  # share of the update that is worth a warning
TAIL = 0.5  # share of the rollout
WAITING = 0.2  # share of the admitted prompts
FEW_REQUESTS = 32  # at once, on an engine: it then reads its weights for little
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """`error`: the run cannot start or will stop; `warning`: it wastes the cluster."""

    level: Literal["error", "warning"]
    message: str


@dataclass(frozen=True)
class Plan:
    """What the command prints."""

    config: Config
    sizes: Sizes
    cluster: Cluster
    assumed: Assumptions
    work: Workload
    memory: Memory
    rollout: RolloutTime
    update: UpdateTime
    push: PushTime
    seconds: dict[str, float]  # of the phases, in their order
    warnings: list[Finding]

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        """No errors."""
        return all(warning.level != "error" for warning in self.warnings)

    @property
    def data_parallel(self) -> int:
        """Replicas of the actor."""
        return self.cluster.world // self.config.actor.replica

    @property
    def longest_path(self) -> int:
        """See `memory.longest_path`."""
        return longest_path(self.config, self.sizes, self.cluster)

    @property
    def engines(self) -> int:
        """Engines of the rollout."""
        return self.cluster.world // self.config.rollout.tp


def plan_run(config: Config, sizes: Sizes, cluster: Cluster, assumed: Assumptions) -> Plan:
    """Everything about one step.

    Raises `ConfigError` for a layout that has no meaning on this cluster.
    """
    _check_layout(config, sizes, cluster)
    work = make_workload(config, assumed)
    memory = plan_memory(config, sizes, cluster, config.actor.rank_tokens)
    engine = memory.engine
    rollout = rollout_time(config, sizes, cluster, engine, work)
    update = update_time(config, sizes, cluster, work)
    push = push_time(config, sizes, cluster, engine)
    seconds = {
        "push": push.seconds,
        "rollout": rollout.seconds,
        "sleep, wake": wake_seconds(engine, cluster) + offload_seconds(config, sizes, cluster),
        "log-probs": log_prob_time(config, sizes, cluster, work),
        "update": update.seconds,
        "other": constants.STEP_SECONDS,
    }
    plan = Plan(config, sizes, cluster, assumed, work, memory, rollout, update, push, seconds, warnings=[])
    plan.warnings.extend(_warnings(plan))
    return plan


def _check_layout(config: Config, sizes: Sizes, cluster: Cluster) -> None:
    check_grid(config, cluster.world)
    check_layout(sizes, config.actor)
    sizes.check_engine_split(config.rollout.tp, config.rollout.expert_parallel)
    stages(config.actor, sizes.layers)


def _warnings(plan: Plan) -> list[Finding]:
    errors = errors_of(plan.config, plan.sizes, plan.cluster, plan.work, plan.memory)
    messages = [*_starving(plan), *_waiting(plan)]
    return [Finding("error", text) for text in errors] + [Finding("warning", text) for text in messages]


def errors_of(config: Config, sizes: Sizes, cluster: Cluster, work: Workload, memory: Memory) -> list[str]:
    """Why a run cannot start, or will stop."""
    return [
        *_memory_errors(config, memory),
        *_cache_errors(memory.engine, work.longest),
        *_precision_errors(config, sizes, cluster.gpu),
        *_length_errors(sizes, work.longest),
    ]


def _memory_errors(config: Config, memory: Memory) -> list[str]:
    found = []
    for phase in PHASES:
        total = memory.total(phase)
        if total > memory.available:
            largest = sorted(memory.phases[phase].items(), key=lambda item: -item[1])[:3]
            named = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
            found.append(f"{phase} needs {_gib(total)} of {_gib(memory.available)} GiB a GPU: {named}")
    host, allowed = sum(memory.host.values()), config.memory.host_gib
    if allowed is not None and host > allowed * GIB:  # checks.check_host_memory
        named = ", ".join(f"{name} {_gib(size)}" for name, size in memory.host.items())
        found.append(f"memory.host_gib: a node needs {_gib(host)} GiB of host memory, {allowed:g} are allowed: {named}")
    return found


def _cache_errors(engine: EngineMemory, longest: int) -> list[str]:
    if engine.cache_tokens < longest:
        return [
            f"the KV cache of an engine holds {engine.cache_tokens} tokens, one path may have {longest}: "
            "raise rollout.tp or rollout.engine.gpu_memory_utilization"
        ]
    return []


def _precision_errors(config: Config, sizes: Sizes, gpu: Gpu) -> list[str]:
    rollout, found = config.rollout, []
    quantization = rollout.engine.get("quantization")
    if quantization not in (None, BLOCK_FP8):
        found.append(f"rollout.engine.quantization: found {quantization}, pushes know {BLOCK_FP8} (or none)")
    fp8_engine = engine_in_fp8(config)
    if gpu.fp8 is None and (fp8_engine or in_fp8(config.actor)):
        found.append(f"{gpu.name} has no FP8 tensor cores")
    if sizes.experts and fp8_engine:
        found.append(
            "rollout.engine.quantization: expected none with a mixture of experts: pushes do not know FP8 experts"
        )
    if sizes.experts and in_fp8(config.actor):
        found.append(f"actor.fp8: not supported with a mixture of experts ({sizes.family})")
    if fp8_engine and rollout.dtype == "float32":
        found.append(f"rollout.dtype: float32 with quantization {BLOCK_FP8}; vLLM takes bfloat16 or float16")
    inputs = {"hidden": (sizes.hidden, 1), "attention": (sizes.heads * sizes.head_dim, rollout.tp)}
    inputs["FFN"] = (sizes.ffn, rollout.tp)
    found += [
        f"rollout.engine.quantization: the {name} width {width} / {ranks} is not a multiple of {FP8_BLOCK}: vLLM's FP8 "
        "layers take no other (weights/fp8.py)"
        for name, (width, ranks) in inputs.items()
        if fp8_engine and width // ranks % FP8_BLOCK
    ]
    return found


def _length_errors(sizes: Sizes, longest: int) -> list[str]:
    if longest > sizes.max_positions:
        return [f"a path may have {longest} tokens, the model has {sizes.max_positions} positions"]
    return []


def _starving(plan: Plan) -> list[str]:
    config, work, rollout, engine = plan.config, plan.work, plan.rollout, plan.memory.engine
    found = []
    tree = work.prompt_tokens + work.profile.physical
    if plan.work.longest <= engine.cache_tokens < tree:
        found.append(
            f"the KV cache of an engine holds {engine.cache_tokens} tokens, less than one tree ({tree:.0f} on average)"
        )
    if rollout.full_batch < FEW_REQUESTS:
        roots = rollout.prompts_per_engine * float(work.profile.live[0])
        why = (
            f"its KV cache admits no more of its {rollout.prompts_per_engine:.1f} prompts"
            if roots > 2 * rollout.full_batch
            else f"it gets {rollout.prompts_per_engine:.1f} prompts: more prompts a step, or a larger rollout.tp"
        )
        found.append(f"an engine decodes at most {rollout.full_batch:.0f} requests at once; {why}")
    elif rollout.tail_seconds > TAIL * rollout.seconds:
        found.append(
            f"{rollout.tail_seconds / rollout.seconds:.0%} of the rollout is its tail "
            f"({rollout.prompts_per_engine:.1f} prompts an engine): more prompts a step, or rollout.tail_steps"
        )
    if rollout.waiting > WAITING:
        found.append(
            f"the KV cache cannot hold the trees that are admitted: {rollout.waiting:.0%} of them wait and "
            "are prefilled again; a larger cache, or a smaller rollout.engine.max_num_seqs"
        )
    if config.trainer.prompts_per_update < plan.data_parallel:
        found.append(
            f"trainer.prompts_per_update = {config.trainer.prompts_per_update} over {plan.data_parallel} data-parallel "
            "ranks: some have nothing to do"
        )
    return found


def _waiting(plan: Plan) -> list[str]:
    config, cluster, passes = plan.config, plan.cluster, plan.update.passes
    found = []
    if passes.bubble > BUBBLE:
        found.append(
            f"pipeline stages wait {passes.bubble:.0%} of the update: {passes.micro_batches} micro-batches of a rank "
            f"on actor.pp = {config.actor.pp}; fewer stages, actor.vpp, or more prompts an update"
        )
    actor = config.actor
    groups = {"actor.tp": (actor.tp, actor.tp), "rollout.tp": (config.rollout.tp, config.rollout.tp)}
    if actor.cp > 1:
        groups["actor.cp"] = (actor.cp, actor.tp * actor.cp)
    for key, (ranks, side_by_side) in groups.items():
        if cluster.crosses(side_by_side):
            found.append(f"{key} = {ranks} crosses nodes of {cluster.gpus_per_node} GPUs: every layer waits for it")
    return found


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def plan_json(plan: Plan) -> dict[str, Any]:
    """The object of `--json`; docs/planning.md explains its keys. Bytes, seconds, tokens."""
    config, memory, work, engine = plan.config, plan.memory, plan.work, plan.memory.engine
    profile, passes = work.profile, plan.update.passes
    return {
        "fits": plan.fits,
        "warnings": [asdict(warning) for warning in plan.warnings],
        "model": {"path": config.model.path, "parameters": model_parameters(plan.sizes)},
        "cluster": {
            "gpu": plan.cluster.gpu.name,
            "network": plan.cluster.network.name,
            "nodes": plan.cluster.nodes,
            "gpus_per_node": plan.cluster.gpus_per_node,
        },
        "layout": {
            "tp": config.actor.tp,
            "cp": config.actor.cp,
            "pp": config.actor.pp,
            "vpp": config.actor.vpp,
            "dp": plan.data_parallel,
            "sequence_parallel": config.actor.sequence_parallel,
            "recompute": config.actor.recompute,
            "micro_batch_tokens": config.actor.micro_batch_tokens,
            "rollout_tp": config.rollout.tp,
            "engines": plan.engines,
            "offload": sorted(config.memory.offloaded(gpu=True)),
        },
        "assumptions": asdict(plan.assumed),
        "workload": {
            "prompts_drawn": work.drawn,
            "prompts_trained": work.trained,
            "updates": work.updates,
            "leaves": profile.leaves,
            "physical_tokens": profile.physical,
            "logical_tokens": profile.logical,
            "trained_tokens": work.trained_tokens,
        },
        "memory": {
            "available": memory.available,
            "phases": {
                phase: {"total": memory.total(phase), "stage": memory.stages[phase], "items": items}
                for phase, items in memory.phases.items()
            },
            "longest_path": plan.longest_path,
            "host_per_node": memory.host,
            "checkpoint": memory.checkpoint,
            "engine": asdict(engine),
        },
        "seconds": plan.seconds | {"total": plan.total},
        "rollout": asdict(plan.rollout),
        "update": {
            "micro_batches": passes.micro_batches,
            "bubble": passes.bubble,
            "reduce_seconds": plan.update.reduce_seconds,
            "optimizer_seconds": plan.update.optimizer_seconds,
        },
        "push": asdict(plan.push),
    }
