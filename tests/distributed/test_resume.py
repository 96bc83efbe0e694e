"""A run that was killed and continued is the run that was never killed; a checkpoint loads in any layout."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from harness import LaunchError, launch
from models import YARN, write_prompts
from safetensors.torch import load_file
from test_engine import configuration
from trees import random_tree

from treepo_mcore.tree.files import read_trees, write_trees

OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-5}
LAYOUTS = {
    "dp2": {},
    "tp2 sp": {"tp": 2, "sequence_parallel": True},
    "cp2": {"cp": 2},
    "pp2": {"pp": 2},
    "pp2 uneven": {"pp": 2, "first_stage_layers": 1},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "plain optimizer": {"distributed": False},
}
OF_MIXTURES = {
    "dp2 ep2": {"ep": 2},
    "tp2 ep2": {"tp": 2, "sequence_parallel": True, "ep": 2},
    "pp2": {"pp": 2},
}


def settings(layout):
    layout = dict(layout)
    return {"optimizer": OPTIMIZER | {"distributed": layout.pop("distributed", True)}} | layout


@pytest.mark.parametrize(("family", "first"), [("qwen3", "dp2"), ("qwen3", "pp2"), ("qwen3_moe", "dp2 ep2")])
def test_a_checkpoint_loads_in_another_layout(family, first, model_directory, tmp_path):
    """Weights are equal at once, and moments show in the two steps after."""
    write_trees(tmp_path / "trees.jsonl", [random_tree(seed, leaves=7) for seed in range(10)])
    layouts = OF_MIXTURES if family == "qwen3_moe" else LAYOUTS
    others = {name: layout for name, layout in layouts.items() if layout.get("distributed", True)}
    arguments = {
        "directory": str(model_directory(family, tie_word_embeddings=True)),
        "first": settings(layouts[first]),
        "others": {name: settings(layout) for name, layout in others.items()},
        "trees": str(tmp_path / "trees.jsonl"),
        "out": str(tmp_path),
    }
    seconds = launch("resume:change_layout", 2, arguments)[0]
    print("seconds:", {name: round(value, 2) for name, value in seconds.items()})
    before, after = torch.load(tmp_path / "before.pt"), torch.load(tmp_path / "after.pt")
    assert distance(after, before) > 1e-3
    worst = 0.0
    for name in others:
        loaded = torch.load(tmp_path / f"before {name}.pt")
        assert all(torch.equal(loaded["weights"][key], before["weights"][key]) for key in before["weights"]), name
        assert loaded["gap"] == 0
        continued = torch.load(tmp_path / f"after {name}.pt")
        worst = max(worst, distance(continued, after))
        assert distance(continued, after) < 1e-5, name
    print("largest relative distance after two more steps:", worst)


def distance(one, other):
    pairs = ((one["weights"][key], tensor) for key, tensor in other["weights"].items())
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def test_a_run_of_no_steps_evaluates_and_exports(model_directory, tmp_path):
    """And there is nothing to save before the first update, which may also come later than the first step.

    What it does not continue is not continued later either, should it be cut off before it saves.
    """
    config = configuration(model_directory("qwen2"), tmp_path, {}, 1)
    config["run"] = {"dir": str(tmp_path / "run"), "resume": False}
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("7")
    config["trainer"] = {"steps": 0}
    arguments = {"config": config, "unlearned": str(tmp_path / "unlearned")}
    (summary,) = launch("resume:train_without_a_step", 1, arguments)
    assert summary["steps"] == 0
    assert list(checkpoints.iterdir()) == []
    assert equal_files(tmp_path / "run" / "policy", model_directory("qwen2"))


def test_observers_ask_and_all_ranks_do(model_directory, tmp_path):
    """Whatever rank asks: a checkpoint after the first step, no update in the second, the end after the third."""
    config = configuration(model_directory("qwen2"), tmp_path, {}, 1)
    config["trainer"] |= {"steps": 9, "prompts_per_update": 4, "save_every": 0, "save_trees_every": 1, "eval_every": 0}
    one, two = launch("resume:watched", 2, {"config": config})
    assert one == two
    assert one["summary"]["stopped"] == "observer"
    assert one["told"] == [
        "sampled 0: 6 trees, 0 advantages",
        "trained 0: [3, 3], 6 advantages",
        "sampled 1: 6 trees, 0 advantages",
        "trained 1: [], 0 advantages",
        "sampled 2: 6 trees, 0 advantages",
        "trained 2: [3, 3], 6 advantages",
    ]
    run = tmp_path / "run"
    assert sorted(file.name for file in (run / "checkpoints").glob("iter_*")) == ["iter_0000001", "iter_0000003"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/mean" in row]
    assert [row["step"] for row in steps if "actor/loss" in row] == [0, 2]
    assert len(list((run / "trees").glob("step_*/engine_0000?.parquet"))) == 6
    parts = ("push", "rollout", "choose", "update", "observe", "save")
    for row in steps:
        assert sum(row.get(f"time/{part}", 0.0) for part in parts) <= row["time/step"]
    assert "time/save" in steps[1]
    assert "time/save" not in steps[2]


def test_bad_numbers_lead_back_to_the_newest_checkpoint(model_directory, tmp_path):
    """Once, with the prompts that come next; the second time is one too many."""
    config = configuration(model_directory("qwen2"), tmp_path, {"optimizer": OPTIMIZER}, 1)
    config["data"]["train"] = str(write_prompts(tmp_path / "train.jsonl", 40, tokens=40, seed=1))
    config["trainer"] |= {
        "steps": 9,
        "prompts_per_step": 4,
        "prompts_per_update": 2,
        "save_every": 1,
        "max_rollbacks": 1,
        "eval_every": 0,
    }
    one, two = launch("resume:roll_back", 2, {"config": config})
    assert one == two
    assert len(one["weights"]) == 5
    assert one["weights"][0] != one["weights"][1] != one["weights"][2]
    assert one["weights"][3] == one["weights"][2]  # what step 2 learnt is gone
    assert one["weights"][4] != one["weights"][3]
    assert not set(one["prompts"][3]) & set(one["prompts"][2])


def test_a_rank_that_is_stuck_ends_the_job_with_the_stacks_of_all(model_directory, tmp_path):
    config = configuration(model_directory("qwen2"), tmp_path, {}, 1)
    config["trainer"] |= {"steps": 9, "eval_before": False, "eval_every": 0}
    config["comm"] = {"stuck_seconds": 20}
    with pytest.raises(LaunchError) as caught:
        launch("resume:get_stuck", 2, {"config": config}, limit=120)
    output = str(caught.value)
    assert "exit status 1" in output
    assert re.search(r"error: rank 1 on .*: step 1, choose: nothing happened for 20 s \(comm.stuck_seconds\)", output)
    assert re.search(r"error: rank 0 on .*: step 1, choose: nothing happened for 20 s", output)
    assert re.search(r'resume.py", line \d+ in sampled', output)


@pytest.mark.long
def test_a_resumed_run_is_bit_identical(model_directory, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    config = configuration(model_directory("qwen2", rope_parameters=YARN), whole, {"optimizer": OPTIMIZER}, 1)
    config["data"]["train"] = str(write_prompts(whole / "train.jsonl", 9, tokens=40, seed=1))
    config["run"] = {"dir": str(whole / "run"), "deterministic": True, "seed": 3}
    config["filter"] = {"enabled": True}
    config["trainer"] = {
        "steps": 4,
        "prompts_per_step": 4,
        "prompts_per_update": 2,
        "save_every": 2,
        "eval_every": 2,
        "save_trees_every": 1,
    }
    launch("resume:train", 1, {"config": config})
    # What a job leaves behind that was killed in its third step.
    checkpoints = whole / "run" / "checkpoints"
    kept = resumed / "checkpoints" / "iter_0000002"
    shutil.copytree(checkpoints / "iter_0000002", kept)
    (resumed / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    (resumed / "checkpoints" / "iter_0000004").mkdir()
    lines = (whole / "run" / "metrics.jsonl").read_text().splitlines()
    (resumed / "metrics.jsonl").write_text("".join(line + "\n" for line in lines[:4]))
    config["run"]["dir"] = str(resumed)
    launch("resume:train", 1, {"config": config})
    for step in (2, 3):
        one, other = (list(read_trees(d / "trees" / f"step_{step:06d}")) for d in (whole / "run", resumed))
        assert [tree.to_json() for tree in one] == [tree.to_json() for tree in other]
    assert equal_files(whole / "run" / "policy", resumed / "policy")
    assert not equal_files(whole / "run" / "policy", model_directory("qwen2", rope_parameters=YARN))
    assert losses(whole / "run") == losses(resumed)


def equal_files(one, other):
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run):
    """(step, loss, grad norm) of every line that has them; no step comes twice."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["actor/loss"], row["actor/grad_norm"]) for row in rows if "actor/loss" in row]
