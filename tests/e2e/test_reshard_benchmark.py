"""benchmarks/reshard.py: a small row from end to end, and what it does with a row that fails."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reshard.py"
sys.path.insert(0, str(SCRIPT.parent))  # it imports its neighbours
spec = importlib.util.spec_from_file_location("reshard_benchmark", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def measure(out, *arguments):
    command = [sys.executable, "-W", "ignore", SCRIPT, "--millions", "3", "--repeats", "1", "--out", out, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_rows_that_fail_leave_the_others(tmp_path, monkeypatch, capsys):
    """One of three does; when all do, that is the status."""
    way = {"median": 1.0, "min": 1.0, "max": 1.0}
    ranks = [dict.fromkeys(("received_bytes", "least_bytes", "staging_bytes", "checksum_seconds"), 0)]

    def launch(repeats, millions, processes, rollout_tp, case):
        if case in failing:
            return None
        row = {"case": case, "processes": processes, "millions": millions, "ranks": ranks}
        row |= dict.fromkeys(("gather", "direct", "unverified", "floor"), way)
        return row | {"direct_over_floor": 1.0, "gather_over_direct": 1.0}

    monkeypatch.setattr(benchmark, "launch", launch)
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["reshard.py", "--processes", "2", "--rollout-tp", "2", "--out", str(out)])
    failing = ["PP2 -> TP2"]
    benchmark.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["TP2 -> TP2", "TP1 DP2 -> TP2"] * 2
    assert "failed: PP2 -> TP2, 2 processes, 50M; PP2 -> TP2, 2 processes, 500M" in capsys.readouterr().err
    failing = ["TP2 -> TP2", "PP2 -> TP2", "TP1 DP2 -> TP2"]
    with pytest.raises(SystemExit):
        benchmark.main()
    assert json.loads(out.read_text())["rows"] == rows


def test_all_rows_of_the_table(monkeypatch):
    """Without arguments: what docs/resharding.md shows."""
    asked = []
    monkeypatch.setattr(benchmark, "launch", lambda repeats, *row: asked.append(row))
    monkeypatch.setattr(sys, "argv", ["reshard.py", "--out", "/nonexistent/rows.json"])
    with pytest.raises(SystemExit):
        benchmark.main()
    sizes = [(millions, processes) for millions, processes, _, _ in asked]
    assert {size: sizes.count(size) for size in sizes} == {(50, 2): 5, (50, 4): 3, (50, 8): 1, (500, 2): 5, (500, 4): 2}
