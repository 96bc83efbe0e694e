"""How many parameters each GPU holds: of the actor by pipeline stage, and of an engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from treepo_mcore.config import ActorConfig, ConfigError
from treepo_mcore.model.families import parts_of
from treepo_mcore.model.family import Part
from treepo_mcore.model.sizes import Sizes


@dataclass(frozen=True)
class Stage:
    """One pipeline stage."""

    numbers: tuple[int, ...]  # of its layers
    embedding: bool
    head: bool  # with the final norm

    @property
    def layers(self) -> int:
        """How many."""
        return len(self.numbers)


def stages(actor: ActorConfig, layers: int) -> list[Stage]:
    """Megatron's split. Raises `ConfigError` when it does not come out even."""
    counts, turns = _stage_layers(actor, layers), actor.vpp or 1
    numbers: list[list[int]] = [[] for _ in counts]
    first = 0
    for _ in range(turns):
        for own, count in zip(numbers, counts, strict=True):
            own += range(first, first + count // turns)
            first += count // turns
    return [Stage(tuple(own), index == 0, index == actor.pp - 1) for index, own in enumerate(numbers)]


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


def check_layout(sizes: Sizes, actor: ActorConfig) -> None:
    """What the actor itself refuses (`megatron_configs`), said before there is one."""
    sizes.check_split("actor.tp", actor.tp)
    _check_experts(sizes, actor)
    if actor.sequence_parallel and actor.tp == 1:
        raise ConfigError("actor.sequence_parallel: needs actor.tp > 1")
    if actor.vpp and actor.pp == 1:
        raise ConfigError("actor.vpp: virtual pipeline stages need actor.pp > 1")


def _check_experts(sizes: Sizes, actor: ActorConfig) -> None:
    if sizes.experts is None:
        for key, ranks in (("actor.ep", actor.ep), ("actor.etp", actor.etp)):
            if ranks > 1:
                raise ConfigError(f"{key}: {ranks} needs a mixture of experts, found a {sizes.family} model")
        return
    if why := sizes.experts.split_problem(actor.ep, actor.etp):
        raise ConfigError(f"actor.ep, actor.etp: {actor.ep}, {actor.etp}: {why}")
    if actor.tp > 1 and not actor.sequence_parallel:  # Megatron says so in its first forward pass
        raise ConfigError(
            f"actor.sequence_parallel: expected true with actor.tp: {actor.tp} and a mixture of experts, found false"
        )
    for index, stage in enumerate(stages(actor, sizes.layers)):
        if not any(sizes.experts.sparse[number] for number in stage.numbers):
            raise ConfigError(f"actor.pp: stage {index} of {actor.pp} would have no layer with experts, expected one")


def matrix_parameters(sizes: Sizes, stage: Stage | None = None) -> int:
    """Weights of the matrices that a token meets, of all layers or of a stage's, whole: half its FLOPs."""
    return sum(part.flops for part in _parts(sizes, stage)) // 2


def token_work(sizes: Sizes) -> float:
    """Query-key pairs that take as many multiplications as one token in the linear layers: 52,000 in Llama 70B."""
    return matrix_parameters(sizes) / sizes.layers / (2 * sizes.heads * sizes.head_dim)


def active_parameters(sizes: Sizes) -> int:
    """Weights of the checkpoint that compute one token: all but the experts that were not chosen."""
    parts = parts_of(sizes)
    idle = sum(part.numel // part.experts * (part.experts - part.chosen) for part in parts.inner if part.experts)
    return model_parameters(sizes) - idle


def matrices_held(sizes: Sizes, stage: Stage, actor: ActorConfig) -> int:
    """Weights of matrices of layers on one GPU of a stage."""
    dense = [part for part in _parts(sizes, stage) if part.flops and not part.experts]
    return expert_parameters(sizes, stage, actor) + sum(math.prod(part.actor_shape(actor.tp)) for part in dense)


def dense_share(sizes: Sizes) -> float:
    """Of the checkpoint's weights, those that are not of experts."""
    return 1 - sum(part.numel for part in parts_of(sizes).inner if part.experts) / model_parameters(sizes)


def sparse_layers(sizes: Sizes, stage: Stage | None = None) -> int:
    """Layers with experts, of all or of a stage's."""
    if sizes.experts is None:
        return 0
    return sum(sizes.experts.sparse[number] for number in (stage.numbers if stage else range(sizes.layers)))


def expert_parameters(sizes: Sizes, stage: Stage, actor: ActorConfig) -> int:
    """Weights of experts on one GPU of a stage."""
    parts = [part for part in _parts(sizes, stage) if part.experts]
    return sum(part.experts // actor.ep * math.prod(part.actor_shape(actor.etp)) for part in parts)


def _parts(sizes: Sizes, stage: Stage | None) -> Iterator[Part]:
    """Of the layers of a stage, or of all."""
    layers = parts_of(sizes).layers
    return chain.from_iterable(layers if stage is None else (layers[number] for number in stage.numbers))


def vocabulary_parameters(sizes: Sizes, tp: int) -> int:
    """Of the embedding or the output layer on one of `tp` GPUs of the actor."""
    return math.prod(parts_of(sizes).outer[0].actor_shape(tp))


def stage_parameters(sizes: Sizes, stage: Stage, actor: ActorConfig) -> int:
    """Weights of one GPU of a stage. Tied embeddings have a copy on the last stage when there are several."""
    count = expert_parameters(sizes, stage, actor)
    count += sum(math.prod(part.actor_shape(actor.tp)) for part in _parts(sizes, stage) if not part.experts)
    if stage.embedding:
        count += vocabulary_parameters(sizes, actor.tp)
    if stage.head:
        count += sizes.hidden
        if not sizes.tied or actor.pp > 1:
            count += vocabulary_parameters(sizes, actor.tp)
    return count


def model_parameters(sizes: Sizes) -> int:
    """Weights of the checkpoint."""
    parts = parts_of(sizes)
    return sum(part.numel for part in chain(parts.inner, parts.outer))


def engine_parameters(sizes: Sizes, tp: int) -> tuple[int, int]:
    """On one of `tp` GPUs of an engine: in matrices of layers (these can be FP8), and everything else.

    Of experts a GPU holds as much whether it has some of them or a part of each.
    """
    parts = parts_of(sizes)
    counts = {True: 0, False: 0}
    for part in chain(parts.inner, parts.outer):
        counts[part.quantised] += math.prod(part.engine_shape(tp, sizes.head_dim))
    return counts[True], counts[False]


def tensors(sizes: Sizes) -> int:
    """Tensors in the actor's layout of the whole model: what a gathered push handles one by one."""
    parts = parts_of(sizes)
    return sum(part.experts or 1 for part in chain(parts.inner, parts.outer))
