"""Experiment trackers: the numbers of metrics.jsonl, by step. Their libraries are imported where they are used."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from treepo_mcore.config import Config, ConfigError, RunConfig
from treepo_mcore.registry import resolve
from treepo_mcore.system.environment import deaf_children

log = logging.getLogger(__name__)

WANDB_PROJECT = "treepo_mcore"
WANDB_ID = "wandb_id"  # file in run.dir: under this id a resumed run continues


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """What is a number among the values of a step."""

    def close(self) -> None:
        """Nothing is written after this."""


def check_trackers(config: RunConfig) -> None:
    """Raise `ConfigError` for a tracker that is not known, or whose package or port is not there."""
    for name in config.trackers:
        find_tracker(name)
        package = PACKAGES.get(name, name)
        if name in TRACKERS and importlib.util.find_spec(package) is None:
            raise ConfigError(f"run.trackers: {name} is not installed here; pip install {package}, or leave it out")
    if "prometheus" in config.trackers and os.environ.get("RANK", "0") == "0":
        _check_port(config.prometheus_port)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(f"run.prometheus_port: {port} cannot be listened at: {error.strerror}") from error


def find_tracker(name: str) -> Callable[[Config, int], Tracker]:
    """One of `TRACKERS`, or a class of the user's. Raises `ConfigError` where there is none."""
    return resolve("run.trackers", name, TRACKERS, lambda function: function, ("config", "step"))


def open_trackers(config: Config, step: int) -> list[Tracker]:
    """Those that run.trackers names, for a run that starts, or goes on, at `step`.

    For rank 0, when metrics.jsonl is there and holds nothing that the run will repeat.
    """
    return [find_tracker(name)(config, step) for name in config.run.trackers]


class TensorBoard:
    """Event files in run.dir/tensorboard. What an earlier attempt wrote from `step` on is marked as void there."""

    def __init__(self, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(config.run.dir / "tensorboard"), purge_step=step)
        # The evaluation before this step goes with the rest, and will not be repeated.
        for values in _logged(config.run.dir / "metrics.jsonl", step):
            self.write(step, values)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """See `Tracker`."""
        for name, value in _numbers(values).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a job that is killed keeps what metrics.jsonl keeps

    def close(self) -> None:
        """See `Tracker`."""
        self.writer.close()


class WeightsAndBiases:
    """A wandb run, named after run.dir; WANDB_* environment variables say where it goes."""

    def __init__(self, config: Config, step: int) -> None:
        import wandb

        directory = config.run.dir
        with deaf_children():  # then SIGUSR1, by which Slurm tells of the time limit, does not end wandb's process
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
                name=os.environ.get("WANDB_NAME", directory.resolve().name),
                id=_wandb_id(directory / WANDB_ID, fresh=step == 0),
                resume="allow",
                dir=str(directory),
                config=config.model_dump(mode="json"),
            )
        # Not wandb's own count of calls: it never goes back, and would swallow the steps that a resumed run repeats.
        self.run.define_metric("*", step_metric="step")
        self.gone = False

    def write(self, step: int, values: dict[str, Any]) -> None:
        """See `Tracker`."""
        self._while_it_lives(lambda: self.run.log({"step": step, **_numbers(values)}))

    def close(self) -> None:
        """See `Tracker`."""
        self._while_it_lives(self.run.finish)

    def _while_it_lives(self, call: Callable[[], None]) -> None:
        """wandb's process ends by a SIGTERM to all of a Slurm step; the rank still has to finish its step and save."""
        if self.gone:
            return
        try:
            call()
        except ConnectionError as error:
            self.gone = True
            log.warning("run.trackers: wandb's process is gone (%s); the run goes on without it", error)


class Prometheus:
    """A page of the newest numbers at `run.prometheus_port` of rank 0's node, for a Prometheus server to read."""

    def __init__(self, config: Config, step: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self.registry = CollectorRegistry()  # vLLM fills the one that all share
        self.gauges: dict[str, Any] = {}
        self.server, self.thread = start_http_server(config.run.prometheus_port, registry=self.registry)
        self.write(step, {"steps": config.trainer.steps})

    def write(self, step: int, values: dict[str, Any]) -> None:
        """See `Tracker`. A name has treepo_mcore_ in front, and _ for what is no letter or digit."""
        from prometheus_client import Gauge

        for name, value in {**_numbers(values), "step": step, "written_timestamp_seconds": time.time()}.items():
            legal = "treepo_mcore_" + re.sub(r"\W", "_", name, flags=re.ASCII)
            if legal not in self.gauges:
                self.gauges[legal] = Gauge(legal, name, registry=self.registry)
            self.gauges[legal].set(value)

    def close(self) -> None:
        """See `Tracker`."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


TRACKERS: dict[str, Callable[[Config, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "prometheus": Prometheus,
}
PACKAGES = {"prometheus": "prometheus_client"}  # where they are not called like the tracker


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {n: v for n, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _logged(metrics: Path, step: int) -> list[dict[str, Any]]:
    rows = map(json.loads, metrics.read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "step"} for row in rows if row["step"] == step]


def _wandb_id(file: Path, fresh: bool) -> str:
    """The one kept in the file; a new one, kept there, for a run from the beginning."""
    if fresh or not file.is_file():
        file.write_text(uuid.uuid4().hex)
    return file.read_text()
