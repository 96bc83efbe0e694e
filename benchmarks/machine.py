"""What a row of a benchmark was measured on, and with: it stands in every JSON file."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from treepo_mcore.observe.versions import versions

HERE = Path(__file__).resolve().parent


def machine() -> dict[str, Any]:
    """Processor, cores, load of the last minute, commit, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    git = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    load = round(os.getloadavg()[0], 2)
    return {"cpu": cpu, "cores": os.cpu_count(), "load": load, "commit": git.stdout.strip()} | versions()
