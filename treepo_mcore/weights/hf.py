"""Hugging Face directories in and out, through the same pieces as every other layout."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from treepo_mcore.config import ConfigError
from treepo_mcore.model.files import safetensors_header, weight_files
from treepo_mcore.model.sizes import Architecture
from treepo_mcore.weights.layout import Piece, box, hf_shapes

UNUSED = ("rotary_emb.inv_freq", "lm_head.weight")  # endings of tensors that a checkpoint may have in excess
SHARD_BYTES = 5 << 30  # of one exported safetensors file, the hub's habit
READABLE = ("F64", "F32", "F16", "BF16")  # safetensors' names; others (F8_E4M3, I8) need scales that are not read here
# Config, tokenizer, chat templates; of folders only those of named templates, as transformers writes them.
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "additional_chat_templates/*.jinja")


def check_weights(directory: Path, arch: Architecture) -> dict[str, Path]:
    """Tensor name -> file, after comparing every header with the shapes that config.json implies; and its dtype.

    Raises `ConfigError` with the tensor's name.
    """
    files = weight_files(directory)
    headers = {file: _header(file) for file in set(files.values())}
    shapes = hf_shapes(arch)
    for name in sorted(files.keys() - shapes.keys()):
        if not name.endswith(UNUSED):
            raise ConfigError(
                f"{files[name]}: tensor {name} has no place in a {arch.family} model as config.json describes it"
            )
    for name, shape in shapes.items():
        if name not in files:
            raise ConfigError(f"{directory}: tensor {name} is missing from the safetensors files")
        dtype = headers[files[name]][name]["dtype"]
        if dtype not in READABLE:
            raise ConfigError(f"{files[name]}: tensor {name} has dtype {dtype}, expected one of {', '.join(READABLE)}")
        found = tuple(headers[files[name]][name]["shape"])
        if found != shape:
            raise ConfigError(
                f"{files[name]}: tensor {name} has shape {list(found)}, config.json implies {list(shape)}"
            )
    return files


def _header(file: Path) -> dict[str, Any]:
    """The library that will read the file judges it too: sizes that do not fit the offsets, overlaps, holes."""
    header = safetensors_header(file)
    try:
        with safe_open(file, framework="pt"):
            return header
    except SafetensorError as error:
        raise ConfigError(f"{file}: not a safetensors file: {error}") from error


@torch.no_grad()
def load_pieces(directory: Path, arch: Architecture, pieces: list[Piece], tensors: dict[str, Tensor]) -> None:
    """Fill local tensors from the files; each rank reads only the slices of its own pieces."""
    files = check_weights(directory, arch)
    by_file: dict[Path, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_file[files[piece.tensor]].append(piece)
    for file, wanted in sorted(by_file.items()):
        with safe_open(file, framework="pt") as handle:
            for piece in wanted:
                index = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))
                piece.of_local(tensors).copy_(handle.get_slice(piece.tensor)[index])


@torch.no_grad()
def gather_tensors(
    arch: Architecture, pieces: list[Piece], tensors: dict[str, Tensor], dtype: torch.dtype, to: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every full HF tensor in turn. Collective.

    to: the one rank that gets them; the others send what they own and get nothing. By default all ranks get them, the
    plain way against which shard-to-shard transfer is tested. Among replicas the lowest rank sends. Peak memory of a
    rank that gets them: the full tensor and the share of it that one rank owns, which for a pipeline without tensor
    parallelism is the same size again; the caller adds what it keeps. Of the others: their own share.
    """
    owned = _owners(pieces)
    device = next(iter(tensors.values())).device
    mine = {(p.tensor, p.start, p.shape): p.of_local(tensors) for p in pieces}
    for name, shape in hf_shapes(arch).items():
        covered = sum(math.prod(extent) for boxes in owned[name].values() for _, extent in boxes)
        if covered != math.prod(shape):
            raise RuntimeError(f"{name}: {covered} of {math.prod(shape)} elements have an owner")
        full = torch.empty(shape, dtype=dtype, device=device) if to in (None, dist.get_rank()) else None
        for owner, boxes in owned[name].items():
            share = [(start, extent, mine.get((name, start, extent))) for start, extent in boxes]
            _gather_share(full, share, owner, to, dtype, device)
        if full is not None:
            yield name, full
        del full  # before there is another one
        if to is not None:
            dist.barrier()  # in step: who has sent all would wait for the last tensor longer than a group's time limit


def _gather_share(
    full: Tensor | None,
    share: list[tuple[tuple[int, ...], tuple[int, ...], Tensor | None]],
    owner: int,
    to: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """What one rank owns of a tensor. share: boxes, start and shape, with this rank's own copy where it has one."""
    rank = dist.get_rank()
    if full is None and rank != owner:
        return
    flat = torch.empty(sum(math.prod(extent) for _, extent, _ in share), dtype=dtype, device=device)
    parts = flat.split([math.prod(extent) for _, extent, _ in share])
    if rank == owner:
        for part, (_, extent, local) in zip(parts, share, strict=True):
            assert local is not None
            part.view(extent).copy_(local)
    if to is None and dist.get_world_size() > 1:
        dist.broadcast(flat, owner)
    elif to is not None and owner != to:
        operation = dist.P2POp(dist.isend, flat, to) if rank == owner else dist.P2POp(dist.irecv, flat, owner)
        for work in dist.batch_isend_irecv([operation]):
            work.wait()
    if full is not None:
        for part, (start, extent, _) in zip(parts, share, strict=True):
            box(full, start, extent).copy_(part.view(extent))


def _owners(pieces: list[Piece]) -> dict[str, dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]]]:
    """HF tensor -> sending rank -> its boxes (start, shape); every distinct box once."""
    boxes = sorted({(p.tensor, p.start, p.shape) for p in pieces})
    everyone: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, boxes)
    seen: set = set()
    owned: dict = defaultdict(lambda: defaultdict(list))
    for rank, theirs in enumerate(everyone):
        for key in theirs:
            if key not in seen:
                seen.add(key)
                owned[key[0]][rank].append(key[1:])
    return owned


def export_directory(source: Path, target: Path, named: Iterable[tuple[str, Tensor]]) -> None:
    """Write a directory that `transformers` and vLLM load: sharded safetensors, index, config and tokenizer.

    source: where configuration and tokenizer are. target: weights of an earlier export in it are removed; it cannot be
    `source` (`ConfigError`). named comes from `gather_tensors`, which every rank must run through; only rank 0 needs
    the tensors (`to=0`) and writes. It keeps up to `SHARD_BYTES`, or the largest tensor, in host memory.
    """
    if source.resolve() == target.resolve():
        raise ConfigError(f"{target}: found the model's own directory as the target of an export, expected another one")
    writes = dist.get_rank() == 0
    if writes:
        target.mkdir(parents=True, exist_ok=True)
        for pattern in ("model*.safetensors*", "part-*.safetensors"):  # an old index would outweigh a new single file
            for file in target.glob(pattern):
                file.unlink()
        for pattern in COPIED:
            for file in source.glob(pattern):
                if not file.name.endswith(".index.json"):
                    copy = target / file.relative_to(source)
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, copy)  # without the source's mode: it may be read-only
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    dtype = None
    for name, tensor in named:
        if not writes:
            continue
        dtype = tensor.dtype
        nbytes = tensor.numel() * tensor.element_size()
        if size and size + nbytes > SHARD_BYTES:
            _flush(target, shards)
            size = 0
        shards[-1][name] = tensor.cpu()
        size += nbytes
        total += nbytes
        del tensor  # on a GPU, before there is another one
    if writes:
        _finish(target, shards, total, dtype)
    dist.barrier()


def _flush(target: Path, shards: list[dict[str, Tensor]]) -> None:
    save_file(shards[-1], target / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
    shards[-1] = dict.fromkeys(shards[-1])  # type: ignore[arg-type]  # names only; the memory is free again
    shards.append({})


def _finish(target: Path, shards: list[dict[str, Tensor]], total: int, dtype: torch.dtype | None) -> None:
    if len(shards) == 1:
        save_file(shards[0], target / "model.safetensors", metadata={"format": "pt"})
    else:
        save_file(shards[-1], target / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
        where: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            (target / f"part-{number}.safetensors").rename(target / file)
            where |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2))
