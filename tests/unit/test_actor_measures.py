"""What an update reports of its edges, by hand."""

import math

import pytest
import torch
from trees import random_tree

from treepo_mcore.actor.batch import empty_sequence
from treepo_mcore.config import LossConfig
from treepo_mcore.learn.advantage import LeafAdvantage
from treepo_mcore.learn.measures import edge_means, edge_sums
from treepo_mcore.learn.packing import pack_trees
from treepo_mcore.records import EdgeValues

LIMITS = LossConfig(clip_low=0.2, clip_high=0.28)


def sums(sequence, old, own, loss=0.0, **given):
    size = len(sequence.target)
    logp = sequence.behaviour_logprob
    values = {"entropy": torch.arange(size).float(), "correction": None, "reference_kl": None} | given
    edges = EdgeValues(sequence, logp, values.pop("entropy"), None, None)
    return edge_sums(edges, torch.tensor(loss), logp + old, logp + own, limits=LIMITS, **values)


def test_means_count_an_edge_once_for_each_leaf():
    tree = random_tree(3, leaves=5)
    worth = LeafAdvantage(torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]).double().numpy(), torch.ones(5).double().numpy())
    (sequence,) = pack_trees([tree], [worth], 1000)
    size, counts = len(sequence.target), sequence.multiplicity.double()
    draw = torch.Generator().manual_seed(0)
    old, own = (torch.randn(size, generator=draw) * 0.5 for _ in range(2))
    factor = torch.rand(size, generator=draw)
    # A micro-batch of a rank without trees changes nothing, whatever its log-probs are.
    nothing = sums(empty_sequence(), torch.tensor([9.0]), torch.tensor([9.0]))
    mine = sums(sequence, old, own, loss=2.5, correction=factor, reference_kl=factor * 2)
    total = torch.cat([mine[:-1] + nothing[:-1], torch.maximum(mine[-1:], nothing[-1:])])
    found = edge_means(total)

    def mean(column):
        return float((column.double() * counts).sum() / counts.sum())

    rho, ratio = own.exp(), (-old).exp()
    clipped = ((ratio > 1.28) & (sequence.adv_pos > 0)) | ((ratio < 0.8) & (sequence.adv_neg < 0))
    expected = {
        "tokens": float(counts.sum()),
        "loss": 2.5,
        "entropy": mean(torch.arange(size)),
        "approx_kl": mean(ratio - 1 + old),
        "clipped": mean(clipped),
        "ratio": mean(ratio),
        "correction": mean(factor),
        "reference_kl": mean(factor * 2),
        "mismatch/logprob_abs_mean": mean(own.abs()),
        "mismatch/kl": mean(rho - 1 - own),
        "mismatch/logprob_abs_max": own.abs().max().item(),
        "mismatch/effective_samples": mean(rho) ** 2 / mean(rho.square()),
    }
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < found["clipped"] < 1
    assert found["mismatch/effective_samples"] < 0.99


def test_without_any_token_nothing_is_divided_by_zero():
    found = edge_means(sums(empty_sequence(), torch.zeros(1), torch.zeros(1)))
    assert all(math.isfinite(value) for value in found.values())
