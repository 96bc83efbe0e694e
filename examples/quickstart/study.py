"""The quickstart's evidence: three seeds and two controls from the same warm model, one table and one JSON file.

    python examples/quickstart/study.py [--out benchmarks/results/quickstart.json]

shuffled: every leaf gets the reward of another leaf of its step; what is learned then is not learned from rewards.
flat: independent answers instead of trees, the same number a prompt, for the same time as the tree run of seed 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RUN = Path(__file__).with_name("run.py")


def quickstart(name: str, *overrides: str) -> dict[str, Any]:
    """One run; returns its summary."""
    directory = Path("runs/study") / name
    settings = [f"run.dir={directory}", "run.resume=false", "trainer.export=false", *overrides]
    subprocess.run([sys.executable, RUN, *settings], check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    print(
        f"{name:<10} {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}  "
        f"{summary['steps']:>3} steps  {summary['train_seconds']:>6.1f} s training",
        flush=True,
    )
    return summary | {"name": name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quickstart.json"))
    out = parser.parse_args().out
    rows = [quickstart(f"seed {seed}", f"run.seed={seed}") for seed in range(3)]
    same_time = [f"trainer.max_seconds={rows[0]['train_seconds']}", "trainer.steps=1000"]
    rows.append(quickstart("shuffled", "reward.shuffle=true"))
    rows.append(quickstart("flat", "rollout.sampler=flat", *same_time))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"versions": json.loads(Path("runs/study/flat/versions.json").read_text()), "runs": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
