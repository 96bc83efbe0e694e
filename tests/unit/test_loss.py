"""The policy loss on tree edges against the loss of the flattened leaves, and log-probs against log_softmax."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_mcore.actor.costs import LOGITS_BYTES, block_columns
from treepo_mcore.actor.log_probs import LinearLogProb
from treepo_mcore.config import LossConfig
from treepo_mcore.learn.loss import nll_loss, policy_loss


def one_leaf_loss(logp, old, advantage, config):
    """Clip-higher and dual clip as the papers write them, of one token of one leaf."""
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * config.dual_clip), loss)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([0.0, 0.1]))
def test_equal_to_the_flattened_leaves(seed, leaves, entropy_coef):
    draw = torch.Generator().manual_seed(seed)
    edges = 12
    config = LossConfig(clip_low=0.2, clip_high=0.28, dual_clip=3.0, entropy_coef=entropy_coef)
    logp = torch.randn(edges, generator=draw, dtype=torch.float64).requires_grad_()
    old = logp.detach() + 1.5 * torch.randn(edges, generator=draw, dtype=torch.float64)
    entropy = torch.rand(edges, generator=draw, dtype=torch.float64).requires_grad_()
    through = torch.rand(edges, leaves, generator=draw) < 0.6
    through[:, 0] = True
    worth = torch.randn(leaves, generator=draw, dtype=torch.float64) * through
    mine = policy_loss(logp, old, worth.clamp(min=0).sum(1), worth.clamp(max=0).sum(1), entropy, through.sum(1), config)
    mine.backward()
    found, found_entropy = logp.grad, entropy.grad
    logp.grad = entropy.grad = None
    flat = one_leaf_loss(logp[:, None], old[:, None], worth, config) * through
    flat = flat.sum() - (entropy_coef * (entropy[:, None] * through).sum() if entropy_coef else 0)
    flat.backward()
    torch.testing.assert_close(mine, flat)
    torch.testing.assert_close(found, logp.grad, rtol=1e-9, atol=1e-12)
    if entropy_coef:
        torch.testing.assert_close(found_entropy, entropy.grad)


def test_clipping_stops_the_gradient_on_the_right_side():
    """Good tokens stop above 1 + clip_high, bad ones below 1 - clip_low and above dual_clip."""
    config = LossConfig(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    ratios = torch.tensor([0.5, 1.0, 1.27, 1.29, 2.9, 3.1])
    for positive, alive in ((1.0, [1, 1, 1, 0, 0, 0]), (0.0, [0, 1, 1, 1, 1, 0])):
        logp = ratios.log().requires_grad_()
        good, bad = torch.full((6,), positive), torch.full((6,), positive - 1)
        policy_loss(logp, torch.zeros(6), good, bad, torch.zeros(6), torch.ones(6), config).backward()
        assert (logp.grad != 0).int().tolist() == alive
        torch.testing.assert_close(logp.grad.abs(), ratios * torch.tensor(alive))


def test_a_ratio_beyond_all_bounds_has_a_finite_gradient():
    logp = torch.tensor([-0.1, -95.0]).requires_grad_()
    old, one = torch.tensor([-95.0, -0.1]), torch.ones(2)
    loss = policy_loss(logp, old, one, -one, torch.zeros(2), one, LossConfig())
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()


def test_supervised_loss_counts_leaves():
    assert nll_loss(torch.tensor([-1.0, -2.0]), torch.tensor([3, 1])).item() == 5.0


@pytest.mark.parametrize("entropy_too", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("columns", "block"), [(330, 512), (384, 512), (384, 128), (384, 7), (330, 1)])
def test_log_probs_entropy_and_gradients(group, columns, block, temperature, entropy_too):
    """Padded columns have large logits, which would show."""
    vocab, edges, hidden = 330, 40, 16
    draw = torch.Generator().manual_seed(0)
    rows, layer = torch.randn(edges, hidden, generator=draw), torch.randn(columns, hidden, generator=draw)
    layer[vocab:] = 30 * rows[0]
    target = torch.randint(0, vocab, (edges,), generator=draw)
    weights = torch.randn(2, edges, generator=draw)
    mine = [x.clone().requires_grad_() for x in (rows, layer)]
    logp, entropy = LinearLogProb.apply(*mine, target, temperature, vocab, group, block)
    (weights[0] * logp + (weights[1] * entropy if entropy_too else 0)).sum().backward()
    theirs = [x.double().requires_grad_() for x in (rows, layer)]
    full = (theirs[0] @ theirs[1][:vocab].t() / temperature).log_softmax(-1)
    expected = full.gather(1, target[:, None])[:, 0]
    expected_entropy = -(full.exp() * full).sum(-1)
    (weights[0] * expected + (weights[1] * expected_entropy if entropy_too else 0)).sum().backward()
    torch.testing.assert_close(logp, expected.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy.float(), rtol=0, atol=1e-5)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad.float(), rtol=1e-4, atol=1e-5)
    assert mine[1].grad[vocab:].eq(0).all()


def test_half_precision_gives_float32(group):
    rows, layer = (torch.randn(n, 8).bfloat16().requires_grad_() for n in (3, 9))
    logp, entropy = LinearLogProb.apply(rows, layer, torch.zeros(3, dtype=torch.int64), 1.0, 5, group, 2)
    assert logp.dtype == entropy.dtype == torch.float32
    logp.sum().backward()
    for x in (rows, layer):
        assert x.grad.dtype == torch.bfloat16
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("block", [1, 3])
def test_very_unlikely_tokens_stay_finite(group, block):
    layer = torch.tensor([[500.0], [-500.0], [0.0]], requires_grad=True)
    logp, entropy = LinearLogProb.apply(torch.ones(1, 1), layer, torch.tensor([1]), 1.0, 3, group, block)
    (logp + entropy).sum().backward()
    assert logp.item() == -1000
    assert entropy.item() == 0
    assert torch.isfinite(layer.grad).all()


def test_blocks_of_logits_stay_within_their_bytes():
    """A micro-batch of 33,000 tokens in bfloat16: 46 blocks of Qwen2.5-7B's 152,064 columns; of few rows, all."""
    columns = block_columns(33_000, 2)
    assert 0.9 * LOGITS_BYTES < 33_000 * columns * 10 <= LOGITS_BYTES
    assert columns % 128 == 0
    assert block_columns(600, 2) > 152_064
    assert block_columns(10**9, 2) == 128
