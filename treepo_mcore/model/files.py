"""A model's directory, and the headers of its files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from treepo_mcore.config import ConfigError, ModelConfig

POINTER = b"version https://git-lfs"
MOST = {"num_hidden_layers": 10_000, "num_experts": 10_000, "num_local_experts": 10_000}  # with all names to make


def is_hub_name(path: str) -> bool:
    """Whether a model's path is no directory. Raises `ConfigError` where it is no hub name either."""
    if Path(path).is_dir():
        return False
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ConfigError(f"model.path: {path}: no such directory (and not a hub name like org/model)")
    return True


def resolve_model(config: ModelConfig, weights: bool = True, asks: bool = True) -> Path:
    """The local directory of a model: the path itself, or a hub name's snapshot through huggingface_hub.

    weights: have the hub's weights too, not only what describes them. asks: may ask the hub, else its cache must have
    everything. Honours HF_HUB_OFFLINE. Raises `ConfigError` when neither is there.
    """
    if not is_hub_name(config.path):
        return Path(config.path)
    from huggingface_hub import snapshot_download

    # Of other folders' files (checkpoints, other formats) nothing is read but named chat templates.
    described: dict[str, Any] = {
        "local_files_only": not asks,
        "allow_patterns": ["*.json", "*.model", "*.txt", "*.jinja"],
        "ignore_patterns": ["*/*.json", "*/*.model", "*/*.txt"],
    }
    try:
        found = Path(snapshot_download(config.path, revision=config.revision, **described))
        if weights:
            described |= {"allow_patterns": _weights_of(found), "ignore_patterns": None}
            snapshot_download(config.path, revision=config.revision, **described)
        return found
    except Exception as error:  # the hub's errors share no base class; all mean "not to be had"
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise ConfigError(
            f"model.path: {config.path} at revision {config.revision or 'main'} is neither a directory nor "
            f"to be had from the hub{offline}: {type(error).__name__}"
        ) from error


def _weights_of(directory: Path) -> list[str]:
    """The files that the index names; without one, the single file."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(set(read_json(index).get("weight_map", {}).values()))


def weight_files(directory: Path) -> dict[str, Path]:
    """HF tensor name -> safetensors file, from the index or the single file; `weight_headers` looks at the files.

    Raises `ConfigError` where there is neither, or no reading of them.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
            raise ConfigError(f"{index}: expected a weight_map from tensors to files, found {str(placed)[:80]}")
        if single.is_file() and single.name not in placed.values():
            raise ConfigError(
                f"{directory}: both {single.name} and {index.name}, which does not name it: not all readers would take "
                "the same weights; expected one of the two"
            )
        where = {name: directory / file for name, file in placed.items()}
    elif single.is_file():
        where = dict.fromkeys(safetensors_header(single), single)
    else:
        raise ConfigError(f"{directory}: neither model.safetensors nor model.safetensors.index.json")
    return where


def weight_headers(where: dict[str, Path]) -> dict[Path, dict[str, Any]]:
    """The header of each file, read once. where: as `weight_files` gives it.

    Raises `ConfigError` naming a file that is missing, shorter than its header says, or without a tensor that the index
    places in it.
    """
    headers = {file: safetensors_header(file) for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in headers[file]:
            raise ConfigError(f"{file}: the index places {name} here, but the file does not hold it")
    return headers


def safetensors_header(file: Path) -> dict[str, Any]:
    """Tensor name -> {dtype, shape, data_offsets}; checks that the file is as long as its header says."""
    if not file.is_file():
        raise ConfigError(f"{file}: missing weight file")
    refuse_pointer(file)
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise ConfigError(f"{file}: truncated safetensors file ({size} bytes, header alone needs {length + 8})")
        try:
            header = json.loads(handle.read(length))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: not a safetensors file: its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{file}: not a safetensors file: expected an object as its header, found {str(header)[:80]}")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_entry(entry):
            raise ConfigError(f"{file}: tensor {name}: expected dtype, shape and data_offsets, found {str(entry)[:80]}")
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < end:
        raise ConfigError(f"{file}: truncated safetensors file (found {size} bytes, expected {end})")
    return header


def number(where: str, table: dict[str, Any], key: str, absent: float | None = None) -> float:
    """A positive number of a table. absent: what its absence means; None: it has to be there.

    Raises `ConfigError` where there is something else. where: the file, for messages.
    """
    value = table.get(key)
    if value is None and absent is not None:
        return absent
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{where}: expected {key} to be a positive number, found {value!r:.80}")
    return float(value)


def whole(where: str, table: dict[str, Any], key: str, absent: int | None = None) -> int:
    """The same, without a fraction, and not beyond `MOST`."""
    value = number(where, table, key, absent)
    if value != int(value):
        raise ConfigError(f"{where}: expected {key} to be a whole number, found {value!r}")
    if value > (most := MOST.get(key, 2**31 - 1)):
        raise ConfigError(f"{where}: expected {key} to be at most {most}, found {value:.0f}")
    return int(value)


def truth(where: str, table: dict[str, Any], key: str, absent: bool = False) -> bool:
    """True or false of a table. Raises `ConfigError` where there is something else."""
    value = table.get(key, absent)
    if value is None:
        return absent
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: expected {key} to be true or false, found {value!r}")
    return value


def refuse_pointer(file: Path) -> None:
    """Raise `ConfigError` for what git-lfs leaves in the place of a file that it has not fetched."""
    if file.is_file():
        with file.open("rb") as handle:
            if handle.read(len(POINTER)) == POINTER:
                raise ConfigError(f"{file}: a pointer of git-lfs, not the file; fetch it with: git lfs pull")


def _is_entry(entry: Any) -> bool:
    """Of a safetensors header: {"dtype": text, "shape": [sizes], "data_offsets": [begin, end]}."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    numbers = entry.get("shape"), entry.get("data_offsets")
    return all(isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in numbers) and (
        len(entry["data_offsets"]) == 2
    )


def read_json(file: Path) -> dict[str, Any]:
    """An object. Raises `ConfigError` where the file is missing or holds something else."""
    if not file.is_file():
        raise ConfigError(f"{file}: missing")
    refuse_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content
