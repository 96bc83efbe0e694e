"""Bytes on each GPU, item by item (`actor/costs.py`, `engine/costs.py`), and which items are there in which phase."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from treepo_mcore.actor.costs import (
    CONTEXT_BYTES,
    actor_state,
    checkpoint_bytes,
    host_memory,
    largest_layer,
    logits,
    plain_copies,
    update_working,
)
from treepo_mcore.config import Config
from treepo_mcore.engine.costs import GRAPH_BYTES, UTILISATION, EngineMemory, cache_bytes, engine_in_fp8, engine_mlp
from treepo_mcore.model.facts import ELEMENT
from treepo_mcore.model.shards import (
    Stage,
    engine_parameters,
    stages,
)
from treepo_mcore.model.sizes import Sizes
from treepo_mcore.plan.hardware import Cluster

MOST_THOUSANDS = 10_000  # of tokens in a path: looked no further
PHASES = ("update", "log_probs", "push", "rollout")
DEFAULT_REQUESTS = {True: 1024, False: 256}  # vLLM's max_num_seqs: GPUs of 70 GiB and more but the A100; others
DEFAULT_BATCHED_TOKENS = {True: 16384, False: 8192}  # vLLM's max_num_batched_tokens, likewise
BLOCK = 16  # tokens of a KV block


@dataclass(frozen=True)
class Memory:
    """In each phase of the GPU that is fullest then. Bytes."""

    stages: dict[str, int]  # phase -> pipeline stage of that GPU
    phases: dict[str, dict[str, int]]  # phase -> item -> bytes there in that phase
    host: dict[str, int]  # of one node
    checkpoint: int  # on disk
    engine: EngineMemory
    available: int

    def total(self, phase: str) -> int:
        """Bytes at the height of a phase."""
        return sum(self.phases[phase].values())


def plan_memory(config: Config, sizes: Sizes, cluster: Cluster, tokens: int) -> Memory:
    """`tokens` is the length of the longest micro-batch."""
    actor, split = config.actor, stages(config.actor, sizes.layers)
    engine = plan_engine(config, sizes, cluster)
    all_phases = [_stage_phases(config, sizes, cluster, split[i], i, tokens, engine) for i in range(len(split))]
    totals = [{phase: sum(there.values()) for phase, there in phases.items()} for phases in all_phases]
    fullest = {phase: max(range(len(split)), key=lambda i: totals[i][phase]) for phase in PHASES}
    phases = {phase: all_phases[i][phase] for phase, i in fullest.items()}
    host, disk = host_memory(config, sizes, cluster.world, cluster.gpus_per_node), checkpoint_bytes(actor, sizes)
    return Memory(fullest, phases, host, disk, engine, cluster.gpu.memory)


def longest_path(config: Config, sizes: Sizes, cluster: Cluster) -> int:
    """Tokens of the longest path that an update and the pass for log-probs have the memory for, in whole thousands."""

    def fits(thousands: int) -> bool:
        memory = plan_memory(config, sizes, cluster, math.ceil(1000 * thousands / config.actor.cp))
        return max(memory.total("update"), memory.total("log_probs")) <= memory.available

    return 1000 * bisect_left(range(1, MOST_THOUSANDS), True, key=lambda thousands: not fits(thousands))


def _stage_phases(
    config: Config,
    sizes: Sizes,
    cluster: Cluster,
    stage: Stage,
    index: int,
    tokens: int,
    engine: EngineMemory,
) -> dict[str, dict[str, int]]:
    """Phase -> item -> bytes of one GPU of a stage."""
    actor, offload = config.actor, config.memory.offloaded(gpu=True)
    state = actor_state(actor, sizes, stage, cluster.world // (actor.tp * actor.pp))
    work = update_working(actor, sizes, stage, index, tokens, cluster.gpu.capability)
    mask = {name: work[name] for name in ("tree attention", "FP8 weights")}
    layer = largest_layer(actor, sizes, tokens)
    forward = {"activations": layer, "logits": logits(actor, sizes, tokens) if stage.head else 0} | mask
    resident = {name: size for name, size in state.items() if name not in offload}
    state_in_push = resident | {"parameters": state["parameters"]}
    context = {"context": CONTEXT_BYTES}
    engine_on = {"engine weights": engine.weights}
    plain = {"plain copies": plain_copies(actor, sizes, stage)}
    generating = {"KV cache": engine.cache, "engine working": engine.working, "CUDA graphs": GRAPH_BYTES}
    phases = {
        "update": state | work | context,
        "log_probs": state | forward | context,
        # Weights are on the GPU while they are pushed; the cache and the rest of the state are not.
        "push": state_in_push | engine_on | {"staging": config.rollout.push_staging_mb << 20} | context | plain,
        "rollout": resident | engine_on | generating | {"staging": config.rollout.push_staging_mb << 20} | context,
    }
    return {phase: {name: size for name, size in there.items() if size} for phase, there in phases.items()}


def plan_engine(config: Config, sizes: Sizes, cluster: Cluster) -> EngineMemory:
    """One GPU of an engine under vLLM's memory accounting."""
    rollout, settings = config.rollout, config.rollout.engine
    matrices, rest = engine_parameters(sizes, rollout.tp)
    size = ELEMENT[rollout.dtype]
    weights = matrices * (1 if engine_in_fp8(config) else size) + rest * size
    large = cluster.gpu.memory >= 70 << 30 and not cluster.gpu.name.startswith("A100")
    requests = settings.get("max_num_seqs") or DEFAULT_REQUESTS[large]
    batched = settings.get("max_num_batched_tokens") or DEFAULT_BATCHED_TOKENS[large]
    working = batched * size * (engine_mlp(rollout, sizes) + 4 * sizes.hidden) + 3 * 4 * requests * sizes.vocab
    utilisation = settings.get("gpu_memory_utilization") or UTILISATION
    # As vLLM: bytes that are said outright are what the cache gets, whatever the share of the GPU.
    said = settings.get("kv_cache_memory_bytes")
    cache = said or max(0, round(utilisation * cluster.gpu.memory) - weights - working)
    per_token = cache_bytes(sizes, rollout.tp, str(settings.get("kv_cache_dtype", "auto")), size)
    blocks = cache // (per_token * BLOCK)
    return EngineMemory(weights, working, cache, blocks * BLOCK, per_token, requests, utilisation)
