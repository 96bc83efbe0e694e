"""A model family is one object: its parts, and what its config.json may and may not say.

A part is one tensor of both libraries, Megatron's and vLLM's, and the rows of the checkpoint's tensors that it holds.
How each library cuts a part over its ranks follows from its `Cut`: the shapes are here, where nothing needs torch, and
which rows lie where is in `actor/layout.py` and `engine/vllm/layout.py`. Shapes of the checkpoint, layouts on both
sides, exports and the counts of parameters and FLOPs are all folds over this one list. What a layer keeps for its
backward pass is not a property of its weights; `actor/costs.py` counts that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from treepo_mcore.config import ConfigError
from treepo_mcore.model.facts import ACTOR_VOCAB_UNIT, ENGINE_VOCAB_UNIT, padded
from treepo_mcore.model.rotary import KINDS
from treepo_mcore.model.sizes import Sizes

# whole: every rank holds all of it. columns: each rank some columns. stacked: each rank some rows of every source, one
# below the other. qkv: query heads and the key/value heads that they share. vocabulary: rows, padded and then split.
# Of an expert, the ranks that share it cut its columns and stacked rows.
Cut = Literal["whole", "columns", "stacked", "qkv", "vocabulary"]


@dataclass(frozen=True)
class Source:
    """A run of rows of one tensor of the checkpoint."""

    tensor: str  # behind the layer's prefix, if the part is of a layer
    rows: int
    first: int = 0  # in that tensor, where several sources share it

    def of_expert(self, number: int) -> Source:
        """With the expert's number in its name."""
        return replace(self, tensor=self.tensor.format(number))


@dataclass(frozen=True)
class Part:
    """One tensor of the model, or of a layer, or of each of a layer's experts.

    Experts' names, Megatron's and those of sources, have ``{}`` in the place of the expert's number, which in
    Megatron counts from a rank's own first expert on. vLLM holds all experts of a rank in one tensor, one behind the
    other: its name and its shape are of all of them, everything else here is of one expert.
    """

    cut: Cut
    megatron: tuple[str, ...]  # its names, inside a layer if it is of one; TransformerEngine fuses norms under another
    vllm: str
    sources: tuple[Source, ...]  # one below the other; q, k and v in this order
    width: int | None = None  # columns; None: one-dimensional
    quantised: bool = False  # whether an engine with FP8 weights holds it in FP8
    experts: int = 0  # of the layer; 0: it is not of experts
    chosen: int = 0  # of these, how many compute a token

    @property
    def rows(self) -> int:
        """Of all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def numel(self) -> int:
        """Elements of the checkpoint in it, of all experts."""
        return self.rows * (self.width or 1) * (self.experts or 1)

    @property
    def flops(self) -> int:
        """Of one token's forward pass: a multiplication and an addition for each weight of a matrix it goes through."""
        if self.width is None or self.cut == "vocabulary":
            return 0
        return 2 * self.rows * self.width * (self.chosen or 1)

    def of_expert(self, number: int) -> Part:
        """The same of one expert, under the names of the checkpoint."""
        return replace(self, experts=0, sources=tuple(source.of_expert(number) for source in self.sources))

    def actor_shape(self, tp: int) -> tuple[int, ...]:
        """On one of `tp` ranks of Megatron; of one expert, on one of the `tp` that share it."""
        if self.cut == "vocabulary":
            return self._shape(padded(self.rows, ACTOR_VOCAB_UNIT * tp) // tp)
        return self._even(tp)

    def engine_shape(self, tp: int, head_dim: int, expert_parallel: bool = False) -> tuple[int, ...]:
        """On one of `tp` ranks of vLLM, which repeats key/value heads where there are fewer of them than ranks.

        expert_parallel: whether each rank holds some experts whole, and not a part of each.
        """
        if self.experts:
            return (self.experts // tp, *self._even(1)) if expert_parallel else (self.experts, *self._even(tp))
        if self.cut == "vocabulary":
            return self._shape(padded(self.rows, ENGINE_VOCAB_UNIT) // tp)
        if self.cut == "qkv":
            q, k, v = (source.rows for source in self.sources)
            return self._shape(q // tp + max(k // tp, head_dim) + max(v // tp, head_dim))
        return self._even(tp)

    def _shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.width is None else (rows, self.width)

    def _even(self, tp: int) -> tuple[int, ...]:
        if self.cut == "columns":
            assert self.width is not None
            return (self.rows, self.width // tp)
        return self._shape(self.rows if self.cut == "whole" else self.rows // tp)


@dataclass(frozen=True)
class Parts:
    """All of a model."""

    outer: tuple[Part, ...]  # embedding, final norm, output layer where it is not the embedding
    layers: tuple[tuple[Part, ...], ...]  # of each layer

    @property
    def inner(self) -> Iterator[Part]:
        """Of all layers."""
        return chain.from_iterable(self.layers)

    def holds(self, name: str) -> bool:
        """Whether a layer has a tensor that Megatron calls so, such as ``self_attention.linear_qkv.bias``."""
        return any(name in part.megatron for part in self.inner)


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one architecture have in common."""

    name: str
    parts: Callable[[Sizes], Parts]
    head_dim: int | None = None  # where config.json does not say; None: hidden_size / num_attention_heads
    windowed: bool = False  # whether `sliding_window` counts; a window shorter than the context is refused
    window: int | None = None  # what transformers assumes where that key is absent
    rotary: tuple[str, ...] = tuple(KINDS)  # kinds of rotary embeddings that transformers knows for it
    mixture: bool = False  # of experts


def hf_shapes(parts: Parts) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape, the embedding first, then layer by layer.

    Raises `ConfigError` where rows of a tensor belong to no part, or to two.
    """
    embedding, *rest = parts.outer
    shapes = _tensors((embedding,))
    alike = {layer: _tensors(layer) for layer in set(parts.layers)}
    for number, layer in enumerate(parts.layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in alike[layer].items()}
    return shapes | _tensors(tuple(rest))


def _single(part: Part) -> list[Part]:
    return [part.of_expert(number) for number in range(part.experts)] or [part]


def _tensors(parts: tuple[Part, ...]) -> dict[str, tuple[int, ...]]:
    runs: dict[str, list[tuple[int, int]]] = {}
    widths: dict[str, int | None] = {}
    for part in chain.from_iterable(_single(part) for part in parts):
        for source in part.sources:
            runs.setdefault(source.tensor, []).append((source.first, source.first + source.rows))
            if widths.setdefault(source.tensor, part.width) != part.width:
                raise ConfigError(f"{source.tensor}: parts of {widths[source.tensor]} and of {part.width} columns")
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor, pieces in runs.items():
        end = 0
        for first, last in sorted(pieces):
            if first != end:
                what = "no part" if first > end else "two parts"
                raise ConfigError(
                    f"{tensor}: rows {min(first, end)} to {max(first, end)} belong to {what} of the model"
                )
            end = last
        width = widths[tensor]
        shapes[tensor] = (end,) if width is None else (end, width)
    return shapes
