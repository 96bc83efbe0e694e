"""A model family is one object: its parts, and what its config.json may and may not say.

A part is one tensor of both libraries, Megatron's and vLLM's, and the rows of the checkpoint's tensors that it holds.
How each library cuts a part over its ranks follows from its `Cut`: the shapes are here, where nothing needs torch, and
which rows lie where is in `actor/layout.py` and `engine/vllm/layout.py`. Shapes of the checkpoint, layouts on both
sides, exports and the counts of parameters and FLOPs are all folds over this one list. What a layer keeps for its
backward pass is not a property of its weights; `actor/costs.py` counts that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from treepo_mcore.config import ConfigError
from treepo_mcore.model.facts import ACTOR_VOCAB_UNIT, ENGINE_VOCAB_UNIT, padded
from treepo_mcore.model.rotary import KINDS
from treepo_mcore.model.sizes import Sizes

# whole: every rank holds all of it. columns: each rank some columns. stacked: each rank some rows of every source, one
# below the other. qkv: query heads and the key/value heads that they share. vocabulary: rows, padded and then split.
Cut = Literal["whole", "columns", "stacked", "qkv", "vocabulary"]


@dataclass(frozen=True)
class Source:
    """A run of rows of one tensor of the checkpoint."""

    tensor: str  # behind the layer's prefix, if the part is of a layer
    rows: int
    first: int = 0  # in that tensor, where several sources share it


@dataclass(frozen=True)
class Part:
    """One tensor of the model, or of each of its layers."""

    cut: Cut
    megatron: tuple[str, ...]  # its names, inside a layer if it is of one; TransformerEngine fuses norms under another
    vllm: str
    sources: tuple[Source, ...]  # one below the other; q, k and v in this order
    width: int | None = None  # columns; None: one-dimensional
    quantised: bool = False  # whether an engine with FP8 weights holds it in FP8

    @property
    def rows(self) -> int:
        """Of all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def numel(self) -> int:
        """Elements of the checkpoint in it."""
        return self.rows * (self.width or 1)

    @property
    def flops(self) -> int:
        """Of one token's forward pass: a multiplication and an addition for each weight of a matrix."""
        return 0 if self.width is None or self.cut == "vocabulary" else 2 * self.numel

    def actor_shape(self, tp: int) -> tuple[int, ...]:
        """On one of `tp` ranks of Megatron."""
        if self.cut == "vocabulary":
            return self._shape(padded(self.rows, ACTOR_VOCAB_UNIT * tp) // tp)
        return self._even(tp)

    def engine_shape(self, tp: int, head_dim: int) -> tuple[int, ...]:
        """On one of `tp` ranks of vLLM, which repeats key/value heads where there are fewer of them than ranks."""
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
    layer: tuple[Part, ...]  # of every layer alike

    def holds(self, name: str) -> bool:
        """Whether every layer has a tensor that Megatron calls so, such as ``self_attention.linear_qkv.bias``."""
        return any(name in part.megatron for part in self.layer)


@dataclass(frozen=True)
class Family:
    """What the checkpoints of one architecture have in common."""

    name: str
    parts: Callable[[Sizes], Parts]
    head_dim: int | None = None  # where config.json does not say; None: hidden_size / num_attention_heads
    windowed: bool = False  # whether `sliding_window` counts; a window shorter than the context is refused
    window: int | None = None  # what transformers assumes where that key is absent
    rotary: tuple[str, ...] = tuple(KINDS)  # kinds of rotary embeddings that transformers knows for it


def hf_shapes(parts: Parts, layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape, the embedding first, then layer by layer.

    Raises `ConfigError` where rows of a tensor belong to no part, or to two.
    """
    embedding, *rest = parts.outer
    shapes = _tensors((embedding,))
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _tensors(parts.layer).items()}
    return shapes | _tensors(tuple(rest))


def _tensors(parts: tuple[Part, ...]) -> dict[str, tuple[int, ...]]:
    runs: dict[str, list[tuple[int, int]]] = {}
    widths: dict[str, int | None] = {}
    for part in parts:
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
