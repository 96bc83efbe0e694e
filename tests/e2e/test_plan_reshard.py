"""`plan reshard` and `train --dry-run` as a user types them; the clusters of the recipes are `long`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODELS = EXAMPLES / "models"
RECIPES = {  # -> nodes of 8
    "qwen2.5-7b-8gpu/config.yaml": 1,
    "qwen2.5-7b-32k-8gpu/config.yaml": 1,
    "qwen3-30b-a3b-8gpu/config.yaml": 1,
    "llama-3.1-70b-64gpu/config_fp8.yaml": 8,
}
GB = 1e9
CLUSTERS = {  # model, nodes of 8, layout, GB of an engine rank's parameters, vocabulary padding left out
    "70B tp4 pp4": ("Llama-3.1-70B", 8, ["actor.tp=4", "actor.pp=4", "rollout.tp=8"], 17.64),
}


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "treepo_mcore", *map(str, arguments)],
        cwd=EXAMPLES.parent,  # paths in the recipes
        capture_output=True,
        text=True,
        timeout=600,  # of the longest, all ranks of 256 GPUs on paper
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )


def write_config(folder, model):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"model": {"path": str(model)}, "data": {"train": "nowhere.jsonl"}}))
    return file


@pytest.fixture
def small(tmp_path):
    """A configuration whose model is nothing but a config.json."""
    model = tmp_path / "small"
    model.mkdir()
    shapes = json.loads((MODELS / "Llama-3.1-70B" / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(shapes | {"num_hidden_layers": 4}))
    return write_config(tmp_path, model)


def test_plan_reshard_prints_one_json_object(small):
    layout = ["actor.tp=4", "actor.pp=4", "rollout.tp=8", "--nodes", 2]
    rates = ["--gpu", "a100", "--network", 25]
    result = command("plan", "reshard", small, *layout, *rates, "--json")
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert report["covered_once"] is True
    assert report["bytes_received_max"] == max(
        map(sum, zip(*(report["by_rank"][kind]["received"] for kind in ("same node", "across nodes")), strict=True))
    )
    assert report["seconds_predicted"] >= report["seconds_at_least"] > 0
    assert report["bytes_per_second"] == {"same GPU": 1019.5e9, "same node": 300e9, "across nodes": 25e9}


def test_dry_run_says_what_it_looked_at(small):
    result = command("train", small, "actor.tp=2", "actor.pp=2", "rollout.tp=2", "--dry-run", "--gpus-per-node", 4)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert lines[0] == "model: small, 5.52 billion parameters; not here: weights, tokenizer"
    assert lines[1] == "layout: 4 ranks on 1 nodes; actor tp2 pp2 dp1 -> 2 x engine tp2"
    assert lines[2].startswith("process groups: ")
    assert "created in the same order by every rank" in lines[2]
    assert lines[3].endswith("every byte arrives once")
    assert lines[-1].startswith("dry run passed in ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--dry-run", "--nodes", 1, "actor.tp=8", "actor.pp=2"],
            "error: actor.tp x actor.cp x actor.pp = 8 x 1 x 2: 8 processes are ",
        ),
        (["--nodes", 2], "error: --nodes, --gpus-per-node: only with --dry-run; "),
    ],
)
def test_errors_are_one_line_and_status_2(small, arguments, line):
    result = command("train", small, *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.long
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_clusters_on_paper(tmp_path, cluster):
    model, nodes, layout, shard = CLUSTERS[cluster]
    config = write_config(tmp_path, MODELS / model)
    result = command("plan", "reshard", config, *layout, "--nodes", nodes, "--json")
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    assert report["covered_once"] is True
    arrives = [sum(kind["received"][rank] for kind in report["by_rank"].values()) for rank in range(8 * nodes)]
    assert max(arrives) == pytest.approx(shard * GB, rel=0.01)
    # Other stages are on other nodes; of its own stage a rank holds its shard, or a neighbour does, or part of both.
    stages = report["actor"]["pp"]
    across = max(report["by_rank"]["across nodes"]["received"])
    assert across == pytest.approx(shard * GB * (1 - 1 / stages), rel=0.03)
    assert across <= report["bytes_received_max"] <= max(arrives)
    assert report["staging_bytes_max"] <= 256 << 20
    assert report["seconds_at_least"] <= report["seconds_predicted"] < 2 * report["seconds_at_least"]


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_pass_a_dry_run(recipe):
    result = command("train", EXAMPLES / recipe, "--dry-run", "--nodes", RECIPES[recipe])
    assert result.returncode == 0, result.stderr[-3000:]
    assert "every byte arrives once" in result.stdout
