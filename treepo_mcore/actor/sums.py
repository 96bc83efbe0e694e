"""The sums of a checkpoint's files, in Megatron-Core's `integrity.json`: a changed byte is found before it trains.

Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from treepo_mcore.config import ConfigError

MANIFEST = "integrity.json"  # which Megatron-Core's `load(verify_integrity=True)` reads too
ALGORITHM = "sha256"


def settle(file: Path) -> str:
    """Have the disk keep a file that was just written; returns its sum."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return _sum(file)


def written_by(checkpoint: Path, rank: int) -> list[Path]:
    """The files that a rank has written: of tensors its own; what is not of tensors is rank 0's."""
    files = [file for file in checkpoint.iterdir() if file.is_file() and file.name != MANIFEST]
    return sorted(file for file in files if _rank_of(file.name) == rank)


def _rank_of(name: str) -> int:
    return int(name.split("_")[2]) if name.startswith("__") and name.endswith(".distcp") else 0


def write_sums(checkpoint: Path, sums: dict[str, str]) -> None:
    """sums: hexadecimal SHA-256 by the name of the file."""
    file = checkpoint / MANIFEST
    file.write_text(json.dumps({"algorithm": ALGORITHM, "files": dict(sorted(sums.items()))}, indent=1))
    settle(file)


def read_sums(checkpoint: Path) -> dict[str, str]:
    """What `write_sums` was given. Raises `ConfigError` when it is missing or not such a file."""
    file = checkpoint / MANIFEST
    if not file.is_file():
        raise ConfigError(f"{file}: missing, so nothing tells whether the checkpoint is whole")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON ({error})") from error
    sums = found.get("files") if isinstance(found, dict) and found.get("algorithm") == ALGORITHM else None
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise ConfigError(f'{file}: expected {{"algorithm": "{ALGORITHM}", "files": {{name: sum}}}}')
    if bad := [name for name in sums if Path(name).name != name]:
        raise ConfigError(f"{file}: {bad[0]!r}: expected the name of a file in this directory")
    return sums


def differences(checkpoint: Path, sums: dict[str, str], names: Iterable[str]) -> list[str]:
    """A line for each of the named files that is missing, cannot be read or is not as it was written."""

    def look(name: str) -> str | None:
        file = checkpoint / name
        try:
            found = _sum(file)
        except OSError as error:
            return f"{file}: cannot be read ({error.strerror})"
        if found != sums[name]:
            return f"{file}: not as it was written, expected {ALGORITHM} {sums[name][:12]}, found {found[:12]}"
        return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return [line for line in threads.map(look, names) if line]


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, ALGORITHM).hexdigest()
