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
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like", "ones_like")


class _Stream:
    """A stream on which everything is already done."""

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> None: ...

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
    table[(torch.Tensor, "cuda")] = lambda tensor, *args, **kwargs: tensor
    table[(torch.Tensor, "type")] = _type
    return table


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
