"""The quickstart's training in every layout: twenty steps of seed 0 from the same warm model, a table and a JSON file.

    python examples/quickstart/layouts.py            -> benchmarks/results/quickstart_layouts.json

Seeds and controls are studies: `treepo-mcore study studies/trees_that_pay.yaml`, `studies/controls.yaml`.
"""

from __future__ import annotations

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


def layouts() -> list[dict[str, Any]]:
    """A run of each."""
    steps = f"trainer.steps={LAYOUT_STEPS}"
    return [quickstart(name, steps, *how, processes=processes) for name, (processes, how) in LAYOUTS.items()]


def main() -> None:
    rows = layouts()
    out = Path("benchmarks/results/quickstart_layouts.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    versions = json.loads((Path("runs/study") / rows[-1]["name"] / "versions.json").read_text())
    out.write_text(json.dumps({"versions": versions, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
