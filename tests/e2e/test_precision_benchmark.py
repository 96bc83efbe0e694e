"""benchmarks/precision.py: what it compares, and its gradients on an untrained model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trees import random_tree

from treepo_mcore.tree.files import write_trees

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "precision.py"
spec = importlib.util.spec_from_file_location("precision_benchmark", SCRIPT)
precision = importlib.util.module_from_spec(spec)
spec.loader.exec_module(precision)


def test_comparison_by_hand():
    def found(a, b, logp):
        return {"gradients": {"a": torch.tensor(a), "b": torch.tensor(b)}, "log_probs": torch.tensor(logp)}

    reference = found([[3.0, 0.0]], [0.0, 4.0], [-1.0, -2.0])
    row = precision.compare(found([[3.0, 0.0]], [4.0, 4.0], [-1.0, -2.5]), reference)
    assert row["cosines"] == pytest.approx({"a": 1.0, "b": 0.5**0.5})
    assert (row["cosine_least"], row["least_of"]) == (pytest.approx(0.5**0.5), "b")
    assert row["cosine"] == pytest.approx((9 + 16) / (41**0.5 * 5))
    assert row["norm_ratio"] == pytest.approx(41**0.5 / 5)
    assert (row["logprob_abs_mean"], row["logprob_abs_max"]) == pytest.approx((0.25, 0.5))
    assert precision.cosine(torch.zeros(2), torch.ones(2)) == 0


def test_first_step_and_all_of_them():
    rows = [
        {"reward/mean": r, "mismatch/logprob_abs_mean": m, "mismatch/logprob_abs_max": x, "mismatch/kl": k}
        for r, m, x, k in [(0.25, 0.1, 0.5, 0.02), (0.75, 0.3, 0.4, 0.04)]
    ]
    found = precision.describe(rows)
    assert found["reward"] == [0.25, 0.75]
    assert found["first_step"] == {"mean": 0.1, "max": 0.5, "kl": 0.02}
    assert found["all_steps"] == pytest.approx({"mean": 0.2, "max": 0.5, "kl": 0.03})


@pytest.mark.long
def test_gradients_in_bf16_point_where_float32_does(task, tmp_path):
    trees = [random_tree(seed) for seed in range(4)]
    for tree in trees:
        for index, leaf in enumerate(tree.leaves):
            leaf.correct, leaf.score = index % 2 == 0, float(index % 2 == 0)
    write_trees(tmp_path / "trees.jsonl", trees)
    found = {}
    for name in ("float32", "bf16"):
        out = tmp_path / f"{name}.pt"
        call = f"measure_gradients({name!r}, Path({str(tmp_path / 'trees.jsonl')!r}), Path({str(out)!r}), {task!r})"
        code = f"from pathlib import Path; from precision import measure_gradients; {call}"
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=SCRIPT.parent, check=True)
        found[name] = torch.load(out)
    assert precision.compare(found["float32"], found["float32"])["cosine_least"] == pytest.approx(1.0)
    row = precision.compare(found["bf16"], found["float32"])
    assert 0.99 < row["cosine"] < 1.0
    assert 0 < row["logprob_abs_mean"] < 0.05
    json.dumps(row)
