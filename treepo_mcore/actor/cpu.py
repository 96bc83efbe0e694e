"""What Megatron-Core 0.19.2 needs to run where there is no CUDA.

Megatron asks `torch.cuda` for the current device, streams and random states, writes ``device="cuda"`` in a few
factory calls, and compares `Tensor.type()` with ``torch.cuda.*`` names. `megatron_device()` answers all of that
with the CPU, only inside its `with` block: vLLM, which shares the process, is always run outside of it and sees
an untouched torch. Where CUDA exists the block does nothing at all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.cuda.random
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import token_dispatcher
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like", "ones_like")


class _Stream:
    """A stream on which everything is already done."""

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> _Stream:
        return self

    def synchronize(self) -> None: ...


def _on_cpu(device: Any) -> Any:
    text = str(device)
    return CPU if text.startswith("cuda") else device


def _factory(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return function(*args, **kwargs)

    return call


_tensor_type = torch.Tensor.type


def _type(tensor: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    # Megatron sorts parameters by the names 'torch.cuda.FloatTensor' and so on.
    if dtype is None:
        name = _tensor_type(tensor)  # of a subclass, torch asks this very function once more
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)
    return _tensor_type(tensor, dtype, **kwargs)


def _replacements() -> dict[tuple[Any, str], Any]:
    cuda: dict[str, Any] = {
        "current_device": lambda: CPU,
        "synchronize": lambda *args: None,
        "current_stream": lambda *args: _Stream(),
        "default_stream": lambda *args: _Stream(),
        "Stream": lambda *args, **kwargs: _Stream(),
        "stream": lambda *args: contextlib.nullcontext(),
        "set_device": lambda *args: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "FloatTensor": torch.FloatTensor,
    }
    random: dict[str, Any] = {
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    table: dict[tuple[Any, str], Any] = {(torch.cuda, name): value for name, value in {**cuda, **random}.items()}
    table |= {(torch.cuda.random, name): value for name, value in random.items()}
    table |= {(torch, name): _factory(getattr(torch, name)) for name in FACTORIES}
    table |= _of_experts()
    table[(torch.Tensor, "cuda")] = lambda tensor, *args, **kwargs: tensor
    table[(torch.Tensor, "type")] = _type
    return table


def _of_experts() -> dict[tuple[Any, str], Any]:
    """Of Megatron's dispatcher of tokens to experts."""
    return {
        (token_dispatcher, "maybe_move_tensor_to_cpu"): _move_splits,
        (mappings, "_gather_along_first_dim"): _gather_uneven,
        (mappings, "_reduce_scatter_along_first_dim"): _scatter_uneven,
    }


_move, _gather = token_dispatcher.maybe_move_tensor_to_cpu, mappings._gather_along_first_dim
_scatter = mappings._reduce_scatter_along_first_dim


def _move_splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """On a GPU sizes come to the host as arrays; here they would stay tensors, which all_to_all_single refuses."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else _move(tensor, as_numpy, record_stream)


def _gather_uneven(rows: torch.Tensor, group: Any, output_split_sizes: Any = None, *rest: Any) -> torch.Tensor:
    """Gloo gathers shares of one size only."""
    if output_split_sizes is None or len(set(output_split_sizes)) == 1:
        return _gather(rows, group, output_split_sizes, *rest)
    padded = rows.new_zeros(max(output_split_sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in output_split_sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, output_split_sizes, strict=True)])


def _scatter_uneven(rows: torch.Tensor, group: Any, input_split_sizes: Any = None, *rest: Any) -> torch.Tensor:
    if input_split_sizes is None or len(set(input_split_sizes)) == 1:
        return _scatter(rows, group, input_split_sizes, *rest)
    total = rows.clone()
    dist.all_reduce(total, group=group)
    return total.split(input_split_sizes)[group.rank()].clone()


_TABLE = _replacements()
_depth = 0


@contextlib.contextmanager
def megatron_device() -> Iterator[None]:
    """Scope in which Megatron-Core may run: the CPU stands in for CUDA where there is none. Re-entrant."""
    global _depth
    if torch.cuda.is_available() or _depth:
        yield
        return
    # What `with torch.device(...)` acts on is looked up once and kept: not here, where it would find replacements.
    _device_constructors()
    saved = {place: getattr(*place) for place in _TABLE}
    _depth += 1
    try:
        for (owner, name), value in _TABLE.items():
            setattr(owner, name, value)
        yield
    finally:
        _depth -= 1
        for (owner, name), value in saved.items():
            setattr(owner, name, value)


def on_megatron_device[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Run a function inside `megatron_device()`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with megatron_device():
            return function(*args, **kwargs)

    return call
