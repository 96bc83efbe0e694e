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


@pytest.mark.long
def test_small_rows(tmp_path):
    out = tmp_path / "rows.json"
    kept = {"case": "TP9", "processes": 9, "millions": 9, "direct_over_floor": 1.5}
    kept |= {way: {"median": 0.002, "min": 0.001, "max": 0.003} for way in ("gather", "direct", "floor")}
    kept |= {"ranks": [{"received_bytes": 2_000_000, "least_bytes": 1_000_000}]}
    out.write_text(json.dumps({"rows": [kept]}))
    done = measure(out, "--processes", "2", "--rollout-tp", "2")
    assert done.returncode == 0, done.stderr
    first, *rows = json.loads(out.read_text())["rows"]
    assert first == kept
    assert [row["case"] for row in rows] == ["TP2 -> TP2", "PP2 -> TP2", "TP1 DP2 -> TP2"]
    for row in rows:
        assert all(0 < row[way]["median"] < 60 for way in ("gather", "direct", "unverified", "floor"))
        assert [rank["received_bytes"] for rank in row["ranks"]] == [rank["least_bytes"] for rank in row["ranks"]]
        assert len(row["commit"]) >= 7
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert table[-1] == "| TP9 | 9, 9M | 2 (1-3) | 2 (1-3) | 2 (1-3) | 1.50 | 2.0 (1.0) |"


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
