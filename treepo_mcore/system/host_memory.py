"""Host memory that this process may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Of the node, or of this container or Slurm job where it is allowed less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    own = next((line[4:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/")), "")
    return min([free, *cgroup_free_bytes(CGROUP, own)])


def cgroup_free_bytes(root: Path, own: str) -> Iterator[int]:
    """What each limit on a process of the control group `own` (version 2) leaves, its own first, then those above."""
    for folder in (root / own, *(root / own).parents):
        limit = folder / "memory.max"
        if folder.is_relative_to(root) and limit.is_file() and limit.read_text().strip() != "max":
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Files that are cached count as used, although they give way.
            used = int((folder / "memory.current").read_text()) - int(counts["inactive_file"])
            yield int(limit.read_text()) - used
