"""Context parallelism on paper: how even the ranks' shares of large trees are, and the keys that they fetch.

    python benchmarks/context.py      # half a minute: a table, and benchmarks/results/context.json

Trees are made up, shares are those of `actor/context.py`; nothing is trained. Work is that of Llama-3.1-70B, bytes are
of its keys and values on one of eight tensor-parallel ranks, for a layer and one direction. A second table deals
mini-batches of small trees: whole trees to eight data-parallel ranks, and the same sequences cut over eight
context-parallel ranks.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from torch import Tensor

from treepo_mcore.actor.context import Runs, cut, share_of

RESULTS = Path(__file__).parent / "results" / "context.json"
TOKEN_WORK = 52_000.0  # `model.shards.token_work` of Llama-3.1-70B
KEY_BYTES = 2 * 128 * 2  # a key and a value in bfloat16, of one head
# Name -> leaves, prompt, segment, segments of the longest path.
TREES = {
    "64 leaves, paths of 33k": (64, 2048, 2048, 16),
    "32 leaves, paths of 35k": (32, 4096, 1024, 32),
    "16 leaves, paths of 127k": (16, 4096, 2048, 60),
    "one answer of 127k": (1, 4096, 2048, 60),
    "two answers of 64k": (2, 4096, 2048, 30),
}
BATCHES, DRAWS, DEALT = (8, 16, 32), 50, 8


def tree(leaves: int, prompt: int, segment: int, depth: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(subtree_end, positions) of a tree that forks in two until it has its leaves; some of these end early."""
    draw = np.random.default_rng(seed)
    ends: list[int] = []
    starts: list[int] = []

    def grow(above: int, size: int, left: int, share: int) -> None:
        """A node of `size` tokens at position `above`, with `share` leaves below and `left` segments to go."""
        first = len(starts)
        starts.extend(range(above, above + size))
        ends.extend([0] * size)
        early = leaves > 2 and share == 1 and draw.random() < 1 / depth
        if left and not early:
            for part in [share - share // 2, share // 2] if share > 1 else [1]:
                grow(above + size, segment, left - 1, part)
        ends[first : first + size] = [len(starts)] * size

    grow(0, prompt, depth, leaves)
    return torch.tensor(ends), torch.tensor(starts)


def spread(values: list[float]) -> float:
    """The largest over the mean."""
    return max(values) * len(values) / sum(values)


def work_of(positions: Tensor, runs: Runs) -> float:
    return sum(float((positions[begin:end].double() + 1 + TOKEN_WORK).sum()) for begin, end in runs)


def shares(name: str, ranks: int) -> dict[str, Any]:
    """One row of the first table."""
    end, positions = tree(*TREES[name])
    begin = time.perf_counter()
    runs = cut(positions, TOKEN_WORK, ranks)
    mine = share_of(end, runs, 0)
    seconds = time.perf_counter() - begin
    everyone = [mine] + [share_of(end, runs, rank) for rank in range(1, ranks)]
    fetched = max(share.fetched for share in everyone)
    return {
        "tree": name,
        "tokens": len(end),
        "longest_path": int(positions.max()) + 1,
        "ranks": ranks,
        "runs": len(runs[0]),
        "work_max_over_mean": spread([work_of(positions, some) for some in runs]),
        "tokens_max_over_mean": spread([float(len(share.own)) for share in everyone]),
        "keys_fetched_most": fetched,
        "of_an_all_gather": fetched / (len(end) * (ranks - 1) / ranks),
        "mib_a_layer": fetched * KEY_BYTES / 2**20,
        "keys_sent_most": max(sum(map(len, share.send)) for share in everyone),
        "plan_seconds_of_a_rank": seconds,
    }


def whole_trees(work: np.ndarray, ranks: int) -> float:
    """As `learn.deal.balance` deals them: the largest to the least loaded rank, and so on."""
    loads = np.zeros(ranks)
    for one in sorted(work, reverse=True):
        loads[loads.argmin()] += one
    return float(loads.max() / loads.mean())


def mini_batches(count: int) -> dict[str, Any]:
    """One row of the second table: means over draws of sizes whose logarithm is normal, sigma 0.6."""
    draw = np.random.default_rng(count)
    dealt, cut_up = [], []
    for _ in range(DRAWS):
        sizes = np.maximum(64, 4000 * draw.lognormal(0, 0.6, count)).astype(int)
        trees = [tree(8, size // 24, size // 24, 4, seed)[1] for seed, size in enumerate(sizes)]
        dealt.append(whole_trees(np.array([work_of(t, [(0, len(t))]) for t in trees]), DEALT))
        together = torch.cat(trees)
        cut_up.append(spread([work_of(together, runs) for runs in cut(together, TOKEN_WORK, DEALT)]))
    return {
        "trees": count,
        "ranks": DEALT,
        "whole_trees_max_over_mean": np.mean(dealt),
        "cut_max_over_mean": max(cut_up),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = [shares(name, ranks) for name in TREES for ranks in (2, 4, 8)]
    for row in rows:
        print(
            f"{row['tree']:<26} {row['tokens']:>9,} tokens  cp{row['ranks']}  {row['runs']} run(s)  work "
            f"{row['work_max_over_mean']:.3f}  tokens {row['tokens_max_over_mean']:.3f}  keys "
            f"{row['keys_fetched_most']:>7,} = {row['of_an_all_gather']:.3f} of an all-gather, "
            f"{row['mib_a_layer']:.0f} MiB  planned in {row['plan_seconds_of_a_rank']:.2f} s"
        )
    dealt = [mini_batches(count) for count in BATCHES]
    for row in dealt:
        print(
            f"{row['trees']:>2} trees on {row['ranks']} ranks: work max / mean {row['whole_trees_max_over_mean']:.2f} "
            f"dealt whole (mean), {row['cut_max_over_mean']:.4f} cut (worst of {DRAWS})"
        )
    RESULTS.write_text(json.dumps({"machine": machine(), "shares": rows, "mini_batches": dealt}, indent=1) + "\n")


if __name__ == "__main__":
    main()
