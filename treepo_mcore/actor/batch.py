"""A packed sequence made ready for Megatron: padded, on the device, with its attention arguments."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from treepo_mcore.actor.attention import Implementation, TreeParams, tree_params
from treepo_mcore.records import PackedSequence


@dataclass
class MicroBatch:
    """One sequence and the log-probs that its own are compared with."""

    sequence: PackedSequence
    attention: TreeParams
    old_logp: Tensor | None  # float32 [E]; None: no ratios are taken
    reference_logp: Tensor | None  # float32 [E]; None: no reference policy


def micro_batch(
    sequence: PackedSequence,
    old_logp: Tensor | None,
    reference_logp: Tensor | None,
    *,
    multiple: int,
    implementation: Implementation,
    device: torch.device,
) -> MicroBatch:
    """Pad to a multiple (sequence parallelism splits evenly) and move to the device."""
    sequence = _to(_padded(sequence, multiple), device)
    attention = tree_params(sequence.parent, sequence.subtree_end, sequence.positions, implementation)
    old, reference = (None if x is None else x.to(device) for x in (old_logp, reference_logp))
    return MicroBatch(sequence, attention, old, reference)


def empty_sequence() -> PackedSequence:
    """One token and one edge that counts zero times: fills a rank's turn when it has no tree."""
    zero, nothing = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    return PackedSequence(
        tokens=zero,
        positions=zero,
        parent=zero - 1,
        subtree_end=zero + 1,
        source=zero,
        target=zero,
        multiplicity=zero,
        adv_pos=nothing,
        adv_neg=nothing,
        weight=nothing,
        behaviour_logprob=nothing,
        edge_key=torch.zeros(1, 3, dtype=torch.int64),
    )


def _padded(sequence: PackedSequence, multiple: int) -> PackedSequence:
    """Padding tokens are one-token trees of their own without edges."""
    size = len(sequence.tokens)
    extra = -size % multiple
    if not extra:
        return sequence
    zeros = torch.zeros(extra, dtype=torch.int64)
    return replace(
        sequence,
        tokens=torch.cat([sequence.tokens, zeros]),
        positions=torch.cat([sequence.positions, zeros]),
        parent=torch.cat([sequence.parent, zeros - 1]),
        subtree_end=torch.cat([sequence.subtree_end, torch.arange(size, size + extra) + 1]),
        arrays={name: _with_zeros(values, extra) for name, values in sequence.arrays.items()},
    )


def _with_zeros(values: Tensor, rows: int) -> Tensor:
    return torch.cat([values, values.new_zeros(rows, *values.shape[1:])])


def _to(sequence: PackedSequence, device: torch.device) -> PackedSequence:
    tensors = {f.name: getattr(sequence, f.name) for f in fields(sequence) if f.name != "arrays"}
    arrays = {name: values.to(device) for name, values in sequence.arrays.items()}
    return replace(sequence, arrays=arrays, **{name: values.to(device) for name, values in tensors.items()})
