"""What a figure was measured on, and with: it stands in every JSON file."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import treepo_mcore


def machine() -> dict[str, Any]:
    """With a load above 1 before the start, seconds are worth little."""
    from treepo_mcore.system.versions import versions  # brings torch, which the environment must be prepared for

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    today, load = datetime.now(UTC).date().isoformat(), round(os.getloadavg()[0], 2)
    return {"date": today, "cpu": cpu, "cores": os.cpu_count(), "load": load, "commit": commit()} | versions()


def commit() -> str:
    """Of the package that is measured, "-dirty" behind it where files were changed since."""
    git = ["git", "-C", str(Path(treepo_mcore.__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
