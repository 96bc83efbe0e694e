"""`treepo-mcore sft`: its loss is that of `transformers`, it learns, stops, and goes on as if it had not stopped."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from treepo_mcore.data.tokenizer import load_tokenizer

WARM_UP = Path(__file__).resolve().parents[2] / "examples" / "quickstart" / "warmup.yaml"


def sft(task: list[str], run: Path, *overrides: str, processes: int = 2, status: int = 0) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    folder = folder_of(task)
    given = {
        "model.path": folder / "model",
        "data.train": folder / "sft.jsonl",
        "data.eval.problems.path": folder / "eval.jsonl",
        "run.dir": run,
        "run.deterministic": "true",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        *launcher,
        "-m",
        "treepo_mcore",
        "sft",
        str(WARM_UP),
        *(f"{key}={value}" for key, value in given.items()),
    ]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=500, env=os.environ.copy())
    assert done.returncode == status, done.stderr[-3000:]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def folder_of(task: list[str]) -> Path:
    return Path(next(override for override in task if override.startswith("model.path=")).partition("=")[2]).parent


def test_the_loss_of_a_step_is_that_of_transformers(task: list[str], tmp_path: Path) -> None:
    """Two processes with shares of different sizes; the mean is over the tokens of all answers and their ends."""
    folder = folder_of(task)
    lines = (folder / "sft.jsonl").read_text().splitlines()[:7]
    (tmp_path / "seven.jsonl").write_text("\n".join(lines))
    files = [f"data.train={tmp_path / 'seven.jsonl'}", "data.overlap=keep"]
    row, *_ = sft(task, tmp_path / "run", *files, "trainer.steps=1", "trainer.prompts_per_update=7")
    tokenizer, model = load_tokenizer(folder / "model"), AutoModelForCausalLM.from_pretrained(folder / "model")
    total, count = 0.0, 0
    for line in map(json.loads, lines):
        prompt = tokenizer.encode(line["prompt"], start=True)
        answer = [*tokenizer.encode(line["solution"]), tokenizer.eos_ids[0]]
        with torch.no_grad():
            logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        total -= sum(float(logp[place, token]) for place, token in zip(places, answer, strict=True))
        count += len(answer)
    assert row["actor/loss"] == pytest.approx(total / count, rel=1e-5)
    assert row["data/answers"] == 7


@pytest.mark.long
def test_it_learns_and_goes_on_bit_for_bit(task: list[str], tmp_path: Path) -> None:
    steps = ["trainer.steps=12", "trainer.prompts_per_update=16", "actor.optimizer.warmup_steps=2"]
    whole = sft(task, tmp_path / "whole", *steps, "trainer.eval_every=0")
    losses = [row["actor/loss"] for row in whole if "actor/loss" in row]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    assert whole[-1].keys() > {"eval/accuracy", "eval/problems/accuracy", "eval/problems/accuracy_low"}
    assert (tmp_path / "whole" / "policy" / "model.safetensors").is_file()
    sft(task, tmp_path / "cut", *steps, "trainer.save_every=5", "trainer.max_seconds=0.001", "trainer.export=false")
    again = sft(task, tmp_path / "cut", *steps, "trainer.eval_every=0")
    assert [row["actor/loss"] for row in again if "actor/loss" in row] == losses
    assert all(math.isfinite(loss) for loss in losses)
