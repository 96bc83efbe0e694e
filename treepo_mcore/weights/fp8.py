"""Weights as 128 x 128 blocks of E4M3 with one float32 scale each, as vLLM's `fp8_per_block` linear layers hold them.

vLLM counts blocks from the first row and column of a rank's own parameter (all of `qkv_proj`, say), so that is the grid
here. A block that one transfer covers is quantised by the rank that has the weights: one byte an element travels, and
the scale. Where transfers meet inside a block, its parts travel in the rollout's dtype and the receiver quantises it.
`block_plan` cuts a plan accordingly, `quantisers` says what became of each tensor.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor

from treepo_mcore.config import ConfigError
from treepo_mcore.model.facts import FP8_BLOCK as BLOCK
from treepo_mcore.weights.layout import box
from treepo_mcore.weights.plan import Transfer, part_of

SCALE = "_scale_inv"  # behind the name of a block-quantised weight, as vLLM names it
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST = 1e-4  # amax below which vLLM's quantiser does not go, so that an empty block has a finite scale
# Elements quantised at a time: what bounds the float32 copies. On a GPU more, or starting kernels would take the time.
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}
Where = Literal["owner", "receiver", "both"]


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


def quantise_into(weight: Tensor, values: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """The same into tensors that are there already, a few rows of blocks at a time.

    dtype: what the weight is rounded to first, as it would be on its way into the engine.
    """
    step = max(CHUNK[weight.device.type] // weight.shape[1] // BLOCK, 1) * BLOCK
    for first in range(0, weight.shape[0], step):
        some, scales = quantise(weight[first : first + step].to(dtype))
        values[first : first + step].copy_(some)
        scale[first // BLOCK : first // BLOCK + len(scales)].copy_(scales)


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """Float32 [N, K] of E4M3 values [N, K] and their block scales."""
    height, width = values.shape
    spread = scale.repeat_interleave(BLOCK, 0)[:height].repeat_interleave(BLOCK, 1)[:, :width]
    return values.float() * spread


def fp8_parameters(parameters: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters that a real model holds in FP8."""
    return {name: tuple(tensor.shape) for name, tensor in parameters.items() if tensor.dtype == torch.float8_e4m3fn}


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a parameter."""
    return tuple(-(-size // BLOCK) for size in shape)


def check_whole_columns(shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse what vLLM could load and not run. shapes: of the FP8 parameters on a rank of the engine.

    A layer's input is quantised in groups of 128, and vLLM asserts that they divide it. Raises `ConfigError`.
    """
    for name, (_, width) in shapes.items():
        if width % BLOCK:
            raise ConfigError(
                f"rollout.engine.quantization: {name} has {width} columns on a rank of the engine, vLLM's FP8 needs "
                f"a multiple of {BLOCK}; use another rollout.tp, or no quantization"
            )


def block_plan(plan: list[Transfer], shapes: dict[str, tuple[int, ...]]) -> list[Transfer]:
    """The plan with what goes into FP8 parameters cut into whole blocks and the rest.

    shapes: of the FP8 parameters [N, K], by name; all ranks of all engines are alike.
    """
    cut: list[Transfer] = []
    for transfer in plan:
        shape = shapes.get(transfer.target_local)
        cut += [transfer] if shape is None else _split(transfer, shape)
    return cut


def quantisers(plan: list[Transfer]) -> dict[str, Where]:
    """Of a block plan: where each quantised HF tensor is quantised; "both" where some of its blocks are cut."""
    forms: dict[str, set[str]] = {}
    for transfer in plan:
        if transfer.form != "plain":
            forms.setdefault(transfer.tensor, set()).add(transfer.form)
    return {
        name: "both" if len(found) == 2 else "owner" if "blocks" in found else "receiver"
        for name, found in forms.items()
    }


class CutBlocks:
    """The blocks of a rank that come in parts: put together in the rollout's dtype, quantised when complete."""

    def __init__(self, parameters: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        """parameters: name -> E4M3 values and their scales, both written here."""
        self.parameters, self.dtype = parameters, dtype
        # (parameter, row and column of the block) -> what is there, elements still missing
        self.waiting: dict[tuple[str, int, int], tuple[Tensor, int]] = {}
        self.bytes = 0  # of what is waiting
        self.peak = 0  # most that these were

    def put(self, name: str, start: tuple[int, ...], part: Tensor) -> None:
        """part: a box of the parameter that begins at `start`."""
        ends = [first + size for first, size in zip(start, part.shape, strict=True)]
        spans = [range(first // BLOCK, -(-end // BLOCK)) for first, end in zip(start, ends, strict=True)]
        for index in itertools.product(*spans):
            corner = tuple(i * BLOCK for i in index)
            low = tuple(map(max, corner, start))
            shape = tuple(min(c + BLOCK, end) - a for c, end, a in zip(corner, ends, low, strict=True))
            piece = box(part, tuple(a - b for a, b in zip(low, start, strict=True)), shape)
            self._put_into_block(name, index, tuple(a - c for a, c in zip(low, corner, strict=True)), piece)

    def _put_into_block(self, name: str, index: tuple[int, ...], start: tuple[int, ...], piece: Tensor) -> None:
        row, column = index
        values, scale = self.parameters[name]
        target = values[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
        block, missing = self.waiting.pop((name, row, column), (None, target.numel()))
        if block is None:
            block = torch.empty(target.shape, dtype=self.dtype, device=target.device)
            self.bytes += block.nbytes
            self.peak = max(self.peak, self.bytes)
        box(block, start, tuple(piece.shape)).copy_(piece)
        missing -= piece.numel()
        if missing:
            self.waiting[name, row, column] = block, missing
        else:
            quantise_into(block, target, scale[row : row + 1, column : column + 1], self.dtype)
            self.bytes -= block.nbytes


def _split(transfer: Transfer, whole: tuple[int, ...]) -> list[Transfer]:
    """Whole blocks of the parameter, if any, and up to four strips around them. whole: the parameter's shape."""
    (top, bottom), (left, right) = map(_inner, transfer.target_start, transfer.shape, whole)
    if top >= bottom or left >= right:
        return [transfer._replace(form="cut")]
    height, width = transfer.shape
    middle = part_of(transfer, top, bottom - top)
    strips = [
        part_of(transfer, 0, top),
        part_of(transfer, bottom, height - bottom),
        part_of(middle, 0, left, dim=1),
        part_of(middle, right, width - right, dim=1),
    ]
    blocks = part_of(middle, left, right - left, dim=1)._replace(form="blocks")
    return [blocks, *(strip._replace(form="cut") for strip in strips if strip.numel)]


def _inner(first: int, size: int, whole: int) -> tuple[int, int]:
    """The part [from, to) of `size` elements from `first` on that is whole blocks; the last one may be short."""
    end = first + size
    return -first % BLOCK, size if end == whole else size - end % BLOCK


def _blocks(weight: Tensor) -> Tensor:
    """[rows of blocks, 128, columns of blocks, 128], zeros beyond the edges; a view where there is none."""
    height, width = scale_shape(tuple(weight.shape))
    if weight.shape != (height * BLOCK, width * BLOCK):
        whole = torch.zeros(height * BLOCK, width * BLOCK, dtype=weight.dtype, device=weight.device)
        whole[: weight.shape[0], : weight.shape[1]] = weight
        weight = whole
    return weight.unflatten(1, (width, BLOCK)).unflatten(0, (height, BLOCK))
