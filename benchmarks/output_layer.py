"""The output layer's log-probs in blocks of the vocabulary: the memory of both passes, and what they cost.

    python benchmarks/output_layer.py      # five minutes: a table, and benchmarks/results/output_layer.json

Memory: a micro-batch of 33,000 tokens and the 152,064 words of Qwen2.5-7B, with a small hidden state, on which logits
do not depend: the process's largest resident size over what it had before. Time: both passes, of a size that fits into
memory whole, as a ratio to one block; five times in turn.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import machine
from torch import Tensor

from treepo_mcore.actor.costs import LOGITS_BYTES, block_columns
from treepo_mcore.actor.log_probs import LinearLogProb

RESULTS = Path(__file__).parent / "results" / "output_layer.json"
ROWS, WORDS, HIDDEN = 33_000, 152_064, 64
TIMED_ROWS, TIMED_WORDS, TIMED_HIDDEN = 2048, 32_768, 1024
BLOCKS, TIMES = (1, 2, 8, 32), 5


def both_passes(rows: Tensor, weight: Tensor, target: Tensor, block: int) -> None:
    """Log-probs and entropies, and their gradients."""
    rows, weight = rows.requires_grad_(), weight.requires_grad_()
    logp, entropy = LinearLogProb.apply(rows, weight, target, 1.0, len(weight), dist.group.WORLD, block)
    (logp.sum() + 0.01 * entropy.sum()).backward()
    rows.grad = weight.grad = None


def inputs(rows: int, words: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = (torch.randn(count, hidden, generator=draw).to(dtype) for count in (rows, words))
    return (*made, torch.randint(0, words, (rows,), generator=draw))  # type: ignore[return-value]


def peak(block: int) -> dict[str, Any]:
    """GiB that a process of its own takes for both passes."""
    done = subprocess.run([sys.executable, __file__, str(block)], stdout=subprocess.PIPE, text=True, check=True)
    return {"columns": block, "gib": float(done.stdout), "whole_logits_gib": ROWS * WORDS * 4 / 2**30}


def measure_peak(block: int) -> None:
    given = inputs(ROWS, WORDS, HIDDEN, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    both_passes(*given, block)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)


def times() -> list[dict[str, Any]]:
    """Of several numbers of blocks, over one."""
    given = inputs(TIMED_ROWS, TIMED_WORDS, TIMED_HIDDEN, torch.float32)
    seconds: dict[int, list[float]] = {count: [] for count in BLOCKS}
    for _ in range(TIMES):
        for count in BLOCKS:
            begin = time.perf_counter()
            both_passes(*given, -(-TIMED_WORDS // count))
            seconds[count].append(time.perf_counter() - begin)
    ratios = {count: [a / b for a, b in zip(taken, seconds[1], strict=True)] for count, taken in seconds.items()}
    return [
        {"blocks": count, "over_one": statistics.median(ratio), "least": min(ratio), "most": max(ratio)}
        for count, ratio in ratios.items()
    ]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
    if len(sys.argv) > 1:
        measure_peak(int(sys.argv[1]))
        return
    peaks = [peak(columns) for columns in (block_columns(ROWS, 4), 128)]
    for row in peaks:
        print(
            f"blocks of {row['columns']} columns: {row['gib']:.2f} GiB; all logits once {row['whole_logits_gib']:.1f}"
        )
    timed = times()
    for row in timed:
        print(
            f"{row['blocks']} blocks: {row['over_one']:.2f} ({row['least']:.2f} to {row['most']:.2f}) of the time of 1"
        )
    found = {"machine": machine(), "logits_bytes": LOGITS_BYTES, "rows": ROWS, "words": WORDS, "peaks": peaks}
    RESULTS.write_text(json.dumps(found | {"times": timed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
