"""Rendered scripts: what is asked for is in them, shellcheck finds nothing, examples are what the command prints."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treepo_mcore.checks import HOST_SHARE
from treepo_mcore.cli.app import app
from treepo_mcore.config import ConfigError, load_config
from treepo_mcore.launch.preflight import GIB
from treepo_mcore.launch.render import SlurmJob, TorchrunJob, render, seconds_seen
from treepo_mcore.model.architecture import read_sizes
from treepo_mcore.model.files import resolve_model
from treepo_mcore.plan.hardware import make_cluster
from treepo_mcore.plan.plan import plan_run
from treepo_mcore.plan.workload import Assumptions
from treepo_mcore.system.time_limit import seconds_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "quickstart" / "config.yaml"
EXAMPLES = sorted([*(ROOT / "examples" / "slurm").glob("*.sh"), *(ROOT / "examples" / "torchrun").glob("*.sh")])
RECIPES = sorted((ROOT / "examples").glob("*gpu/*.sh"))
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

JOBS = {
    "slurm": SlurmJob(CONFIG, nodes=2),
    "slurm, everything": SlurmJob(
        CONFIG,
        ("actor.tp=2", "data.train=a file.jsonl"),
        nodes=4,
        account="post-training",
        partition="h100",
        qos="high",
        time="1-12:00:00",
        signal_seconds=900,
        container_image="/images/treepo.sqsh",
        container_mounts="/data:/data,/home/me/runs:/workspace/runs",
        interface="eth0",
        ib_hca="mlx5_0,mlx5_1",
        nvlinks=18,
        port=23456,
    ),
    "slurm, CPU": SlurmJob(CONFIG, nodes=2, gpus_per_node=0, processes_per_node=1, exclusive=False),
    "torchrun, one node": TorchrunJob(CONFIG),
    "torchrun, static": TorchrunJob(CONFIG, nodes=2, head="10.0.0.1", interface="eth0", port=12345),
    "torchrun, c10d": TorchrunJob(CONFIG, nodes=2, head="10.0.0.1", rendezvous="c10d"),
}


@pytest.mark.parametrize("job", JOBS)
def test_scripts_pass_shellcheck(job, tmp_path):
    _shellcheck(render(JOBS[job]), tmp_path)


OURS = [ROOT / ".ci" / "run"]
OURS += [path for folder in ("tools", "tests/launch", "examples/ngc") for path in sorted((ROOT / folder).glob("*.sh"))]


@pytest.mark.parametrize("script", OURS, ids=lambda path: path.name)
def test_our_own_scripts_pass_shellcheck(script, tmp_path):
    _shellcheck(script.read_text(), tmp_path)


def _shellcheck(script: str, folder: Path) -> None:
    if SHELLCHECK is None:
        pytest.skip("no shellcheck on the PATH; it comes with requirements/cpu.lock")
    file = folder / "script.sh"
    file.write_text(script)
    done = subprocess.run([SHELLCHECK, "--norc", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("example", EXAMPLES + RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_examples_are_what_the_command_prints(example, monkeypatch):
    """To make one anew, run the command of its second line."""
    monkeypatch.chdir(ROOT)
    made_by = re.search("^# Made by: treepo-mcore (.*)$", example.read_text(), re.MULTILINE)
    result = CliRunner().invoke(app, shlex.split(made_by[1]), catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output == example.read_text()


@pytest.mark.parametrize("example", EXAMPLES + RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_limits_of_examples_are_those_of_their_plans(example, monkeypatch):
    """Host memory, of which a run takes 90 %; room for the checkpoints that are kept and the one that is written; and,
    under Slurm, a warning that is longer than a step, and checkpoints that come within the time limit."""
    monkeypatch.chdir(ROOT)
    script = example.read_text()
    words = shlex.split(re.search("^# Made by: treepo-mcore launch [a-z]+ (.*)$", script, re.MULTILINE)[1])
    overrides = [word for word in words if "=" in word]
    if "presets" in words[0]:  # which name a model on the hub
        overrides.append("model.path=examples/models/Qwen2.5-7B")
    config = load_config(words[0], overrides)
    nodes = int(words[words.index("--nodes") + 1]) if "--nodes" in words else 1
    cluster, means = make_cluster("h100", "ib400", nodes, 8), Assumptions(256, 1792)
    plan = plan_run(config, read_sizes(resolve_model(config.model, weights=False)), cluster, means)
    disk, memory = (int(n) for n in re.search(r"--disk-gib (\d+) --memory-gib (\d+)", script).groups())
    assert memory >= sum(plan.memory.host.values()) / GIB / HOST_SHARE
    assert disk >= (config.trainer.keep_checkpoints + 1) * plan.memory.checkpoint / GIB
    if example.name == "slurm.sh" or example.parent.name == "slurm":
        warning = int(re.search(r"B:USR1@(\d+)", script)[1])
        limit = seconds_of(re.search("--time=(.*)", script)[1])
        assert warning > 1.5 * plan.total  # answers get longer, and a checkpoint is written
        assert config.trainer.save_every * plan.total < min(limit - warning, 3 * 3600)


def test_there_are_examples_of_both():
    assert {path.parent.name for path in EXAMPLES} == {"slurm", "torchrun"}


def test_a_batch_script_has_what_was_asked_for():
    script = render(JOBS["slurm, everything"])
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))
    assert options == {
        "job-name": "treepo",
        "account": "post-training",
        "partition": "h100",
        "qos": "high",
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "exclusive": "",
        "mem": "0",
        "time": "1-12:00:00",
        "output": "%x-%j.out",
        "open-mode": "append",
        "requeue": "",
        "signal": "B:USR1@900",
    }
    for words in (
        "image=/images/treepo.sqsh\n",
        "mounts=/data:/data,/home/me/runs:/workspace/runs\n",
        "export NCCL_IB_HCA=mlx5_0,mlx5_1 #",
        "export NCCL_SOCKET_IFNAME=eth0 #",
        "MASTER_PORT=23456 #",
        "--nvlinks 18 --ib-hca mlx5_0,mlx5_1 ",
        "actor.tp=2 'data.train=a file.jsonl'",
    ):
        assert words in script
    bare = render(JOBS["slurm"])
    for words in ("account", "qos", "partition", "container", "NCCL_IB_HCA", "IFNAME"):
        assert words not in bare


def test_a_port_that_is_none_is_refused():
    for port in ("0", "65536"):
        result = CliRunner().invoke(app, ["launch", "torchrun", str(CONFIG), "--port", port])
        assert result.exit_code == 2
        assert "--port" in result.output


def test_the_script_says_how_it_was_made():
    runner = CliRunner()
    for job in JOBS.values():
        script = render(job)
        command = re.search("^# Made by: treepo-mcore (.*)$", script, re.MULTILINE)[1]
        assert runner.invoke(app, shlex.split(command), catch_exceptions=False).output == script


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (
            SlurmJob(CONFIG, ("actor.tp=3",)),
            "actor.tp x actor.cp x actor.pp = 3 x 1 x 1: 8 processes are not a multiple of 3",
        ),
        (SlurmJob(CONFIG, ("actor.tpp=3",)), "unknown key actor.tpp"),
        (SlurmJob(CONFIG, gpus_per_node=0), "--processes-per-node: needed where --gpus-per-node is 0"),
        (SlurmJob(CONFIG, processes_per_node=4), "--processes-per-node: 4, expected one for each of --gpus-per-node 8"),
        (SlurmJob(CONFIG, container_mounts="/a:/a"), "--container-mounts: needs --container-image"),
        (SlurmJob(CONFIG, time="tomorrow"), "--time: expected MINUTES, H:M:S, D-H:M:S or UNLIMITED, found 'tomorrow'"),
        (SlurmJob(CONFIG, time="11"), "--signal-seconds: 600 leaves nothing of --time 11 (660 s)"),
        (SlurmJob(CONFIG, ("run.resume=false",)), "run.resume: found false; a requeued job would begin anew"),
        (TorchrunJob(CONFIG, nodes=2), "--head: needed with several nodes"),
    ],
)
def test_what_cannot_run_is_refused(job, words):
    with pytest.raises(ConfigError) as caught:
        render(job)
    assert words in str(caught.value)


@pytest.mark.parametrize("time", ["12", "11:01", "0:12:00", "1-0", "1-0:00", "0-00:12:00"])
def test_time_limits_as_sbatch_takes_them(time):
    assert f"#SBATCH --time={time}\n" in render(SlurmJob(CONFIG, time=time))


def test_submit_hands_the_script_to_sbatch(tmp_path, monkeypatch):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\ncat > {tmp_path}/submitted\necho Submitted batch job 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    command = ["launch", "slurm", str(CONFIG), "--nodes", "2", "--submit"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "submitted").read_text() == render(JOBS["slurm"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="no sbatch on this machine"):
        CliRunner().invoke(app, command, catch_exceptions=False)


@pytest.mark.parametrize("word", ["infinite", "UNLIMITED", "0"])
def test_words_for_no_limit_are_sbatchs(word):
    assert seconds_of(word) == float("inf")


@pytest.mark.parametrize("option", ["job-name", "account", "partition", "qos"])
def test_a_name_that_would_break_the_script_is_refused(option):
    recipe = str(ROOT / "examples/qwen2.5-7b-8gpu/config.yaml")
    result = CliRunner().invoke(app, ["launch", "slurm", recipe, "--nodes", "1", f"--{option}", "tree po"])
    assert result.exit_code
    assert f"--{option}: expected letters, digits" in str(result.exception)


def test_a_warning_into_which_a_step_of_the_run_does_not_fit(tmp_path):
    rows = [{"time/step": 50.0}, {"time/step": 95.0, "time/save": 30.0, "time/evaluate": 5.0}, {"eval/accuracy": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')
    assert seconds_seen(tmp_path) == (60.0, 30.0)
    job = SlurmJob(CONFIG, (f"run.dir={tmp_path}",), signal_seconds=80)
    with pytest.raises(ConfigError, match=r"--signal-seconds: 80, .* up to 60 s and saving up to 30 s"):
        render(job)
    render(replace(job, signal_seconds=90))
