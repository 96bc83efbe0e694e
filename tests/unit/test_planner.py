"""The planner's arithmetic: sizes, schedules, trees, warnings."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_weights_plan import architecture, hf_tensors, megatron_side
from tree_fake_engine import grow as sampled
from tree_fake_engine import keyed_draw

from treepo_mcore.actor.costs import in_flight
from treepo_mcore.config import (
    ActorConfig,
    BranchingConfig,
    ConfigError,
    RolloutConfig,
    StoppingConfig,
    TreeConfig,
    parse_config,
)
from treepo_mcore.engine.vllm.layout import vllm_pieces
from treepo_mcore.grow.shape import sampled_shape
from treepo_mcore.learn.advantage import LeafAdvantage
from treepo_mcore.learn.packing import pack_trees
from treepo_mcore.model.architecture import read_sizes
from treepo_mcore.model.shards import engine_parameters, model_parameters, stage_parameters, stages
from treepo_mcore.plan.hardware import make_cluster
from treepo_mcore.plan.memory import longest_path, plan_engine, plan_memory
from treepo_mcore.plan.plan import plan_run
from treepo_mcore.plan.seconds import pass_time, push_time
from treepo_mcore.plan.workload import Assumptions, grow, hazard, make_workload
from treepo_mcore.tree.tree import PROMPT
from treepo_mcore.weights.plan import make_plan

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
MEANS = Assumptions(256, 1792, 0.6)


def sizes(name):
    return read_sizes(MODELS / name)


def config(**sections):
    raw = {"model": {"path": "m"}, "data": {"train": "t"}, "rollout": {"tree": {"segment_tokens": 512}}}
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return parse_config(raw)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # The sum over the tensors of the published checkpoints (model.safetensors.index.json, total_size / 2).
        ("Qwen2.5-7B", 7_615_616_512),
        ("Llama-3.1-70B", 70_553_706_496),
        ("Qwen2.5-72B", 72_706_203_648),
        ("Llama-3.1-405B", 405_853_388_800),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("Qwen3-235B-A22B", 235_093_634_560),
    ],
)
def test_parameters_are_those_of_the_published_checkpoints(name, count):
    assert model_parameters(sizes(name)) == count


def test_shards_add_up_to_the_model():
    model = sizes("Llama-3.1-70B")
    actor = ActorConfig(tp=4, pp=4)
    shards = sum(4 * stage_parameters(model, stage, actor) for stage in stages(actor, model.layers))
    norms = 3 * (2 * model.layers + 1) * model.hidden  # on every rank, counted once in the model
    padding = 2 * (128512 - 128256) * model.hidden
    assert shards == model_parameters(model) + norms + padding
    assert sum(engine_parameters(model, 1)) == model_parameters(model)


def test_an_engine_repeats_key_heads_that_are_fewer_than_its_gpus():
    model = sizes("Llama-3.1-70B")
    eight, sixteen = engine_parameters(model, 8)[0], engine_parameters(model, 16)[0]
    assert 16 * sixteen - 8 * eight == 8 * model.layers * 2 * model.head_dim * model.hidden


def test_stages_that_do_not_come_out_even_are_refused():
    with pytest.raises(ConfigError, match=r"126 layers do not spread evenly over 8 stages"):
        stages(ActorConfig(pp=8), 126)
    counts = [s.layers for s in stages(ActorConfig(pp=8, first_stage_layers=15, last_stage_layers=15), 126)]
    assert counts == [15, *[16] * 6, 15]


def test_micro_batches_in_flight():
    assert [in_flight(ActorConfig(pp=4), stage) for stage in range(4)] == [4, 3, 2, 1]
    # Korthikanti et al. 2022: the first stage of an interleaved pipeline holds 1 + (p - 1) / (p v) of a whole one.
    assert in_flight(ActorConfig(pp=4, vpp=2), 0) == 4 * (1 + 3 / 8)


def test_the_bubble_is_that_of_one_forward_one_backward():
    """p - 1 of m + p - 1 turns, when stages are equal: here without an output layer to speak of."""
    model = replace(sizes("Llama-3.1-70B"), vocab=1)
    settings = config(actor={"pp": 4}, trainer={"prompts_per_update": 16})
    cluster = make_cluster("h100", "ib400", 1, 4)
    work = make_workload(settings, MEANS)
    one = pass_time(settings, model, cluster, work, 16, backward=True)
    assert one.bubble == pytest.approx(3 / (one.micro_batches + 3), rel=1e-4)


def test_hazard_gives_the_mean():
    for mean in (50, 2000, 6000, 7168):
        rate = hazard(mean, 7168)
        assert (-math.expm1(-rate * 7168) / rate if rate else 7168) == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("first", [None, (2, 8)])
def test_trees_grow_like_those_of_the_sampler(first):
    """Same rules, same rate: the same tokens, on average over trees."""
    tree = TreeConfig(
        width=16,
        segment_tokens=16,
        max_depth=10,
        branching=BranchingConfig(factor=(2, 2), first=first),
        stopping=StoppingConfig(boxed="none", repetition_count=0),
    )
    rate = 0.02
    planned = grow(tree, -math.log(1 - rate))
    grown = [sampled(tree, keyed_draw(seed, rate), chunk=16, seed=seed)[0] for seed in range(60)]
    physical = sum(len(node.tokens) for tree in grown for node in tree.nodes[1:]) / len(grown)
    logical = sum(leaf_length(tree, leaf) for tree in grown for leaf in tree.leaves) / len(grown)
    assert planned.leaves == 16
    assert physical == pytest.approx(planned.physical, rel=0.08)
    assert logical == pytest.approx(planned.logical, rel=0.08)


@pytest.mark.parametrize(("first", "more"), [pytest.param((2, 8), 0.09, marks=pytest.mark.long), ((2, 2), 0.18)])
def test_tokens_that_repeat_where_trees_are_split_are_as_many_as_the_page_says(first, more):
    """docs/planning.md, for the 7B recipe: the plan leaves them out."""
    stopping = StoppingConfig(boxed="none", repetition_count=0)
    tree = TreeConfig(width=16, max_depth=14, branching=BranchingConfig(first=first), stopping=stopping)
    ends = -math.expm1(-hazard(1792, 7168))
    whole = packed = 0
    for seed in range(8):
        grown, _ = sampled(tree, keyed_draw(seed, ends), chunk=512, seed=seed)
        longer = 256 - len(grown.nodes[PROMPT].tokens)  # the plan's prompt, without making its tokens
        advantage = LeafAdvantage(np.zeros(len(grown.leaves)), np.ones(len(grown.leaves)))
        whole += longer + sum(len(node.tokens) for node in grown.nodes)
        for sequence in pack_trees([grown], [advantage], 8192 - longer):
            packed += longer * int((sequence.parent == -1).sum()) + len(sequence.tokens)
    assert packed / whole - 1 == pytest.approx(more, abs=0.04)


def leaf_length(tree, leaf):
    return tree.nodes[leaf.node].end - tree.nodes[PROMPT].end


def test_flat_answers_share_nothing():
    profile = grow(sampled_shape(RolloutConfig(sampler="flat")), hazard(1792, 7168))
    assert profile.sharing == 1
    assert profile.physical / 16 == pytest.approx(1792, rel=0.03)
    assert profile.live[0] == 16


def test_shards_that_match_are_not_sent():
    """Equal tensor parallelism and one stage: a push stays on its rank."""
    model, cluster = sizes("Qwen2.5-7B"), make_cluster("h100", "ib400", 1, 8)
    aligned = config(actor={"tp": 2}, rollout={"tp": 2})
    crossed = config(actor={"tp": 2}, rollout={"tp": 1})
    assert push_time(aligned, model, cluster, plan_engine(aligned, model, cluster)).received == 0
    other = push_time(crossed, model, cluster, plan_engine(crossed, model, cluster))
    assert other.received == pytest.approx(plan_engine(crossed, model, cluster).weights / 2, abs=1)


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "rollout_tp"),
    [(4, 2, 1, 2), (2, 1, 2, 1), (2, 4, 1, 8), (4, 2, 2, 8), (1, 4, 2, 4), (2, 2, 2, 2)],
)
def test_pushed_bytes_are_those_of_the_real_plan(tp, pp, dp, rollout_tp):
    """Of a small model whose layers are nearly all of it, on average over ranks."""
    arch = architecture(hidden=16, ffn=128, layers=16, heads=8, kv_heads=8, head_dim=4, vocab=64)
    each = arch.layers // pp
    layers = [range(stage * each, (stage + 1) * each) for stage in range(pp)]
    sources = megatron_side(arch, hf_tensors(arch), tp, layers, dp, 1)[1]
    world = tp * pp * dp
    targets = [list(vllm_pieces(arch, rollout_tp, rank % rollout_tp)) for rank in range(world)]
    received = 2 * sum(t.numel for t in make_plan(sources, targets) if not t.local) / world
    settings = config(actor={"tp": tp, "pp": pp}, rollout={"tp": rollout_tp})
    cluster = make_cluster("h100", "ib400", 1, world)
    engine = plan_engine(settings, arch, cluster)
    assert push_time(settings, arch, cluster, engine).received == pytest.approx(received, rel=0.07, abs=2000)


def test_other_stages_are_on_other_nodes():
    """As `plan reshard` counts it from the real layouts: 8.82 GB into a rank, all of it across nodes."""
    settings = config(actor={"tp": 8, "pp": 2}, rollout={"tp": 8})
    model, cluster = sizes("Llama-3.1-70B"), make_cluster("h100", "ib400", 8, 8)
    push = push_time(settings, model, cluster, plan_engine(settings, model, cluster))
    assert push.received == push.received_remote == pytest.approx(8.82e9, rel=1e-3)


def test_what_is_offloaded_is_not_there_in_the_rollout():
    model, cluster = sizes("Qwen2.5-7B"), make_cluster("h100", "ib400", 1, 8)
    stay = plan_memory(config(memory={"offload": []}), model, cluster, 8192)
    leave = plan_memory(config(memory={"offload": ["optimizer", "gradients"]}), model, cluster, 8192)
    assert stay.total("rollout") - leave.total("rollout") == sum(
        stay.phases["rollout"][item] for item in ("optimizer", "gradients")
    )
    assert leave.host == stay.host | {"optimizer": 8 * stay.phases["update"]["optimizer"]}
    assert stay.total("update") == leave.total("update")


@pytest.mark.parametrize(
    ("sections", "gpu", "nodes", "said"),
    [
        ({"actor": {"tp": 1}}, "h100", 1, r"update needs .* GiB a GPU"),
        (
            {"actor": {"tp": 4}, "rollout": {"engine": {"gpu_memory_utilization": 0.23}}},
            "h100",
            1,
            r"the KV cache of an engine holds \d+ tokens, one path may have 8192",
        ),
        ({"actor": {"tp": 4, "fp8": "current"}}, "a100", 1, r"no FP8 tensor cores"),
        (
            {"actor": {"tp": 2}, "memory": {"host_gib": 10}},
            "h100",
            1,
            r"memory\.host_gib: a node needs 425\.6 GiB of host memory, 10 are allowed: optimizer 85.1, checkpoint 340",
        ),
        (
            {"rollout": {"engine": {"quantization": "fp8"}}},
            "h100",
            1,
            r"rollout\.engine\.quantization: found fp8, pushes know fp8_per_block \(or none\)",
        ),
        (
            {"rollout": {"dtype": "float32", "engine": {"quantization": "fp8_per_block"}}},
            "h100",
            1,
            r"rollout\.dtype: float32 with quantization fp8_per_block",
        ),
        (
            {"rollout": {"engine": {"kv_cache_memory_bytes": 60 << 30}}},
            "h100",
            1,
            r"rollout needs .* KV cache 60\.0",
        ),
        (
            {"actor": {"tp": 4}, "trainer": {"prompts_per_step": 4, "prompts_per_update": 4}},
            "h100",
            1,
            r"decodes at most 10 requests at once; it gets 0\.8 prompts",
        ),
        ({"actor": {"tp": 2, "pp": 4}, "trainer": {"prompts_per_update": 4}}, "h100", 1, r"pipeline stages wait"),
        ({"actor": {"tp": 4}, "trainer": {"prompts_per_update": 8}}, "h100", 8, r"have nothing to do"),
        ({"actor": {"tp": 4}, "rollout": {"tp": 4}}, "h100", 4, r"rollout.tp = 4 crosses nodes of 2"),
        ({"actor": {"tp": 4}, "rollout": {"tp": 1}}, "h100", 4, r"actor.tp = 4 crosses nodes of 6"),
    ],
)
def test_warnings(sections, gpu, nodes, said):
    per_node = int(said[-1]) if "crosses" in said else 8
    plan = plan_run(config(**sections), sizes("Qwen2.5-7B"), make_cluster(gpu, "ib400", nodes, per_node), MEANS)
    assert any(re.search(said, warning.message) for warning in plan.warnings), plan.warnings


def test_a_block_that_no_node_divides_crosses_nodes():
    """Of six GPUs: ranks 4 to 7 are on two of them, so all blocks of four are as slow as that one."""
    cluster, one = make_cluster("h100", "ib400", 4, 6), make_cluster("h100", "ib400", 1, 6)
    assert [cluster.crosses(ranks) for ranks in (2, 3, 4, 6, 12)] == [False, False, True, False, True]
    assert cluster.link(4) < cluster.gpu.nvlink == one.link(4)


def test_the_port_of_a_node_is_shared_by_its_gpus():
    rates = [make_cluster("h100", "eth100", 2, gpus).network.bandwidth for gpus in (1, 8)]
    assert rates == [12.5e9, 12.5e9 / 8]
    assert make_cluster("h100", "ib400", 2, 1).network.bandwidth == 50e9


def test_bytes_said_outright_are_the_kv_cache():
    """vLLM then does not look at gpu_memory_utilization."""
    model, cluster = sizes("Qwen2.5-7B"), make_cluster("h100", "ib400", 1, 8)
    engine = {"kv_cache_memory_bytes": 20 << 30, "gpu_memory_utilization": 0.9}
    assert plan_engine(config(rollout={"engine": engine}), model, cluster).cache == 20 << 30


def test_an_ffn_that_blocks_cannot_cut_is_named():
    settings = config(actor={"tp": 8, "pp": 4}, rollout={"tp": 4, "engine": {"quantization": "fp8_per_block"}})
    plan = plan_run(settings, sizes("Qwen2.5-72B"), make_cluster("h100", "ib400", 8, 8), MEANS)
    assert not plan.fits
    assert any("29568 / 4 is not a multiple of 128" in warning.message for warning in plan.warnings)
    odd = replace(sizes("Qwen2.5-7B"), heads=8, kv_heads=8, head_dim=120, hidden=960)
    plan = plan_run(settings, odd, make_cluster("h100", "ib400", 8, 8), MEANS)
    assert [w.message for w in plan.warnings if "the attention width 960 / 4 is not a multiple" in w.message]
    assert [w.message for w in plan.warnings if "the hidden width 960 / 1 is not a multiple" in w.message]


def test_layouts_without_meaning_are_refused():
    cluster = make_cluster("h100", "ib400", 1, 8)
    for sections, said in (
        ({"actor": {"tp": 8, "pp": 2}}, r"8 processes are not a multiple of 16"),
        ({"actor": {"cp": 3}}, r"actor.tp x actor.cp x actor.pp = 1 x 3 x 1: 8 processes are not a multiple of 3"),
        ({"rollout": {"tp": 16}}, r"rollout\.tp: 8 processes"),
        ({"actor": {"tp": 8}}, r"actor\.tp: 8 does not divide the model's attention heads of 28"),
        ({"rollout": {"tp": 8}}, r"rollout\.tp: 8 does not divide the model's attention heads of 28"),
    ):
        with pytest.raises(ConfigError, match=said):
            plan_run(config(**sections), sizes("Qwen2.5-7B"), cluster, MEANS)
    shared = replace(sizes("Qwen2.5-7B"), heads=24, kv_heads=6)
    for section in ("actor", "rollout"):
        with pytest.raises(ConfigError, match=rf"{section}\.tp: 4 and the model's 6 key/value heads: neither divides"):
            plan_run(config(**{section: {"tp": 4}}), shared, cluster, MEANS)
    with pytest.raises(ConfigError, match=r"--gpu: v100; known: a100"):
        make_cluster("v100", "ib400", 1, 8)
    with pytest.raises(ConfigError, match=r"--network: token-ring; known: ib200.*or GB/s"):
        make_cluster("h100", "token-ring", 1, 8)
    assert make_cluster("h100", "12.5", 1, 8).network.bandwidth == 12.5e9


def test_planning_takes_no_torch():
    code = "import sys, treepo_mcore.plan.suggest, treepo_mcore.plan.references; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_longest_path_is_the_last_that_fits_and_grows_with_context_parallelism():
    cluster, found = make_cluster("h100", "ib400", 1, 8), []
    for cp in (1, 2, 4):
        ours = config(actor={"tp": 2, "cp": cp, "sequence_parallel": True})
        found.append(longest_path(ours, sizes("Qwen2.5-7B"), cluster))
        totals = [
            plan_memory(ours, sizes("Qwen2.5-7B"), cluster, tokens // cp).total("update")
            for tokens in (found[-1], found[-1] + 1000)
        ]
        assert totals[0] <= cluster.gpu.memory < totals[1]
    assert found[1] == pytest.approx(2 * found[0], rel=0.1)
    assert found[2] == pytest.approx(4 * found[0], rel=0.1)
    assert longest_path(config(actor={"tp": 1}), sizes("Llama-3.1-70B"), cluster) == 0
