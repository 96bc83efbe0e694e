"""The commands of the README on small models: train, resume, export, layouts, a killed rank, the whole demo."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from treepo_mcore.config import load_config
from treepo_mcore.tree.files import read_trees

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"

LAYOUTS = {
    "tp2 with sequence parallelism, one engine": (2, ["actor.tp=2", "actor.sequence_parallel=true", "rollout.tp=2"]),
    "pp2": (2, ["actor.pp=2"]),
    "cp2, one engine": (2, ["actor.cp=2", "rollout.tp=2"]),
}


def start(processes: int, overrides: list[str], words: str = "train") -> subprocess.Popen[str]:
    """A command on the quickstart's configuration under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "treepo_mcore", *words.split(), str(QUICKSTART / "config.yaml"), *overrides]
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def train(processes: int, overrides: list[str], words: str = "train") -> str:
    """Run to the end; returns what was printed."""
    process = start(processes, overrides, words)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]
    return output


def test_train_then_the_same_command_continues(task: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [*task, f"run.dir={run}", "trainer.save_trees_every=1", "trainer.profile_steps=[1]"]
    first = train(2, [*overrides, "trainer.steps=2"])
    assert json.loads(first.strip().splitlines()[-1]) == json.loads((run / "summary.json").read_text())
    assert "start at step 0" in first
    config = load_config(run / "config.yaml")
    assert config.trainer.steps == 2
    trees = list(read_trees(run / "trees" / "step_000001"))
    assert [len(tree.leaves) for tree in trees] == [8] * 4
    assert all(leaf.reward is not None and leaf.text is not None for tree in trees for leaf in tree.leaves)
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "step_000001_rank_0.json.gz"
    ranges = {event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert ranges >= {"push", "rollout", "choose", "update", "aten::mm"}
    second = train(2, [*overrides, "trainer.steps=3"])
    assert "resumed at step 2" in second
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "reward/mean" in row] == [0, 1, 2]
    # The log-probs of engine and actor are of the same float32 weights.
    assert max(row.get("mismatch/logprob_abs_max", 0.0) for row in steps) < 1e-4
    _check_policy(run / "policy")
    assert not undocumented(name for row in steps for name in row)


def undocumented(names: Iterable[str]) -> set[str]:
    """Of metrics.jsonl, that docs/metrics.md does not have."""
    known = re.findall(r"`([a-z]+/[^`]+)`", (ROOT / "docs" / "metrics.md").read_text())
    places = {"NAME": r"[\w.-]+", "K": r"\d+", "REASON": r"\w+", "PHASE": r"\w+"}
    patterns = [re.sub("NAME|REASON|PHASE|K", lambda match: places[match[0]], re.escape(name)) for name in known]
    patterns += [
        f"eval/(?:[\\w.-]+/)?{name.removeprefix('eval/')}(?:_low|_high)?" for name in patterns if "eval/" in name
    ]
    anything = re.compile("|".join(patterns))
    return {name for name in names if name != "step" and not anything.fullmatch(name)}


def _check_policy(directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert AutoTokenizer.from_pretrained(directory).vocab_size == model.config.vocab_size


@pytest.mark.long
def test_everything_offloaded_between_phases(task: list[str], tmp_path: Path) -> None:
    """What a GPU needs, done with ordinary memory: two steps, evaluation, a checkpoint, an export."""
    overrides = [*task, f"run.dir={tmp_path}", "memory.offload=[parameters,gradients,optimizer]"]
    train(2, [*overrides, "trainer.steps=2"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("mismatch/logprob_abs_max", 0.0) for row in rows) < 1e-4
    _check_policy(tmp_path / "policy")


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains(layout: str, task: list[str], tmp_path: Path) -> None:
    processes, overrides = LAYOUTS[layout]
    train(processes, [*task, *overrides, f"run.dir={tmp_path}", "trainer.steps=2"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("mismatch/logprob_abs_max", 0.0) for row in rows) < 1e-4


@pytest.mark.long
def test_a_killed_rank_ends_the_job_and_the_command_continues(task: list[str], tmp_path: Path) -> None:
    overrides = [*task, f"run.dir={tmp_path}", "trainer.save_every=1", "trainer.keep_checkpoints=2"]
    process = start(2, [*overrides, "trainer.steps=1000"])
    tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 200
    while not (tracker.is_file() and int(tracker.read_text()) >= 2):
        assert time.monotonic() < deadline, "no checkpoint"
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.5)
    killed = time.monotonic()
    os.kill(_worker(process.pid), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - killed < 60
    done = int(tracker.read_text())
    state = tmp_path / "checkpoints" / f"iter_{done:07d}" / "trainer_state.json"
    assert json.loads(state.read_text())["layout"]["form"] == "dp_reshardable"
    train(2, overrides, "checkpoint reshard")
    assert json.loads(state.read_text())["layout"]["form"] == "fully_reshardable"
    output = train(2, [*overrides, f"trainer.steps={done + 1}"])
    assert f"resumed at step {done}" in output


def _worker(launcher: int) -> int:
    """A training process below torchrun."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    workers = [int(c) for c in children if b"treepo_mcore" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return workers[-1]


def test_a_signal_to_one_rank_saves_on_all_and_the_command_continues(task: list[str], tmp_path: Path) -> None:
    overrides = [*task, f"run.dir={tmp_path}", "data.eval=null", "trainer.eval_every=1"]  # of nothing
    process = start(2, [*overrides, "trainer.steps=1000"])
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.is_file() and "reward/mean" in metrics.read_text()):
        assert time.monotonic() < deadline, "no step"
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.5)
    os.kill(_worker(process.pid), signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    done = int((tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert f"SIGUSR1: saved at step {done}, exit status 75" in output
    assert {line.split()[2] for line in output.splitlines() if line.strip().startswith("exitcode")} == {"75"}
    assert not (tmp_path / "summary.json").exists()
    again = train(2, [*overrides, f"trainer.steps={done + 1}"])
    assert f"resumed at step {done}" in again
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "reward/mean" in line]
    assert steps == list(range(done + 1))


@pytest.mark.long
def test_a_sick_run_is_told_what_it_has(task: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short answers of a model that knows nothing, in a cache for too few of them, graded by a function that fails."""
    settings = {
        "run.dir": tmp_path / "run",
        "trainer.steps": 12,
        "trainer.prompts_per_step": 16,
        "rollout.tree.segment_tokens": 24,
        "rollout.tree.max_depth": 2,
        "rollout.engine.num_gpu_blocks_override": 60,
        "reward.function": "reward_functions:raises_for_one_in_ten",
        "trainer.eval_after": "false",
        "trainer.eval_before": "false",
        "trainer.export": "false",
    }
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]))
    output = train(1, [*task, *(f"{key}={value}" for key, value in settings.items())])
    told = {line.split(": ")[2] for line in output.splitlines() if "observe.health: step" in line}
    assert told >= {"cut answers", "reward calls fail", "key-value cache too small"}, told
