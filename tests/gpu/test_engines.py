"""Actor and engine on one GPU and on several: pushes, equal seeds, reference policy and checkpoints.

Log-probs of what the engine sampled are compared with those of `transformers`, float32 on the CPU, for the exported
weights: after every push, with the engine asleep at level 2 in between.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from models import Reference, write_prompts
from trees import path_of

from treepo_mcore.tree.files import read_trees
from treepo_mcore.weights.fp8 import dequantise, quantise

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

pytestmark = pytest.mark.gpu

ROUNDS = 3
FP8 = {"quantization": "fp8_per_block"}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # whole blocks of FP8
CASES = {  # GPUs, actor, rollout.tp, engine
    "one": (1, {}, 1, {}),
    "one, FP8 engine": (1, {}, 1, FP8),
    "tp2 to tp2": (2, {"tp": 2, "sequence_parallel": True}, 2, {}),
    "pp2 to two engines": (2, {"pp": 2}, 1, {}),
    "dp2 to tp2, FP8 engine": (2, {}, 2, FP8),
    "tp2 pp2 to two engines of tp2": (4, {"tp": 2, "pp": 2}, 2, {}),
    "tp2 dp2 to tp4": (4, {"tp": 2}, 4, {}),
}


def configuration(directory, folder, actor, rollout_tp, engine):
    prompts = write_prompts(folder / "prompts.jsonl", 6, tokens=40)
    tree = {"width": 8, "segment_tokens": 16, "max_depth": 4, "stopping": {"repetition_count": 0}}
    rollout = {"tp": rollout_tp, "tree": tree, "engine": {"kv_cache_memory_bytes": 1 << 30} | engine}
    return {
        "run": {"dir": str(folder / "run"), "deterministic": True},
        "model": {"path": str(directory)},
        "data": {"train": str(prompts), "max_prompt_tokens": 64},
        "rollout": rollout,
        "filter": {"enabled": False},
        "actor": {"reference": "host", "micro_batch_tokens": 1024, "optimizer": {"lr": 1e-2}} | actor,
        "memory": {"offload": ["parameters", "gradients", "optimizer"]},
        "reward": {"function": "reward_functions:last_word_is_even"},
        "trainer": {"prompts_per_step": 6, "prompts_per_update": 3},
    }


@pytest.mark.parametrize("case", CASES)
def test_a_trainer_on_gpus(case, model_directory, tmp_path):
    from harness import launch

    processes, actor, rollout_tp, engine = CASES[case]
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs, there are {torch.cuda.device_count()}")
    config = configuration(model_directory("llama", **SIZES), tmp_path, actor, rollout_tp, engine)
    for rank in launch("gpu.engines:run", processes, {"config": config, "rounds": ROUNDS, "out": str(tmp_path)}):
        assert rank["same_seeds"] == [True] * ROUNDS
        assert rank["changed"] > 0.1, rank
        assert max(rank["reference"], rank["checkpoint"]) < 1e-3, rank
    own = [mean_gap(tmp_path, number, number, fp8=bool(engine)) for number in range(ROUNDS)]
    stale = [mean_gap(tmp_path, number - 1, number, fp8=bool(engine)) for number in range(1, ROUNDS)]
    print("nats a token to transformers:", own, "with the weights of the round before:", stale)
    # On a CPU in bf16: 0.015 and 1.35. FP8 quantises activations too, and was never measured.
    assert max(own) < (0.3 if engine else 0.05), (own, stale)
    assert min(stale) > 2 * max(own), (own, stale)


def mean_gap(folder, weights, trees, fp8):
    """Between the engine's log-probs in the trees of a round and those of a round's weights, nats a token."""
    reference, gaps = Reference(folder / f"round_{weights}"), []
    for name, parameter in reference.model.named_parameters():
        if fp8 and name.endswith("_proj.weight"):
            parameter.data = dequantise(*quantise(parameter.data.bfloat16())).float()
    for tree in read_trees(folder / f"round_{trees}.jsonl"):
        for leaf in range(len(tree.leaves)):
            logp = reference.log_probs(path_of(tree, leaf))[0][len(tree.nodes[0].tokens) - 1 :]
            gaps.append((logp - torch.tensor(tree.response_logprobs(leaf))).abs())
    return torch.cat(gaps).mean().item()
