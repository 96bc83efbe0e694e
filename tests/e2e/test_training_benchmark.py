"""benchmarks/training.py: the object it prints, and trees that a run saved."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from trees import random_tree

from treepo_mcore.tree.files import write_trees

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"
KEYS = ("speedup_update", "speedup_logprob", "logical_over_unique")


def run(*arguments):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json", "--repeats", "1", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_saved_trees_of_any_vocabulary(tmp_path):
    trees = [random_tree(seed, leaves=7) for seed in range(3)]
    trees[0].nodes[1].tokens[0] = 150_000
    write_trees(tmp_path / "trees.jsonl", trees)
    found = run("--trees", str(tmp_path / "trees.jsonl"), "--out", str(tmp_path / "out.json"))
    assert found == json.loads((tmp_path / "out.json").read_text())
    (row,) = found["rows"]
    assert row["tokens"]["tree"] == sum(len(node.tokens) for tree in trees for node in tree.nodes)
    assert found["logical_over_unique"] == pytest.approx(row["tokens"]["flat"] / row["tokens"]["tree"])
    assert all(found[key] > 0 for key in KEYS)
