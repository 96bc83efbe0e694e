"""The printed script for one node: it trains, it saves when it is signalled, it continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treepo_mcore.launch.render import TorchrunJob, render

ROOT = Path(__file__).resolve().parents[2]


def start(task: list[str], folder: Path, steps: int) -> subprocess.Popen[str]:
    overrides = (*task, "run.dir=run", f"trainer.steps={steps}", "trainer.eval_before=false")
    config = ROOT / "examples" / "quickstart" / "config.yaml"
    job = TorchrunJob(config, overrides, 1, 0, 2, sys.executable, disk_gib=1, memory_gib=1)
    script = folder / f"{steps}.sh"
    script.write_text(render(job))
    return subprocess.Popen(
        ["bash", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_a_signal_before_there_are_ranks_ends_torchrun(tmp_path):
    """With a stand-in that is still importing torch."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ncase $* in *preflight*) exit 0 ;; esac\ntouch started\nexec sleep 60\n")
    python.chmod(0o755)
    script = tmp_path / "train.sh"
    script.write_text(render(TorchrunJob(ROOT / "examples" / "quickstart" / "config.yaml", (), 1, 0, 2, str(python))))
    running = subprocess.Popen(["bash", script], cwd=tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.long
def test_a_signal_to_the_script_saves_and_ends_in_75(task, tmp_path):
    running = start(task, tmp_path, 1000)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.is_file() and "reward/mean" in metrics.read_text()):
        assert time.monotonic() < deadline, "no step"
        assert running.poll() is None, running.communicate()[0][-4000:]
        time.sleep(0.5)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=300)
    done = int((tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert running.returncode == 75, output
    assert f"SIGUSR1: saved at step {done}, exit status 75" in output
