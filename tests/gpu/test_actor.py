"""The actor on a GPU: bf16 against float32, FP8 against bf16, and whole steps beside a real engine."""

import json
import sys
from pathlib import Path

import pytest
from models import write_prompts
from trees import random_tree

from treepo_mcore.system.machine import has_module
from treepo_mcore.tree.files import write_trees

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

pytestmark = pytest.mark.gpu

# A gradient of the plain optimizer can be read whole.
PLAIN = {"optimizer": {"distributed": False}}


@pytest.fixture
def arguments(model_directory, tmp_path):
    write_trees(tmp_path / "trees.jsonl", [random_tree(seed, leaves=7) for seed in range(8)])
    return {"directory": str(model_directory("llama")), "trees": str(tmp_path / "trees.jsonl")}


def test_bf16_points_where_float32_does(arguments):
    from harness import launch

    cases = {"float32": PLAIN | {"dtype": "float32"}, "bf16": PLAIN | {"dtype": "bfloat16"}}
    found = launch("gpu.actors:gradients", 1, arguments | {"cases": cases})[0]["bf16"]
    assert found["cosine"] > 0.99, found
    assert found["logp"] < 0.05, found


@pytest.mark.skipif(not has_module("transformer_engine"), reason="TransformerEngine is not installed (docs/gpu.md)")
@pytest.mark.parametrize("fp8", ["current", "blockwise"])
def test_fp8_points_where_bf16_does(arguments, fp8):
    from harness import launch

    whole = {"megatron": {"first_last_layers_bf16": False}}
    cases = {"bf16": PLAIN | {"dtype": "bfloat16"}, fp8: PLAIN | {"dtype": "bfloat16", "fp8": fp8} | whole}
    found = launch("gpu.actors:gradients", 1, arguments | {"cases": cases})[0][fp8]
    assert found["cosine"] > 0.9, found
    assert 0 < found["logp"] < 0.2, found


@pytest.mark.skipif(not has_module("transformer_engine"), reason="TransformerEngine is not installed (docs/gpu.md)")
@pytest.mark.parametrize("fp8", ["current", "blockwise"])
def test_fp8_parameters_are_another_place_for_the_same_numbers(arguments, fp8):
    """Weights are quantised from the same bf16 values either way: before and after updates, offloaded or not."""
    from harness import launch

    recipe = {"dtype": "bfloat16", "fp8": fp8, "optimizer": {"lr": 1e-3}}
    whole = {"first_last_layers_bf16": False}
    cases = {
        "copies": recipe | {"megatron": whole},
        "parameters": recipe | {"megatron": whole | {"fp8_param": True, "fp8_param_gather": True}},
    }
    found = launch("gpu.actors:updates", 1, arguments | {"cases": cases})[0]["parameters"]
    assert found["quantised"] > 0
    # Failed on an H200 with "current" on 26 November 2026: 0.57 nats in one of the three. docs/gpu.md
    assert max(found["logp"]) < 1e-3, found
    assert 0 < found["read"] < 0.1, found  # what is pushed: eight bits instead of bf16, relative to the largest weight


def test_two_steps_with_a_real_engine(model_directory, tmp_path):
    """Everything is offloaded in between, and the device's memory is in the metrics."""
    from harness import launch

    prompts = write_prompts(tmp_path / "prompts.jsonl", 8, tokens=20)
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(model_directory("llama"))},
        "data": {"train": str(prompts), "eval": str(prompts), "overlap": "keep", "max_prompt_tokens": 64},
        "rollout": {
            "tree": {"width": 8, "segment_tokens": 16, "max_depth": 4, "stopping": {"repetition_count": 0}},
            "engine": {"kv_cache_memory_bytes": 1 << 30},  # a share of the GPU would be millions of blocks
        },
        "filter": {"enabled": False},
        "memory": {"offload": ["parameters", "gradients", "optimizer"]},
        "reward": {"function": "reward_functions:last_word_is_even"},
        "trainer": {"steps": 2, "prompts_per_step": 6, "prompts_per_update": 3},
    }
    launch("resume:train", 1, {"config": config})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "reward/mean" in row]
    assert len(steps) == 2
    for row in steps:
        for phase in ("push", "rollout", "train"):
            assert row[f"memory/{phase}_gib"] > 0
        assert row["memory/rollout_gib"] > row["memory/push_gib"]
        assert row["mismatch/logprob_abs_mean"] < 0.1
