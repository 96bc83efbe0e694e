"""The environment for GPUs on a machine without one, made up in a process; `make test-gpu-env` has the real one."""

import subprocess
import sys

import pytest

from treepo_mcore import checks
from treepo_mcore.checks import Context, Moment, walk
from treepo_mcore.config import ConfigError, parse_config

PLATFORM = """
import vllm.platforms
from vllm.platforms.interface import UnspecifiedPlatform
vllm.platforms.current_platform = UnspecifiedPlatform()
from treepo_mcore.system import environment
environment.gpus_are_missing = lambda: {missing}
import treepo_mcore.engine.vllm
print(vllm.platforms.current_platform.device_type or "none")
"""
HALF_AN_ENGINE = """
import importlib.metadata, sys
from treepo_mcore.system import environment
environment.installed = lambda name: "2.16" if name == "transformer-engine" else None
import treepo_mcore.actor
try:
    import transformer_engine
except ImportError:
    print("hidden")
"""


def run(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.parametrize(("missing", "found"), [(True, "cpu"), pytest.param(False, "none", marks=pytest.mark.long)])
def test_vllm_without_its_device_plans_as_on_a_cpu(missing, found):
    assert run(PLATFORM.format(missing=missing)) == found


def test_half_of_transformer_engine_is_hidden_from_megatron():
    assert run(HALF_AN_ENGINE) == "hidden"


def test_training_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(checks, "gpus_are_missing", lambda: True)
    config = parse_config({"model": {"path": "m"}, "data": {"train": "t"}, "actor": {"micro_batch_tokens": 16384}})
    with pytest.raises(ConfigError, match="no GPU on this machine, and the vLLM that is installed is the one for GPUs"):
        walk(Context(config), Moment.FILES)
