"""The runs of a study, one after the other, and what each brought; what is done is not run again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import treepo_mcore
from treepo_mcore.config import ConfigError
from treepo_mcore.study.definition import Study, overrides
from treepo_mcore.system.environment import package_versions

Run = dict[str, Any]  # a row of the results
WORK = ("push", "rollout", "choose", "update")  # parts of a step that count as training


def sources() -> str:
    """A hash of this package's files: results of other ones are not comparable."""
    folder = Path(treepo_mcore.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """A JSON file that grows by a run at a time."""

    def __init__(self, file: Path, study: Study, grows: bool = True) -> None:
        """grows: runs will be added. Raises `ConfigError` where those would not be comparable: other versions, other
        settings of an arm."""
        self.file = file
        self.made_by = package_versions() | {"sources": sources(), "cores": str(os.cpu_count())}
        self.runs: list[Run] = []
        if not file.is_file():
            return
        found = json.loads(file.read_text())
        for key, mine in self.made_by.items() if grows else ():
            if found["made_by"].get(key) != mine:
                raise ConfigError(
                    f"{file}: made with {key} {found['made_by'].get(key)}, now {mine}; move it away first"
                )
        self.runs = found["runs"]
        for run in self.runs:
            if run["arm"] in study.arms and run["settings"] != study.settings_of(run["arm"], run["seed"]):
                raise ConfigError(f"{file}: arm {run['arm']} was run with other settings; give it another name")

    def has(self, arm: str, seed: int) -> bool:
        """Whether this run is done."""
        return any(run["arm"] == arm and run["seed"] == seed for run in self.runs)

    def add(self, run: Run) -> None:
        """Keep a run; the file is whole at any time."""
        self.runs.append(run)
        part = self.file.with_suffix(".part")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"made_by": self.made_by, "runs": self.runs}, indent=1) + "\n")
        part.replace(self.file)


def run_all(study: Study, results: Results, folder: Path, max_runs: int | None = None) -> None:
    """What is missing, seed by seed, so that pairs are near in time. folder: for the runs' files.

    max_runs: stop after so many. Raises `ConfigError` where a run fails, or where the model is not a warm one.
    """
    missing = [(seed, arm) for seed in study.seeds for arm in study.arms if not results.has(arm, seed)]
    for seed, arm in missing[:max_runs]:
        run = one_run(study, arm, seed, folder / f"{arm.replace(' ', '-')}-{seed}")
        check_warm(study, run)
        results.add(run)


def check_warm(study: Study, run: Run) -> None:
    """Raise `ConfigError` where the model that training begins with is too weak, or too good, to compare arms with."""
    if study.warm is None:
        return
    (low, high), accuracy = study.warm, run["points"][0][3]
    if not low <= accuracy <= high:
        raise ConfigError(f"warm: expected an accuracy of {low:g} to {high:g} before training, found {accuracy:.3f}")


def one_run(study: Study, arm: str, seed: int, directory: Path) -> Run:
    """Train once, in processes of its own."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    settings = study.settings_of(arm, seed)
    load = round(os.getloadavg()[0], 2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={study.processes}"]
    command = [
        *launcher,
        "-m",
        "treepo_mcore",
        "train",
        str(study.config),
        *overrides(settings),
        f"run.dir={directory}",
    ]
    log = directory / "log.txt"
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if status:
        raise ConfigError(f"arm {arm}, seed {seed}: the run ended with status {status}, see {log}")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    today = datetime.now(UTC).date().isoformat()
    return {"arm": arm, "seed": seed, "settings": settings, "date": today, "load": load} | outcome(rows)


def outcome(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of metrics.jsonl: accuracies with the seconds of training and the decoded tokens before them, and the sums."""
    seconds, tokens, points, values = 0.0, 0, [], []
    for row in rows:
        if "eval/accuracy" in row:
            points.append([row["step"], round(seconds, 2), tokens, row["eval/accuracy"]])
        if "time/step" in row:
            seconds += sum(row[f"time/{part}"] for part in WORK)
            tokens += row["rollout/decoded_tokens"]
            values.append(row)
    half = values[len(values) // 2 :]
    return {
        "steps": len(values),
        "seconds": round(seconds, 2),
        "decoded_tokens": tokens,
        "informative": round(sum(row["filter/kept"] for row in half) / len(half), 4),
        "tokens_per_informative": round(sum(row["rollout/tokens_per_informative"] for row in half) / len(half), 1),
        "points": points,  # [step, seconds, decoded tokens, held-out accuracy]
    }
