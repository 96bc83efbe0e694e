"""Block quantisation: close to the weight, equal to vLLM's own, by the owner of whole blocks or by the receiver."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weights_plan import architecture, megatron_side, vllm_shard

from treepo_mcore.config import ConfigError
from treepo_mcore.engine.vllm.layout import fp8_shapes, vllm_layout, vllm_pieces, vllm_shapes
from treepo_mcore.model.facts import FP8_BLOCK as BLOCK
from treepo_mcore.weights.fp8 import (
    CHUNK,
    FP8,
    FP8_MAX,
    SCALE,
    CutBlocks,
    block_plan,
    check_whole_columns,
    dequantise,
    quantise,
    quantise_into,
    quantisers,
    scale_shape,
)
from treepo_mcore.weights.layout import box, hf_shapes
from treepo_mcore.weights.plan import PlanError, make_plan, make_rounds

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


def test_dequantised_product_is_close_to_float32():
    """Half a unit of three mantissa bits in every term; small numbers in a block add at most its largest / 2**18."""
    original, inputs = weight((300, 256)), torch.randn(7, 256)
    values, scale = quantise(original)
    error = (inputs @ dequantise(values, scale).T - inputs @ original.T).abs()
    tiny = scale.repeat_interleave(BLOCK, 0)[:300].repeat_interleave(BLOCK, 1)[:, :256] * 2**-10
    bound = inputs.abs() @ (original.abs() / 16 + tiny).T
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > 1e-3 * bound.max()


@pytest.mark.parametrize("shape", SHAPES)
def test_quantise_into_views_in_chunks(shape, monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", 200)
    original = weight(shape)
    values = torch.zeros(shape[0], shape[1] + 5, dtype=FP8)[:, 5:]
    scale = torch.zeros(scale_shape(shape))
    quantise_into(original, values, scale, torch.bfloat16)
    expected, expected_scale = quantise(original.bfloat16())
    assert torch.equal(values.float(), expected.float())
    assert torch.equal(scale, expected_scale)


@st.composite
def fp8_cases(draw):
    """Sizes around blocks: heads of a quarter of one to a whole one, FFNs that are not whole blocks."""
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    arch = architecture(
        hidden=draw(st.sampled_from([128, 192, 256])),
        ffn=draw(st.sampled_from([256, 320, 512, 640])),
        heads=4,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([32, 64, 128])),
        layers=draw(st.integers(1, 2)),
        vocab=64,
        tied=draw(st.booleans()),
    )
    tp, rollout_tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    cut = draw(st.integers(0, arch.layers))
    stages = [range(arch.layers)] if pp == 1 else [range(cut), range(cut, arch.layers)]
    dp = max(1, rollout_tp // (tp * pp))
    return arch, tp, stages, dp, rollout_tp


def random_tensors(arch):
    draw = torch.Generator().manual_seed(0)
    shapes = hf_shapes(arch)
    return {name: torch.randn(shape, generator=draw) * (1 + i % 7) for i, (name, shape) in enumerate(shapes.items())}


def pushed(shards, plan, arch, rollout_tp, limit):
    """What stands in every engine rank's parameters after the plan, in bfloat16 and FP8."""
    quantised = fp8_shapes(arch, rollout_tp)
    ranks = []
    for _ in shards:
        tensors = {
            name: torch.zeros(shape, dtype=FP8 if name in quantised else torch.bfloat16)
            for name, shape in vllm_shapes(arch, rollout_tp).items()
        }
        ranks.append(tensors | {name + SCALE: torch.zeros(scale_shape(shape)) for name, shape in quantised.items()})
    cuts = [
        CutBlocks({name: (tensors[name], tensors[name + SCALE]) for name in quantised}, torch.bfloat16)
        for tensors in ranks
    ]
    moved = itertools.chain.from_iterable(make_rounds(plan, limit, 2))
    for transfer in [*(t for t in plan if t.local), *moved]:
        assert transfer.local or transfer.bytes(2) <= limit
        source = box(shards[transfer.source][transfer.source_local], transfer.source_start, transfer.shape)
        tensors, name = ranks[transfer.target], transfer.target_local
        if transfer.form == "cut":
            cuts[transfer.target].put(name, transfer.target_start, source)
            continue
        view = box(tensors[name], transfer.target_start, transfer.shape)
        if transfer.form == "plain":
            view.copy_(source)
            continue
        scales = box(
            tensors[name + SCALE], tuple(first // BLOCK for first in transfer.target_start), scale_shape(transfer.shape)
        )
        assert not scales.any()  # every block once
        quantise_into(source, view, scales, torch.bfloat16)
    assert not any(e.waiting or e.bytes for e in cuts)
    return ranks


@settings(max_examples=50, deadline=None)
@given(fp8_cases(), st.sampled_from([90_000, 10**9]))
def test_a_rank_receives_parts_of_blocks_parameter_by_parameter(case, limit):
    arch, tp, stages, dp, rollout_tp = case
    _, sources = megatron_side(arch, random_tensors(arch), tp, stages, dp, 16)
    targets = [list(vllm_pieces(arch, rollout_tp, rank % rollout_tp)) for rank in range(len(sources))]
    rounds = make_rounds(block_plan(make_plan(sources, targets), fp8_shapes(arch, rollout_tp)), limit, 2)
    for rank in range(len(sources)):
        cuts = [t.target_local for part in rounds for t in part if t.form == "cut" and t.target == rank]
        assert len(list(itertools.groupby(cuts))) == len(set(cuts))


def test_waiting_blocks_are_counted():
    """A block of 128 x 128 in bfloat16, complete at once, and one at the ragged end, 128 x 72, that waits."""
    values, scale = torch.zeros(128, 200, dtype=FP8), torch.zeros(1, 2)
    cuts = CutBlocks({"a": (values, scale)}, torch.bfloat16)
    original = weight((128, 200))
    cuts.put("a", (0, 0), original[:, :150])
    assert (cuts.bytes, cuts.peak) == (128 * 72 * 2, 128 * 128 * 2)
    cuts.put("a", (0, 150), original[:, 150:])
    assert (cuts.bytes, cuts.peak) == (0, 128 * 128 * 2)
    expected = quantise(original.bfloat16())
    assert torch.equal(values.float(), expected[0].float())
    assert torch.equal(scale, expected[1])


def cuts_no_block(piece, shape):
    spans = zip(piece.start, piece.shape, shape, strict=True)
    return all(a % BLOCK == 0 and (n % BLOCK == 0 or a + n == whole) for a, n, whole in spans)


@settings(max_examples=20, deadline=None)
@given(fp8_cases(), st.sampled_from([90_000, 10**9]))
def test_pushed_blocks_equal_quantising_the_engine_shard(case, limit):
    """vLLM quantises its own fused shard; whole HF blocks are those of the full tensor too.

    90,000 bytes have room for 128 rows of 640 columns, which cannot be sent in parts.
    """
    arch, tp, stages, dp, rollout_tp = case
    hf = random_tensors(arch)
    shards, sources = megatron_side(arch, hf, tp, stages, dp, 16)
    targets = [list(vllm_pieces(arch, rollout_tp, rank % rollout_tp)) for rank in range(len(shards))]
    plan = block_plan(make_plan(sources, targets), fp8_shapes(arch, rollout_tp))
    where = quantisers(plan)
    ranks = pushed(shards, plan, arch, rollout_tp, limit)
    for rank, tensors in enumerate(ranks):
        expected = vllm_shard(arch, hf, rollout_tp, rank % rollout_tp)
        assert vllm_layout(tensors, arch, rollout_tp, rank % rollout_tp) == targets[rank]
        for name, tensor in expected.items():
            if name + SCALE not in tensors:
                assert torch.equal(tensors[name], tensor.bfloat16()), name
                continue
            values, scale = quantise(tensor.bfloat16())
            assert torch.equal(tensors[name].view(torch.uint8), values.view(torch.uint8)), name
            assert torch.equal(tensors[name + SCALE], scale), name
        for piece in targets[rank]:  # against the full HF tensor, where its blocks are not cut
            if where.get(piece.tensor) != "owner" or not cuts_no_block(piece, hf[piece.tensor].shape):
                continue
            values, _ = quantise(hf[piece.tensor].bfloat16())
            mine = piece.of_local(tensors)
            assert torch.equal(mine.float(), box(values, piece.start, piece.shape).float()), piece


def whole_blocks(**sizes):
    defaults = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 128, "layers": 1, "vocab": 64}
    return architecture(**defaults | sizes)


def plan_between(arch, tp, rollout_tp):
    world = max(tp, rollout_tp)
    sources = [list(vllm_pieces(arch, tp, rank)) if rank < tp else [] for rank in range(world)]
    targets = [list(vllm_pieces(arch, rollout_tp, rank % rollout_tp)) for rank in range(world)]
    return block_plan(make_plan(sources, targets), fp8_shapes(arch, rollout_tp))


def test_owners_quantise_whole_blocks():
    plan = plan_between(whole_blocks(), 2, 1)
    where = quantisers(plan)
    assert len(where) == 7
    assert set(where.values()) == {"owner"}
    moved = [t for t in plan if not t.local and t.form == "blocks"]
    assert sum(t.bytes(2) for t in moved) == sum(t.numel + 4 * t.numel // BLOCK**2 for t in moved)


def test_a_short_block_at_the_end_of_a_parameter_is_whole():
    assert set(quantisers(plan_between(whole_blocks(hidden=192), 1, 1)).values()) == {"owner"}


def test_receivers_quantise_what_shards_cut():
    """Heads of 64 over two ranks of the engine: a rank's keys and values share a block, queries do not."""
    where = quantisers(plan_between(whole_blocks(head_dim=64), 1, 2))
    receivers = {name.split(".")[-2] for name, place in where.items() if place == "receiver"}
    assert receivers == {"k_proj", "v_proj"}
    assert set(where.values()) == {"owner", "receiver"}


def test_the_ffn_of_qwen_72b():
    """231 blocks wide: at rollout.tp 1 the actor's shards cut blocks, at 8 vLLM's own kernels refuse `down_proj`."""
    arch = whole_blocks(ffn=29568, heads=8, kv_heads=8)
    where = quantisers(plan_between(arch, 8, 1))
    assert {name.split(".")[-2] for name, place in where.items() if place == "both"} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    check_whole_columns(fp8_shapes(arch, 1))
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj\.weight has 3696 columns on a rank"):
        check_whole_columns(fp8_shapes(arch, 8))


def test_a_row_of_blocks_larger_than_the_staging_is_refused():
    plan = plan_between(whole_blocks(), 2, 1)
    row = BLOCK * 256 + 4 * 2
    assert all(t.shape[0] == BLOCK for r in make_rounds(plan, row, 2) for t in r if "gate" in t.tensor)
    with pytest.raises(PlanError, match=r"bytes of .* cannot be sent in parts, and .* rollout\.push_staging_mb"):
        make_rounds(plan, row - 1, 2)
