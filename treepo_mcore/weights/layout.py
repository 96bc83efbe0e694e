"""One picture of where every weight lives.

Every local tensor, Megatron's, vLLM's or a file's, is a list of pieces: a box of a Hugging Face tensor and the place
of that box in the local tensor. Boxes keep their shape; nothing is ever transposed. A local tensor may have more
dimensions than the file's (experts stacked in one): its first indices then choose the slab that the box lies in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from treepo_mcore.model import family
from treepo_mcore.model.families import parts_of
from treepo_mcore.model.sizes import Sizes


@dataclass(frozen=True, order=True)
class Piece:
    """A box that a Hugging Face tensor and a local tensor share."""

    tensor: str  # name in the HF checkpoint
    start: tuple[int, ...]  # first index in the HF tensor, each dimension
    shape: tuple[int, ...]
    local: str  # name of the local tensor
    local_start: tuple[int, ...]  # one index for each dimension of the local tensor

    def of_local(self, tensors: dict[str, Tensor]) -> Tensor:
        """View of the piece in its local tensor."""
        return box(tensors[self.local], self.local_start, self.shape)

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)


def box(tensor: Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """View ``tensor[start : start + shape]``. Indices beyond the shape's come first and choose a slab of the tensor."""
    slab = len(start) - len(shape)
    for index in start[:slab]:
        tensor = tensor.select(0, index)
    for dim, (first, size) in enumerate(zip(start[slab:], shape, strict=True)):
        tensor = tensor.narrow(dim, first, size)
    return tensor


def rows(tensor: str, first: int, count: int, width: int | None, local: str, local_first: int) -> Piece:
    """A run of rows over the full width; width None for one-dimensional tensors."""
    if width is None:
        return Piece(tensor, (first,), (count,), local, (local_first,))
    return Piece(tensor, (first, 0), (count, width), local, (local_first, 0))


def hf_shapes(arch: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape, in the order of the layers. Raises `ConfigError`: see `family`."""
    return family.hf_shapes(parts_of(arch))
