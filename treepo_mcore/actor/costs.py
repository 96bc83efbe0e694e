"""What the actor costs: bytes of its state, of an update, of checkpoints, and of host memory. Torch is not imported.

Follows Megatron-Core 0.19: weights in `actor.dtype`, float32 gradients in the data-parallel buffer, float32 master
weights and two moments, these last sharded over the data-parallel ranks by the distributed optimizer. A float32 actor
has no master copy. Activations are those that autograd keeps for this project's layer (`actor/model.py`), counted
tensor by tensor.
"""

from __future__ import annotations

import math
from dataclasses import replace

from treepo_mcore.config import ActorConfig, Config
from treepo_mcore.model.decoder import Q_NORM
from treepo_mcore.model.facts import ELEMENT
from treepo_mcore.model.families import parts_of
from treepo_mcore.model.shards import (
    Stage,
    expert_parameters,
    matrices_held,
    model_parameters,
    sparse_layers,
    stage_parameters,
    stages,
    vocabulary_parameters,
)
from treepo_mcore.model.sizes import Sizes

CONTEXT_BYTES = 3 << 30  # assumed: CUDA context, NCCL's buffers, cuBLAS workspaces, a sleeping engine's rest
LOGITS_BYTES = 1 << 30  # of a block of logits, see `block_columns`
SAVING, LOADING = 20, 12  # bytes of host memory a parameter: 12 of the optimizer, one part twice more on the way


def in_fp8(actor: ActorConfig) -> bool:
    """Whether linear layers compute in FP8."""
    return actor.fp8 != "none" or bool(actor.megatron.get("fp8"))


def update_working(
    actor: ActorConfig,
    sizes: Sizes,
    stage: Stage,
    index: int,
    tokens: int,
    capability: tuple[int, int],
) -> dict[str, int]:
    """Item by item what an update takes on one GPU at its height, on top of `actor_state`.

    index: the stage's number; tokens: of the longest micro-batch; capability: of the GPU.
    """
    activations = in_flight(actor, index) * stage_activations(actor, sizes, stage, tokens)
    return {
        "activations": round(activations),
        **working(actor, sizes, stage, tokens),
        "tree attention": attention_mask(actor, tokens),
        "FP8 weights": fp8_weights(actor, sizes, stage, capability),
    }


def fp8_weights(actor: ActorConfig, sizes: Sizes, stage: Stage, capability: tuple[int, int]) -> int:
    """Bytes of the copies that TransformerEngine keeps of a stage's weights while it computes.

    Two a weight, as it is and transposed; one where there is one scale a tensor and products take both ways
    (TransformerEngine's `is_non_tn_fp8_gemm_supported`).
    """
    if actor.megatron.get("fp8_param"):  # two bytes a weight, too, in place of those in bf16
        return 0
    named = {"current": "tensorwise", "blockwise": "blockwise"}
    recipe = named.get(actor.fp8, actor.megatron.get("fp8_recipe", "delayed"))
    either_way = (10, 0) <= capability < (12, 0) or capability >= (13, 0)
    copies = 1 if either_way and recipe in ("delayed", "tensorwise") else 2
    return copies * _weights_in_fp8(actor, sizes, stage)


def plain_copies(actor: ActorConfig, sizes: Sizes, stage: Stage) -> int:
    """Bytes of the copies in `actor.dtype` that a push reads instead of FP8 parameters (actor/quantised.py)."""
    return ELEMENT[actor.dtype] * _weights_in_fp8(actor, sizes, stage) if actor.megatron.get("fp8_param") else 0


def _weights_in_fp8(actor: ActorConfig, sizes: Sizes, stage: Stage) -> int:
    """Of one GPU of a stage."""
    if not in_fp8(actor):
        return 0
    own, numbers = actor.megatron, stage.numbers
    if own.get("first_last_layers_bf16", actor.fp8 != "none"):  # as in the named recipes of actor/precision.py
        first = own.get("num_layers_at_start_in_bf16", 1) * stage.embedding
        numbers = numbers[first : len(numbers) - own.get("num_layers_at_end_in_bf16", 1) * stage.head]
    return matrices_held(sizes, replace(stage, numbers=numbers), actor)


def actor_state(actor: ActorConfig, sizes: Sizes, stage: Stage, dp: int) -> dict[str, int]:
    """What one GPU of a stage keeps from step to step."""
    count, of_experts = stage_parameters(sizes, stage, actor), expert_parameters(sizes, stage, actor)
    half = actor.dtype != "float32"
    gradients = 2 if half and actor.megatron.get("grad_reduce_in_fp32") is False else 4
    moments = 12 if half else 8
    replicas = (dp, expert_replicas(actor, dp)) if actor.optimizer.distributed else (1, 1)
    shares = zip((count - of_experts, of_experts), replicas, strict=True)
    return {
        "parameters": ELEMENT[actor.dtype] * count,
        "gradients": gradients * count,
        "optimizer": sum(math.ceil(moments * weights / ranks) for weights, ranks in shares),
    }


def expert_replicas(actor: ActorConfig, dp: int) -> int:
    """Ranks that hold the same experts, or parts of them."""
    return dp * actor.tp // (actor.ep * actor.etp)


def in_flight(actor: ActorConfig, stage: int) -> float:
    """Micro-batches of whole stages whose activations wait for their backward pass (1F1B, interleaved with vpp)."""
    if not actor.vpp:
        return actor.pp - stage
    return (2 * (actor.pp - stage - 1) + (actor.vpp - 1) * actor.pp + 1) / actor.vpp


def stage_activations(actor: ActorConfig, sizes: Sizes, stage: Stage, tokens: int, *, cpu: bool = False) -> int:
    """Kept by the layers for one micro-batch on one GPU between its forward and its backward pass."""
    sparse = sparse_layers(sizes, stage)
    kinds = {False: stage.layers - sparse, True: sparse}
    return sum(
        count * layer_activations(actor, sizes, tokens, cpu=cpu, experts=experts)
        for experts, count in kinds.items()
        if count
    )


def working(actor: ActorConfig, sizes: Sizes, stage: Stage, tokens: int, *, cpu: bool = False) -> dict[str, int]:
    """What comes and goes on top of kept activations: the largest of what is never there at the same time."""
    parts = {}
    if stage.head:
        parts["logits"] = logits(actor, sizes, tokens) + head_activations(actor, sizes, tokens, cpu=cpu)
    layer = layer_gradients(actor, sizes, tokens)
    if actor.recompute == "full":
        whole = largest_layer(actor, sizes, tokens, cpu=cpu)
        parts["recomputed layer"] = layer + whole - layer_activations(actor, sizes, tokens)  # its input was kept
    else:
        parts["layer gradients"] = layer
    name = max(parts, key=lambda part: parts[part])
    return {name: parts[name]}


def head_activations(actor: ActorConfig, sizes: Sizes, tokens: int, *, cpu: bool = False) -> int:
    """The final norm's input (on a CPU also its result), and the rows for the output layer, in full."""
    wide = (2 if cpu else 1) / spread(actor) + 1
    return round(ELEMENT[actor.dtype] * tokens * sizes.hidden * wide)


def largest_layer(actor: ActorConfig, sizes: Sizes, tokens: int, *, cpu: bool = False) -> int:
    """What a layer keeps where nothing is recomputed, of the kind that keeps most."""
    return max(
        layer_activations(actor, sizes, tokens, whole=True, cpu=cpu, experts=experts) for experts in _kinds(sizes)
    )


def layer_activations(
    actor: ActorConfig, sizes: Sizes, tokens: int, *, whole: bool = False, cpu: bool = False, experts: bool = False
) -> int:
    """Kept by one layer between forward and backward. whole: as if nothing were recomputed. experts: a layer of them.

    Sequence parallelism divides what is as wide as the hidden state; tensor parallelism divides all else but the
    rotary angles. On a CPU torch computes a norm in steps and keeps one tensor more for each.
    """
    size, tp = ELEMENT[actor.dtype], actor.tp
    hidden = sizes.hidden / spread(actor)
    if actor.recompute == "full" and not whole:
        return round(size * tokens * hidden)
    heads, kv = sizes.heads * sizes.head_dim / tp, sizes.kv_heads * sizes.head_dim / tp
    norms = (6 if cpu else 4) * hidden  # of each of two: its input, its output as the linear layer's input
    fused = heads + 2 * kv  # the output of linear_qkv, alive through the view that is v
    rotated = heads + kv
    per_head_norms = (2 if cpu else 1) * rotated if parts_of(sizes).holds(Q_NORM) else 0
    angles = 4 * sizes.head_dim  # cosine and sine, for q and for k
    mlp = _mlp_width(actor, sizes, experts, 5, 2)  # gate and up in one, silu(gate), up once more, their product
    sums = 4 * sizes.heads / tp  # of the softmax, float32
    return round(tokens * (size * (norms + fused + rotated + per_head_norms + heads + angles + mlp) + sums))


def layer_gradients(actor: ActorConfig, sizes: Sizes, tokens: int) -> int:
    """What the backward pass of one layer holds of its own at its height, in the MLP."""
    widest = max(_mlp_width(actor, sizes, experts, 3, 1) for experts in _kinds(sizes))
    return round(ELEMENT[actor.dtype] * tokens * (widest + sizes.hidden / spread(actor)))


def _kinds(sizes: Sizes) -> set[bool]:
    """Of layers that the model has: with experts or without."""
    return set(sizes.experts.sparse) if sizes.experts else {False}


def _mlp_width(actor: ActorConfig, sizes: Sizes, experts: bool, inner: int, outer: int) -> float:
    """Elements a token on one GPU: `inner` times the FFN width, and of experts `outer` times the hidden size.

    Each copy of a token that travels to an expert is counted where it goes, as if all experts had as many.
    """
    if not experts:
        return inner * sizes.ffn / actor.tp
    assert sizes.experts is not None
    copies = sizes.experts.topk * actor.etp / actor.tp  # ranks of a tensor group dispatch a share of the tokens each
    each = inner * sizes.experts.ffn / actor.etp + outer * sizes.hidden
    return copies * each + inner * sizes.experts.shared / actor.tp


def spread(actor: ActorConfig) -> int:
    """GPUs that share what is as wide as the hidden state."""
    return actor.tp if actor.sequence_parallel else 1


def attention_mask(actor: ActorConfig, tokens: int) -> int:
    """The tree's mask: bool and as a bias for the dense form, nothing to speak of for the others."""
    return tokens * tokens * (1 + ELEMENT[actor.dtype]) if actor.attention == "dense" else 0


def block_columns(rows: int, element: int) -> int:
    """Columns of logits that are there at once, of `rows` rows, within `LOGITS_BYTES`; in whole units of 128.

    element: bytes of the actor's type, in which logits are made; on the way to log-probs they are there in float32
    twice more.
    """
    return max(1, LOGITS_BYTES // (max(rows, 1) * (element + 8)) // 128) * 128


def logits(actor: ActorConfig, sizes: Sizes, rows: int) -> int:
    """At the height of `LinearLogProb` on one GPU of the last stage.

    A block of logits (or their gradient) in the actor's type; the exponentials and the shifted logits (the gradient) in
    float32; and where there are several blocks, the sum of the rows' gradients in float32.
    """
    size, columns = ELEMENT[actor.dtype], vocabulary_parameters(sizes, actor.tp) // sizes.hidden
    block = block_columns(rows, size)
    added_up = rows * sizes.hidden * 4 if block < columns else 0
    return rows * min(block, columns) * (size + 2 * 4) + added_up


def host_memory(
    config: Config, sizes: Sizes, world: int, ranks: int, *, gpu: bool = True, learns: bool = True
) -> dict[str, int]:
    """Bytes of a node with `ranks` of the `world` ranks, as full as any: the reference policy, the actor's weights
    while they change places, the offload (all pinned), and what checkpoints pass through (not pinned).

    Saving, the first data-parallel ranks gather the optimizer's state; loading, every rank reads its whole shard's. On
    a CPU checkpoints are left out: their memory is that of the model. An actor that does not learn has weights only.
    """
    actor = config.actor
    dp = world // (actor.tp * actor.pp)
    states = [actor_state(actor, sizes, stage, dp) for stage in stages(actor, sizes.layers)]
    state = max(states, key=lambda state: state["parameters"])
    weights = state["parameters"]
    needs = {"reference": weights, "swap": weights} if actor.reference == "host" and learns else {}
    moved = {"parameters", "optimizer"} if learns else {"parameters"}
    needs |= {name: state[name] for name in sorted(config.memory.offloaded(gpu) & moved)}
    needs = {name: size * ranks for name, size in needs.items()}
    if gpu and learns:
        count = weights // ELEMENT[actor.dtype]
        gathering = min(ranks, actor.tp) * max(1, ranks // (world // actor.pp))  # ranks of this node
        needs["checkpoint"] = count * max(SAVING * gathering, LOADING * ranks)
    return needs


def checkpoint_bytes(actor: ActorConfig, sizes: Sizes) -> int:
    """Of one checkpoint on disk: weights, two moments, and float32 weights where the parameters are not that."""
    return model_parameters(sizes) * (ELEMENT[actor.dtype] + (8 if actor.dtype == "float32" else 12))
