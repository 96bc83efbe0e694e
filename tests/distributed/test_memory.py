"""Moving the actor's memory between updates changes nothing but where it lies."""

from pathlib import Path

from harness import launch
from trees import random_tree

from treepo_mcore.tree.files import write_trees

OPTIMIZER = {"lr": 1e-3, "eps": 1e-5}
LAYOUTS = {
    "bfloat16, distributed optimizer": {"dtype": "bfloat16"},
    "float32, distributed optimizer": {},
    "float32, plain optimizer": {"distributed": False},
    "pipeline": {"pp": 2, "dtype": "bfloat16"},
}


def test_updates_are_the_same_when_everything_moves_in_between(model_directory, tmp_path):
    write_trees(tmp_path / "trees.jsonl", [random_tree(seed, leaves=5) for seed in range(12)])
    layouts = {}
    for name, layout in LAYOUTS.items():
        own = dict(layout)
        layouts[name] = {"optimizer": OPTIMIZER | {"distributed": own.pop("distributed", True)}} | own
    arguments = {
        "directory": str(model_directory("llama")),
        "layouts": layouts,
        "trees": str(tmp_path / "trees.jsonl"),
        "out": str(tmp_path),
    }
    for rank in launch("memory:run", 2, arguments):
        for name, found in rank.items():
            assert found["equal"], name
            assert found["device"] == [0, 0, 0], name
            predicted = found["predicted"]
            assert all(predicted.values()), name
            needed = predicted["parameters"] + predicted["optimizer"]
            # Every tensor begins on a multiple of 512 bytes; small ones take more than their size.
            assert needed <= found["host"] <= 1.25 * needed, (name, needed, found["host"])
            assert found["pinned"] == found["host"], name


def test_an_actor_that_only_answers_holds_weights_alone(model_directory, tmp_path):
    """Neither gradients nor optimizer; and its weights are those of the checkpoint."""
    write_trees(tmp_path / "trees.jsonl", [random_tree(seed) for seed in range(4)])
    arguments = {"directory": str(model_directory("qwen2")), "trees": str(tmp_path / "trees.jsonl")}
    (found,) = launch("memory:weights_alone", 1, arguments | {"out": str(tmp_path / "checkpoints")})
    parameters = found["learner"]["parameters"]
    assert found["learner"]["gradients"] + found["learner"]["optimizer"] >= 3 * parameters
    assert 0 < found["reader"]["parameters"] <= parameters
    assert (found["reader"]["gradients"], found["reader"]["optimizer"], found["wrapped"]) == (0, 0, False)
    assert (found["changed"], found["equal"]) == (True, True)


def test_supervised_steps_with_state_away_between_them(task, tmp_path):
    model = Path(next(override for override in task if override.startswith("model.path=")).split("=")[1])
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(model)},
        "data": {"train": str(model.parent / "sft.jsonl"), "answer_key": "solution", "max_prompt_tokens": 96},
        "rollout": {"dtype": "float32", "tree": {"segment_tokens": 80, "max_depth": 1}},
        "actor": {"dtype": "float32", "micro_batch_tokens": 2048},
        "memory": {"offload": ["gradients", "optimizer"]},
        "trainer": {"steps": 2, "prompts_per_update": 4, "export": False},
    }
    (found,) = launch("memory:warm_up", 1, {"config": config})
    assert found["gone"] == [0, 0]
    assert found["changed"]
