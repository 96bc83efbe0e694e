"""Log-probs and entropies of sampled tokens, from hidden states and a vocabulary-parallel output layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

NOTHING = -1e30  # the logit of a padded column: its exponential is 0, and 0 times it is not NaN


class VocabParallelLogProb(torch.autograd.Function):
    """log p(target) and entropy from logits whose columns are spread over the tensor-parallel group.

    logits [E, V_padded / tp], to be divided by temperature (columns at and beyond `vocab` are padding and never enter
    the softmax), target int64 [E]. Returns float32 [E] twice. Makes two float32 copies of the logits and keeps one of
    them, the exponentials, for the backward pass.
    (Megatron's `vocab_parallel_cross_entropy` counts padded columns, has no entropy, and overwrites its input.)
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, temperature: float, vocab: int, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        columns = logits.shape[-1]
        first = group.rank() * columns
        real = min(max(0, vocab - first), columns)
        top = logits[:, :real].amax(-1).float() if real else logits.new_full((len(logits),), NOTHING).float()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        x = logits - top[:, None]  # in float32, as `top` is
        if temperature != 1:
            x /= temperature
        x[:, real:] = NOTHING
        local = target - first
        elsewhere = (local < 0) | (local >= columns)
        local = local.masked_fill(elsewhere, 0)
        chosen = x.gather(1, local[:, None])[:, 0].masked_fill(elsewhere, 0.0)
        exps = x.exp()
        sums = torch.stack([exps.sum(-1), x.mul_(exps).sum(-1), chosen])
        dist.all_reduce(sums, group=group)
        total, weighted, chosen = sums
        entropy = total.log() - weighted / total
        ctx.save_for_backward(exps, total, local, elsewhere, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return chosen - total.log(), entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        exps, total, local, elsewhere, entropy = ctx.saved_tensors
        grad_logp = grad_logp / ctx.temperature
        grad = exps * (-grad_logp / total)[:, None]
        grad.scatter_add_(1, local[:, None], (grad_logp * ~elsewhere)[:, None])
        if grad_entropy is not None:
            # dH/dx_j = -p_j (log p_j + H)
            p = exps / total[:, None]
            grad -= (grad_entropy / ctx.temperature)[:, None] * (torch.xlogy(p, p) + p * entropy[:, None])
        return grad, None, None, None, None


def edge_log_probs(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Mapping[str, Any], **_: Any
) -> Tensor:
    """Megatron's `output_processor`: hidden states -> float32 [2, E], log-probs and entropies of the edges.

    Rows are gathered by edge source before the output layer, so that prompt tokens cost no logits and a branch
    point gives one row for each child. context: source and target int64 [E], temperature, vocab, and whether the
    entropy needs a gradient (`entropy_grad`).
    """
    config = output_layer.config
    group = parallel_state.get_tensor_model_parallel_group()
    if config.sequence_parallel:
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True
        )
    rows = hidden_states[:, 0].index_select(0, context["source"])
    logits = tensor_parallel.linear_with_grad_accumulation_and_async_allreduce(
        input=rows[:, None],
        weight=output_layer.weight if output_weight is None else output_weight,
        bias=None,
        gradient_accumulation_fusion=config.gradient_accumulation_fusion,
        allreduce_dgrad=group.size() > 1 and not config.sequence_parallel,
        sequence_parallel=False,
        tp_group=group,
    )[:, 0]
    logp, entropy = VocabParallelLogProb.apply(
        logits, context["target"], context["temperature"], context["vocab"], group
    )
    return torch.stack([logp, entropy if context["entropy_grad"] else entropy.detach()])
