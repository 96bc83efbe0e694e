"""Kill a small run again and again, at random moments, and see that it ends as the run that was never killed.

    python tools/soak.py [--minutes 60] [--faults N] [--seed 0] [--out benchmarks/results/soak.json]

Two processes train the quickstart's untrained model in float32 under `run.deterministic` and save every step. A fault
is SIGKILL to one rank, to all of them, to torchrun, or to a rank while a checkpoint is written, or SIGUSR1 to one. The
same command then goes on; after three faults it is left in peace. Its weights and metrics are compared, bit for bit,
with those of a run without faults. Prints a line a fault and a summary; exit status 1 where anything differed or hung.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
FAULTS = ("rank", "all", "torchrun", "writer", "signal")
FAULTS_OF_A_RUN = 3
SECONDS_TO_END = 60  # of what is left of a job
NOT_COMPARED = ("time/", "memory/", "push/", "rollout/", "save/")  # seconds and bytes


def main() -> None:
    """Run the faults and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--faults", type=int, default=10**6, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8, help="of a run")
    parser.add_argument("--work", type=Path, default=Path(".cache/soak"), help="folder for models and runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begin, rng = time.monotonic(), random.Random(options.seed)
    shutil.rmtree(options.work, ignore_errors=True)
    overrides = [*make_task(options.work), f"trainer.steps={options.steps}"]
    whole = Job(options.work / "whole", overrides)
    seconds = whole.to_the_end()
    expected, faults, runs = whole.outcome(), [], []
    while time.monotonic() - begin < 60 * options.minutes and len(faults) < options.faults:
        job = Job(options.work / f"run{len(runs)}", overrides)
        while len(job.faults) < FAULTS_OF_A_RUN and job.fault(rng, seconds):
            print(json.dumps(job.faults[-1]), flush=True)
        job.to_the_end()
        faults += job.faults
        differs = compare(job.outcome(), expected)
        runs.append({"faults": len(job.faults), "identical": not differs})
        print(json.dumps(runs[-1]), *differs, flush=True)
        if not differs:
            shutil.rmtree(job.folder)
    summary = summarise(faults, runs, time.monotonic() - begin, options.seed)
    print(json.dumps(summary, indent=1))
    if options.out:
        options.out.write_text(json.dumps(summary | {"log": faults}, indent=1) + "\n")
    sys.exit(0 if all(run["identical"] for run in runs) and summary["hung"] == 0 else 1)


def make_task(folder: Path) -> list[str]:
    """Data, tokenizer and an untrained model; the overrides that point to them."""
    python = [sys.executable]
    data = [*python, QUICKSTART / "make_data.py", "--out", folder, "--train", "200", "--eval", "16"]
    subprocess.run(data, check=True)
    corpus = ["--corpus", folder / "sft.jsonl", "--out", folder / "tokenizer", "--vocab-size", "320"]
    subprocess.run([*python, QUICKSTART / "make_tokenizer.py", *corpus], check=True)
    made = ["--tokenizer", folder / "tokenizer", "--out", folder / "model"]
    subprocess.run([*python, QUICKSTART / "make_model.py", *made], check=True)
    return [
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'eval.jsonl'}",
        "trainer.prompts_per_step=4",
        "trainer.prompts_per_update=2",
        "trainer.save_every=1",
        "trainer.save_trees_every=0",
        "filter.enabled=false",
        "run.deterministic=true",
    ]


class Job:
    """One run, by the same command as often as it takes."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder, self.overrides = folder, [*overrides, f"run.dir={folder}"]
        self.faults: list[dict[str, Any]] = []

    def to_the_end(self) -> float:
        """Seconds that the command took. Raises RuntimeError where it fails."""
        begin, process = time.monotonic(), self._start()
        if process.wait(600) != 0:
            raise RuntimeError(f"the command failed:\n{self._log().read_text()[-6000:]}")
        return time.monotonic() - begin

    def fault(self, rng: random.Random, seconds: float) -> bool:
        """Start the command, and a fault at a random moment; False where the run ended before."""
        kind, process = rng.choice(FAULTS), self._start()
        begin, moment = time.monotonic(), time.monotonic() + rng.uniform(0.2, 0.95) * seconds
        while time.monotonic() < moment or (kind == "writer" and not self._writing()):
            if process.poll() is not None:
                assert process.returncode == 0, self._log().read_text()[-6000:]
                return False
            time.sleep(0.01)
        fault = {
            "kind": kind,
            "after": round(time.monotonic() - begin, 1),
            "step": self._step(),
            "writing": self._writing(),
        }
        struck, processes = time.monotonic(), family(process.pid)
        self._strike(kind, process.pid, processes, rng)
        while alive := left(processes):
            if time.monotonic() - struck > SECONDS_TO_END:
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.05)
            process.poll()
        process.wait()
        self.faults.append(fault | {"seconds_to_end": round(time.monotonic() - struck, 1), "hung": bool(alive)})
        return True

    def outcome(self) -> dict[str, Any]:
        """The sum of the weights, and every step's metrics but for seconds and bytes."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        rows = [{k: v for k, v in line.items() if not k.startswith(NOT_COMPARED)} for line in lines]
        weights = (self.folder / "policy" / "model.safetensors").read_bytes()
        return {"weights": hashlib.sha256(weights).hexdigest(), "metrics": rows}

    def _start(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*launcher, "-m", "treepo_mcore", "train", str(QUICKSTART / "config.yaml"), *self.overrides]
        with self._log().open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _strike(self, kind: str, launcher: int, processes: set[int], rng: random.Random) -> None:
        below = [pid for pid in processes if (state := state_of(pid)) and state[1] == launcher]
        ranks = [pid for pid in below if b"treepo_mcore" in command_of(pid)]
        if kind == "torchrun" or not ranks:
            os.kill(launcher, signal.SIGKILL)
            return
        for rank in ranks if kind == "all" else [rng.choice(ranks)]:
            os.kill(rank, signal.SIGUSR1 if kind == "signal" else signal.SIGKILL)

    def _log(self) -> Path:
        return self.folder.with_suffix(".log")

    def _step(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_text().count("reward/mean") if metrics.exists() else 0

    def _writing(self) -> bool:
        return any((self.folder / "checkpoints").glob("iter_*.part"))


def family(pid: int) -> set[int]:
    """A process and all below it."""
    found, grown = {pid}, True
    parents = {child: state[1] for child in numbers() if (state := state_of(child))}
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return found


def numbers() -> list[int]:
    """Of all processes."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def state_of(pid: int) -> tuple[str, int] | None:
    """State and parent of a process; None when it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1])


def left(pids: set[int]) -> list[int]:
    """Those that have not ended."""
    return [pid for pid in pids if (state := state_of(pid)) and state[0] != "Z"]


def command_of(pid: int) -> bytes:
    """The command line of a process, empty when it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def compare(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    differs = [] if found["weights"] == expected["weights"] else ["weights differ"]
    one, other = found["metrics"], expected["metrics"]
    if [row["step"] for row in one] != [row["step"] for row in other]:
        return [*differs, f"steps {[row['step'] for row in one]}, not {[row['step'] for row in other]}"]
    for mine, theirs in zip(one, other, strict=True):
        names = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        differs += [f"step {mine['step']}: {', '.join(names)}"] if names else []
    return differs


def summarise(faults: list[dict[str, Any]], runs: list[dict[str, Any]], seconds: float, seed: int) -> dict[str, Any]:
    """What a reader wants to know first."""
    return {
        "minutes": round(seconds / 60, 1),
        "seed": seed,
        "faults": len(faults),
        "by_kind": dict(Counter(fault["kind"] for fault in faults)),
        "while_a_checkpoint_was_written": sum(fault["writing"] for fault in faults),
        "hung": sum(fault["hung"] for fault in faults),
        "seconds_to_end": max((fault["seconds_to_end"] for fault in faults), default=0.0),
        "runs": len(runs),
        "identical": sum(run["identical"] for run in runs),
    }


if __name__ == "__main__":
    main()
