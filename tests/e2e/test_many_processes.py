"""The quickstart's configuration on eight processes with every kind of parallelism, in the memory of a laptop."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from test_train import start

GIB = 2**30
SETTINGS = [
    "actor.tp=2",
    "actor.pp=2",
    "rollout.tp=1",
    # Eight engines: 64 MB of KV cache each instead of 1 GB, and fewer requests at once.
    f"rollout.engine.kv_cache_memory_bytes={64 * 2**20}",
    "rollout.engine.max_num_seqs=32",
    "trainer.steps=2",
    "trainer.prompts_per_step=16",
    "trainer.prompts_per_update=8",
    "trainer.eval_before=false",
]


def family(root: int) -> list[int]:
    """A process and all below it."""
    found, children = [root], {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(status.parent.name))
    for process in found:
        found += children.get(process, [])
    return found


def memory(root: int) -> tuple[float, float]:
    """Resident GiB below a process: summed as each counts it, and with shared pages shared out."""
    totals = [0, 0]
    for process in family(root):
        try:
            rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        sizes = {row.split(":")[0]: int(row.split()[1]) * 1024 for row in rows[1:]}
        totals[0] += sizes["Rss"]
        totals[1] += sizes["Pss"]
    return totals[0] / GIB, totals[1] / GIB


@pytest.mark.long
def test_eight_processes_train_within_24_gib(task: list[str], tmp_path: Path) -> None:
    begin = time.monotonic()
    process = start(8, [*task, *SETTINGS, f"run.dir={tmp_path}"])
    peaks = [0.0, 0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            peaks[:] = map(max, peaks, memory(process.pid))

    watching = threading.Thread(target=watch)
    watching.start()
    output, _ = process.communicate(timeout=2400)
    done.set()
    watching.join()
    print(f"peak resident memory {peaks[0]:.1f} GiB (shared pages once: {peaks[1]:.1f} GiB)", end=", ")
    print(f"{time.monotonic() - begin:.0f} s in all")
    assert process.returncode == 0, output[-4000:]
    summary = json.loads(output.strip().splitlines()[-1])
    assert summary["layout"] == "tp2 pp2 dp2 rollout-tp1"
    assert summary["steps"] == 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward/mean" in row] == [0, 1]
    assert max(row.get("mismatch/logprob_abs_max", 0.0) for row in rows) < 1e-4
    assert 0 < peaks[0] < 24
