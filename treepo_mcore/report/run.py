"""What a run left in its directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_mcore.config import Config, ConfigError, load_config

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run as its files show it."""

    folder: Path
    config: Config
    steps: list[Row]  # lines of metrics.jsonl, one a step
    evaluations: list[Row]  # lines of metrics.jsonl, with the step before which each was made
    summary: Row  # empty before the run's end
    versions: Row
    saved: list[Path]  # folders of saved trees, in the order of their steps

    @property
    def name(self) -> str:
        """For people."""
        return self.folder.name


def read_run(folder: Path) -> Run:
    """Read a run's directory. Raises `ConfigError` where it is none."""
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise ConfigError(f"{folder}: no metrics.jsonl, expected a run's directory")
    try:
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    except ValueError as error:
        raise ConfigError(f"{log}: not valid JSON: {error}") from error
    return Run(
        folder,
        load_config(folder / "config.yaml"),
        [row for row in rows if "time/step" in row],
        [row for row in rows if "eval/accuracy" in row],
        _json(folder / "summary.json"),
        _json(folder / "versions.json"),
        sorted((folder / "trees").glob("step_??????")),
    )


def _json(file: Path) -> Row:
    if not file.is_file():
        return {}
    try:
        found: Row = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from error
    return found
