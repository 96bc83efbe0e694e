"""Tree attention: a token sees its ancestors and nothing else.

A packed sequence lists trees depth first, so the whole mask is one number a token: key k is visible to query q
when ``k <= q < subtree_end[k]``. A rank has the queries of its own tokens, and keys of these and of what is above them
(`actor/context.py`): all, where there is no context parallelism. Three ways of computing it, equal in value:

- ``dense``: scaled dot-product attention with the [queries, keys] mask; the reference.
- ``chain``: every maximal run of tokens that follow one another (one run a leaf) is one query block. It attends
  causally to itself and, without a mask, to keys and values gathered along its ancestors; the two are merged by their
  sums of exponentials. Nothing masked is computed. A short chain takes both at once, with a small mask: for it the
  calls cost more than the arithmetic. The fastest of those tried on a CPU.
- ``flex``: FlexAttention with a block mask, for GPUs (`actor/flex.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from treepo_mcore.actor.context import Exchange, Share
from treepo_mcore.actor.flex import MULTIPLE, flex, tree_block_mask
from treepo_mcore.config import ConfigError

Implementation = Literal["dense", "chain", "flex"]

SHORT = 64  # tokens of a chain that is not split (benchmarks/training.py on the quickstart's trees, and on longer ones)

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Part:
    """Keys of a chain, of which every query sees all, those up to itself (causal), or what the bias says."""

    keys: slice | Tensor  # indices of keys, int64
    causal: bool = False
    bias: Tensor | None = None  # float32 [queries, keys], 0 or -inf


@dataclass(frozen=True)
class Chain:
    """Own tokens [begin, end), each following the one before, and what they see."""

    begin: int
    end: int
    parts: tuple[Part, ...]


@dataclass
class TreeParams(PackedSeqParams):
    """Rides through Megatron's layers in the place of `PackedSeqParams`."""

    positions: Any = None  # int64 [S], depth of every own token in its path
    share: Any = None  # Share, where some keys come from other ranks of the context-parallel group
    allowed: Any = None  # bool [S, keys], dense only
    chains: Any = None  # list[Chain], chain only
    blocks: Any = None  # BlockMask, flex only


def choose_attention(wanted: Literal["auto", "dense", "chain", "flex"], gpu: bool) -> Implementation:
    """What `actor.attention` means here. Raises `ConfigError` for a kernel of the other kind of device."""
    if wanted == "auto":
        return "flex" if gpu else "chain"
    if wanted == "chain" and gpu:
        raise ConfigError("actor.attention: chain is a CPU kernel; on a GPU use auto, flex or dense")
    if wanted == "flex" and not gpu:
        raise ConfigError("actor.attention: flex has no backward pass on a CPU; use auto, chain or dense")
    return wanted


def attention_multiple(implementation: Implementation) -> int:
    """Tokens of a packed sequence come in multiples of this."""
    return MULTIPLE if implementation == "flex" else 1


def tree_params(share: Share, follows: Tensor, positions: Tensor, implementation: Implementation) -> TreeParams:
    """Attention arguments of a rank's share of a packed sequence.

    follows: bool [S], whether a token's predecessor is the own token before it; positions: int64 [S].
    """
    longest = int(positions.max()) + 1
    params = TreeParams(qkv_format="sbhd", max_seqlen_q=longest, max_seqlen_kv=longest, positions=positions)
    if share.order is not None:
        params.share = share
    if implementation == "dense":
        params.allowed = ancestor_mask(share.end, share.rows)
    elif implementation == "flex":
        params.blocks = tree_block_mask(share.end, share.rows)
    else:
        params.chains = find_chains(follows, share.end, share.rows)
    return params


def ancestor_mask(end: Tensor, rows: Tensor) -> Tensor:
    """bool [queries, keys]: row q is True at the keys that q sees. See `Share` for the arguments."""
    index = torch.arange(len(end), device=end.device)
    return (index[None, :] <= rows[:, None]) & (rows[:, None] < end[None, :])


def find_chains(follows: Tensor, end: Tensor, rows: Tensor, short: int = SHORT) -> list[Chain]:
    """Split a rank's tokens into runs in which each follows the one before. See `tree_params`, `Share`.

    short: tokens up to which a chain attends to itself and to its ancestors at once.
    """
    size = len(follows)
    starts = (~follows).nonzero()[:, 0].tolist()
    chains = []
    for begin, stop in zip(starts, [*starts[1:], size], strict=True):
        first = int(rows[begin])
        ancestors = (end[:first] > first).nonzero()[:, 0]
        own = slice(first, first + stop - begin)
        if not len(ancestors):
            parts: tuple[Part, ...] = (Part(own, causal=True),)
        elif stop - begin <= short:
            index = torch.arange(own.start, own.stop, device=end.device)
            parts = (Part(torch.cat([ancestors, index]), bias=_causal_bias(stop - begin, len(ancestors))),)
        else:
            parts = (Part(own, causal=True), Part(ancestors))
        chains.append(Chain(begin, stop, parts))
    return chains


def _causal_bias(queries: int, ancestors: int) -> Tensor:
    """The queries are the last of their keys."""
    hidden = torch.ones(queries, ancestors + queries, dtype=torch.bool).triu(ancestors + 1)
    return torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


class TreeAttention(MegatronModule):
    """Megatron's `core_attention` slot: q [S, 1, heads / tp, d], k and v [S, 1, groups / tp, d]."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None
        assert softmax_scale is None, "no family asks for one"
        self.scale = config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: TreeParams,
        **kwargs: Any,
    ) -> Tensor:
        """Returns [S, 1, heads / tp * d]."""
        q, k, v = query[:, 0], key[:, 0], value[:, 0]
        if packed_seq_params.share is not None:
            group = parallel_state.get_context_parallel_group()
            both = Exchange.apply(torch.cat([k, v], dim=-1), packed_seq_params.share, group)
            k, v = (half.contiguous() for half in both.split([k.shape[-1], v.shape[-1]], dim=-1))
        if packed_seq_params.chains is not None:
            out = ChainAttention.apply(q, k, v, packed_seq_params.chains, self.scale)
        elif packed_seq_params.blocks is not None:
            out = flex(q, k, v, packed_seq_params.blocks)
        else:
            out = dense_attention(q, k, v, packed_seq_params.allowed, self.scale)
        return out.reshape(query.shape[0], 1, -1)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """q [S, heads, d]; k, v [keys, groups, d]; allowed bool [S, keys]. Returns [S, heads, d]."""
    out = F.scaled_dot_product_attention(
        _heads_first(q), _heads_first(k), _heads_first(v), attn_mask=allowed, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


class ChainAttention(torch.autograd.Function):
    """Exact attention chain by chain; gradients of shared keys are added up over the chains that saw them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, chains: list[Chain], scale: float) -> Tensor:
        groups = k.shape[1]
        out = torch.empty_like(q)
        sums = []  # logarithms of the sums of exponentials, [groups, heads / groups, chain]
        for chain in chains:
            rows = slice(chain.begin, chain.end)
            queries = _by_group(q[rows], groups)
            done, sum_ = _attend(queries, k, v, chain.parts[0], scale)
            for part in chain.parts[1:]:
                more, sum_of_more = _attend(queries, k, v, part, scale)
                done = torch.lerp(done.float(), more.float(), torch.sigmoid(sum_of_more - sum_)[..., None])
                sum_ = torch.logaddexp(sum_, sum_of_more)
            out[rows] = _from_groups(done)
            sums.append(sum_)
        ctx.save_for_backward(q, k, v, out, *sums)
        ctx.chains, ctx.scale = chains, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        # Given the output and the sum over all keys, the kernel's gradients of a part are those of the whole.
        q, k, v, out, *sums = ctx.saved_tensors
        groups = k.shape[1]
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for chain, sum_ in zip(ctx.chains, sums, strict=True):
            rows = slice(chain.begin, chain.end)
            queries, done = _by_group(q[rows], groups), _by_group(out[rows], groups)
            grad_done = _by_group(grad[rows], groups).contiguous()
            for part in chain.parts:
                seen = _keys_and_values(k, v, part, queries)
                own, *shared = _backward(
                    grad_done, queries, *seen, done, sum_, 0.0, part.causal, attn_mask=part.bias, scale=ctx.scale
                )
                grad_q[rows] += _from_groups(own)
                for total, more in zip((grad_k, grad_v), shared, strict=True):
                    _add(total, part.keys, more.sum(1).transpose(0, 1))
        return grad_q, grad_k, grad_v, None, None


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]  # [S, h, d] -> [1, h, S, d]


# The kernel's batch is the key/value groups, its heads the queries of a group: these can then share their keys without
# copies, by a stride of zero.


def _by_group(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [S, h, d] -> [groups, h / groups, S, d]


def _from_groups(x: Tensor) -> Tensor:
    return x.permute(2, 0, 1, 3).flatten(1, 2)  # [groups, h / groups, S, d] -> [S, h, d]


def _attend(queries: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    seen = _keys_and_values(k, v, part, queries)
    result: tuple[Tensor, Tensor] = _forward(queries, *seen, 0.0, part.causal, attn_mask=part.bias, scale=scale)
    return result


def _keys_and_values(k: Tensor, v: Tensor, part: Part, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Two of [keys, groups, d] -> their rows as [groups, heads / groups, keys, d]."""
    shape = (-1, queries.shape[1], -1, -1)
    return k[part.keys].transpose(0, 1)[:, None].expand(shape), v[part.keys].transpose(0, 1)[:, None].expand(shape)


def _add(total: Tensor, keys: slice | Tensor, more: Tensor) -> None:
    if isinstance(keys, slice):
        total[keys] += more
    else:
        total.index_add_(0, keys, more)
