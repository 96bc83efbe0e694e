"""Log-probs of a vocabulary-parallel output layer, and the clipped policy loss on trees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from treepo_mcore.config import LossConfig

BOUND = 20.0  # nats, of differences of log-probs before they are exponentiated, as in verl
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


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    adv_pos: Tensor,
    adv_neg: Tensor,
    entropy: Tensor,
    weight: Tensor,
    config: LossConfig,
    kl: Tensor | None = None,
) -> Tensor:
    """Sum over edges of the clip-higher, dual-clip loss of all leaves below each edge (spec 3.3, identity I2).

    All float32 [E]. A token shared by several leaves has one ratio, so its loss needs only the sums of their positive
    and of their negative advantages. Entropy and KL (see `reference_kl`) count with the sum of the leaves' weights.
    """
    ratio = likelihood_ratio(logp, old_logp)
    gain = adv_pos * ratio.clamp(max=1 + config.clip_high)
    loss = adv_neg * ratio.clamp(min=1 - config.clip_low).clamp(max=config.dual_clip)
    total = -(gain + loss).sum()
    if config.entropy_coef:
        total = total - config.entropy_coef * (entropy * weight).sum()
    if kl is not None:
        total = total + config.kl_coef * (kl * weight).sum()
    return total


def likelihood_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """p(new) / p(old) at each sampled token, float32 [E]; bounded, as an infinite one times a zero gradient is NaN."""
    return (logp - old_logp).clamp(-BOUND, BOUND).exp()


def reference_kl(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) at each sampled token: >= 0, unbiased on the policy's own samples.

    float32 [E]; http://joschu.net/blog/kl-approx.html. The difference is bounded, so that one token the policy has
    given up cannot make the loss infinite.
    """
    difference = (reference_logp - logp).clamp(-BOUND, BOUND)
    return difference.exp() - 1 - difference


def nll_loss(logp: Tensor, weight: Tensor) -> Tensor:
    """Supervised loss, summed over edges and leaves."""
    return -(logp * weight).sum()
