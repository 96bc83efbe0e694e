"""What benchmarks/gpu runs on a GPU, run once on a CPU with small sizes: that it runs, and nothing about speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
SMALL = {
    "hidden_size": 128,  # heads of 32: the least that vLLM has on a CPU
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 4096,
}

pytestmark = pytest.mark.long


def run(code, tmp_path):
    """Python with the scripts' folder on its path; `out` is a function that keeps a row."""
    script = tmp_path / "code.py"
    head = f"import json, pathlib\nfolder = pathlib.Path({str(tmp_path)!r})\nSMALL = {SMALL!r}\n"
    tail = "\n(folder / 'row.json').write_text(json.dumps(row))\n"
    script.write_text(head + code + tail)
    path = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((tmp_path / "row.json").read_text())


def test_steps(tmp_path):
    code = """
import whole
whole.STEPS, whole.PROMPTS, whole.TREE = 2, 2, {"width": 4, "segment_tokens": 8, "max_depth": 2}
row = whole.steps(folder, "none", "70b-layers", **SMALL)
"""
    row = run(code, tmp_path)
    assert row["time/rollout"] > 0
    assert {"time/push", "time/sleep", "time/wake", "time/offload", "push/seconds"} <= set(row)


def test_training(tmp_path):
    code = """
import training
training.MEAN, training.TREES, training.WIDTH, training.REPEATS, training.BUDGET = 16, 2, 4, 1, 8192
actor = training.build("none", training.write_model(folder / "model", "70b-layers", **SMALL | {"vocab_size": 2048}))
packed = training.pack(32)
row = training.describe(packed, training.in_turns(actor, packed), actor.arch)
"""
    row = run(code, tmp_path)
    assert row["tokens_flat_over_tree"] > 1
    assert row["update_tflops_tree"] > 0


@pytest.mark.parametrize("sampler", ["flat, async", "depth-synchronous", "ours"])
def test_rollout(sampler, tmp_path):
    code = f"""
import rollout
rollout.MODELS["small"] = rollout.MODELS["70b-layers"] | SMALL
rollout.PROMPTS = {{"small": 4}}
rollout.MEAN, rollout.WIDTH, rollout.DEPTH, rollout.SEGMENT, rollout.PROMPT = 16, 4, 4, 8, 32
row = rollout.measure(("small", {sampler!r}))
"""
    row = run(code, tmp_path)
    assert row["leaves"] == 16
    assert 4 < row["mean_leaf_tokens"] < 24
    assert (row["engine_steps"] is None) == (sampler == "flat, async")
