"""A job on paper equals the live job: its process groups, its plan transfer by transfer, its bytes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import launch
from models import write_prompts

from treepo_mcore.config import ConfigError, parse_config
from treepo_mcore.model.architecture import read_architecture
from treepo_mcore.plan.dry_run import dry_run
from treepo_mcore.plan.hardware import GPUS, NETWORKS
from treepo_mcore.plan.paper import fake_rank, put_on_paper
from treepo_mcore.plan.reshard import reshard_report

WORLD = 4
STAGING = 512 << 10  # bytes: several rounds
# Two key/value heads of 64: shards cut FP8 blocks of keys and values.
BLOCKS = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
CASES = {  # model, actor, rollout_tp, processes per node
    "tp2 pp2 to tp2": ({"family": "qwen2"}, {"tp": 2, "pp": 2}, 2, 4),
    "uneven pp2 dp2 to tp4 over two nodes, tied": (
        {"family": "qwen3", "tie_word_embeddings": True},
        {"pp": 2, "first_stage_layers": 1},
        4,
        2,
    ),
    "interleaved pp2 dp2 to four engines": ({"family": "llama"}, {"pp": 2, "vpp": 2}, 1, 4),
    "a replica a node to tp4": ({"family": "mistral", "sliding_window": None}, {"tp": 2}, 4, 2),
    "tp2 pp2 to tp2, fp8": ({"family": "llama"} | BLOCKS, {"tp": 2, "pp": 2}, 2, 4),
}
FP8 = {"dtype": "bfloat16", "engine": {"quantization": "fp8_per_block"}}


def settings(model_directory, model, actor, rollout_tp, **rollout):
    overrides = {key: value for key, value in model.items() if key != "family"}
    return {
        "model": {"path": str(model_directory(model["family"], **overrides))},
        "data": {"train": "none", "max_prompt_tokens": 64},
        "rollout": {"tp": rollout_tp, "dtype": "float32", "tree": {"segment_tokens": 16, "max_depth": 4}} | rollout,
        "actor": {"dtype": "float32"} | actor,
    }


def on_paper(raw, nodes, gpus_per_node):
    config = parse_config(raw)
    directory = Path(config.model.path)
    return put_on_paper(config, read_architecture(directory), directory, nodes, gpus_per_node)


@pytest.fixture(scope="module", params=CASES)
def both(request, model_directory):
    """(job on paper, what the live ranks returned)."""
    if "fp8" in request.param and not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's FP8 kernel for CPUs needs AMX")
    model, actor, rollout_tp, gpus_per_node = CASES[request.param]
    raw = settings(model_directory, model, actor, rollout_tp, **(FP8 if "fp8" in request.param else {}))
    live = launch("paper:run", WORLD, {"config": raw, "gpus_per_node": gpus_per_node, "staging": STAGING}, 600)
    return on_paper(raw, WORLD // gpus_per_node, gpus_per_node), live


def test_plans_are_equal_transfer_by_transfer(both):
    job, live = both
    paper = json.loads(json.dumps([transfer._asdict() for transfer in job.plan()]))
    assert len(paper) > 50
    for rank, found in enumerate(live):  # each keeps what is its own
        assert found["plan"] == [transfer for transfer in paper if rank in (transfer["source"], transfer["target"])]


def test_process_groups_and_places_are_equal(both):
    job, live = both
    paper = [list(group) for group in job.groups]
    for rank, grid in zip(live, job.grids, strict=True):
        assert rank["groups"] == paper
        assert rank["grid"] == json.loads(json.dumps(asdict(grid)))


def test_bytes_and_staging_are_those_of_the_live_push(both):
    job, live = both
    report = reshard_report(job, GPUS["h100"], NETWORKS["ib400"], STAGING)
    assert report["covered_once"] is True
    assert report["rounds"] == live[0]["rounds"] > 1
    assert report["staging_bytes_max"] == max(rank["staging"] for rank in live)
    others = [report["by_rank"][kind] for kind in ("same node", "across nodes")]
    for number, rank in enumerate(live):
        assert sum(kind["sent"][number] for kind in others) == rank["sent"]
        assert sum(kind["received"][number] for kind in others) == rank["received"]
        assert report["by_rank"]["same GPU"]["received"][number] == rank["local"]


def test_nothing_of_the_fake_job_stays():
    before = dist.new_group, sys.excepthook
    with fake_rank(3, 8) as created:
        assert (dist.get_rank(), dist.get_world_size()) == (3, 8)
        dist.new_group([0, 1], backend="gloo")
        dist.new_group([2, 3])
    assert created == [(0, 1), (2, 3)]
    with pytest.raises(ZeroDivisionError), fake_rank(0, 2):
        raise ZeroDivisionError
    assert not dist.is_initialized()
    assert (dist.new_group, sys.excepthook) == before


@pytest.mark.parametrize(
    ("actor", "rollout_tp", "engine", "line"),
    [
        ({"tp": 3}, 1, {}, "actor.tp: 3 does not divide the model's attention heads of 4"),
        ({"pp": 4, "tp": 2}, 1, {}, "actor.tp x actor.cp x actor.pp = 2 x 1 x 4: 4 processes are not a multiple of 8"),
        ({}, 3, {}, "rollout.tp: 3 does not divide"),
        ({"pp": 2}, 8, {}, "rollout.tp: 8 does not divide the model's attention heads of 4"),
        ({"pp": 3}, 1, {}, "actor: Megatron-Core refuses this"),
        ({}, 1, {"max_num_seq": 8}, "unknown key rollout.engine.max_num_seq"),
        ({}, 1, {"max_num_seqs": -1}, "rollout: vLLM refuses this"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(model_directory, actor, rollout_tp, engine, line):
    raw = settings(model_directory, {"family": "qwen2"}, actor, rollout_tp, engine=engine)
    with pytest.raises(ConfigError) as caught:
        on_paper(raw, 1, 4)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    assert not dist.is_initialized()


def test_a_dry_run_looks_at_the_files_that_are_there(model_directory, tmp_path):
    raw = settings(model_directory, {"family": "qwen2"}, {"tp": 2, "pp": 2}, 2)
    raw["data"]["train"] = str(write_prompts(tmp_path / "train.jsonl", 4))
    config = parse_config(raw)
    lines = dry_run(config, 1, 4)
    assert lines[0].endswith(f"checked: weights, tokenizer, {tmp_path}/train.jsonl")
    assert any("every byte arrives once" in line for line in lines)
    with pytest.raises(ConfigError, match=r"^reward.function: "):
        dry_run(parse_config(raw | {"reward": {"function": "nonsense"}}), 1, 4)
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"train.jsonl.* line 1: no 'prompt'"):
        dry_run(config, 1, 4)


def test_an_actor_in_fp8_is_planned_where_there_is_no_gpu(model_directory):
    """Its parameters are those of the same actor in bfloat16."""
    layout = {"tp": 2, "pp": 2, "dtype": "bfloat16"}
    plans = [
        on_paper(settings(model_directory, {"family": "qwen2"}, layout | more, 2), 1, 4).plan()
        for more in ({}, {"fp8": "blockwise"})
    ]
    assert plans[0] == plans[1]
