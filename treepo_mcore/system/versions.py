"""What a run was made with."""

from __future__ import annotations

import platform

import torch

from treepo_mcore.system.environment import package_versions


def versions() -> dict[str, str]:
    """Versions of Python and the packages that are installed, and the device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return package_versions() | {"device": device}
