"""Log-probs and entropies of sampled tokens, from hidden states and a vocabulary-parallel output layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from treepo_mcore.actor.costs import block_columns

NOTHING = -1e30  # below any logit: the maximum of no columns. Its exponential is 0, and 0 times it is not NaN


class LinearLogProb(torch.autograd.Function):
    """log p(target) and entropy from hidden states and an output layer whose rows are spread over a tensor group.

    rows [E, H]; weight [V_padded / tp, H], of which rows at and beyond `vocab` are padding and never enter the softmax;
    target int64 [E]; logits are divided by temperature. Returns float32 [E] twice.

    Logits are made block by block of the vocabulary, with the running maximum and sums of an online softmax, and again
    in the backward pass: no more of them than `block` columns are ever there. Where one block is all, it is kept for
    the backward pass, which needs nothing again. (Megatron's `vocab_parallel_cross_entropy` wants all logits, counts
    padded columns, has no entropy, and overwrites its input.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float,
        vocab: int,
        group: dist.ProcessGroup,
        block: int,
    ) -> tuple[Tensor, Tensor]:
        """block: columns of logits that are there at once."""
        first = group.rank() * len(weight)
        real = min(max(0, vocab - first), len(weight))
        local = target - first
        top = rows.new_full((len(rows),), NOTHING, dtype=torch.float32)
        total, weighted, chosen = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        for begin in range(0, real, block):
            logits = rows @ weight[begin : min(begin + block, real)].t()
            before, top = top, torch.maximum(top, logits.amax(-1).float())
            x = (logits - top[:, None]).div_(temperature)  # in float32, as `top` is
            at, here = _within(local, begin, x.shape[1])
            chosen = torch.where(here, logits.gather(1, at)[:, 0].float(), chosen)
            exps = x.exp()
            shift = (before - top) / temperature
            weighted = shift.exp() * (weighted + total * shift) + x.mul_(exps).sum(-1)
            total = shift.exp() * total + exps.sum(-1)
        everywhere = top.clone()
        dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, group=group)
        shift = (top - everywhere) / temperature
        mine = (local >= 0) & (local < real)
        chosen = torch.where(mine, (chosen - everywhere) / temperature, 0.0)
        sums = torch.stack([shift.exp() * total, shift.exp() * (weighted + total * shift), chosen])
        dist.all_reduce(sums, group=group)
        total, weighted, chosen = sums
        entropy = total.log() - weighted / total
        kept = logits if 0 < real <= block else None
        ctx.save_for_backward(rows, weight, local, everywhere + temperature * total.log(), entropy, kept)
        ctx.temperature, ctx.real, ctx.block = temperature, real, block
        ctx.set_materialize_grads(False)
        return chosen - total.log(), entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the rows (this rank's part of the sum over the vocabulary) and of the weight."""
        rows, weight, local, norm, entropy, kept = ctx.saved_tensors
        grad_logp = grad_logp / ctx.temperature
        grad_rows = torch.zeros_like(rows, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight)
        for begin in range(0, ctx.real, ctx.block):
            part = slice(begin, min(begin + ctx.block, ctx.real))
            logits = rows @ weight[part].t() if kept is None else kept
            x = (logits - norm[:, None]).div_(ctx.temperature)  # log p
            if grad_entropy is None:
                grad = x.exp_().mul_(-grad_logp[:, None])
            else:  # dH/dx_j = -p_j (log p_j + H)
                grad = x.exp()
                x.add_(entropy[:, None]).mul_((grad_entropy / ctx.temperature)[:, None]).add_(grad_logp[:, None])
                grad.mul_(x.neg_())
            at, here = _within(local, begin, grad.shape[1])
            grad.scatter_add_(1, at, (grad_logp * here)[:, None])
            grad = grad.to(rows.dtype)
            grad_weight[part] = grad.t() @ rows
            grad_rows += grad @ weight[part]
        return grad_rows.to(rows.dtype), grad_weight, None, None, None, None, None


def _within(local: Tensor, begin: int, columns: int) -> tuple[Tensor, Tensor]:
    """Of the targets, int64 [E, 1], their columns in a block, 0 for others; and bool [E], which are in it."""
    here = (local >= begin) & (local < begin + columns)
    return (local - begin).masked_fill(~here, 0)[:, None], here


def edge_log_probs(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Mapping[str, Any], **_: Any
) -> Tensor:
    """Megatron's `output_processor`: hidden states -> float32 [2, E], log-probs and entropies of the edges.

    Rows are gathered by edge source before the output layer, so that prompt tokens cost no logits and a branch
    point gives one row for each child. context: source and target int64 [E], temperature, vocab, and whether the
    entropy needs a gradient (`entropy_grad`).
    """
    group = parallel_state.get_tensor_model_parallel_group()
    split = output_layer.config.sequence_parallel
    if split:
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True
        )
    rows = hidden_states[:, 0].index_select(0, context["source"])
    if not split:  # gradients of the ranks' columns are added up; gathering does that by itself
        rows = tensor_parallel.copy_to_tensor_model_parallel_region(rows)
    weight = output_layer.weight if output_weight is None else output_weight
    block = block_columns(len(rows), rows.element_size())
    logp, entropy = LinearLogProb.apply(
        rows, weight, context["target"], context["temperature"], context["vocab"], group, block
    )
    return torch.stack([logp, entropy if context["entropy_grad"] else entropy.detach()])
