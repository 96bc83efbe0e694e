"""How many parameters each GPU holds: of the actor by pipeline stage, and of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from treepo_mcore.config import ActorConfig, ConfigError
from treepo_mcore.model.architecture import Sizes
from treepo_mcore.model.facts import ACTOR_VOCAB_UNIT, ENGINE_VOCAB_UNIT, padded


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
    """Weights of one layer's four matrices, whole."""
    heads = sizes.heads * sizes.head_dim
    return sizes.hidden * (2 * heads + 2 * sizes.kv_heads * sizes.head_dim + 3 * sizes.ffn)


def layer_parameters(sizes: Sizes, tp: int) -> int:
    """All weights of one layer on one of `tp` GPUs."""
    norms = 2 * sizes.hidden + (2 * sizes.head_dim if sizes.qk_norm else 0)
    bias = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim if sizes.qkv_bias else 0
    return (matrix_parameters(sizes) + bias) // tp + norms


def vocabulary_parameters(sizes: Sizes, tp: int) -> int:
    """Of the embedding or the output layer on one of `tp` GPUs of the actor."""
    return padded(sizes.vocab, ACTOR_VOCAB_UNIT * tp) // tp * sizes.hidden


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
    vocabularies = 1 if sizes.tied else 2
    return sizes.layers * layer_parameters(sizes, 1) + vocabularies * sizes.vocab * sizes.hidden + sizes.hidden


def engine_parameters(sizes: Sizes, tp: int) -> tuple[int, int]:
    """On one of `tp` GPUs of an engine: in matrices of layers (these can be FP8), and everything else.

    Key and value heads are repeated when there are fewer of them than GPUs.
    """
    heads = sizes.heads * sizes.head_dim // tp
    kv = max(1, sizes.kv_heads // tp) * sizes.head_dim
    matrices = sizes.hidden * (2 * heads + 2 * kv + 3 * (sizes.ffn // tp))
    bias = heads + 2 * kv if sizes.qkv_bias else 0
    norms = 2 * sizes.hidden + (2 * sizes.head_dim if sizes.qk_norm else 0)
    vocabulary = padded(sizes.vocab, ENGINE_VOCAB_UNIT) // tp * sizes.hidden * (1 if sizes.tied else 2)
    return sizes.layers * matrices, sizes.layers * (norms + bias) + vocabulary + sizes.hidden


def tensors(sizes: Sizes) -> int:
    """Tensors in the actor's layout of the whole model: what a gathered push handles one by one."""
    return sizes.layers * (6 + sizes.qkv_bias + 2 * sizes.qk_norm) + 2 + (not sizes.tied)
