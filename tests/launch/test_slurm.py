"""The rendered batch script on a real Slurm with two nodes on this host: preflight, training, signal, requeue, end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from treepo_mcore.launch.render import SlurmJob, render

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or os.geteuid() != 0,
        reason="needs root and Slurm: tools/install_slurm.sh",
    ),
]


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes, n1 and n2."""
    # Not below pytest's own folders: munged runs as another user, who may not enter them.
    with tempfile.TemporaryDirectory(prefix="treepo-slurm-") as folder:
        subprocess.run([HERE / "cluster.sh", "up", folder, "2"], check=True)
        monkeypatch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        yield
        subprocess.run([HERE / "cluster.sh", "down", folder], check=True)


class Job:
    """A submitted script."""

    def __init__(self, script: str, directory: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = ["sbatch", "--parsable"]
        done = subprocess.run(
            command, input=script, text=True, cwd=directory, env=environment, capture_output=True, check=True
        )
        self.id = done.stdout.strip()
        self.log = directory / f"treepo-{self.id}.out"

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        shown = subprocess.run(["scontrol", "show", "job", self.id], capture_output=True, text=True, check=True).stdout
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)

    def wait(self, seconds: float) -> dict[str, str]:
        """Until the job has ended for good."""
        return self.until(lambda: self.facts()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), seconds)

    def until(self, true, seconds: float) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.5)
        return self.facts()

    def output(self) -> str:
        logs = sorted(self.log.parent.glob(f"run/logs/{self.id}/*"))
        return "\n".join(file.read_text()[-4000:] for file in [self.log, *logs] if file.exists())


def job(task, tmp_path, *more, **settings) -> Job:
    config = ROOT / "examples" / "quickstart" / "config.yaml"
    evaluate = ("trainer.eval_before=false", "trainer.eval_after=false")
    overrides = (*task, "run.dir=run", "trainer.steps=20", *evaluate, *more)
    small = {"gpus_per_node": 0, "processes_per_node": 1, "time": "60", "signal_seconds": 60, "python": sys.executable}
    small |= {"disk_gib": 1, "memory_gib": 1, "exclusive": False}
    return Job(render(SlurmJob(config, overrides, nodes=2, **small | settings)), tmp_path)


def test_a_signal_before_the_end_saves_requeues_and_the_job_completes(task, cluster, tmp_path):
    running = job(task, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    running.until(lambda: metrics.is_file() and "reward/mean" in metrics.read_text(), 600)
    # As --signal=B:USR1 does at its time.
    subprocess.run(["scancel", "--batch", "--signal=USR1", running.id], check=True)
    facts = running.wait(900)
    output = running.output()
    print(output)
    assert facts["JobState"] == "COMPLETED", output
    assert facts["Restarts"] == "1"
    batch = running.log.read_text()
    assert re.search("preflight n1: ok, .*reached by 1 other node", batch)
    assert re.search("preflight n2: ok, .*clock and versions as on n1", batch)
    assert "requeued" in batch
    node = next((tmp_path / "run" / "logs" / running.id).glob("0-*.log")).read_text()
    saved = batch.split("newest checkpoint: ")[2].split()[0]
    assert 0 < int(saved) < 20
    assert f"SIGUSR1: saved at step {saved}, exit status 75" in node
    assert f"resumed at step {saved}" in node
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_node_that_will_not_do_is_named_and_nothing_is_trained(task, cluster, tmp_path):
    running = job(task, tmp_path, disk_gib=10**6)
    facts = running.wait(300)
    output = running.log.read_text()
    assert facts["JobState"] == "FAILED"
    assert "preflight n1: FAILED: " in output
    assert "preflight n2: FAILED: " in output
    assert "expected 1000000" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("environment", "signalled", "state", "restarts", "words"),
    [
        ({}, ["scancel", "--batch", "--signal=USR1"], "COMPLETED", "1", "the ranks ended with status 0"),
        ({"DIE": "3"}, None, "FAILED", "1", "no new checkpoint in this attempt: not requeued"),
        ({"DIE": "1", "STATUS": "2"}, None, "FAILED", "0", "the configuration or a file was refused: not requeued"),
        ({"DIE": "7", "SAVE": "5"}, None, "FAILED", "1", "no new checkpoint in this attempt: not requeued"),
        ({}, ["scancel"], "CANCELLED", "0", "SIGTERM: waiting for the ranks to save"),
    ],
    ids=["asked to stop", "dies", "is refused", "dies after a checkpoint", "cancelled"],
)
def test_what_the_script_makes_of_an_end(
    environment, signalled, state, restarts, words, cluster, tmp_path, monkeypatch
):
    """With a stand-in for the trainer, so that the end is certain: when it is requeued and when not."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    running = job([], tmp_path, python=str(HERE / "stand_in.sh"), processes_per_node=2)
    if signalled:
        running.until(lambda: running.facts()["JobState"] == "RUNNING", 60)
        time.sleep(4)
        subprocess.run([*signalled, running.id], check=True)
    facts = running.wait(120)
    running.until(lambda: words in running.log.read_text(), 30)
    output = running.log.read_text()
    assert (facts["JobState"], facts["Restarts"]) == (state, restarts), output
    assert ("requeued\n" in output.replace("not requeued\n", "")) == (restarts == "1"), output


def test_cancelling_saves(task, cluster, tmp_path):
    running = job(task, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    running.until(lambda: metrics.is_file() and "reward/mean" in metrics.read_text(), 600)
    subprocess.run(["scancel", running.id], check=True)
    running.until(lambda: "the ranks ended with status" in running.log.read_text(), 300)
    facts = running.wait(100)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert int((tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()) > 0
