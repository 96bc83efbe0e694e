"""Context parallelism: who has which tokens, which keys come from others, and that attention is the same."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import SCALE, inputs, packed
from trees import random_tree

from treepo_mcore.actor.attention import ChainAttention, ancestor_mask, dense_attention
from treepo_mcore.actor.batch import Shares, micro_batch
from treepo_mcore.actor.context import Share, cut, share_of
from treepo_mcore.actor.flex import BLOCK, flex

WORK = 50.0


def any_cut(size, ranks, seed):
    """Runs of any lengths, some empty, dealt to ranks by chance."""
    draw = random.Random(seed)
    marks = sorted(draw.randint(0, size) for _ in range(3 * ranks - 1))
    shares = [[] for _ in range(ranks)]
    for run in zip([0, *marks], [*marks, size], strict=True):
        draw.choice(shares).append(run)
    return shares


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 10**6))
def test_a_rank_has_exactly_the_keys_that_its_tokens_see(seeds, ranks, seed):
    sequence = packed([random_tree(number, leaves=7) for number in seeds])
    index, end = torch.arange(len(sequence.tokens)), sequence.subtree_end
    seen = ancestor_mask(end, index)
    runs = any_cut(len(index), ranks, seed)
    shares = [share_of(end, runs, rank) for rank in range(ranks)]
    assert torch.equal(torch.cat([share.own for share in shares]).sort().values, index)
    for rank, share in enumerate(shares):
        keys = seen[share.own].any(0).nonzero()[:, 0]
        assert torch.equal(ancestor_mask(share.end, share.rows), seen[share.own][:, keys])
        # What arrives, in the order in which it is sent, is what the keys are made of.
        arrived = [other.own[other.send[rank]] for other in shares]
        assert tuple(map(len, arrived)) == share.receive
        assert torch.equal(torch.cat([share.own, *arrived])[share.order], keys)
        paths = int(sequence.positions.max()) * sum(begin < stop for begin, stop in runs[rank])
        assert share.fetched <= paths


def with_nothing(x):
    """Row -1 is zero."""
    return torch.cat([x, torch.zeros(1, *x.shape[1:])])


def attend(name, sequence, share, q, k, v, multiple):
    """Of a share, padded, with rows of `q`, `k`, `v` [all tokens, ...] in the place of what the layer computes."""
    batch = micro_batch(sequence, share, None, None, multiple=multiple, implementation=name, device=torch.device("cpu"))
    extra = len(batch.sequence.tokens) - len(share.own)
    keys = ancestor_mask(sequence.subtree_end, torch.arange(len(sequence.tokens)))[share.own].any(0).nonzero()[:, 0]
    nothing = torch.full((extra,), -1)
    own, keys = torch.cat([share.own, nothing]), torch.cat([keys, nothing])
    mine = with_nothing(q)[own], with_nothing(k)[keys], with_nothing(v)[keys]
    params = batch.attention
    if name == "flex":
        out = flex(*mine, params.blocks)
    elif name == "chain":
        out = ChainAttention.apply(*mine, params.chains, SCALE)
    else:
        out = dense_attention(*mine, params.allowed, SCALE)
    return out[: len(share.own)]


@pytest.mark.parametrize(
    ("name", "multiple"), [("dense", 1), ("dense", 4), ("chain", 1), ("chain", 4), ("flex", BLOCK)]
)
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_attention_over_shares_is_that_of_one_rank(name, multiple, seed, ranks):
    """Values, and gradients, which flex has not on a CPU."""
    sequence = packed([random_tree(seed, leaves=7), random_tree(seed + 1)])
    size = len(sequence.tokens)
    runs = any_cut(size, ranks, seed)
    results = []
    for alone in (True, False):
        tensors = inputs(size, 4, 2, seed=0)
        out = torch.zeros_like(tensors[0])
        with torch.set_grad_enabled(name != "flex"):
            for rank in range(1 if alone else ranks):
                share = share_of(sequence.subtree_end, [[(0, size)]] if alone else runs, rank)
                if alone:
                    out = attend("dense", sequence, share, *tensors, 1)
                elif len(share.own):
                    out = out.index_copy(0, share.own, attend(name, sequence, share, *tensors, multiple))
        if name != "flex":
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
        results.append([out.detach(), *(x.grad for x in tensors if x.grad is not None)])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 40))
def test_every_edge_is_on_one_rank_with_its_values(seed, ranks, leaves):
    sequence = packed([random_tree(seed, leaves=leaves)])
    edges, found = [], {}
    for rank in range(ranks):
        share = Shares(ranks, rank, WORK).of(sequence)
        old = torch.arange(len(sequence.target)).float()
        made = micro_batch(sequence, share, old, None, multiple=2, implementation="chain", device=torch.device("cpu"))
        mine = made.sequence
        assert len(mine.tokens) % 2 == 0
        if not len(made.edges):
            assert mine.multiplicity.tolist() == [0]  # something to begin the backward pass at
            assert made.old_logp.tolist() == [0]
            continue
        edges += made.edges.tolist()
        assert torch.equal(made.old_logp, old[made.edges])
        assert torch.equal(mine.tokens[mine.source], sequence.tokens[sequence.source[made.edges]])
        found |= zip(map(tuple, mine.edge_key.tolist()), mine.target.tolist(), strict=True)
    assert sorted(edges) == list(range(len(sequence.target)))
    assert found == dict(zip(map(tuple, sequence.edge_key.tolist()), sequence.target.tolist(), strict=True))


def depths(*pieces):
    """Positions of tokens: runs of (first position, length)."""
    return torch.cat([torch.arange(first, first + length) for first, length in pieces])


def imbalance(values):
    return max(values) * len(values) / sum(values)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_trees_are_cut_by_work_and_chains_in_two_runs(ranks):
    tree = depths((0, 500), *[(500, 4000)] * 16)
    (runs,) = {len(share) for share in cut(tree, WORK, ranks)}
    assert runs == 1
    chain = depths((0, 20_000))
    shares = cut(chain, WORK, ranks)
    assert {len(share) for share in shares} == {2}
    for positions in (tree, chain):
        work, made = positions.double() + 1 + WORK, cut(positions, WORK, ranks)
        assert imbalance([sum(work[a:b].sum().item() for a, b in share) for share in made]) < 1.02
        assert sorted(run for share in made for run in share)[-1][1] == len(positions)
    assert imbalance([sum(b - a for a, b in share) for share in cut(chain, WORK, ranks)]) < 1.001


def test_more_ranks_than_tokens():
    shares = cut(depths((0, 2)), WORK, 4)
    assert sum(b - a for share in shares for a, b in share) == 2
    assert len(shares) == 4


def test_padding_keeps_what_others_send_in_its_place():
    share = Share(
        own=torch.tensor([4, 5]),
        rows=torch.tensor([1, 2]),
        end=torch.tensor([3, 3, 3]),
        order=torch.tensor([2, 0, 1]),  # the key that was fetched comes first
        send=(torch.tensor([0]),),
        receive=(1,),
    ).padded(2)
    assert share.order.tolist() == [4, 0, 1, 2, 3]
    assert share.rows.tolist() == [1, 2, 3, 4]
    assert share.end.tolist() == [3, 3, 3, 4, 5]
