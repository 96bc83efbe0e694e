"""What is around vLLM's engine: settings it has no argument for, and whose errors are told how."""

import os
from pathlib import Path

import pytest

from treepo_mcore.config import ConfigError, parse_config
from treepo_mcore.engine.vllm import engine as vllm_engine

from test_precision import architecture  # isort: skip

DIRECTORY = Path("model")


def config(**engine):
    data = {"train": "d", "max_prompt_tokens": 32}
    tree = {"segment_tokens": 16, "max_depth": 4}
    return parse_config({"model": {"path": "m"}, "data": data, "rollout": {"tree": tree, "engine": engine}})


@pytest.fixture
def no_setting(monkeypatch):
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "")  # put back afterwards
    monkeypatch.delenv("VLLM_USE_DEEP_GEMM")


def test_deep_gemm_is_off_for_every_fp8_engine(no_setting):
    vllm_engine.engine_arguments(config(), architecture(), DIRECTORY)
    assert "VLLM_USE_DEEP_GEMM" not in os.environ
    for _ in range(2):
        vllm_engine.engine_arguments(config(quantization="fp8_per_block"), architecture(), DIRECTORY)
        assert os.environ["VLLM_USE_DEEP_GEMM"] == "0"


def test_a_user_who_wants_deep_gemm_is_told(no_setting, monkeypatch):
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "1")
    with pytest.raises(ConfigError, match="VLLM_USE_DEEP_GEMM: found 1, expected 0 with quantization fp8_per_block"):
        vllm_engine.engine_arguments(config(quantization="fp8_per_block"), architecture(), DIRECTORY)
    vllm_engine.engine_arguments(config(), architecture(), DIRECTORY)
    assert os.environ["VLLM_USE_DEEP_GEMM"] == "1"


def test_errors_of_building_the_engine_are_not_taken_for_bad_settings(monkeypatch):
    def build(**_):
        raise ValueError("a kernel is not there")

    monkeypatch.setattr(vllm_engine.vllm_cpu, "prepare", lambda tp: None)
    monkeypatch.setattr(vllm_engine, "LLM", build)
    with pytest.raises(ValueError, match=r"^a kernel is not there$"):
        vllm_engine.VllmEngine(config(), architecture(), DIRECTORY, (0,))


def test_fp8_on_a_processor_without_its_instructions_is_told(no_setting, monkeypatch):
    monkeypatch.setattr(vllm_engine, "_runs_fp8", lambda: False)
    with pytest.raises(ConfigError, match=r"rollout.engine.quantization: .* needs AMX"):
        vllm_engine.check_engine(config(quantization="fp8_per_block"), architecture(), DIRECTORY)


def test_what_block_sizes_kernels_take():
    """Of both backends that pushes and trees run on; vLLM itself refuses others only when the model is built."""
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from treepo_mcore.engine.vllm.engine import KERNEL_BLOCK

    (taken,) = CPUAttentionBackend.get_supported_kernel_block_sizes()
    assert isinstance(taken, MultipleOf)
    assert taken.base == KERNEL_BLOCK
