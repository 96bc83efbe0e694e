"""Hugging Face directories written by many ranks: each writer gathers and writes files of its own, side by side."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from treepo_mcore.config import ConfigError
from treepo_mcore.model.sizes import Architecture
from treepo_mcore.weights.hf import Gatherer
from treepo_mcore.weights.layout import Piece

SHARD_BYTES = 5 << 30  # of one safetensors file, the hub's habit
# Config, tokenizer, chat templates; of folders only those of named templates, as transformers writes them.
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "additional_chat_templates/*.jinja")


@dataclass
class Shard:
    """A file, what is in it and who writes it."""

    writer: int  # rank
    names: list[str] = field(default_factory=list)
    file: str = ""
    size: int = 0  # bytes of the tensors


def plan_shards(shapes: dict[str, tuple[int, ...]], itemsize: int, writers: Sequence[int]) -> list[Shard]:
    """Tensors in their order, as many in a file as `SHARD_BYTES` has room for; writers take turns."""
    shards = [Shard(writers[0])]
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1].size and shards[-1].size + size > SHARD_BYTES:
            shards.append(Shard(writers[len(shards) % len(writers)]))
        shards[-1].names.append(name)
        shards[-1].size += size
    for number, shard in enumerate(shards, 1):
        shard.file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards


def first_ranks_of_nodes() -> list[int]:
    """One writer a node: each has a way to the disk of its own."""
    world = dist.get_world_size()
    return list(range(0, world, int(os.environ.get("LOCAL_WORLD_SIZE", world))))


def export_directory(
    source: Path,
    target: Path,
    arch: Architecture,
    pieces: list[Piece],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    writers: Sequence[int] | None = None,
) -> None:
    """Write a directory that `transformers` and vLLM load: sharded safetensors, index, config and tokenizer.

    Collective. source: where configuration and tokenizer are. target: weights of an earlier export in it are removed;
    all writers have to see it. pieces, tensors: this rank's. writers: ranks, by default the first of each node; a
    writer keeps one file of `SHARD_BYTES`, or the largest tensor, in host memory. Raises `ConfigError` on all ranks
    where `target` is the source, or a writer cannot write there.
    """
    if source.resolve() == target.resolve():
        raise ConfigError(f"{target}: found the model's own directory as the target of an export, expected another one")
    writers = first_ranks_of_nodes() if writers is None else writers
    rank = dist.get_rank()
    _agree(target, lambda: _prepare(source, target, dtype) if rank == 0 else None)
    _agree(target, lambda: _try(target / f".rank-{rank}") if rank in writers else None)
    gatherer = Gatherer(arch, pieces, tensors, dtype)
    shards = plan_shards(gatherer.shapes, dtype.itemsize, writers)
    for begin in range(0, len(shards), len(writers)):
        _write(target, shards[begin : begin + len(writers)], gatherer)
    if rank == 0 and len(shards) > 1:
        where = {name: shard.file for shard in shards for name in shard.names}
        index = {"metadata": {"total_size": sum(shard.size for shard in shards)}, "weight_map": where}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    dist.barrier()


def _write(target: Path, shards: Sequence[Shard], gatherer: Gatherer) -> None:
    """One file a writer. A file appears when it is whole."""
    kept: dict[str, Tensor] = {}
    for row in zip_longest(*(shard.names for shard in shards)):
        for shard, name in zip(shards, row, strict=True):
            full = None if name is None else gatherer.get(name, shard.writer)
            if full is not None:
                kept[name] = full.cpu()
            del full  # on a GPU, before there is another one
        dist.barrier()  # in step: who has sent all would wait for the last tensor longer than a group's time limit
    for shard in shards:
        if shard.writer == dist.get_rank():
            part = target / f"{shard.file}.part"
            save_file(kept, part, metadata={"format": "pt"})
            part.replace(target / shard.file)


def _agree(target: Path, work: Callable[[], None]) -> None:
    """What cannot be written on one rank is an error on all."""
    problem = None
    try:
        work()
    except OSError as error:
        problem = error.strerror
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    for rank, other in enumerate(found):
        if other is not None:
            raise ConfigError(f"{target}: cannot be written by rank {rank}: {other}")


def _prepare(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Everything but weights, in the place of what an earlier export left."""
    target.mkdir(parents=True, exist_ok=True)
    for file in target.glob("model*.safetensors*"):  # an old index would outweigh a new single file
        file.unlink()
    for pattern in COPIED:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                copy = target / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)  # without the source's mode: it may be read-only
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2))


def _try(probe: Path) -> None:
    probe.touch()
    probe.unlink()
