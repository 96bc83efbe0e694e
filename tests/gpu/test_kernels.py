"""Kernels that need a GPU: FlexAttention compiled, forward and backward, in bf16 and float32."""

import pytest
import torch
from trees import random_tree

from treepo_mcore.actor.attention import ancestor_mask, dense_attention
from treepo_mcore.actor.flex import MULTIPLE, flex, tree_block_mask
from treepo_mcore.learn.advantage import LeafAdvantage
from treepo_mcore.learn.packing import pack_trees

pytestmark = pytest.mark.gpu

HEADS, GROUPS, HEAD = 8, 2, 64
SCALE = HEAD**-0.5


def ends(seeds, scale):
    """subtree_end of packed trees, every token `scale` times, padded as in a run."""
    trees = [random_tree(seed, leaves=6) for seed in seeds]
    worth = [LeafAdvantage(torch.zeros(len(t.leaves)).numpy(), torch.ones(len(t.leaves)).numpy()) for t in trees]
    (sequence,) = pack_trees(trees, worth, 10**6)
    end = (sequence.subtree_end * scale).repeat_interleave(scale)
    return torch.cat([end, torch.arange(len(end), len(end) + -len(end) % MULTIPLE) + 1]).cuda()


def run(attend, end, dtype):
    """Output and gradients in float32."""
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(len(end), h, HEAD, generator=draw, device="cuda").to(dtype).requires_grad_()
        for h in (HEADS, GROUPS, GROUPS)
    )
    out = attend(q, k, v)
    out.backward(torch.randn(out.shape, generator=draw, device="cuda").to(dtype))
    return [x.detach().float() for x in (out, q.grad, k.grad, v.grad)]


def all_of(end):
    """Rows of a rank that has all tokens."""
    return torch.arange(len(end), device=end.device)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("seeds", "scale"), [([1], 3), ([2, 3], 20), ([4, 5, 6], 40)])
def test_flex_equals_the_dense_reference(seeds, scale, dtype, bound):
    end = ends(seeds, scale)
    found = run(lambda q, k, v: flex(q, k, v, tree_block_mask(end, all_of(end))), end, dtype)
    exact = run(
        lambda q, k, v: dense_attention(q, k, v, ancestor_mask(end, all_of(end)), SCALE),
        end,
        torch.float32,
    )
    for mine, theirs in zip(found, exact, strict=True):
        assert (mine - theirs).norm() <= bound * theirs.norm()


def test_no_compilation_for_new_lengths():
    from torch._dynamo.utils import counters

    def graphs():
        return counters["stats"]["unique_graphs"]

    lengths = set()
    for number, scale in enumerate((5, 9, 14, 23, 31, 40)):
        end = ends([7, 8], scale)
        lengths.add(len(end))
        run(
            lambda q, k, v, end=end: flex(q, k, v, tree_block_mask(end, all_of(end))),
            end,
            torch.bfloat16,
        )
        if number == 1:
            compiled = graphs()
    assert len(lengths) > 4
    assert graphs() == compiled
