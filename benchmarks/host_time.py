"""What the sampler costs the host in an engine step: everything between two steps, on an engine without a model.

    python benchmarks/host_time.py [--steps N] [--out FILE]

384 requests run, each gives a token a step; paths fork, end, are decoded and scored by the real reward pool, trees
complete and others start. Seconds are those of the collecting thread's processor, of steps with all 384 only.
The target is 2 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from machine import machine

from treepo_mcore.config import parse_config
from treepo_mcore.data.prepared import Prompt
from treepo_mcore.engine.protocol import Chunk
from treepo_mcore.grow.sampler import Request
from treepo_mcore.rewards.pool import RewardPool
from treepo_mcore.rollout.collector import Collector
from treepo_mcore.rollout.queue import SharedQueue, Wanted

LIVE = 384
EOS, OPEN, CLOSE, WORDS = 0, 1, 2, 1000
# Stopping rule, L, mean tokens of an answer.
CASES = [("boxed_and_eos", 512, 1000), ("boxed", 64, 128)]


class Words:
    """A tokenizer: an EOS, the frame of a box, numbers."""

    vocab_size = WORDS
    eos_ids = (EOS,)
    words = ("", "\\boxed{", "} ", *(f"{number} " for number in range(3, WORDS)))

    def encode(self, text: str, start: bool = False) -> list[int]:
        return [CLOSE]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join([self.words[token] for token in ids])


class Engine:
    """One random token a step for the oldest LIVE requests; an answer of memoryless length ends with a box and EOS."""

    block_tokens, max_requests = 16, LIVE

    def __init__(self, mean: int, steps: int) -> None:
        self.rng, self.mean, self.steps = random.Random(0), mean, steps
        self.requests: dict[str, list[Any]] = {}  # id -> tokens left, what comes next
        self.host: list[float] = []
        self.full = False  # the last step had LIVE requests
        self.left_at = 0.0

    def submit(self, request: Request) -> None:
        self.requests[request.id] = [request.max_tokens, []]

    def abort(self, ids: list[str]) -> None:
        for name in ids:
            self.requests.pop(name, None)

    def free_blocks(self) -> int:
        return 10**9

    def preemptions(self) -> int:
        return 0

    def step(self) -> list[Chunk]:
        if self.full:
            self.host.append(time.thread_time() - self.left_at)
        if len(self.host) == self.steps:
            raise StopIteration
        chunks = []
        for name, state in list(self.requests.items())[:LIVE]:
            if not state[1] and self.rng.random() < 1 / self.mean:
                state[1] = [EOS, CLOSE, 7, OPEN]
            token = state[1].pop() if state[1] else self.rng.randrange(3, WORDS)
            state[0] -= 1
            finish = "stop" if token == EOS else None if state[0] else "length"
            if finish:
                del self.requests[name]
            chunks.append(Chunk(name, [token], [-1.0], finish, 0))  # type: ignore[arg-type]
        self.full = len(chunks) == LIVE
        self.left_at = time.thread_time()
        return chunks


def measure(boxed: str, segment: int, mean: int, steps: int) -> dict[str, Any]:
    """One case."""
    tree = {"width": 16, "segment_tokens": segment, "max_depth": 14, "branching": {"factor": 2, "first": 2}}
    config = parse_config(
        {
            "model": {"path": "none"},
            "data": {"train": "none"},
            "rollout": {"tree": tree | {"stopping": {"boxed": boxed}}},
        }
    )
    prompts = [Prompt(str(i), [3] * 100, "", "7" if i % 2 else "8") for i in range(10**4)]
    engine = Engine(mean, steps)
    queue = SharedQueue(dist.HashStore(), 0, 1, Wanted(*[len(prompts)] * 3))
    with RewardPool(config.reward) as rewards:
        collector = Collector(config, engine, Words(), rewards, None)  # type: ignore[arg-type]
        with suppress(StopIteration):
            collector.collect(prompts, queue, 0, 0.0)
    ms = 1e3 * np.array(engine.host)
    return {
        "boxed": boxed,
        "segment_tokens": segment,
        "mean_answer": mean,
        "steps": len(ms),
        "mean_ms": float(ms.mean()),
        "median_ms": float(np.median(ms)),
        "p99_ms": float(np.quantile(ms, 0.99)),
    }


def main() -> None:
    """Both cases, a line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4000, help="engine steps with all requests, of each case")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/host_time.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {
        "machine": machine(),
        "live": LIVE,
        "cases": [],
    }
    print(f"{'stopping.boxed':>16}{'L':>6}{'steps':>8}{'mean ms':>10}{'median':>10}{'p99':>10}")
    for case in CASES:
        row = measure(*case, options.steps)
        result["cases"].append(row)
        columns = f"{row['steps']:8}{row['mean_ms']:10.2f}{row['median_ms']:10.2f}{row['p99_ms']:10.2f}"
        print(f"{row['boxed']:>16}{row['segment_tokens']:6}{columns}", flush=True)
    result["load_after"] = os.getloadavg()[0]
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
