"""What this machine has for the fast path: the GPU, TransformerEngine, apex. Found without importing either of them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch

from treepo_mcore.system.environment import installed

# PyPI's `apex` is a web toolkit for Pyramid whose last release has this version; NVIDIA's is built from its repository.
PYRAMID_APEX = "0.9.10"


@dataclass(frozen=True)
class Machine:
    """The facts that decide about layers, fusions and precision; a value of its own, so that they can be made up."""

    capability: tuple[int, int] | None = None  # of the GPU; None: this process sees none
    cuda: tuple[int, ...] = ()  # version that torch was built for
    te: tuple[int, ...] | None = None  # TransformerEngine for torch, core and binding; None: absent
    fused_wgrad: bool = False  # apex's fused_weight_gradient_mlp_cuda

    @property
    def has_gpu(self) -> bool:
        """Whether there is a GPU to use."""
        return self.capability is not None

    @property
    def te_layers(self) -> bool:
        """Whether the model is built of TransformerEngine's layers: wherever they can run."""
        return self.has_gpu and self.te is not None


@cache
def this_machine() -> Machine:
    """Looked up once a process."""
    gpu = torch.cuda.is_available()
    return Machine(
        capability=torch.cuda.get_device_capability() if gpu else None,
        cuda=numbers(torch.version.cuda or ""),
        te=_transformer_engine(),
        fused_wgrad=has_module("fused_weight_gradient_mlp_cuda"),
    )


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.16.1+cu13" -> (2, 16, 1); empty where there is none."""
    parts = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
        if digits != part:
            break
    return tuple(parts)


def has_module(name: str) -> bool:
    """Whether a top-level module can be imported, without doing so."""
    return importlib.util.find_spec(name) is not None


def is_pyramid_apex(version: str | None) -> bool:
    """Whether the installed `apex` is PyPI's unrelated package."""
    return bool(version) and str(version).startswith(PYRAMID_APEX)


def _transformer_engine() -> tuple[int, ...] | None:
    """Both halves: without the torch binding, Megatron's import of TransformerEngine fails."""
    version = installed("transformer-engine-torch")
    return numbers(version) if version and has_module("transformer_engine") else None
