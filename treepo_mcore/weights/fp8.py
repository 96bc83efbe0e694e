"""Weights as 128 x 128 blocks of E4M3 with one float32 scale each, as vLLM's block-FP8 linear layers hold them.

A block can be quantised where all of it lies. `quantisers` says for every tensor of a plan where that is: on the
owner (one byte an element travels, and the scales), on the receiver (the tensor travels in the rollout's dtype), or
nowhere, because the engine's own shard would cut a block; vLLM has no layout for that, so the plan is refused.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from treepo_mcore.weights.layout import Piece
from treepo_mcore.weights.plan import PlanError

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST = 1e-4  # amax below which vLLM's quantiser does not go, so that an empty block has a finite scale
# The linear layers; embeddings, the head, norms and biases keep the rollout's dtype.
QUANTISED = tuple(
    f".{name}_proj.weight"
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
)
Where = Literal["owner", "receiver"]


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values [N, K] and scales float32 [ceil(N / 128), ceil(K / 128)]; value x scale is the weight.

    Bit for bit what `vllm.utils.deep_gemm.per_block_cast_to_fp8` makes of the same weight.
    """
    blocks = _blocks(weight)
    scale = blocks.abs().float().amax(dim=(1, 3), keepdim=True).clamp(SMALLEST) / FP8_MAX
    values = (blocks * (1.0 / scale)).to(FP8)
    height, width = weight.shape
    whole = values.view(blocks.shape[0] * BLOCK, blocks.shape[2] * BLOCK)
    return whole[:height, :width].contiguous(), scale[:, 0, :, 0]


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """Float32 [N, K] of E4M3 values [N, K] and their block scales."""
    height, width = values.shape
    spread = scale.repeat_interleave(BLOCK, 0)[:height].repeat_interleave(BLOCK, 1)[:, :width]
    return values.float() * spread


def quantisers(
    shapes: dict[str, tuple[int, ...]], sources: list[list[Piece]], targets: list[list[Piece]]
) -> dict[str, Where]:
    """Where each linear weight of a plan is quantised.

    shapes: of the HF tensors. Raises `PlanError` with the tensor's name where an edge of the engine's shard cuts a
    block of it.
    """
    names = [name for name in shapes if name.endswith(QUANTISED)]
    where: dict[str, Where] = dict.fromkeys(names, "owner")
    for piece in (p for pieces in targets for p in pieces if p.tensor in where):
        if _cuts(piece, shapes[piece.tensor]):
            raise PlanError(
                f"{piece.tensor}: the engine's shard {list(piece.shape)} from {list(piece.start)} cuts a block of "
                f"{BLOCK} x {BLOCK}; use a rollout.tp whose shards are multiples of {BLOCK}, or a bfloat16 rollout"
            )
    for piece in (p for pieces in sources for p in pieces if p.tensor in where):
        if _cuts(piece, shapes[piece.tensor]):
            where[piece.tensor] = "receiver"
    return where


def _cuts(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Whether an edge of the piece lies inside a block and not at the tensor's end."""
    return any(
        first % BLOCK or ((first + size) % BLOCK and first + size != whole)
        for first, size, whole in zip(piece.start, piece.shape, shape, strict=True)
    )


def _blocks(weight: Tensor) -> Tensor:
    """[rows of blocks, 128, columns of blocks, 128], zeros beyond the edges."""
    height, width = (-(-size // BLOCK) for size in weight.shape)
    whole = torch.zeros(height * BLOCK, width * BLOCK, dtype=weight.dtype, device=weight.device)
    whole[: weight.shape[0], : weight.shape[1]] = weight
    return whole.view(height, BLOCK, width, BLOCK)
