"""The pushes of four clusters on paper: `treepo-mcore plan reshard` for each, as one table and one JSON file.

    python benchmarks/reshard_paper.py --out benchmarks/results/reshard_paper.json

Nothing of it needs a GPU, weights or a second process. `wall` and `peak` are what the command itself took here;
all other figures are of the cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from treepo_mcore.system.versions import versions

MODELS = Path(__file__).resolve().parents[1] / "examples" / "models"
UNEVEN = {"first_stage_layers": 7, "last_stage_layers": 7}  # 126 layers over 16 stages
CLUSTERS: list[tuple[str, int, dict[str, int], int, bool]] = [  # model, nodes of 8 GPUs, actor, rollout.tp, FP8
    ("Llama-3.1-70B", 8, {"tp": 8, "pp": 4}, 8, False),
    ("Llama-3.1-70B", 8, {"tp": 8, "pp": 4}, 8, True),
    ("Llama-3.1-70B", 8, {"tp": 4, "pp": 4}, 8, False),
    ("Llama-3.1-70B", 8, {"tp": 4, "pp": 4}, 8, True),
    ("Qwen2.5-72B", 8, {"tp": 8, "pp": 4}, 8, False),
    ("Llama-3.1-405B", 32, {"tp": 8, "pp": 16} | UNEVEN, 16, False),
    ("Llama-3.1-405B", 32, {"tp": 8, "pp": 16} | UNEVEN, 8, True),
]
HEAD = ("model", "ranks", "actor", "engine", "received", "sent", "rounds", "staging", "at least", "predicted")


def main() -> None:
    """Run every cluster in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reshard_paper.json"))
    options = parser.parse_args()
    results = []
    print("".join(f"{cell:>14}" for cell in (*HEAD, "wall", "peak")))
    for cluster in CLUSTERS:
        result = run(*cluster)
        results.append(result)
        print("".join(f"{cell:>14}" for cell in row(result)), flush=True)
    options.out.write_text(json.dumps({"versions": versions(), "clusters": results}, indent=1) + "\n")


def run(model: str, nodes: int, actor: dict[str, int], rollout_tp: int, fp8: bool) -> dict[str, Any]:
    """One cluster's report without the rows of single ranks, and what the command took."""
    overrides = [f"actor.{key}={value}" for key, value in actor.items()] + [f"rollout.tp={rollout_tp}"]
    overrides += ["rollout.engine.quantization=fp8_per_block"] * fp8
    with tempfile.TemporaryDirectory() as folder:
        config, output = Path(folder) / "run.yaml", Path(folder) / "output"
        config.write_text(json.dumps({"model": {"path": str(MODELS / model)}, "data": {"train": "none"}}))
        arguments = ["plan", "reshard", str(config), *overrides, "--nodes", str(nodes), "--json"]
        begin = time.perf_counter()
        with output.open("w") as file:
            process = subprocess.Popen([sys.executable, "-m", "treepo_mcore", *arguments], stdout=file)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(arguments)}: status {status}")
        report = json.loads(output.read_text())
    del report["by_rank"]
    report |= {"wall_seconds": round(time.perf_counter() - begin, 1), "peak_gib": round(usage.ru_maxrss / 2**20, 2)}
    return {"command": " ".join(["treepo-mcore plan reshard CONFIG", *overrides, f"--nodes {nodes}"])} | report


def row(result: dict[str, Any]) -> list[str]:
    """Cells of the table: GB, MiB, seconds."""
    actor = result["actor"]
    return [
        result["model"].removeprefix("Llama-3.1-"),
        str(result["ranks"]),
        f"tp{actor['tp']} pp{actor['pp']} dp{actor['dp']}",
        f"{result['engines']} x tp{result['rollout_tp']}" + " fp8" * bool(result["quantised_by"]),
        f"{result['bytes_received_max'] / 1e9:.2f} GB",
        f"{result['bytes_sent_max'] / 1e9:.2f} GB",
        f"{result['rounds']:,}",
        f"{result['staging_bytes_max'] / 2**20:.0f} MiB",
        f"{result['seconds_at_least']:.3f} s",
        f"{result['seconds_predicted']:.3f} s",
        f"{result['wall_seconds']:.0f} s",
        f"{result['peak_gib']:.1f} GiB",
    ]


if __name__ == "__main__":
    main()
