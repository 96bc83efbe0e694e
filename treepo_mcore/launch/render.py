"""A job described by a few settings -> the script that runs it; the texts are in ``templates/``."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from treepo_mcore.config import NEWEST_CHECKPOINT, Config, ConfigError, check_grid, load_config
from treepo_mcore.system.signals import STOPPED
from treepo_mcore.system.time_limit import seconds_of

REFUSED = 2  # status of the command where a configuration or a file cannot be used
EARLY_SECONDS = 60  # by which Slurm's --signal may come before the time it is asked for


@dataclass(frozen=True)
class Job:
    """What both launchers need. Field names are the command's options."""

    config: Path
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int = 8
    processes_per_node: int | None = None  # default: one per GPU; without GPUs it must be said
    python: str = "python"
    port: int | None = None
    interface: str | None = None
    ib_hca: str | None = None
    nvlinks: int | None = None
    disk_gib: int = 100
    memory_gib: int = 64

    @property
    def processes(self) -> int:
        """Ranks of a node."""
        return self.processes_per_node or self.gpus_per_node

    def check(self) -> Config:
        """The configuration, if it can run on so many processes. Raises `ConfigError`."""
        if self.processes < 1:
            raise ConfigError("--processes-per-node: needed where --gpus-per-node is 0")
        if self.gpus_per_node and self.processes != self.gpus_per_node:
            raise ConfigError(
                f"--processes-per-node: {self.processes}, expected one for each of --gpus-per-node {self.gpus_per_node}"
            )
        config = load_config(self.config, list(self.overrides))
        check_grid(config, self.nodes * self.processes)
        return config


@dataclass(frozen=True)
class SlurmJob(Job):
    """A batch script: one task a process, started by srun."""

    job_name: str = "treepo"
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str = "04:00:00"
    signal_seconds: int = 600
    exclusive: bool = True
    container_image: str | None = None
    container_mounts: str | None = None


@dataclass(frozen=True)
class TorchrunJob(Job):
    """A script to run on every node: one torchrun a node."""

    rendezvous: Literal["static", "c10d"] = "static"
    head: str | None = None


def render(job: SlurmJob | TorchrunJob) -> str:
    """The script. Raises `ConfigError` where the configuration or the layout cannot be used."""
    config = job.check()
    if isinstance(job, TorchrunJob) and job.nodes > 1 and job.head is None:
        raise ConfigError("--head: needed with several nodes, the address of the first one")
    if isinstance(job, SlurmJob):
        _check_slurm(job)
        _check_signal(job, config.run.dir)
        if not config.run.resume:
            raise ConfigError("run.resume: found false; a requeued job would begin anew at every attempt")
    launcher = "slurm" if isinstance(job, SlurmJob) else "torchrun"
    environment = Environment(
        loader=PackageLoader("treepo_mcore.launch"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template(f"{launcher}.sh.j2").render(
        job=job,
        command=command_line(job, launcher),
        run_dir=config.run.dir,
        tracker=config.run.checkpoints.relative_to(config.run.dir) / NEWEST_CHECKPOINT,
        stopped=STOPPED,
        refused=REFUSED,
        log_name=Path(job.config).stem,
    )


def _check_slurm(job: SlurmJob) -> None:
    if job.container_mounts and not job.container_image:
        raise ConfigError("--container-mounts: needs --container-image")
    for name in ("job_name", "account", "partition", "qos"):
        value = getattr(job, name)
        if value and not re.fullmatch(r"[\w.,:+@%-]+", value):
            raise ConfigError(
                f"--{name.replace('_', '-')}: expected letters, digits and . , : + @ % _ -, found {value!r}"
            )
    limit = seconds_of(job.time)
    if job.signal_seconds >= limit - EARLY_SECONDS:
        raise ConfigError(
            f"--signal-seconds: {job.signal_seconds} leaves nothing of --time {job.time} ({limit} s), of which Slurm "
            f"may take another {EARLY_SECONDS} s"
        )


def _check_signal(job: SlurmJob, run_dir: Path) -> None:
    """Where the run has been before, its longest step and checkpoint have to fit into the warning."""
    step, save = seconds_seen(run_dir)
    if step + save > job.signal_seconds:
        raise ConfigError(
            f"--signal-seconds: {job.signal_seconds}, but in {run_dir} a step took up to {step:.0f} s and saving up to "
            f"{save:.0f} s; expected {math.ceil(step + save)} or more, or the run would end before it has saved"
        )


def seconds_seen(run_dir: Path) -> tuple[float, float]:
    """The longest step, without what came between steps, and the longest save of a run; 0 where there was none."""
    file = run_dir / "metrics.jsonl"
    step = save = 0.0
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:  # cut short by a job that died
            continue
        between = sum(values.get(f"time/{part}", 0.0) for part in ("save", "evaluate"))
        step = max(step, values.get("time/step", 0.0) - between)
        save = max(save, values.get("time/save", 0.0), values.get("save/seconds", 0.0))
    return step, save


def command_line(job: SlurmJob | TorchrunJob, launcher: str) -> str:
    """The command that renders this script: what differs from the defaults."""
    words = ["treepo-mcore", "launch", launcher, str(job.config), *job.overrides]
    for field in fields(job):
        value = getattr(job, field.name)
        if field.name in ("config", "overrides") or value == field.default:
            continue
        option = field.name.replace("_", "-")
        words += [f"--no-{option}"] if value is False else [f"--{option}", str(value)]
    return shlex.join(words)
