"""Mixtures of experts: what config.json says, who holds what, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from models import make_model

from treepo_mcore.actor.layout import parameter_pieces
from treepo_mcore.actor.model import megatron_configs
from treepo_mcore.actor.parallel import Place
from treepo_mcore.config import ActorConfig, ConfigError, check_grid, load_config, parse_config
from treepo_mcore.engine.vllm.engine import engine_arguments
from treepo_mcore.engine.vllm.layout import vllm_pieces, vllm_shapes
from treepo_mcore.model.architecture import read_architecture, read_sizes
from treepo_mcore.model.shards import (
    active_parameters,
    engine_parameters,
    expert_parameters,
    matrix_parameters,
    model_parameters,
    stage_parameters,
    stages,
)
from treepo_mcore.plan.hardware import make_cluster
from treepo_mcore.plan.plan import plan_run
from treepo_mcore.plan.workload import Assumptions
from treepo_mcore.weights.hf import check_weights
from treepo_mcore.weights.layout import hf_shapes
from treepo_mcore.weights.plan import make_plan

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
TP2 = {"tp": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "qwen2_moe")


@pytest.fixture(scope="module")
def arch(directory):
    return read_architecture(directory)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_names_and_shapes_are_those_of_the_files(family, tmp_path):
    """Experts one by one; transformers keeps them in one tensor only in memory."""
    made = make_model(tmp_path / "model", family)
    arch = read_architecture(made)
    check_weights(made, arch)
    assert "model.layers.0.mlp.experts.7.down_proj.weight" in hf_shapes(arch)
    assert "model.layers.1.mlp.gate_proj.weight" in hf_shapes(arch)
    assert arch.experts.sparse == (True, False, True, True)


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Qwen3-235B-A22B"])
def test_active_parameters(name):
    """Embedding and output layer included; of eight experts, not of 128, in each layer."""
    sizes = read_sizes(MODELS / name)
    experts = sizes.layers * 3 * sizes.hidden * sizes.experts.ffn
    assert model_parameters(sizes) - active_parameters(sizes) == 120 * experts
    router = sizes.layers * 128 * sizes.hidden
    attention = sizes.layers * 2 * sizes.hidden * sizes.head_dim * (sizes.heads + sizes.kv_heads)
    assert matrix_parameters(sizes) == 8 * experts + router + attention


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": None, "num_local_experts": None}, "expected num_experts to be a positive number, found None"),
        ({"num_experts": 1.5}, "expected num_experts to be a whole number, found 1.5"),
        ({"num_experts_per_tok": 9}, "expected num_experts_per_tok to be at most 8, found 9"),
        ({"num_experts_per_tok": None}, "expected num_experts_per_tok to be a positive number, found None"),
        ({"moe_intermediate_size": -4}, "expected moe_intermediate_size to be a positive number, found -4"),
        ({"norm_topk_prob": "yes"}, "expected norm_topk_prob to be true or false, found 'yes'"),
        ({"mlp_only_layers": "all"}, "expected mlp_only_layers to be a list of layers, found 'all'"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "decoder_sparse_step and mlp_only_layers leave no layer with experts"),
    ],
)
def test_what_config_json_may_not_say(change, words, directory, tmp_path):
    raw = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ConfigError) as caught:
        read_architecture(tmp_path)
    assert words in str(caught.value)


def test_both_names_of_the_number_of_experts(directory, tmp_path):
    """Published files have the one, transformers 5 writes the other."""
    raw = json.loads((directory / "config.json").read_text())
    count = raw.pop("num_experts", None) or raw.pop("num_local_experts")
    for name in ("num_experts", "num_local_experts"):
        raw.pop("num_experts", None)
        raw.pop("num_local_experts", None)
        (tmp_path / "config.json").write_text(json.dumps(raw | {name: count}))
        assert read_architecture(tmp_path).experts.count == 8


@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"ep": 8}, {"etp": 2}, {"ep": 4, "etp": 2}])
def test_ranks_hold_every_element_of_the_experts_once(layout, arch):
    """Of a layer of Megatron's `SequentialMLP` and of TransformerEngine's grouped products alike."""
    ep, etp = layout.get("ep", 1), layout.get("etp", 1)
    shapes = {"linear_fc1": (2 * 64 // etp, 128), "linear_fc2": (128, 64 // etp)}
    held: dict[str, list] = {}
    for spelling in ("mlp.experts.local_experts.{}.{}.weight", "mlp.experts.{1}.weight{0}"):
        covered = {name: torch.zeros(shape, dtype=torch.int) for name, shape in hf_shapes(arch).items()}
        found = held.setdefault(spelling, [])
        for ep_rank, etp_rank, expert, linear in product(range(ep), range(etp), range(8 // ep), shapes):
            name = "decoder.layers.2." + spelling.format(expert, linear)
            place = Place(0, ep, ep_rank, etp_rank)
            for piece in parameter_pieces(arch, name, "local", shapes[linear], 0, place):
                box = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))
                covered[piece.tensor][box] += 1
                found.append(piece)
        for name, count in covered.items():
            assert (count == (".layers.2.mlp.experts." in name)).all(), name
    one, two = held.values()
    assert one == two


@pytest.mark.parametrize(("tp", "expert_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_an_engine_holds_every_element_of_the_experts_once(tp, expert_parallel, arch):
    shapes = vllm_shapes(arch, tp, expert_parallel)
    covered = {name: torch.zeros(shape, dtype=torch.int) for name, shape in hf_shapes(arch).items()}
    for rank in range(tp):
        local = {name: torch.zeros(shape, dtype=torch.int) for name, shape in shapes.items()}
        for piece in vllm_pieces(arch, tp, rank, expert_parallel):
            piece.of_local(local).add_(1)
            covered[piece.tensor][tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))] += 1
        assert all((count == 1).all() for name, count in local.items() if "experts" in name)
    assert all((count == 1).all() for name, count in covered.items() if ".experts." in name)
    held = sum(torch.Size(shape).numel() for name, shape in shapes.items() if "routed_experts" in name)
    assert held * tp == 3 * 8 * 3 * 64 * 128


def test_experts_that_are_on_the_right_ranks_do_not_move(arch):
    """Between an engine and another, and to one that cuts each expert instead."""

    def moved(one, other):
        layouts = [[list(vllm_pieces(arch, 4, rank, kind)) for rank in range(4)] for kind in (one, other)]
        return Counter(t.local for t in make_plan(*layouts) if ".experts." in t.tensor)

    assert moved(True, True) == {True: 3 * 8 * 3}
    assert moved(True, False)[False] == 3 * 8 * 3 * 3


def test_shards_add_up_to_the_model():
    model = read_sizes(MODELS / "Qwen3-30B-A3B")
    actor = ActorConfig(**TP2, pp=2, ep=4)
    experts = sum(4 * expert_parameters(model, stage, actor) for stage in stages(actor, model.layers))
    assert experts == 48 * 128 * 3 * 2048 * 768
    rest = sum(stage_parameters(model, s, actor) - expert_parameters(model, s, actor) for s in stages(actor, 48))
    norms = (2 * model.hidden + 2 * model.head_dim + 128 * model.hidden) * 48 + model.hidden  # and routers: whole
    padding = 2 * (152064 - 151936) * model.hidden
    assert 2 * rest - norms == model_parameters(model) - experts + padding
    assert sum(engine_parameters(model, 1)) == model_parameters(model)


@pytest.mark.parametrize(
    ("actor", "words"),
    [
        ({"ep": 3}, "actor.ep, actor.etp: 3, 1: 3 does not divide the model's 8 experts"),
        ({"etp": 3}, "actor.ep, actor.etp: 1, 3: 3 does not divide the experts' FFN width of 64"),
        ({"tp": 2}, "actor.sequence_parallel: expected true with actor.tp: 2 and a mixture of experts, found false"),
        ({"pp": 4}, "actor.pp: stage 1 of 4 would have no layer with experts, expected one"),
        (
            {"megatron": {"moe_aux_loss_coeff": 0.1}},
            "actor.megatron.moe_aux_loss_coeff: set by the trainer; use nothing",
        ),
        ({"megatron": {"moe_expert_capacity_factor": 1.0}}, "actor.megatron.moe_expert_capacity_factor: set by"),
        ({"megatron": {"moe_router_topk": 1}}, "actor.megatron.moe_router_topk: set by the trainer; use model.path"),
        (
            {"megatron": {"expert_model_parallel_size": 2}},
            "expert_model_parallel_size: set by the trainer; use actor.ep",
        ),
    ],
)
def test_layouts_that_are_refused(actor, words, arch):
    with pytest.raises(ConfigError) as caught:
        megatron_configs(ActorConfig.model_validate(actor), arch)
    assert words in str(caught.value)


def test_a_dense_model_has_no_experts_to_share(model_directory):
    arch = read_architecture(model_directory("qwen3"))
    with pytest.raises(ConfigError, match=r"actor.ep: 2 needs a mixture of experts, found a qwen3 model"):
        megatron_configs(ActorConfig(ep=2), arch)


def run_config(directory, **sections):
    return parse_config({"model": {"path": str(directory)}, "data": {"train": "t", "max_prompt_tokens": 16}} | sections)


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        (
            {"engine": {"moe_backend": "cutlass"}},
            "rollout.engine.moe_backend: expected triton with a mixture of experts",
        ),
        ({"engine": {"quantization": "fp8_per_block"}}, "rollout.engine.quantization: expected None with a mixture"),
        ({"engine": {"enable_eplb": True}}, "rollout.engine.enable_eplb: expected False with a mixture of experts"),
        ({"tp": 3}, "rollout.tp: 3 does not divide the model's attention heads of 4"),
    ],
)
def test_engines_that_are_refused(rollout, words, directory, arch):
    small = {"tree": {"segment_tokens": 8, "max_depth": 2}}
    with pytest.raises(ConfigError) as caught:
        engine_arguments(run_config(directory, rollout=small | rollout), arch, directory)
    assert words in str(caught.value)


def test_a_grid_that_the_experts_do_not_fill(directory):
    config = run_config(directory, actor={"pp": 2, "ep": 4})
    with pytest.raises(ConfigError, match=r"actor.ep x actor.etp = 4 x 1: the 2 ranks of a pipeline stage are not a"):
        check_grid(config, 4)
    check_grid(config, 8)


def test_the_recipe_fits_and_experts_stay_where_they_are():
    recipe = MODELS.parent / "qwen3-30b-a3b-8gpu" / "config.yaml"
    config, sizes = load_config(recipe), read_sizes(MODELS / "Qwen3-30B-A3B")
    plan = plan_run(config, sizes, make_cluster("h100", "ib400", 1, 8), Assumptions(256, 1792, 0.6))
    assert not plan.warnings
    assert plan.push.received == pytest.approx(plan.memory.engine.weights / 2, rel=0.02)  # the other pipeline stage's
