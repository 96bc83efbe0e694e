"""FlexAttention's block mask: the same blocks as from the whole mask, and values equal to the dense reference."""

from functools import partial

import pytest
import torch
import torch.nn.attention.flex_attention as library
from trees import random_tree

from treepo_mcore.actor import flex as module
from treepo_mcore.actor.attention import ancestor_mask, attention_multiple, dense_attention
from treepo_mcore.actor.batch import empty_sequence, micro_batch
from treepo_mcore.actor.context import whole
from treepo_mcore.actor.flex import BLOCK, flex, tree_block_mask
from treepo_mcore.learn.advantage import LeafAdvantage
from treepo_mcore.learn.packing import pack_trees

HEAD = 16
SCALE = HEAD**-0.5


def ends(seeds, scale=1):
    """subtree_end of packed trees, every token `scale` times, padded to whole blocks with trees of one token."""
    trees = [random_tree(seed, leaves=6) for seed in seeds]
    worth = [LeafAdvantage(torch.zeros(len(t.leaves)).numpy(), torch.ones(len(t.leaves)).numpy()) for t in trees]
    (sequence,) = pack_trees(trees, worth, 10**6)
    # A longer tree of the same shape: token i becomes `scale` tokens that follow one another.
    end = (sequence.subtree_end * scale).repeat_interleave(scale)
    padding = torch.arange(len(end), len(end) + -len(end) % BLOCK) + 1
    return torch.cat([end, padding])


CASES = [([1], 1), ([2, 3], 5), ([4], 9), ([5, 6, 7], 11)]


@pytest.mark.parametrize(("seeds", "scale"), CASES)
def test_blocks_are_those_of_the_whole_mask(seeds, scale):
    end = ends(seeds, scale)
    mine = tree_block_mask(end, torch.arange(len(end)))
    allowed = ancestor_mask(end, torch.arange(len(end)))
    theirs = library.create_block_mask(
        lambda b, h, q, k: allowed[q, k], None, None, len(end), len(end), device="cpu", BLOCK_SIZE=BLOCK
    )
    assert torch.equal(mine.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    for name in ("kv", "full_kv", "q", "full_q"):  # the indices that count
        for row, count in enumerate(getattr(mine, f"{name}_num_blocks")[0, 0].tolist()):
            one, other = (getattr(mask, f"{name}_indices")[0, 0, row, :count] for mask in (mine, theirs))
            assert torch.equal(one, other), name


def test_some_blocks_are_full_and_some_are_left_out():
    end = ends([8], 40)
    mask = tree_block_mask(end, torch.arange(len(end)))
    assert mask.full_kv_num_blocks.sum() > 0
    assert mask.to_dense().sum() < len(end) // BLOCK * (len(end) // BLOCK + 1) // 2


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("seeds", "scale"), CASES[:2])
def test_values_and_gradients_equal_the_dense_reference(seeds, scale, heads, monkeypatch):
    # On a CPU torch refuses a backward pass at the door, although its uncompiled one runs.
    monkeypatch.setattr(library, "_validate_device", lambda *_: None)
    end = ends(seeds, scale)
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(len(end), h, HEAD, generator=draw) for h in (heads[0], heads[1], heads[1])]
    seen = torch.randn(tensors[0].shape, generator=draw)
    results = []
    for attend in (
        lambda q, k, v: flex(q, k, v, tree_block_mask(end, torch.arange(len(end)))),
        lambda q, k, v: dense_attention(q, k, v, ancestor_mask(end, torch.arange(len(end))), SCALE),
    ):
        inputs = [x.clone().requires_grad_() for x in tensors]
        out = attend(*inputs)
        out.backward(seen)
        results.append([out.detach(), *(x.grad for x in inputs)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_packed_sequences_are_padded_to_whole_blocks():
    """Two at least: a single one would be compiled for itself."""
    settings = {"implementation": "flex", "device": torch.device("cpu")}
    sequence = empty_sequence()
    batch = micro_batch(
        sequence, whole(sequence.subtree_end), None, None, multiple=attention_multiple("flex"), **settings
    )
    assert batch.attention.blocks.shape[-2:] == (2 * BLOCK, 2 * BLOCK)


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled when `flex` goes the way it goes on a GPU; the graphs are run as they are, not made kernels."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setattr(library, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    module._compiled.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(module, "flex_attention", module._compiled())
    with torch._dynamo.config.patch(disable=False):
        yield made
    module._compiled.cache_clear()
    torch._dynamo.reset()


def attend(blocks, heads=(8, 4)):
    """Both passes of a sequence, as in a step: log-probs without gradients, then an update."""
    size = blocks * BLOCK
    mask = tree_block_mask(torch.arange(size) + 1, torch.arange(size))
    for grad in (False, True):
        q, k, v = (torch.randn(size, h, HEAD, requires_grad=grad) for h in (heads[0], heads[1], heads[1]))
        with torch.set_grad_enabled(grad):
            out = flex(q, k, v, mask)
    torch.testing.assert_close(out, v.repeat_interleave(heads[0] // heads[1], 1))  # every token sees itself alone


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        pytest.param((6, 2, 4, 8, 16, 10), 2, marks=pytest.mark.long),  # in blocks
        ((8, 6, 4, 10), 4),  # the first has as many as there are heads
        pytest.param((4, 8, 16, 6, 10, 12), 4, marks=pytest.mark.long),  # as groups, as heads, as numbers in a head
    ],
)
def test_few_graphs_for_all_lengths(lengths, expected, graphs):
    for blocks in lengths:
        attend(blocks)
    assert len(graphs) == expected


def test_too_many_graphs_are_an_error_and_not_a_whole_matrix(graphs):
    with torch._dynamo.config.patch(recompile_limit=2):
        attend(6)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            attend(6, heads=(4, 4))
