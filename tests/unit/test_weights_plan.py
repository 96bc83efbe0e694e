"""A plan assembles exactly what slicing the HF tensors gives, for random models, layouts and paddings."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_mcore.actor.layout import parameter_pieces
from treepo_mcore.actor.parallel import Place
from treepo_mcore.engine.vllm.layout import vllm_layout, vllm_padding, vllm_pieces, vllm_shapes
from treepo_mcore.model.rotary import Rotary
from treepo_mcore.model.sizes import Architecture
from treepo_mcore.weights.layout import Piece, box, hf_shapes, rows
from treepo_mcore.weights.plan import PlanError, make_plan, make_rounds

POISON = -1.0  # of padding and of everything not yet written


def architecture(**sizes):
    defaults = {
        "family": "qwen3",
        "hidden": 4,
        "ffn": 8,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 2,
        "vocab": 70,
        "norm_eps": 1e-6,
        "tied": False,
        "max_positions": 64,
        "initializer_range": 0.02,
        "rope_inv_freq": (1.0,),
        "rope_scale": 1.0,
        "rotary": Rotary("default", 1e4),
    }
    return Architecture(**defaults | sizes)


def hf_tensors(arch):
    """Every element another number, so that a misplaced one shows."""
    shapes = hf_shapes(arch)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = torch.arange(sum(sizes), dtype=torch.float64).split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def padded(tensor, height, fill=POISON):
    out = torch.full((height, *tensor.shape[1:]), fill, dtype=tensor.dtype)
    out[: len(tensor)] = tensor
    return out


def share(tensor, parts, index, dim=0):
    return tensor.chunk(parts, dim)[index]


def megatron_shard(arch, hf, tp, rank, padding, layers, first, last):
    """What Megatron keeps on a rank, written down without pieces. layers: this stage's, global numbers."""
    unit = padding * tp
    height = -(-arch.vocab // unit) * unit
    shard = {}
    if first or (arch.tied and last):
        name = "embedding.word_embeddings.weight" if first else "output_layer.weight"
        shard[name] = share(padded(hf["model.embed_tokens.weight"], height), tp, rank)
    if last:
        shard["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not arch.tied:
            shard["output_layer.weight"] = share(padded(hf["lm_head.weight"], height), tp, rank)
    for number, layer in enumerate(layers):
        h, m = f"model.layers.{layer}.", f"decoder.layers.{number}."
        shard[m + "input_layernorm.weight"] = hf[h + "input_layernorm.weight"]
        shard[m + "pre_mlp_layernorm.weight"] = hf[h + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias") if arch.family == "qwen2" else ("weight",):
            q, k, v = (hf[f"{h}self_attn.{n}_proj.{kind}"] for n in "qkv")
            groups = [x.view(arch.kv_heads, -1, *x.shape[1:]) for x in (q, k, v)]
            shard[m + f"self_attention.linear_qkv.{kind}"] = share(torch.cat(groups, 1).flatten(0, 1), tp, rank)
        if arch.family == "qwen3":
            shard[m + "self_attention.q_layernorm.weight"] = hf[h + "self_attn.q_norm.weight"]
            shard[m + "self_attention.k_layernorm.weight"] = hf[h + "self_attn.k_norm.weight"]
        shard[m + "self_attention.linear_proj.weight"] = share(hf[h + "self_attn.o_proj.weight"], tp, rank, 1)
        gate, up = (share(hf[h + f"mlp.{n}_proj.weight"], tp, rank) for n in ("gate", "up"))
        shard[m + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
        shard[m + "mlp.linear_fc2.weight"] = share(hf[h + "mlp.down_proj.weight"], tp, rank, 1)
    return shard


def vllm_shard(arch, hf, tp, rank):
    """What vLLM keeps on a rank, written down without pieces; padding rows are zero."""

    def vocab(tensor):
        return share(padded(tensor, -(-arch.vocab // 64) * 64, fill=0.0), tp, rank)

    shard = {"model.embed_tokens.weight": vocab(hf["model.embed_tokens.weight"])}
    if not arch.tied:
        shard["lm_head.weight"] = vocab(hf["lm_head.weight"])
    shard["model.norm.weight"] = hf["model.norm.weight"]
    copies = max(1, tp // arch.kv_heads)
    for layer in range(arch.layers):
        p = f"model.layers.{layer}."
        for kind in ("weight", "bias") if arch.family == "qwen2" else ("weight",):
            q, k, v = (hf[f"{p}self_attn.{n}_proj.{kind}"] for n in "qkv")
            k, v = (
                x.view(arch.kv_heads, arch.head_dim, *x.shape[1:]).repeat_interleave(copies, 0).flatten(0, 1)
                for x in (k, v)
            )
            shard[p + f"self_attn.qkv_proj.{kind}"] = torch.cat([share(x, tp, rank) for x in (q, k, v)])
        gate, up = (share(hf[f"{p}mlp.{n}_proj.weight"], tp, rank) for n in ("gate", "up"))
        shard[p + "mlp.gate_up_proj.weight"] = torch.cat([gate, up])
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            shard[p + name + ".weight"] = share(hf[p + name + ".weight"], tp, rank, 1)
        norms = ["input_layernorm", "post_attention_layernorm"]
        for name in norms + (["self_attn.q_norm", "self_attn.k_norm"] if arch.family == "qwen3" else []):
            shard[p + name + ".weight"] = hf[p + name + ".weight"]
    return shard


@st.composite
def cases(draw):
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    queries = draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * queries
    arch = architecture(
        family=draw(st.sampled_from(["llama", "qwen2", "qwen3"])),  # neither, bias, norms
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        ffn=8 * draw(st.integers(1, 3)),
        hidden=draw(st.sampled_from([4, 6])),
        layers=draw(st.integers(1, 5)),
        vocab=draw(st.integers(3, 300)),
        tied=draw(st.booleans()),
    )
    sizes = [n for n in (1, 2, 4, 8) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    tp, rollout_tp = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    cuts = draw(st.lists(st.integers(0, arch.layers), max_size=3))  # stages may be uneven, even empty
    bounds = [0, *sorted(cuts), arch.layers]
    stages = [range(a, b) for a, b in itertools.pairwise(bounds)]
    vpp = draw(st.sampled_from([n for n in (1, 2) if len(stages) % n == 0]))
    dp = draw(st.sampled_from([1, 2]))
    world = tp * len(stages) // vpp * dp
    while world % rollout_tp:
        dp, world = 2 * dp, 2 * world
    return arch, tp, stages, vpp, dp, rollout_tp, draw(st.sampled_from([1, 16, 128]))


def megatron_side(arch, hf, tp, stages, dp, padding, vpp=1):
    """Shards and layouts of every rank; ranks run over tensor, data, pipeline parallel, as in Megatron.

    With vpp > 1 a rank holds several stages, dealt in turns; its tensors are named `<chunk>.<name>`.
    """
    shards, layouts = [], []
    pp = len(stages) // vpp
    for pp_rank, _, rank in itertools.product(range(pp), range(dp), range(tp)):
        shards.append({})
        layouts.append([])
        for chunk, stage in enumerate(range(pp_rank, len(stages), pp)):
            last = stage == len(stages) - 1
            shard = megatron_shard(arch, hf, tp, rank, padding, stages[stage], stage == 0, last)
            for name, tensor in shard.items():
                local = f"{chunk}.{name}"
                shards[-1][local] = tensor
                layouts[-1] += parameter_pieces(
                    arch, name, local, tuple(tensor.shape), stages[stage].start, Place(rank)
                )
    return shards, layouts


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([128, 1000, 10**9]))
def test_plan_equals_slicing(case, limit):
    arch, tp, stages, vpp, dp, rollout_tp, padding = case
    hf = hf_tensors(arch)
    shards, sources = megatron_side(arch, hf, tp, stages, dp, padding, vpp)
    targets = [list(vllm_pieces(arch, rollout_tp, rank % rollout_tp)) for rank in range(len(shards))]
    plan = make_plan(sources, targets)
    engines = [
        {name: torch.full(shape, POISON, dtype=torch.float64) for name, shape in vllm_shapes(arch, rollout_tp).items()}
        for _ in shards
    ]
    for rank, engine in enumerate(engines):
        for view in vllm_padding(engine, arch, rollout_tp, rank % rollout_tp):
            assert (view == POISON).all()
            view.zero_()
    moved = itertools.chain.from_iterable(make_rounds(plan, limit))
    for transfer in [*(t for t in plan if t.local), *moved]:
        source = box(shards[transfer.source][transfer.source_local], transfer.source_start, transfer.shape)
        target = box(engines[transfer.target][transfer.target_local], transfer.target_start, transfer.shape)
        assert (target == POISON).all()  # every element once
        target.copy_(source)
    for rank, engine in enumerate(engines):
        expected = vllm_shard(arch, hf, rollout_tp, rank % rollout_tp)
        assert engine.keys() == expected.keys()
        for name, tensor in engine.items():
            assert torch.equal(tensor, expected[name]), name


@settings(max_examples=50, deadline=None)
@given(cases(), st.integers(128, 800))
def test_rounds_are_bounded_and_complete(case, limit):
    arch, tp, stages, vpp, dp, rollout_tp, padding = case
    _, sources = megatron_side(arch, hf_tensors(arch), tp, stages, dp, padding, vpp)
    targets = [list(vllm_pieces(arch, rollout_tp, rank % rollout_tp)) for rank in range(len(sources))]
    plan = make_plan(sources, targets)
    rounds = make_rounds(plan, limit)
    assert make_plan(sources, targets) == plan
    assert sum(t.numel for r in rounds for t in r) == sum(t.numel for t in plan if not t.local)
    for part in rounds:
        assert part
        for rank in range(len(sources)):
            assert sum(t.numel for t in part if t.source == rank) <= limit
            assert sum(t.numel for t in part if t.target == rank) <= limit


def test_equal_layouts_stay_local():
    arch = architecture(vocab=128)
    hf = hf_tensors(arch)
    _, sources = megatron_side(arch, hf, 2, [range(2)], 1, 64)
    plan = make_plan(sources, [list(vllm_pieces(arch, 2, rank)) for rank in range(2)])
    assert all(t.local for t in plan)


def test_replicas_share_the_sending():
    whole = [Piece("a", (0,), (100,), "a", (0,))]
    parts = [Piece("a", (10 * i,), (10,), "a", (10 * i,)) for i in range(10)]
    plan = make_plan([whole, whole, []], [[], [], parts])
    assert [sum(t.numel for t in plan if t.source == rank) for rank in range(3)] == [50, 50, 0]


def test_replicas_in_the_own_node_come_first():
    whole = [Piece("a", (0,), (100,), "a", (0,))]
    empty = [[], [], [], []]
    wanted = [[], [], whole, whole]
    sources = [whole, [], whole, []]
    assert [(t.source, t.target) for t in make_plan(sources, wanted, [0, 0, 1, 1])] == [(2, 2), (2, 3)]
    assert [(t.source, t.target) for t in make_plan(sources, wanted, [0, 1, 1, 0])] == [(2, 2), (0, 3)]
    # Load is counted apart: what rank 0 sends to its neighbour is not held against it across nodes.
    both = [whole, [], [], whole, []]
    plan = make_plan(both, [[], whole, whole, [], []], [0, 0, 1, 2, 2])
    assert [(t.source, t.target) for t in plan] == [(0, 1), (0, 2)]
    assert make_plan(sources, empty, [0, 0, 1, 1]) == []


def test_rounds_are_full():
    """Six ranks want what each other has; in the order of the tensors that would take seven rounds."""
    parts = [[rows(f"t{rank}", 0, 1, 100, "a", 0)] for rank in range(6)]
    wanted = [[rows(f"t{number}", 0, 1, 100, f"b{number}", 0) for number in range(6)] for _ in range(6)]
    rounds = make_rounds(make_plan(parts, wanted), 100)
    assert [len(part) for part in rounds] == [6] * 5


def test_a_hole_is_refused():
    source = [rows("a", 0, 5, 3, "a", 0)]
    with pytest.raises(PlanError, match="a: 3 of the 18 elements that x on rank 1 needs have no source"):
        make_plan([source, []], [[], [rows("a", 0, 6, 3, "x", 0)]])
    with pytest.raises(PlanError, match="b: 18 of the 18"):
        make_plan([source, []], [[], [rows("b", 0, 6, 3, "x", 0)]])


def test_sources_that_overlap_are_refused():
    with pytest.raises(PlanError, match=r"a: sources disagree, boxes \[0:4, 0:3\] and \[3:6, 0:3\] overlap"):
        make_plan([[rows("a", 0, 4, 3, "a", 0)], [rows("a", 3, 3, 3, "a", 0)]], [[rows("a", 0, 6, 3, "x", 0)], []])


def test_a_row_larger_than_the_staging_is_refused():
    whole = [rows("a", 0, 4, 100, "a", 0)]
    plan = make_plan([whole, []], [[], whole])
    assert [t.shape for r in make_rounds(plan, 250) for t in r] == [(2, 100), (2, 100)]
    with pytest.raises(PlanError, match=r"a: 100 bytes of a cannot be sent in parts"):
        make_rounds(plan, 99)


def test_the_real_model_is_compared_with_the_table():
    arch = architecture()
    good = {name: torch.zeros(shape) for name, shape in vllm_shapes(arch, 2).items()}
    assert vllm_layout(good, arch, 2, 1) == list(vllm_pieces(arch, 2, 1))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate\.weight: not in the layout of the qwen3"):
        vllm_layout(good | {"model.layers.0.mlp.gate.weight": torch.zeros(1)}, arch, 2, 0)
    with pytest.raises(ValueError, match=r"lm_head.weight: expected by the qwen3 layout, absent"):
        vllm_layout({k: v for k, v in good.items() if k != "lm_head.weight"}, arch, 2, 0)
    with pytest.raises(ValueError, match=r"lm_head.weight: shape \[0\], the layout implies \[64, 4\]"):
        vllm_layout(good | {"lm_head.weight": torch.empty(0)}, arch, 2, 0)


@pytest.mark.parametrize(
    ("sizes", "tp", "message"),
    [({}, 8, "4"), ({"ffn": 6}, 4, "FFN width of 6"), ({"heads": 6, "kv_heads": 3, "ffn": 6}, 2, "neither divides")],
)
def test_sizes_vllm_cannot_split(sizes, tp, message):
    with pytest.raises(ValueError, match=message):
        vllm_shapes(architecture(**sizes), tp)
