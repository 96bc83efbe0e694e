"""How many parameters each GPU holds: of the actor by pipeline stage, and of an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from treepo_mcore.config import ActorConfig, ConfigError
from treepo_mcore.model.families import parts_of
from treepo_mcore.model.sizes import Sizes


@dataclass(frozen=True)
class Stage:
    """One pipeline stage."""

    layers: int
    embedding: bool
    head: bool  # with the final norm


def stages(actor: ActorConfig, layers: int) -> list[Stage]:
    """Megatron's split. Raises `ConfigError` when it does not come out even."""
    counts = _stage_layers(actor, layers)
    return [Stage(n, index == 0, index == actor.pp - 1) for index, n in enumerate(counts)]


def _stage_layers(actor: ActorConfig, layers: int) -> list[int]:
    ends: dict[int, int] = {}
    if actor.first_stage_layers is not None:
        ends[0] = actor.first_stage_layers
    if actor.last_stage_layers is not None:
        ends[actor.pp - 1] = actor.last_stage_layers
    rest, between = layers - sum(ends.values()), actor.pp - len(ends)
    if rest < 0 or (between and rest % between) or (not between and rest):
        raise ConfigError(
            f"actor.pp: {layers} layers do not spread evenly over {actor.pp} stages"
            + (f" with {sum(ends.values())} of them in the first and last" if ends else "")
            + "; set actor.first_stage_layers and actor.last_stage_layers"
        )
    counts = [ends.get(index, rest // between if between else 0) for index in range(actor.pp)]
    for count in counts:
        if actor.vpp and count % actor.vpp:
            raise ConfigError(f"actor.vpp: {actor.vpp} does not divide a stage's {count} layers")
    return counts


def check_tensor_parallel(sizes: Sizes, actor: ActorConfig) -> None:
    """What the actor itself refuses (`megatron_configs`), said before there is one."""
    sizes.check_split("actor.tp", actor.tp)
    if actor.sequence_parallel and actor.tp == 1:
        raise ConfigError("actor.sequence_parallel: needs actor.tp > 1")
    if actor.vpp and actor.pp == 1:
        raise ConfigError("actor.vpp: virtual pipeline stages need actor.pp > 1")


def matrix_parameters(sizes: Sizes) -> int:
    """Weights of one layer's matrices, whole: half its FLOPs a token."""
    return sum(part.flops for part in parts_of(sizes).layer) // 2


def layer_parameters(sizes: Sizes, tp: int) -> int:
    """All weights of one layer on one of `tp` GPUs."""
    return sum(math.prod(part.actor_shape(tp)) for part in parts_of(sizes).layer)


def vocabulary_parameters(sizes: Sizes, tp: int) -> int:
    """Of the embedding or the output layer on one of `tp` GPUs of the actor."""
    return math.prod(parts_of(sizes).outer[0].actor_shape(tp))


def stage_parameters(sizes: Sizes, stage: Stage, tp: int, pp: int) -> int:
    """Weights of one GPU of a stage. Tied embeddings have a copy on the last stage when there are several."""
    count = stage.layers * layer_parameters(sizes, tp)
    if stage.embedding:
        count += vocabulary_parameters(sizes, tp)
    if stage.head:
        count += sizes.hidden
        if not sizes.tied or pp > 1:
            count += vocabulary_parameters(sizes, tp)
    return count


def model_parameters(sizes: Sizes) -> int:
    """Weights of the checkpoint."""
    parts = parts_of(sizes)
    return sizes.layers * sum(part.numel for part in parts.layer) + sum(part.numel for part in parts.outer)


def engine_parameters(sizes: Sizes, tp: int) -> tuple[int, int]:
    """On one of `tp` GPUs of an engine: in matrices of layers (these can be FP8), and everything else."""
    parts = parts_of(sizes)
    counts = {part: math.prod(part.engine_shape(tp, sizes.head_dim)) for part in (*parts.layer, *parts.outer)}
    matrices = sizes.layers * sum(counts[part] for part in parts.layer if part.quantised)
    rest = sizes.layers * sum(counts[part] for part in parts.layer if not part.quantised)
    return matrices, rest + sum(counts[part] for part in parts.outer)


def tensors(sizes: Sizes) -> int:
    """Tensors in the actor's layout of the whole model: what a gathered push handles one by one."""
    parts = parts_of(sizes)
    return sizes.layers * len(parts.layer) + len(parts.outer)
