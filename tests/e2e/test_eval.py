"""`treepo-mcore eval` repeats what the run measured, and leaves the run alone; the run's numbers are in its tracker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from models import make_model, write_prompts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from treepo_mcore.tree.files import read_trees

TESTS = Path(__file__).resolve().parents[1]
WIDTH = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A directory with run.yaml; its `run` is filled by the first test, on two processes with an engine each."""
    folder = tmp_path_factory.mktemp("eval")
    prompts = write_prompts(folder / "prompts.jsonl", 5)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    # Prompts that differ in what their answers are worth: with the row's `scale`.
    lines = [json.dumps(row | {"scale": 1 + index}) + "\n" for index, row in enumerate(rows)]
    prompts.write_text("".join(lines))
    settings = {
        "run": {"dir": str(folder / "run"), "trackers": ["tensorboard"], "deterministic": True},
        "model": {"path": str(make_model(folder / "model", "qwen2"))},
        "data": {
            "train": str(folder / "prompts.jsonl"),
            "eval": str(folder / "prompts.jsonl"),
            "overlap": "keep",
            "max_prompt_tokens": 16,
        },
        "rollout": {"dtype": "float32", "tree": {"width": WIDTH, "segment_tokens": 8, "max_depth": 2}},
        "filter": {"enabled": False},
        "actor": {"dtype": "float32", "optimizer": {"lr": 1e-2}},
        "reward": {"function": "reward_functions:scaled_by_the_row"},
        "trainer": {
            "steps": 1,
            "prompts_per_step": 4,
            "prompts_per_update": 4,
            "eval_samples": 3,
            "save_trees_every": 1,
            "export": False,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def command(name: str, folder: Path, *overrides: str, processes: int | None = None) -> dict:
    """What the command printed on its last line."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "treepo_mcore", name, str(folder / "run.yaml"), *overrides],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if name == "eval":
        assert done.stdout.count("\n") == 1
    return json.loads(done.stdout.splitlines()[-1])


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_eval_of_a_run(run: Path) -> None:
    command("train", run, processes=2)
    before, after = (row for row in logged(run) if "eval/accuracy" in row)
    measured = ["eval/accuracy", "eval/score", "eval/pass@2", "eval/best"]  # a custom function has no majority
    shares = [[name for name in row if not name.endswith(("_low", "_high"))][1:] for row in (before, after)]
    assert [sorted(names) for names in shares] == [sorted(measured)] * 2
    assert before["eval/best_low"] <= before["eval/best"] <= before["eval/best_high"]
    assert before["eval/score"] != after["eval/score"]
    there = contents(run / "run")
    again = command("eval", run, processes=2)
    assert (again["step"], again["checkpoint"], again["answers"], again["prompts"]) == (1, True, 15, 5)
    assert [again[name] for name in measured] == [after[name] for name in measured]
    now = contents(run / "run")
    assert json.loads(now.pop(run / "run" / "eval.json")) == again
    assert now == there


def test_eval_alone_of_a_model_without_a_run(run: Path, tmp_path: Path) -> None:
    """One process, one greedy answer."""
    new = ("trainer.eval_samples=1", f"run.dir={tmp_path / 'new'}", "data.train=not_needed.jsonl")
    result = command("eval", run, *new)
    assert (result["step"], result["checkpoint"], result["answers"]) == (0, False, 5)
    names = [name for name in result if name.startswith("eval/")]
    assert names == ["eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/score"]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["eval.json"]


def test_rewards_of_a_function_that_reads_the_row(run: Path) -> None:
    """After the test above, in its run."""
    trees = list(read_trees(run / "run" / "trees" / "step_000000"))
    for tree in trees:
        scale = 1 + int(tree.prompt_id.rsplit("-")[-1])
        assert {abs(leaf.reward) for leaf in tree.leaves} == {0.25 * scale}
        assert all(leaf.correct == (leaf.score > 0) and leaf.score == leaf.reward for leaf in tree.leaves)
    leaves = [leaf for tree in trees for leaf in tree.leaves]
    (row,) = (row for row in logged(run) if "reward/mean" in row)
    assert row["reward/mean"] == row["reward/score"] == pytest.approx(sum(leaf.reward for leaf in leaves) / len(leaves))


@pytest.mark.long
def test_tensorboard_of_the_run_says_what_metrics_jsonl_says(run: Path) -> None:
    """After the first test: one step more, by the same command."""
    command("train", run, "trainer.steps=2", processes=2)
    events = EventAccumulator(str(run / "run" / "tensorboard"))
    events.Reload()
    found = {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    expected = {
        (row["step"], name): value
        for row in logged(run)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-30)
    assert (0, "reward/mean") in found
    assert (1, "reward/mean") in found


def test_eval_without_held_out_prompts_is_one_line(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "treepo_mcore", "eval", str(run / "run.yaml"), "data.eval=null"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "error: data.eval: found no held-out prompts, which are what eval answers\n"
