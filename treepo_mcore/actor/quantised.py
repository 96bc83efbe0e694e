"""Parameters that are FP8 themselves: TransformerEngine's tensors of bytes and scales, which look like bf16 ones.

Megatron's `fp8_param` and `fp8_param_gather` make the weights of linear layers such tensors; the optimizer keeps its
float32 weights, and what ranks gather after an update is one byte a weight. They cannot be cut into pieces in place, so
all that works on pieces (loading, pushing, exporting) has plain copies in `actor.dtype` instead. These have memory only
while somebody reads them. Without such parameters nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor


class PlainCopies:
    """Of a rank's FP8 parameters."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        """parameters: of the whole model by local name, as they are in its modules. The copies have memory at first."""
        self.quantised = {name: p for name, p in parameters.items() if is_float8tensor(p)}
        self.tensors = {
            name: torch.zeros(p.shape, dtype=p.dtype, device=p.device) for name, p in self.quantised.items()
        }

    @contextmanager
    def readable(self) -> Iterator[None]:
        """The copies have the parameters' values inside."""
        for name, tensor in self.tensors.items():
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
            tensor.copy_(self.quantised[name].detach())
        try:
            yield
        finally:
            self.release()

    @torch.no_grad()
    def write(self) -> None:
        """Quantise the copies into the parameters, before there is an optimizer, and give their memory up.

        TransformerEngine keeps what a parameter was made from in host memory until Megatron's optimizer has taken its
        float32 weights from there: it shall begin with these values, not with what eight bits leave of them.
        """
        for name, parameter in self.quantised.items():
            parameter.copy_(self.tensors[name])  # itself: a detached one has flags of its own
            parameter.get_high_precision_init_val().copy_(self.tensors[name])
        self.release()

    def release(self) -> None:
        """Give the copies' memory up."""
        for tensor in self.tensors.values():
            tensor.untyped_storage().resize_(0)


def data_tensors(parameter: Any) -> list[Tensor]:
    """The tensors that hold a parameter's elements: itself, or an FP8 one's bytes, as they are and transposed.

    Scales are not among them: few, and TransformerEngine keeps them where they are.
    """
    if not is_float8tensor(parameter):
        return [parameter]
    return [tensor for tensor in parameter.get_data_tensors() if tensor is not None]
