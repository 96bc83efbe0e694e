"""One picture of where every weight lives.

Every local tensor, Megatron's, vLLM's or a file's, is a list of pieces: a box of a Hugging Face tensor and the place
of that box in the local tensor. Boxes keep their shape; nothing is ever transposed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from treepo_mcore.model.architecture import Architecture


@dataclass(frozen=True, order=True)
class Piece:
    """A box that a Hugging Face tensor and a local tensor share."""

    tensor: str  # name in the HF checkpoint
    start: tuple[int, ...]  # first index in the HF tensor, each dimension
    shape: tuple[int, ...]
    local: str  # name of the local tensor
    local_start: tuple[int, ...]

    def of_local(self, tensors: dict[str, Tensor]) -> Tensor:
        """View of the piece in its local tensor."""
        return box(tensors[self.local], self.local_start, self.shape)

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)


def box(tensor: Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """View ``tensor[start : start + shape]``."""
    for dim, (first, size) in enumerate(zip(start, shape, strict=True)):
        tensor = tensor.narrow(dim, first, size)
    return tensor


def rows(tensor: str, first: int, count: int, width: int | None, local: str, local_first: int) -> Piece:
    """A run of rows over the full width; width None for one-dimensional tensors."""
    if width is None:
        return Piece(tensor, (first,), (count,), local, (local_first,))
    return Piece(tensor, (first, 0), (count, width), local, (local_first, 0))


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape, in the order of the layers."""
    hidden, head = arch.hidden, arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (arch.vocab, hidden)}
    for layer in range(arch.layers):
        p = f"model.layers.{layer}."
        shapes[p + "input_layernorm.weight"] = (hidden,)
        for name, heads in (("q", arch.heads), ("k", arch.kv_heads), ("v", arch.kv_heads)):
            shapes[p + f"self_attn.{name}_proj.weight"] = (heads * head, hidden)
            if arch.qkv_bias:
                shapes[p + f"self_attn.{name}_proj.bias"] = (heads * head,)
        if arch.qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = (head,)
            shapes[p + "self_attn.k_norm.weight"] = (head,)
        shapes[p + "self_attn.o_proj.weight"] = (hidden, arch.heads * head)
        shapes[p + "post_attention_layernorm.weight"] = (hidden,)
        shapes[p + "mlp.gate_proj.weight"] = (arch.ffn, hidden)
        shapes[p + "mlp.up_proj.weight"] = (arch.ffn, hidden)
        shapes[p + "mlp.down_proj.weight"] = (hidden, arch.ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tied:
        shapes["lm_head.weight"] = (arch.vocab, hidden)
    return shapes
