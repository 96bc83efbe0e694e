"""Block quantisation: close to the weight, equal to vLLM's own, and only of whole blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_weights_plan import architecture

from treepo_mcore.weights.fp8 import FP8_MAX, dequantise, quantise, quantisers
from treepo_mcore.weights.layout import hf_shapes, rows
from treepo_mcore.weights.plan import PlanError
from treepo_mcore.weights.vllm import vllm_pieces

SHAPES = [(128, 128), (256, 384), (300, 200), (1, 1), (129, 127)]


def weight(shape, seed=0):
    """Blocks of very different sizes, one of zeros."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=draw)
    values *= torch.logspace(-3, 2, shape[0])[:, None]
    values[:128, :128] *= 0 if shape[0] > 256 else 1
    return values


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_that_of_three_bits(shape):
    original = weight(shape)
    values, scale = quantise(original)
    assert values.shape == shape
    assert scale.shape == tuple(-(-size // 128) for size in shape)
    assert scale.dtype == torch.float32
    error = (dequantise(values, scale) - original).abs()
    spread = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    # Half a unit of three mantissa bits; below the smallest normal number, 2**-6, half a step of 2**-9.
    assert (error <= torch.maximum(original.abs() / 16, spread * 2**-10) * (1 + 1e-5)).all()


def test_the_largest_of_a_block_is_kept():
    original = weight((256, 128))
    values, scale = quantise(original)
    assert values[:128].float().abs().max() == FP8_MAX
    torch.testing.assert_close(scale[:, 0] * FP8_MAX, torch.stack([b.abs().max() for b in original.split(128)]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_vllm(shape, dtype):
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    original = weight(shape).to(dtype)
    values, scale = quantise(original)
    expected, expected_scale = per_block_cast_to_fp8(original)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


def whole_blocks(**sizes):
    defaults = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 128, "layers": 1, "vocab": 64}
    return dataclasses.replace(architecture(), **defaults | sizes)


def test_owner_quantises_whole_blocks():
    arch = whole_blocks()
    targets = [list(vllm_pieces(arch, 2, rank)) for rank in range(2)]
    where = quantisers(hf_shapes(arch), targets, targets)
    assert set(where.values()) == {"owner"}
    assert len(where) == 7


def test_receiver_quantises_what_owners_cut():
    arch = whole_blocks()
    targets = [list(vllm_pieces(arch, 2, rank)) for rank in range(2)]
    name = "model.layers.0.mlp.gate_proj.weight"
    halves = [[rows(name, 0, 64, 256, "a", 0)], [rows(name, 64, 448, 256, "a", 0)]]
    where = quantisers(hf_shapes(arch), halves, targets)
    assert [tensor for tensor, place in where.items() if place == "receiver"] == [name]


def test_a_cut_shard_of_the_engine_is_refused():
    """The FFN of Qwen2.5-72B is 231 blocks wide."""
    arch = whole_blocks(ffn=29568)
    for tp, refused in ((1, False), (2, True)):
        targets = [list(vllm_pieces(arch, tp, rank)) for rank in range(tp)]
        if refused:
            with pytest.raises(PlanError, match=r"mlp\.\w+_proj\.weight: the engine's shard .* cuts a block"):
                quantisers(hf_shapes(arch), targets, targets)
        else:
            assert set(quantisers(hf_shapes(arch), targets, targets).values()) == {"owner"}
