"""`make demo` from a cold cache: it learns, is told no sickness, and vLLM alone answers with what it exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


@pytest.mark.long
def test_demo_learns(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, QUICKSTART / "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=1500
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = json.loads(result.stdout.strip().splitlines()[-1])
    assert 0.2 <= summary["accuracy_before"] <= 0.5
    assert summary["accuracy_after"] >= summary["accuracy_before"] + 0.15
    assert summary["seconds"] > summary["warmup_seconds"] > 0
    assert "treepo_mcore.observe.health" not in result.stdout + result.stderr  # a healthy run is silent
    held_out = tmp_path / ".cache" / "quickstart" / "data" / "eval.jsonl"
    solved = _solved_by_vllm(tmp_path / "runs" / "quickstart" / "policy", held_out, 64)
    assert solved / 64 > summary["accuracy_after"] - 0.2  # of other problems: three standard errors


VLLM = """
import json, sys
from treepo_mcore.system.environment import prepare_environment
prepare_environment()
from vllm import LLM, SamplingParams
from treepo_mcore.rewards.math import boxed_answer
policy, held_out, count = sys.argv[1:]
rows = [json.loads(line) for line in open(held_out)][: int(count)]
llm = LLM(policy, dtype="float32", max_model_len=160, enforce_eager=True, kv_cache_memory_bytes=1 << 28)
answers = llm.generate([row["prompt"] for row in rows], SamplingParams(temperature=0, max_tokens=80), use_tqdm=False)
print(sum(boxed_answer(a.outputs[0].text) == row["answer"] for a, row in zip(answers, rows)))
"""


def _solved_by_vllm(policy: Path, held_out: Path, count: int) -> int:
    """vLLM alone, with the tokenizer that was exported beside the weights."""
    command = [sys.executable, "-c", VLLM, str(policy), str(held_out), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])
