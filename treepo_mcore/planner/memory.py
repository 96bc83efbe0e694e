"""Bytes on each GPU, item by item, and which items are there in which phase.

The actor's part follows Megatron-Core 0.19: bf16 weights, float32 gradients in the data-parallel buffer, float32
master weights and two moments, these last sharded over the data-parallel ranks by the distributed optimizer. A
float32 actor has no master copy. Activations are those that autograd keeps for this project's layer
(`actor/model.py`), counted tensor by tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from treepo_mcore.architecture import Sizes
from treepo_mcore.config import ActorConfig, Config
from treepo_mcore.planner.constants import CONTEXT_BYTES, GRAPH_BYTES
from treepo_mcore.planner.hardware import Cluster
from treepo_mcore.planner.shards import (
    Stage,
    engine_parameters,
    stage_parameters,
    stages,
    vocabulary_parameters,
)

ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4}
STAGING_BYTES = 256 << 20  # weights/transfer.py
PHASES = ("update", "log_probs", "push", "rollout")
DEFAULT_UTILISATION = 0.6  # of GPU memory for the engine (rollout/vllm_engine.py)
DEFAULT_REQUESTS = {True: 1024, False: 256}  # vLLM's max_num_seqs: GPUs of 70 GiB and more but the A100; others
DEFAULT_BATCHED_TOKENS = {True: 16384, False: 8192}  # vLLM's max_num_batched_tokens, likewise
BLOCK = 16  # tokens of a KV block


@dataclass(frozen=True)
class EngineMemory:
    """One GPU of an engine."""

    weights: int
    working: int  # activations of the largest batch and the sampler's logits
    cache: int
    cache_tokens: int  # that the whole engine holds
    token_bytes: int  # of the cache, one token on one GPU
    requests: int  # that may run at once
    utilisation: float


@dataclass(frozen=True)
class Memory:
    """The fullest GPU. Bytes."""

    stage: int  # of the pipeline that this GPU belongs to
    items: dict[str, int]
    phases: dict[str, dict[str, int]] = field(repr=False)  # phase -> item -> bytes there in that phase
    host: dict[str, int] = field(repr=False)  # of one node
    engine: EngineMemory
    available: int

    def total(self, phase: str) -> int:
        """Bytes at the height of a phase."""
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> str:
        """The fullest phase."""
        return max(PHASES, key=self.total)


def plan_memory(config: Config, sizes: Sizes, cluster: Cluster, tokens: int) -> Memory:
    """Of the fullest stage; `tokens` is the length of the longest micro-batch."""
    actor = config.actor
    split = stages(actor, sizes.layers)
    engine = plan_engine(config, sizes, cluster)
    plans = [_plan_stage(config, sizes, cluster, split, index, tokens, engine) for index in range(len(split))]
    return max(plans, key=lambda plan: max(plan.total(phase) for phase in PHASES))


def _plan_stage(
    config: Config, sizes: Sizes, cluster: Cluster, split: list[Stage], index: int, tokens: int, engine: EngineMemory
) -> Memory:
    actor = config.actor
    state = actor_state(actor, sizes, split[index], cluster.world // (actor.tp * actor.pp))
    activations = in_flight(actor, index) * stage_activations(actor, sizes, split[index], tokens)
    head = split[index].head
    work = {
        "activations": round(activations),
        "recomputed layer": layer_activations(actor, sizes, tokens, whole=True) if actor.recompute == "full" else 0,
        "logits": logits(actor, sizes, tokens, backward=True) if head else 0,
        "tree attention": attention_mask(actor, tokens, cuda=True),
    }
    forward = {
        "activations": 2 * layer_activations(actor, sizes, tokens, whole=True),
        "logits": logits(actor, sizes, tokens, backward=False) if head else 0,
        "tree attention": attention_mask(actor, tokens, cuda=True),
    }
    context = {"context": CONTEXT_BYTES}
    engine_on = {"engine weights": engine.weights}
    generating = {"KV cache": engine.cache, "engine working": engine.working, "CUDA graphs": GRAPH_BYTES}
    phases = {
        "update": state | work | context,
        "log_probs": state | forward | context,
        "push": state | engine_on | {"staging": STAGING_BYTES} | context,
        "rollout": state | engine_on | generating | {"staging": STAGING_BYTES} | context,
    }
    items = {name: size for phase in phases.values() for name, size in phase.items()} | work
    phases = {phase: {name: size for name, size in there.items() if size} for phase, there in phases.items()}
    host = host_memory(config, state["parameters"], cluster)
    return Memory(index, {n: s for n, s in items.items() if s}, phases, host, engine, cluster.gpu.memory)


def actor_state(actor: ActorConfig, sizes: Sizes, stage: Stage, dp: int) -> dict[str, int]:
    """What one GPU of a stage keeps from step to step."""
    count = stage_parameters(sizes, stage, actor.tp, actor.pp)
    half = actor.dtype != "float32"
    gradients = 2 if half and actor.megatron.get("grad_reduce_in_fp32") is False else 4
    moments = (12 if half else 8) * count
    return {
        "parameters": ELEMENT[actor.dtype] * count,
        "gradients": gradients * count,
        "optimizer": math.ceil(moments / dp) if actor.optimizer.distributed else moments,
    }


def in_flight(actor: ActorConfig, stage: int) -> float:
    """Micro-batches of whole stages whose activations wait for their backward pass (1F1B, interleaved with vpp)."""
    if not actor.vpp:
        return actor.pp - stage
    chunks = min(2 * (actor.pp - stage - 1) + (actor.vpp - 1) * actor.pp + 1, actor.vpp * actor.pp)
    return max(1.0, chunks / actor.vpp)


def stage_activations(actor: ActorConfig, sizes: Sizes, stage: Stage, tokens: int) -> int:
    """Kept by one micro-batch on one GPU between its forward and its backward pass, logits apart."""
    size = ELEMENT[actor.dtype]
    spread = actor.tp if actor.sequence_parallel else 1
    total = stage.layers * layer_activations(actor, sizes, tokens)
    if stage.head:  # the final norm's input and output, gathered rows for the output layer
        total += size * tokens * sizes.hidden * (2 + spread) // spread
    return total


def layer_activations(actor: ActorConfig, sizes: Sizes, tokens: int, whole: bool = False) -> int:
    """Kept by one layer. whole: as if nothing were recomputed.

    Sequence parallelism divides what is as wide as the hidden state; tensor parallelism divides all else.
    """
    size, tp = ELEMENT[actor.dtype], actor.tp
    spread = tp if actor.sequence_parallel else 1
    hidden = sizes.hidden / spread
    if actor.recompute == "full" and not whole:
        return round(size * tokens * hidden)
    heads, kv = sizes.heads * sizes.head_dim / tp, sizes.kv_heads * sizes.head_dim / tp
    fused = heads + 2 * kv  # the output of linear_qkv, alive through the view that is v
    rotated = heads + kv
    per_head_norms = 2 * rotated if sizes.qk_norm else 0
    mlp = 4 * sizes.ffn / tp  # gate, up, silu(gate), their product
    # Twice: the norm's input, and its output, which the linear layer keeps.
    wide = 4 * hidden
    sums = 4 * sizes.heads / tp  # of the softmax, float32
    return round(tokens * (size * (wide + fused + rotated + per_head_norms + heads + mlp) + sums))


def attention_mask(actor: ActorConfig, tokens: int, *, cuda: bool) -> int:
    """The tree's mask: bool and as a bias for the dense form, nothing to speak of for the others."""
    dense = actor.attention == "dense" or (actor.attention == "auto" and cuda)
    return tokens * tokens * (1 + ELEMENT[actor.dtype]) if dense else 0


def logits(actor: ActorConfig, sizes: Sizes, rows: int, *, backward: bool) -> int:
    """At the height of `VocabParallelLogProb` on one GPU of the last stage."""
    columns = vocabulary_parameters(sizes, actor.tp) // sizes.hidden
    size = ELEMENT[actor.dtype]
    half = size < 4
    # Forward: logits, tempered logits, then in float32 the shifted logits, exp, and two of the entropy's products.
    forward = 2 * size + 4 * 4 if half else 2 * size + 4 * 3
    # Backward: the kept probabilities, their gradient, the same in the logits' type, tempered.
    back = 4 + 4 + 2 * size
    return rows * columns * (max(forward, back) if backward else forward)


def plan_engine(config: Config, sizes: Sizes, cluster: Cluster) -> EngineMemory:
    """One GPU of an engine under vLLM's memory accounting."""
    rollout, settings = config.rollout, config.rollout.engine
    matrices, rest = engine_parameters(sizes, rollout.tp)
    size = ELEMENT[rollout.dtype]
    weights = matrices * (1 if settings.get("quantization") == "fp8" else size) + rest * size
    large = cluster.gpu.memory >= 70 << 30 and not cluster.gpu.name.startswith("A100")
    requests = settings.get("max_num_seqs") or DEFAULT_REQUESTS[large]
    batched = settings.get("max_num_batched_tokens") or DEFAULT_BATCHED_TOKENS[large]
    working = batched * size * (3 * sizes.ffn // rollout.tp + 4 * sizes.hidden) + 3 * 4 * requests * sizes.vocab
    utilisation = settings.get("gpu_memory_utilization") or DEFAULT_UTILISATION
    cache = max(0, round(utilisation * cluster.gpu.memory) - weights - working)
    per_token = cache_bytes(sizes, rollout.tp, str(settings.get("kv_cache_dtype", "auto")), size)
    blocks = cache // (per_token * BLOCK)
    return EngineMemory(weights, working, cache, blocks * BLOCK, per_token, requests, utilisation)


def cache_bytes(sizes: Sizes, tp: int, dtype: str, size: int) -> int:
    """Of one token on one GPU of an engine."""
    element = 1 if dtype.startswith("fp8") else size
    return 2 * sizes.layers * max(1, sizes.kv_heads // tp) * sizes.head_dim * element


def host_memory(config: Config, parameters: int, cluster: Cluster) -> dict[str, int]:
    """Pinned buffers of one node: the reference policy, and the actor's weights while they change places."""
    copies = {"reference": parameters, "swap": parameters} if config.actor.reference == "host" else {}
    return {name: size * cluster.gpus_per_node for name, size in copies.items()}
