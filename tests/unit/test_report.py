"""`treepo-mcore report`: a page from a run's directory alone, whatever the model wrote."""

import json
import shutil
import subprocess

import pytest
from trees import random_tree
from typer.testing import CliRunner

from treepo_mcore.cli.app import app
from treepo_mcore.config import ConfigError, dump_config, parse_config
from treepo_mcore.report.charts import Line, bars_chart, lines_chart
from treepo_mcore.report.compare import compare
from treepo_mcore.report.page import page
from treepo_mcore.report.run import read_run
from treepo_mcore.tree.files import write_trees

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def run_directory(folder, steps=3, trees=True):
    """What a run of a few steps leaves behind; the first tree's answers are hostile."""
    folder.mkdir()
    config = parse_config({"model": {"path": "gone"}, "data": {"train": "t.jsonl"}, "advantage": {"estimator": "rloo"}})
    (folder / "config.yaml").write_text(dump_config(config))
    rows = [{"step": 0, "eval/accuracy": 0.25}]
    for step in range(steps):
        times = {"time/rollout": 1.0 + step, "time/update": 0.5, "time/step": 2.0 + step}
        rows.append({"step": step, "reward/accuracy": 0.1 * step, "actor/loss": None, "filter/kept": 0.5} | times)
    rows.append({"step": steps, "eval/accuracy": 0.75})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"accuracy_before": 0.25, "accuracy_after": 0.75, "layout": "tp1"}))
    for step in (0, 2) if trees else ():
        saved = [random_tree(seed) for seed in range(5)]
        for number, tree in enumerate(saved):
            tree.meta = {"number": number, "prompt": f"prompt {number} {HOSTILE}", "answer": "7"}
        (folder / "trees" / f"step_{step:06d}").mkdir(parents=True)
        write_trees(folder / "trees" / f"step_{step:06d}" / "engine_00000.parquet", saved)
    return folder


def opened(text):
    """The trees that the page's script reads."""
    return json.loads(text.split('<script id="data" type="application/json">')[1].split("</script>")[0])


def test_a_page_has_charts_and_trees_that_one_can_open(tmp_path):
    folder = run_directory(tmp_path / "run")
    text = page([read_run(folder)], 3)
    for title in ("Held-out accuracy", "Accuracy while sampling", "Seconds of a step", "Sharing by depth"):
        assert title in text
    assert "Entropy" not in text  # no such metric
    first, last = opened(text)
    assert (first["step"], last["step"], last["saved"], len(last["trees"])) == (0, 2, 5, 3)
    tree, source = last["trees"][0], random_tree(0)
    assert [node["parent"] for node in tree["nodes"]] == [node.parent for node in source.nodes]
    assert tree["nodes"][1]["words"] == [f"⟨{token}⟩" for token in source.nodes[1].tokens]  # the tokenizer is gone
    assert [leaf["reward"] for leaf in tree["leaves"]] == [leaf.reward for leaf in source.leaves]
    root = tree["nodes"][0]
    assert root["leaves"] == len(source.leaves)


def test_what_a_model_wrote_cannot_leave_its_place(tmp_path):
    text = page([read_run(run_directory(tmp_path / HOSTILE.replace("/", "_")))], 5)
    assert "alert(1)</script>" not in text
    assert "<img" not in text
    assert HOSTILE in opened(text)[0]["trees"][0]["prompt"]


def test_runs_side_by_side_and_runs_without_trees(tmp_path):
    one, other = run_directory(tmp_path / "one"), run_directory(tmp_path / "other", steps=5, trees=False)
    text = page([read_run(other), read_run(one)], 3)
    assert text.count("Seconds of a step") == 4  # titles of pictures count twice
    assert '<script id="data"' not in text
    result = CliRunner().invoke(app, ["report", str(one), str(other), "--out", str(tmp_path / "both.html")])
    assert (result.exit_code, result.output) == (0, f"{tmp_path / 'both.html'}\n")
    assert "one and other" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "run: no metrics.jsonl, expected a run's directory"),
        (lambda run: (run / "metrics.jsonl").write_text("{"), "metrics.jsonl: not valid JSON: "),
        (lambda run: (run / "config.yaml").unlink(), "config.yaml: no such configuration file"),
        (lambda run: (run / "summary.json").write_text("{"), "summary.json: not valid JSON: "),
        (
            lambda run: (run / "trees" / "step_000002" / "engine_00000.parquet").write_bytes(b"x"),
            "engine_00000.parquet: not valid parquet: ",
        ),
    ],
)
def test_directories_that_are_no_run(tmp_path, spoil, words):
    folder = run_directory(tmp_path / "run")
    spoil(folder)
    with pytest.raises(ConfigError) as error:
        page([read_run(folder)], 3)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_charts_of_one_point_of_zeros_and_of_tiny_numbers():
    for points in ([(3, 0.0)], [(0, 0.0), (1, 0.0)], [(0, 1e-9), (5, 2e-9)], [(0, -5.0), (2, 1e7)]):
        assert "nan" not in lines_chart("t", [Line("a", points), Line("b", [])]).lower()
    assert "nan" not in bars_chart("t", ["a"], [(0, [0.0])]).lower()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_opens_a_tree_and_complains_of_nothing(tmp_path):
    folder = run_directory(tmp_path / "run")
    (folder / "report.html").write_text(page([read_run(folder)], 5))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command = ["chromium", *options, f"file://{folder / 'report.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<button") == 5
    assert "ended by eos, score" in done.stdout


def test_two_runs_side_by_side(tmp_path):
    one, other = run_directory(tmp_path / "one"), run_directory(tmp_path / "other", steps=2)
    text = (other / "config.yaml").read_text().replace("estimator: rloo", "estimator: grpo")
    (other / "config.yaml").write_text(text)
    done = CliRunner().invoke(app, ["compare", str(one), str(other), "--json"])
    found = json.loads(done.stdout)
    assert found["rows"] == {
        "steps": [3, 2],
        "last eval/accuracy": [0.75, 0.75],
        "best eval/accuracy": [0.75, 0.75],
        "seconds of steps, first 2": [5.0, 5.0],
        "seconds of rollout, first 2": [3.0, 3.0],
        "seconds of updates, first 2": [1.0, 1.0],
    }
    assert found["config"] == {"advantage.estimator": ["rloo", "grpo"]}
    lines = CliRunner().invoke(app, ["compare", str(one), str(other)]).stdout.splitlines()
    assert lines[1].split() == ["steps", "3", "2"]
    assert lines[-1].split() == ["advantage.estimator", "rloo", "grpo"]


def test_runs_of_different_tasks_are_not_compared(tmp_path):
    one, other = run_directory(tmp_path / "one"), run_directory(tmp_path / "other")
    config = parse_config({"model": {"path": "gone"}, "data": {"train": "t.jsonl", "eval": "e.jsonl"}})
    (other / "config.yaml").write_text(dump_config(config))
    with pytest.raises(ConfigError, match=r"other: runs of different tasks, by data.eval: {} and {'': 'e.jsonl'}"):
        compare(read_run(one), read_run(other))
