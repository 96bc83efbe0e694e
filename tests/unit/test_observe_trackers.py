"""Trackers: event files read back, a stand-in for wandb, and what is said when a package is missing."""

import json
import socket
import sys
import time
import urllib.request

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from treepo_mcore.config import ConfigError, RunConfig, parse_config
from treepo_mcore.observe.trackers import check_trackers, open_trackers

# Keeps what it is told in a list beside itself.
WANDB = """
import json, pathlib

def tell(*what):
    with open(pathlib.Path(__file__).with_name("told.jsonl"), "a") as file:
        file.write(json.dumps(what) + "\\n")

class Run:
    def define_metric(self, name, step_metric):
        tell("metric", name, step_metric)
    def log(self, values):
        if values["step"] == 7:
            raise ConnectionResetError("gone")
        tell("log", values)
    def finish(self):
        tell("finish")

def init(**arguments):
    tell("init", arguments)
    return Run()
"""


def config(tmp_path, *trackers):
    (tmp_path / "my_run").mkdir(exist_ok=True)
    (tmp_path / "my_run" / "metrics.jsonl").touch()
    run = {"dir": str(tmp_path / "my_run"), "trackers": list(trackers)}
    return parse_config({"run": run, "model": {"path": "m"}, "data": {"train": "t"}})


def write(settings, first, last, offset):
    """An attempt at the steps first .. last - 1."""
    (tracker,) = open_trackers(settings, first)
    for step in range(first, last):
        tracker.write(step, {"actor/loss": step + offset, "tokens": 10 * step, "layout": "tp1", "late": True})
    return tracker


def test_tensorboard_has_the_numbers_and_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    settings = config(tmp_path, "tensorboard")
    killed = write(settings, 0, 5, 0.5)  # not closed: what was written is there all the same
    # What MetricsLog leaves: the evaluation made before the step at which the run goes on.
    rows = [{"step": 2, "actor/loss": 2.5}, {"step": 3, "eval/accuracy": 0.125}]
    (tmp_path / "my_run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(settings, 3, 6, 0.25).close()
    events = EventAccumulator(str(tmp_path / "my_run" / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["actor/loss", "eval/accuracy", "tokens"]
    found = [(event.step, event.value) for event in events.Scalars("actor/loss")]
    assert found == [(0, 0.5), (1, 1.5), (2, 2.5), (3, 3.25), (4, 4.25), (5, 5.25)]
    assert [(event.step, event.value) for event in events.Scalars("eval/accuracy")] == [(3, 0.125)]
    assert [event.value for event in events.Scalars("tokens")] == [0, 10, 20, 30, 40, 50]
    killed.close()


def test_no_trackers_write_nothing(tmp_path):
    assert open_trackers(config(tmp_path), 0) == []
    assert [file.name for file in (tmp_path / "my_run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_line(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        check_trackers(RunConfig(trackers=[name]))
    assert str(caught.value) == f"run.trackers: {name} is not installed here; pip install {name}, or leave it out"


def test_a_prometheus_server_reads_the_newest_numbers(tmp_path):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    settings = config(tmp_path, "prometheus")
    settings.run.prometheus_port = port
    check_trackers(settings.run)
    (tracker,) = open_trackers(settings, 3)
    tracker.write(3, {"actor/loss": 0.5, "eval/pass@2": 0.25, "text": "no number", "filter/kept": None})
    tracker.write(4, {"actor/loss": 0.75})
    with pytest.raises(ConfigError, match=f"run.prometheus_port: {port} cannot be listened at: Address already in use"):
        check_trackers(settings.run)
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    found = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    written = float(found.pop("treepo_mcore_written_timestamp_seconds"))
    assert time.time() - 60 < written <= time.time()
    assert {name.removeprefix("treepo_mcore_"): float(value) for name, value in found.items()} == {
        "steps": settings.trainer.steps,
        "step": 4,
        "actor_loss": 0.75,
        "eval_pass_2": 0.25,
    }
    tracker.close()
    check_trackers(settings.run)


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Function that returns what the stand-in was told."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    yield lambda: [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    sys.modules.pop("wandb")


def test_a_resumed_run_keeps_its_wandb_id_and_a_new_one_gets_its_own(tmp_path, monkeypatch, told):
    settings = config(tmp_path, "wandb")
    check_trackers(settings.run)
    write(settings, 0, 1, 0.5).close()
    write(settings, 1, 2, 0.5).close()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    write(settings, 0, 1, 0.5).close()
    first, second, third = (row[1] for row in told() if row[0] == "init")
    assert first["id"] == second["id"] != third["id"]
    assert (first["name"], first["project"], third["project"]) == ("my_run", "treepo_mcore", "mine")
    assert first["resume"] == "allow"
    assert first["config"]["rollout"]["tree"]["width"] == 16
    assert told()[1:4] == [
        ["metric", "*", "step"],
        ["log", {"step": 0, "actor/loss": 0.5, "tokens": 0}],
        ["finish"],
    ]


def test_a_run_outlives_wandbs_process(tmp_path, told, caplog):
    write(config(tmp_path, "wandb"), 6, 9, 0.5).close()
    assert [row[0] for row in told()] == ["init", "metric", "log"]
    assert [record.getMessage() for record in caplog.records] == [
        "run.trackers: wandb's process is gone (gone); the run goes on without it"
    ]
