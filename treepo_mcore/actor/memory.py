"""What the actor keeps on its device, and how each part leaves it and comes back.

Tensors stay what they are: their storages are emptied and filled again, so every view of them (Megatron's buckets, the
push's pieces) is valid whenever its holder is on the device. FP8 copies of weights are given up with the gradients. On
a CPU the same is done with ordinary memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from treepo_mcore.actor.cpu import on_megatron_device
from treepo_mcore.actor.precision import forget_fp8_copies
from treepo_mcore.actor.quantised import data_tensors
from treepo_mcore.config import Holder

ALIGNED = 512  # bytes; where copies into the host buffer begin


class PinnedBuffer:
    """Host memory that the device reads and writes directly, for as long as this object lives.

    Torch's own pinned allocator would round up to a power of two: up to twice as much.
    """

    def __init__(self, size: int) -> None:
        """size: bytes. Raises RuntimeError when they cannot be pinned."""
        self.bytes = torch.empty(size, dtype=torch.uint8)
        if torch.cuda.is_available():
            code = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0))
            if code:
                raise RuntimeError(
                    f"could not pin {size / 2**30:.1f} GiB of host memory (CUDA error {code}); see ulimit -l"
                )
            # Memory that is freed while it is pinned cannot be pinned by whom it is given to next.
            ending = weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, self.bytes.data_ptr())
            ending.atexit = False

    def __len__(self) -> int:
        return len(self.bytes)


class HostCopy:
    """Storages that can be moved to one pinned host buffer and back."""

    def __init__(self) -> None:
        self.buffer: PinnedBuffer | None = None  # kept, because pinning takes long
        self.moved: list[tuple[torch.UntypedStorage, int, int]] = []  # storage, its bytes, place in the buffer

    @property
    def host_bytes(self) -> int:
        """Size of the buffer."""
        return 0 if self.buffer is None else len(self.buffer)

    def out(self, tensors: Iterable[Tensor], room: int = 0) -> None:
        """Copy the storages of these tensors to the host and free them on the device.

        room: bytes that the buffer has at least, for tensors that come later.
        """
        assert not self.moved, "already on the host"
        at = 0
        for storage in storages(tensors):
            self.moved.append((storage, storage.nbytes(), at))
            at += _aligned(storage.nbytes())
        room = max(at, room)
        if room > self.host_bytes:
            self.buffer = None  # the old one goes before the new one comes
            self.buffer = PinnedBuffer(room)
        for storage, size, place in self.moved:
            assert self.buffer is not None
            self.buffer.bytes[place : place + size].copy_(_bytes(storage), non_blocking=True)
        _synchronize()
        for storage, _, _ in self.moved:
            storage.resize_(0)

    def values(self) -> dict[int, Tensor]:
        """Bytes on the host by storage (its `_cdata`), of what was moved."""
        if self.buffer is None:
            return {}
        return {storage._cdata: self.buffer.bytes[place : place + size] for storage, size, place in self.moved}

    def back(self) -> None:
        """Undo `out`."""
        for storage, size, place in self.moved:
            assert self.buffer is not None
            storage.resize_(size)
            _bytes(storage).copy_(self.buffer.bytes[place : place + size], non_blocking=True)
        _synchronize()
        self.moved = []


class HostTensors:
    """Values of a set of tensors, in one pinned host buffer."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes their values as they are now."""
        ends = list(accumulate(_aligned(tensor.nbytes) for tensor in tensors.values()))
        self.buffer = PinnedBuffer(ends[-1])
        self.values = {
            name: self.buffer.bytes[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for begin, (name, tensor) in zip([0, *ends], tensors.items(), strict=False)
        }
        self.take(tensors)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy their values here."""
        for name, value in self.values.items():
            value.copy_(tensors[name], non_blocking=True)
        _synchronize()

    def give(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values there."""
        for name, value in self.values.items():
            tensors[name].copy_(value, non_blocking=True)
        _synchronize()


class ActorMemory:
    """Moves the actor's parameters, gradients and optimizer state."""

    def __init__(self, chunks: list[Any], optimizer: Any, parameters: Mapping[str, Tensor]) -> None:
        """chunks: Megatron's data-parallel wrappers; parameters: as they are in its modules.

        Without chunks and optimizer there are parameters only.
        """
        self.chunks, self.optimizer, self.parameters = chunks, optimizer, parameters
        self.copies = {"parameters": HostCopy(), "optimizer": HostCopy()}
        self.absent: set[Holder] = set()
        self.bytes = self._predicted()

    def host_bytes(self) -> int:
        """Pinned host memory that is in use."""
        return sum(copy.host_bytes for copy in self.copies.values())

    @on_megatron_device
    def keep(self, holders: set[Holder]) -> None:
        """Have exactly these on the device. Gradients come back as zeros."""
        everything: tuple[Holder, ...] = ("gradients", "optimizer", "parameters")
        for holder in everything:
            if holder not in holders and holder not in self.absent:
                self._out(holder)
                self.absent.add(holder)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the engine's allocator is another one
        for holder in reversed(everything):
            if holder in holders and holder in self.absent:
                self._back(holder)
                self.absent.discard(holder)

    def lasting(self) -> Callable[[Tensor], Tensor]:
        """Turns a tensor into its values in host memory, which stay until the optimizer is needed again.

        No copy is made of what the optimizer has there, nor of tensors on the host that are not the actor's.
        """
        waiting, aside = self.copies["optimizer"].values(), self.copies["parameters"].values()
        own = {s._cdata for s in storages([*self._parameter_tensors(), *self._optimizer_state()])}

        def values(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage in waiting:
                return _alone(_view(waiting[storage], tensor))
            if storage in aside:
                return _view(aside[storage], tensor).clone()  # they come and go with every push
            return tensor.clone() if storage in own and tensor.device.type == "cpu" else tensor.cpu()

        return values

    def _out(self, holder: Holder) -> None:
        if holder == "gradients":
            for chunk in self.chunks:
                chunk.offload_grad_buffers()
                forget_fp8_copies(chunk)
        elif holder == "optimizer":
            room = sum(_aligned(size) for size in self._optimizer_sizes())
            self.copies["optimizer"].out(self._optimizer_tensors(), room)
        else:
            self.copies["parameters"].out(self._parameter_tensors())

    def _back(self, holder: Holder) -> None:
        if holder == "gradients":
            for chunk in self.chunks:
                chunk.restore_grad_buffers()
        else:
            self.copies[holder].back()

    def _parameter_tensors(self) -> list[Tensor]:
        return [tensor for parameter in self.parameters.values() for tensor in data_tensors(parameter)]

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        """Adam's moments and float32 weights. In float32 the latter are the parameters themselves, which stay."""
        shared = {storage._cdata for storage in storages(self._parameter_tensors())}
        device = next(iter(self.parameters.values())).device
        for tensor in self._optimizer_state():
            # Counters stay where they are; TransformerEngine's can keep moments in tensors of its own.
            plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device == device
            if plain and tensor.dim() and tensor.untyped_storage()._cdata not in shared:
                yield tensor

    def _optimizer_state(self) -> Iterator[Tensor]:
        for adam in self._adams():
            for group in adam.param_groups:
                yield from group["params"]
            for state in adam.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def _adams(self) -> list[Any]:
        if self.optimizer is None:
            return []
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [part.optimizer for part in parts if part.optimizer is not None]

    def _predicted(self) -> dict[Holder, int]:
        """Bytes of each holder from the first step on."""
        buffers = [b for chunk in self.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
        return {
            "parameters": sum(storage.nbytes() for storage in storages(self._parameter_tensors())),
            "gradients": sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers),
            "optimizer": sum(self._optimizer_sizes()),
        }

    def _optimizer_sizes(self) -> Iterator[int]:
        """Bytes of each of the optimizer's tensors; Adam's moments, float32 each, come with the first step."""
        shared = {storage._cdata for storage in storages(self._parameter_tensors())}
        for adam in self._adams():
            for tensor in (p for group in adam.param_groups for p in group["params"]):
                yield from (4 * tensor.numel(), 4 * tensor.numel())
                if tensor.untyped_storage()._cdata not in shared:
                    yield tensor.nbytes


def storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Each once, in the order in which they are met; empty ones left out."""
    found = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return [storage for storage in found.values() if storage.nbytes()]


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _view(content: Tensor, like: Tensor) -> Tensor:
    """What `like` would show if its storage had this content (bytes)."""
    values = content.view(like.dtype)
    return values.as_strided(like.shape, like.stride(), values.storage_offset() + like.storage_offset())


def _alone(view: Tensor) -> Tensor:
    """The same memory, but as a storage of its own: torch.save writes a whole storage for each view of it."""
    flat = view.contiguous().view(-1).view(torch.uint8)
    return torch.from_numpy(flat.numpy()).view(view.dtype).view(view.shape)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
