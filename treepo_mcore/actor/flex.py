"""Tree attention for GPUs: FlexAttention (torch) with a block mask made straight from the intervals.

Key k is visible to query q when ``k <= q < subtree_end[k]``. For a block of 128 x 128 that follows from two numbers a
block of keys, so the table of blocks costs (S / 128)^2 and no mask of S x S is ever made. The kernel is compiled
for lengths that vary, with and without a backward pass; sequences come padded to whole blocks, two at least. Queries
are a rank's own tokens; where keys come from other ranks (`actor/context.py`), there are more of these.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # FlexAttention's default
# Lengths come in multiples of it: one block alone would be compiled for itself (torch takes sizes of 1 for constants).
MULTIPLE = 2 * BLOCK


def tree_block_mask(end: Tensor, rows: Tensor) -> BlockMask:
    """Of a rank's share of a packed sequence (`Share`): end int64 [keys], rows int64 [S], S a multiple of 128."""
    size, keys = len(rows), len(end)
    assert size % BLOCK == 0, f"{size} tokens are not whole blocks of {BLOCK}"
    end = F.pad(end, (0, -keys % BLOCK))  # keys behind the last, which nobody sees
    ends, places = end.view(-1, BLOCK), rows.view(-1, BLOCK)
    first = torch.arange(0, len(end), BLOCK, device=end.device)[None, :]  # key of every block
    lowest, highest = places.amin(1)[:, None], places.amax(1)[:, None]
    # A block of keys begins before the last query, and is not over before the first.
    some = (first <= highest) & (ends.amax(1)[None, :] > lowest)
    every = (first + BLOCK - 1 <= lowest) & (ends.amin(1)[None, :] > highest)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= rows[query]) & (rows[query] < end[key])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(size, len(end))
    )


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """q [S, heads, d]; k, v [keys, groups, d]. Returns [S, heads, d]. On a CPU forward only (torch 2.11).

    Scores are divided by sqrt(d), FlexAttention's own scale: a number handed over would vary, to the compiler.
    """
    attend: Any = _compiled() if q.is_cuda else flex_attention
    k, v = (F.pad(x, (0, 0, 0, 0, 0, -len(x) % BLOCK)) for x in (k, v))
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]  # [1, h, S, d]
    out = attend(*heads_first, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@cache
def _compiled() -> Any:
    """FlexAttention compiled once for all lengths (`dynamic`), once more for the backward pass.

    Where the first sequence has as many blocks of 128 tokens as there are heads, torch's compiler takes these two sizes
    for one and the same, and compiles twice more for the next length. Uncompiled, FlexAttention computes the whole
    matrix of scores; torch falls back to that silently once a function was compiled as often as its recompile limit
    allows (8). `fullgraph` makes that an error.
    """
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """bool [rows, columns] -> int32 [1, 1, rows], how many each row has, and [1, 1, rows, columns], those first."""
    order = table.int().argsort(dim=1, descending=True, stable=True)
    return table.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]
