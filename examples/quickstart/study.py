"""The quickstart's evidence: three seeds and two controls from the same warm model, one table and one JSON file.

    python examples/quickstart/study.py            -> benchmarks/results/quickstart.json
    python examples/quickstart/study.py --layouts  -> benchmarks/results/quickstart_layouts.json

shuffled: leaves that are trained on get the rewards of others; what is learned then is not learned from rewards.
flat: independent answers instead of trees, the same number a prompt, for the same time as the tree run of seed 0.
--layouts: instead of these, twenty steps of seed 0 in every layout, from the same warm model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RUN = Path(__file__).with_name("run.py")
LAYOUTS = {  # processes, settings
    "DP2, two engines": (2, []),
    "DP2, one engine": (2, ["rollout.tp=2"]),
    "TP2, two engines": (2, ["actor.tp=2"]),
    "TP2 SP, one engine": (2, ["actor.tp=2", "actor.sequence_parallel=true", "rollout.tp=2"]),
    "PP2, two engines": (2, ["actor.pp=2"]),
    "TP2 PP2, four engines": (4, ["actor.tp=2", "actor.pp=2"]),
}
LAYOUT_STEPS = 20


def quickstart(name: str, *overrides: str, processes: int = 2) -> dict[str, Any]:
    """One run; returns its summary and the largest mismatch of engine and actor in a step."""
    directory = Path("runs/study") / name
    settings = [f"run.dir={directory}", "run.resume=false", "trainer.export=false", *overrides]
    command = [sys.executable, RUN, "--nproc", str(processes), *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    summary["mismatch_max"] = max(row.get("mismatch/logprob_abs_max", 0.0) for row in rows)
    print(
        f"{name:<22} {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}  "
        f"{summary['steps']:>3} steps  {summary['train_seconds']:>6.1f} s training  "
        f"engine - actor at most {summary['mismatch_max']:.1e} nats",
        flush=True,
    )
    return summary | {"name": name}


def seeds_and_controls() -> list[dict[str, Any]]:
    """Five runs."""
    rows = [quickstart(f"seed {seed}", f"run.seed={seed}") for seed in range(3)]
    same_time = [f"trainer.max_seconds={rows[0]['train_seconds']}", "trainer.steps=1000"]
    rows.append(quickstart("shuffled", "reward.shuffle=true"))
    rows.append(quickstart("flat", "rollout.sampler=flat", *same_time))
    return rows


def layouts() -> list[dict[str, Any]]:
    """A run of each."""
    steps = f"trainer.steps={LAYOUT_STEPS}"
    return [quickstart(name, steps, *how, processes=processes) for name, (processes, how) in LAYOUTS.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layouts", action="store_true", help="layouts instead of seeds and controls")
    chosen = parser.parse_args().layouts
    rows = layouts() if chosen else seeds_and_controls()
    out = Path("benchmarks/results") / ("quickstart_layouts.json" if chosen else "quickstart.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    versions = json.loads((Path("runs/study") / rows[-1]["name"] / "versions.json").read_text())
    out.write_text(json.dumps({"versions": versions, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
