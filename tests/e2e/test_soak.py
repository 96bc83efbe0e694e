"""A run that is killed at a random moment ends as the run that was not: one fault of tools/soak.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[2] / "tools" / "soak.py"


@pytest.mark.long
def test_one_fault_of_the_soak(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    options = ["--faults", "1", "--steps", "4", "--seed", "7", "--work", str(tmp_path / "work"), "--out", str(out)]
    done = subprocess.run([sys.executable, str(SOAK), *options], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads(out.read_text())
    assert summary["faults"] >= 1
    assert summary["hung"] == 0
    assert summary["identical"] == summary["runs"] > 0
