"""What a study compares: a YAML file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from treepo_mcore.config import ConfigError, Section, load_config
from treepo_mcore.config.base import did_you_mean
from treepo_mcore.config.files import parse_section, read_yaml

Settings = dict[str, Any]  # dotted key of the configuration -> value


class Study(Section):
    """Arms, each run with every seed; runs of the same seed are a pair."""

    title: str
    config: Path  # of all runs, from the current directory
    prepare: list[str] = []  # a Python script and its arguments, run before the first run
    processes: int = Field(1, ge=1)  # of a run, on this machine
    seeds: list[int] = Field(min_length=1)  # run.seed
    settings: Settings = {}  # of all arms
    arms: dict[str, Settings] = Field(min_length=2)
    baseline: str  # the arm that others are compared with
    target: float = Field(gt=0, lt=1)  # held-out accuracy whose time is compared
    warm: tuple[float, float] | None = None  # between these the accuracy before training has to lie

    @model_validator(mode="after")
    def _names(self) -> Study:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline: no arm {self.baseline!r}{did_you_mean(self.baseline, self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected each once, found {self.seeds}")
        for name in self.arms:
            if not name or not all(letter.isalnum() or letter in " .,+@_-" for letter in name):
                raise ValueError(f"arms: expected letters, digits, blanks and . , + @ _ - in a name, found {name!r}")
        return self

    def settings_of(self, arm: str, seed: int) -> Settings:
        """All that a run sets, but for where it writes."""
        return self.settings | self.arms[arm] | {"run.seed": seed}


def read_study(file: Path) -> Study:
    """Read a study and check the configuration of every arm. Raises `ConfigError` with one line."""
    study = parse_section(Study, read_yaml(file), str(file))
    for arm in study.arms:
        try:
            config = load_config(study.config, overrides(study.settings_of(arm, study.seeds[0])))
        except ConfigError as error:
            raise ConfigError(f"{file}: arm {arm}: {error}") from error
        if config.data.eval is None or not config.trainer.eval_every:
            raise ConfigError(f"{file}: arm {arm}: expected data.eval and trainer.eval_every, to compare accuracies")
        if study.warm and not config.trainer.eval_before:
            raise ConfigError(f"{file}: arm {arm}: warm needs trainer.eval_before")
    return study


def overrides(settings: Settings) -> list[str]:
    """As the command line takes them: values as JSON, which YAML contains."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def prepare(study: Study) -> None:
    """Make what the runs read, where the study says how. Raises `ConfigError`."""
    if study.prepare and subprocess.run([sys.executable, *study.prepare]).returncode:
        raise ConfigError(f"prepare: {' '.join(study.prepare)} failed")
