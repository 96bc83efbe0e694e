"""`treepo-mcore plan` and the pages made with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treepo_mcore.cli.plan import app
from treepo_mcore.config import ConfigError, load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").glob("*gpu/*.yaml"))
QUANTIZED = "rollout.engine.quantization=fp8_per_block"
MEANS = ["--prompt-tokens", "256", "--response-tokens", "1792"]


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipes_fit(recipe):
    """On as many GPUs as the folder's name says."""
    gpus = int(re.search(r"-(\d+)gpu", str(recipe)).group(1))
    result = run(recipe, "--nodes", gpus // 8, *MEANS, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0, found["warnings"]
    assert found["fits"]
    assert max(phase["total"] for phase in found["memory"]["phases"].values()) < 0.97 * found["memory"]["available"]


def test_there_are_recipes():
    assert len(RECIPES) == 8


def test_the_7b_recipe_is_the_papers():
    """What differs stands in the recipe's README."""
    ours = load_config(ROOT / "examples/qwen2.5-7b-8gpu/config.yaml")
    paper = load_config(ROOT / "examples/presets/paper.yaml")
    for section in ("filter", "advantage", "reward"):
        assert getattr(ours, section) == getattr(paper, section)
    assert ours.trainer == paper.trainer.model_copy(update={"save_every": 10})
    assert ours.rollout.tree == paper.rollout.tree
    assert ours.actor.optimizer == paper.actor.optimizer
    assert ours.actor.loss == paper.actor.loss


def test_overrides_and_options_reach_the_plan():
    recipe = "examples/qwen2.5-7b-8gpu/config.yaml"
    found = json.loads(run(recipe, "actor.tp=4", "--nodes", 2, "--gpu", "h200", "--json").stdout)
    assert found["layout"]["tp"] == 4
    assert found["layout"]["dp"] == 4
    assert found["cluster"]["gpu"] == "H200-SXM-141GB"


def test_what_does_not_fit_has_exit_status_1():
    result = run("examples/llama-3.1-70b-64gpu/config.yaml", "--nodes", 2)
    assert result.exit_code == 1
    assert "error" in result.stdout


def test_the_table_names_phases_and_items():
    printed = run("examples/qwen2.5-7b-8gpu/config.yaml", *MEANS).stdout
    for word in ("update", "rollout", "KV cache", "optimizer", "push", "log-probs"):
        assert word in printed


def test_a_missing_file_is_one_line():
    with pytest.raises(ConfigError, match="no such configuration file"):
        run("nowhere.yaml")


def test_suggest_finds_layouts_and_says_why_others_lose():
    result = run("suggest", "--model", "examples/models/Llama-3.1-70B", "--nodes", 8, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    totals = [entry["seconds"]["total"] for entry in found["best"]]
    assert totals == sorted(totals)
    reasons = {row["change"]: row["reason"] for row in found["neighbours"]}
    assert any("does not fit" in reason for reason in reasons.values())
    assert any(re.match(r"\+\d+%", reason) for reason in reasons.values())
    # What it suggests, planned by itself, fits and takes as long.
    recipe = "examples/llama-3.1-70b-64gpu/config.yaml"
    same = ["rollout.tree.branching.first=2", "memory.offload=null"]
    again = json.loads(run(recipe, *found["best"][0]["overrides"], *same, "--nodes", 8, "--json").stdout)
    assert again["fits"]
    assert again["seconds"]["total"] - again["seconds"]["other"] == pytest.approx(totals[0], rel=1e-3)


def test_suggest_takes_long_answers_and_prints_what_it_assumed():
    """Micro-batches hold the longest path, which is longer than the default of actor.micro_batch_tokens."""
    words = ["suggest", "--model", "examples/models/Qwen2.5-7B", "--response-tokens", 1800]
    result = run(*words, "trainer.prompts_per_step=256", "--prompt-tokens", 300)
    assert result.exit_code == 0
    line = re.search("^As overrides: (.*)$", result.stdout, re.MULTILINE)[1].split()
    for said in (
        "model.path=examples/models/Qwen2.5-7B",
        "data.max_prompt_tokens=1200",
        "rollout.tree.segment_tokens=512",
        "rollout.tree.max_depth=15",
        "actor.micro_batch_tokens=8880",
        "trainer.prompts_per_step=256",
    ):
        assert said in line
    pasted = json.loads(run("examples/presets/paper.yaml", *line, "--json").stdout)
    assert pasted["fits"]
    assert pasted["layout"]["micro_batch_tokens"] == 8880


def test_suggest_keeps_what_is_given():
    given = ["actor.tp=4", "actor.micro_batch_tokens=9000", "rollout.engine.kv_cache_memory_bytes=30000000000"]
    found = json.loads(run("suggest", "--model", "examples/models/Qwen2.5-7B", *given, "--json").stdout)
    for entry in found["best"]:
        assert set(given) < set(entry["overrides"])
        assert "gpu_memory_utilization" not in " ".join(entry["overrides"])
    with pytest.raises(ConfigError, match="fills 8 GPUs and agrees with the overrides"):
        run("suggest", "--model", "examples/models/Qwen2.5-7B", "actor.tp=3")
    with pytest.raises(ConfigError, match="expected key=value"):
        run("suggest", "--model", "examples/models/Qwen2.5-7B", "actor.tp")


def test_suggest_leaves_out_what_the_trainer_refuses(tmp_path):
    # 24 heads that share 6 keys: 4 divides the ones and not the others.
    shapes = json.loads((ROOT / "examples/models/Qwen2.5-7B/config.json").read_text())
    shapes |= {"num_attention_heads": 24, "num_key_value_heads": 6, "hidden_size": 3072}
    (tmp_path / "config.json").write_text(json.dumps(shapes))
    said = json.loads(run("suggest", "--model", tmp_path, "--best", 20, "--json").stdout)
    found = [override for entry in said["best"] for override in entry["overrides"]]
    assert {"actor.tp=2", "rollout.tp=2"} <= set(found)
    assert not {"actor.tp=4", "rollout.tp=4"} & set(found)
    # Blocks of 128 do not cut an FFN of 29568 on several GPUs.
    result = run("suggest", "--model", "examples/models/Qwen2.5-72B", "--nodes", 8, QUANTIZED)
    assert result.exit_code == 1
    assert "none fits" in result.stdout


def test_suggest_says_when_nothing_fits():
    result = run("suggest", "--model", "examples/models/Llama-3.1-405B", "--nodes", 1)
    assert result.exit_code == 1
    assert "none fits" in result.stdout


def test_pages_show_what_the_command_prints():
    check = [sys.executable, ROOT / "tools" / "write_plans.py", "--check"]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.long
def test_pictures_are_drawn_from_this_planner():
    check = [sys.executable, ROOT / "tools" / "plot_scaling.py", "--check"]
    result = subprocess.run(check, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
