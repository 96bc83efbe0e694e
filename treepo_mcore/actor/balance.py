"""How evenly the experts of a mixture are used."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn


class ExpertLoad:
    """Counts the tokens of each expert, in every layer of this rank's that has a router."""

    def __init__(self, chunks: list[nn.Module]) -> None:
        """Adds a hook to each router. chunks: Megatron's."""
        routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
        self.counts = [torch.zeros(router.num_experts, dtype=torch.int64) for router in routers]
        for number, router in enumerate(routers):
            router.register_forward_hook(self._hook(number))

    def _hook(self, number: int) -> Any:
        def count(router: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
            chosen = outputs[1].sum(0)  # of bool [tokens, experts]
            self.counts[number] = self.counts[number].to(chosen.device) + chosen

        return count

    def clear(self) -> None:
        """Count from here on."""
        for counts in self.counts:
            counts.zero_()

    def metrics(self) -> dict[str, float]:
        """What was counted since `clear`, the same on every rank; nothing for a dense model. Collective.

        Padding counts: it is computed. Recomputed layers count twice, which shares do not show. `moe/load_max`:
        the fullest expert's tokens over the mean expert's, in the layer where that is most. `moe/load_entropy`: of the
        shares of the experts, over that of equal shares, mean of the layers: 1 when all have as many.
        """
        if not self.counts:
            return {}
        counts = torch.stack(self.counts).double()
        # Ranks of a stage have tokens of their own, those of a tensor group, too: sequence parallelism cuts them.
        dist.all_reduce(counts, group=parallel_state.get_tensor_and_data_parallel_group(True))
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        experts = shares.shape[1]
        entropy = -torch.xlogy(shares, shares).sum(1) / math.log(experts)
        values = torch.stack([shares.max() * experts, entropy.sum(), entropy.new_tensor(len(entropy))])
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        dist.all_reduce(values[:1], op=dist.ReduceOp.MAX, group=pipeline)
        dist.all_reduce(values[1:], group=pipeline)
        return {"moe/load_max": float(values[0]), "moe/load_entropy": float(values[1] / values[2])}
