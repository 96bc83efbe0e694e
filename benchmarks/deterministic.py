"""What `run.deterministic` costs the rollout phase of two engines, in the quickstart's own training runs.

    python benchmarks/deterministic.py        -> benchmarks/results/deterministic.json

Needs the warm model that examples/quickstart/run.py leaves under .cache/quickstart. Runs take turns, with and without;
seconds are summed over the steps of a run but the first. `replacing`: rejected prompts are replaced, as in real runs,
so that engines that go by logical time also wait for each other's verdicts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import machine

RUN = Path("examples/quickstart/run.py")
OUT = Path("benchmarks/results/deterministic.json")
SETTINGS = {
    "the quickstart's": [],
    "replacing": ["filter.max_prompts_factor=2.0", "trainer.prompts_per_step=32", "trainer.prompts_per_update=16"],
}
SUMS = (
    "time/rollout",
    "rollout/idle_seconds",
    "rollout/engine_steps",
    "rollout/decoded_tokens",
    "rollout/drawn_prompts",
)


def train(directory: Path, steps: int, settings: list[str]) -> dict[str, float]:
    """One run on two processes; its sums."""
    fixed = [f"run.dir={directory}", "run.resume=false", "trainer.export=false", f"trainer.steps={steps}"]
    subprocess.run([sys.executable, RUN, "--nproc", "2", *fixed, *settings], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    phases = [row for row in rows if "time/rollout" in row][1:]
    return {name: sum(row[name] for row in phases) for name in SUMS}


def main() -> None:
    """All runs, the table, the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "steps": options.steps, "settings": SETTINGS, "runs": {}}
    for name, settings in SETTINGS.items():
        runs: dict[str, list[dict[str, float]]] = {"false": [], "true": []}
        for _ in range(options.repeats):
            for value, made in runs.items():
                chosen = [*settings, f"run.deterministic={value}"]
                made.append(train(Path("runs/deterministic") / value, options.steps, chosen))
        results["runs"][name] = runs
        for value, made in runs.items():
            seconds = [run["time/rollout"] for run in made]
            middle = {key: statistics.median(run[key] for run in made) for key in SUMS}
            print(
                f"{name:18} deterministic {value:5}  rollout {middle['time/rollout']:.2f} s "
                f"({min(seconds):.2f} to {max(seconds):.2f})  idle {middle['rollout/idle_seconds']:.2f} engine-s  "
                f"{middle['rollout/engine_steps']:.0f} steps  {middle['rollout/decoded_tokens']:.0f} tokens  "
                f"{middle['rollout/drawn_prompts']:.0f} prompts drawn",
                flush=True,
            )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
