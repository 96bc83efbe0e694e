"""Hugging Face directories in and out, through the same pieces as every other layout."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from treepo_mcore.config import ConfigError
from treepo_mcore.model.files import weight_files, weight_headers
from treepo_mcore.model.sizes import Architecture
from treepo_mcore.weights.layout import Piece, box, hf_shapes

UNUSED = ("rotary_emb.inv_freq", "lm_head.weight")  # endings of tensors that a checkpoint may have in excess
READABLE = ("F64", "F32", "F16", "BF16")  # safetensors' names; others (F8_E4M3, I8) need scales that are not read here


def check_weights(directory: Path, arch: Architecture) -> dict[str, Path]:
    """Tensor name -> file, after comparing every header with the shapes that config.json implies; and its dtype.

    Raises `ConfigError` with the tensor's name.
    """
    files = weight_files(directory)
    headers = weight_headers(files)
    for file in headers:
        _judge(file)
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


def _judge(file: Path) -> None:
    """The library that will read the file looks, too: sizes that do not fit the offsets, overlaps, holes."""
    try:
        with safe_open(file, framework="pt"):
            return
    except SafetensorError as error:
        raise ConfigError(f"{file}: not a safetensors file: {error}") from error


@torch.no_grad()
def load_pieces(directory: Path, pieces: list[Piece], tensors: dict[str, Tensor]) -> None:
    """Fill local tensors from the files; each rank reads only the slices of its own pieces.

    The files are those that `check_weights` has looked at.
    """
    files = weight_files(directory)
    by_file: dict[Path, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_file[files[piece.tensor]].append(piece)
    for file, wanted in sorted(by_file.items()):
        with safe_open(file, framework="pt") as handle:
            for piece in wanted:
                index = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))
                piece.of_local(tensors).copy_(handle.get_slice(piece.tensor)[index])


class Gatherer:
    """Full HF tensors from the shares of all ranks, one at a time."""

    def __init__(self, arch: Architecture, pieces: list[Piece], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """dtype: of the full tensors. Collective. Raises RuntimeError where a tensor has elements without an owner."""
        self.shapes, self.dtype = hf_shapes(arch), dtype
        self._owned = _owners(pieces)
        self._device = next(iter(tensors.values())).device
        self._mine = {(p.tensor, p.start, p.shape): p.of_local(tensors) for p in pieces}
        for name, shape in self.shapes.items():
            covered = sum(math.prod(extent) for boxes in self._owned[name].values() for _, extent in boxes)
            if covered != math.prod(shape):
                raise RuntimeError(f"{name}: {covered} of {math.prod(shape)} elements have an owner")

    @torch.no_grad()
    def get(self, name: str, to: int | None) -> Tensor | None:
        """The tensor on rank `to`, where None is all ranks; nothing on the others, which send what they own.

        Among replicas the lowest rank sends. All ranks call it with the same arguments; only those that own a part of
        the tensor, or get it, take part. Memory of a rank that gets it: the full tensor and the share of it that one
        rank owns, which for a pipeline without tensor parallelism is the same size again. Of the others: their share.
        """
        gets = to in (None, dist.get_rank())
        full = torch.empty(self.shapes[name], dtype=self.dtype, device=self._device) if gets else None
        for owner, boxes in self._owned[name].items():
            share = [(start, extent, self._mine.get((name, start, extent))) for start, extent in boxes]
            _gather_share(full, share, owner, to, self.dtype, self._device)
        return full


def gather_tensors(
    arch: Architecture, pieces: list[Piece], tensors: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every full HF tensor in turn, on every rank: the plain way against which shard-to-shard transfer is tested."""
    gatherer = Gatherer(arch, pieces, tensors, dtype)
    for name in gatherer.shapes:
        full = gatherer.get(name, None)
        assert full is not None
        yield name, full
        del full  # before there is another one


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
