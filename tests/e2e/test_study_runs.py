"""`treepo-mcore study` on small real runs: a part, the rest, the report alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def study(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "treepo_mcore", "study", str(file), "--out", str(file.with_suffix(".json"))]
    runs = ["--runs", str(file.parent / "runs"), *arguments]
    return subprocess.run([*command, *runs], capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.long
def test_a_study_goes_on_where_it_was_and_reports(task: list[str], tmp_path: Path) -> None:
    settings = {key: yaml.safe_load(value) for key, _, value in (override.partition("=") for override in task)}
    settings |= {"trainer.steps": 2, "trainer.eval_every": 1, "trainer.export": False}
    settings |= {"trainer.eval_before": True, "actor.micro_batch_tokens": 1024}
    arms = {
        "flat": {"rollout.sampler": "flat", "advantage.estimator": "rloo", "advantage.baseline": "mean"},
        "tree": {},
    }
    definition = {"title": "Small", "config": str(ROOT / "examples" / "quickstart" / "config.yaml"), "seeds": [0]}
    definition |= {"target": 0.5, "baseline": "flat", "settings": settings, "arms": arms}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(definition))
    first = study(file, "--max-runs", "1")
    assert first.returncode == 0, first.stderr[-3000:]
    assert [run["arm"] for run in json.loads(file.with_suffix(".json").read_text())["runs"]] == ["flat"]
    whole = study(file)
    assert whole.returncode == 0, whole.stderr[-3000:]
    runs = json.loads(file.with_suffix(".json").read_text())["runs"]
    assert [run["arm"] for run in runs] == ["flat", "tree"]
    for run in runs:
        assert run["steps"] == 2
        assert [point[0] for point in run["points"]] == [0, 1, 2]
        assert run["points"][0][1:3] == [0.0, 0]
        assert run["points"][2][1] == pytest.approx(run["seconds"])
    assert "| tree | 1 |" in whole.stdout
    again = study(file, "--max-runs", "0")
    assert again.stdout == whole.stdout
    assert "<svg" in file.with_suffix(".html").read_text()
    definition["arms"] = arms | {"tree": {"actor.optimizer.lr": 1.0e-3}}
    file.write_text(yaml.safe_dump(definition))
    other = study(file)
    assert other.returncode == 2
    assert "arm tree was run with other settings" in other.stderr
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(definition | {"baseline": "falt"}))
    wrong = study(tmp_path / "wrong.yaml")
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].endswith("baseline: no arm 'falt'; did you mean flat?")
