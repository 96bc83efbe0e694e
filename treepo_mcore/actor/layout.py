"""The layout of a Megatron-Core GPT model: which box of which HF tensor each local parameter holds.

Facts of Megatron that this file owns: ``linear_qkv`` rows are interleaved by key/value group (``[q ... q, k, v]``
per group) and split evenly over tensor-parallel ranks, also when groups are fewer than ranks; ``linear_fc1`` holds
this rank's gate rows above its up rows; vocabulary rows are padded; layer numbers in names are local to a stage, those
of experts to a rank; experts are cut by a tensor group of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from treepo_mcore.actor.model import unwrap
from treepo_mcore.actor.parallel import Place
from treepo_mcore.model.families import parts_of
from treepo_mcore.model.family import Part
from treepo_mcore.model.sizes import Sizes
from treepo_mcore.weights.layout import Piece, rows

EXPERT = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.weight))(\d+)(.*)")


def is_expert(name: str) -> bool:
    """Whether a parameter of this local name is of one of the experts, whose replicas are fewer than the model's."""
    return ".mlp.experts." in name


def megatron_parameters(chunks: list[nn.Module]) -> dict[str, nn.Parameter]:
    """Local name (``<chunk>.<parameter>``) -> this rank's parameter."""
    return {
        f"{index}.{name}": parameter
        for index, chunk in enumerate(chunks)
        for name, parameter in unwrap(chunk).named_parameters()
    }


def megatron_tensors(chunks: list[nn.Module]) -> dict[str, Tensor]:
    """The same, detached."""
    return {name: parameter.detach() for name, parameter in megatron_parameters(chunks).items()}


def megatron_layout(chunks: list[nn.Module], arch: Sizes, place: Place) -> list[Piece]:
    """Pieces of all parameters of this rank. A parameter that is not in the table raises KeyError with its name."""
    pieces: list[Piece] = []
    for index, chunk in enumerate(chunks):
        model = unwrap(chunk)
        offset = get_transformer_layer_offset(model.config, vp_stage=model.vp_stage)
        for name, parameter in model.named_parameters():
            pieces += parameter_pieces(arch, name, f"{index}.{name}", tuple(parameter.shape), offset, place)
    return pieces


def parameter_pieces(
    arch: Sizes, name: str, local: str, shape: tuple[int, ...], offset: int, place: Place
) -> Iterator[Piece]:
    """Pieces of one parameter of a model chunk.

    name: Megatron's, local to the chunk; local: the same with the chunk's number; offset: layers before the chunk.
    """
    parts, prefix, inner = parts_of(arch), "", name
    known = parts.outer
    if name.startswith("decoder.layers."):
        _, _, number, inner = name.split(".", 3)
        prefix, known = f"model.layers.{int(number) + offset}.", parts.layers[int(number) + offset]
    pattern, expert = _expert(inner)
    part, tp_rank = {spelling: part for part in known for spelling in part.megatron}[pattern], place.tp_rank
    if part.experts:
        part, tp_rank = part.of_expert(place.ep_rank * (part.experts // place.ep) + expert), place.etp_rank
    if part.cut == "qkv":
        yield from _qkv_pieces(arch, part, prefix, local, shape, tp_rank)
    elif part.cut == "columns":
        (source,) = part.sources
        yield Piece(prefix + source.tensor, (source.first, tp_rank * shape[1]), shape, local, (0, 0))
    elif part.cut == "vocabulary":
        first, (source,) = tp_rank * shape[0], part.sources
        count = min(source.rows, first + shape[0]) - first
        if count > 0:
            yield rows(prefix + source.tensor, source.first + first, count, part.width, local, 0)
    else:  # whole, or each source's share below the one before it
        share = shape[0] // len(part.sources)
        begin = 0 if part.cut == "whole" else tp_rank * share
        for index, source in enumerate(part.sources):
            yield rows(prefix + source.tensor, source.first + begin, share, part.width, local, index * share)


def _expert(inner: str) -> tuple[str, int]:
    """The name of an expert's parameter with ``{}`` for its number on this rank, and the number; else name and 0."""
    found = EXPERT.fullmatch(inner)
    return (f"{found[1]}{{}}{found[3]}", int(found[2])) if found else (inner, 0)


def _qkv_pieces(
    arch: Sizes, part: Part, prefix: str, local: str, shape: tuple[int, ...], tp_rank: int
) -> Iterator[Piece]:
    """Intersect this rank's even share of the interleaved rows with the q, k and v runs of every group."""
    head, queries = arch.head_dim, arch.queries_per_group
    q, k, v = part.sources
    low, high = tp_rank * shape[0], (tp_rank + 1) * shape[0]
    for group in range(arch.kv_heads):
        begin = group * (queries + 2) * head
        for source, at, count, first in (
            (q, begin, queries * head, group * queries * head),
            (k, begin + queries * head, head, group * head),
            (v, begin + (queries + 1) * head, head, group * head),
        ):
            a, b = max(low, at), min(high, at + count)
            if a < b:
                run = source.first + first + a - at
                yield rows(prefix + source.tensor, run, b - a, part.width, local, a - low)
