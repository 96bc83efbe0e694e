"""What the quickstart does around the trainer: bad keys, and a run that is there already."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / "examples" / "quickstart" / "run.py"


@pytest.fixture
def quickstart(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("quickstart_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def test_a_bad_key_is_one_line_before_anything_is_made(tmp_path):
    done = subprocess.run(
        [sys.executable, RUN, "rollout.temprature=1"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "unknown key rollout.temprature; did you mean rollout.temperature?" in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_finished_run_starts_over_and_one_that_was_cut_off_goes_on(quickstart, tmp_path):
    overrides = [f"run.dir={tmp_path}"]
    config = quickstart.read_config(overrides)
    assert quickstart.start_over(config, overrides) == overrides
    summary = tmp_path / "summary.json"
    summary.write_text("{}")
    assert quickstart.start_over(config, [*overrides, "run.resume=true"]) == [*overrides, "run.resume=true"]
    assert quickstart.start_over(config, overrides) == [*overrides, "run.resume=false"]
    assert not summary.exists()


def test_without_a_python_3_12_one_line_says_how_to_get_it(tmp_path):
    done = subprocess.run(
        ["/bin/bash", ROOT / "tools" / "setup_venv.sh", tmp_path / "venv", ROOT / "requirements" / "cpu.lock"],
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "3.12" in done.stderr
