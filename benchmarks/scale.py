"""What grows with a job: prompts, trees between ranks and in files, the queue, a push's plan; beside the way before.

    python benchmarks/scale.py            # five minutes on two cores: a table, and benchmarks/results/scale.json
    python benchmarks/scale.py --quick    # the same with a hundredth of the prompts

Processor seconds are of one thread, bytes those of the operating system or of what goes on the wire. "before" is what
the code did until November 2026, written out in this file.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # seconds of one core

import torch.distributed as dist
from machine import machine
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from treepo_mcore.config import DataConfig
from treepo_mcore.data.prepared import Prompt, load_prompts
from treepo_mcore.data.tokenizer import load_tokenizer
from treepo_mcore.rollout.exchange import _with_leaves
from treepo_mcore.rollout.queue import LOOKS_PER_SECOND, SharedQueue, Wanted
from treepo_mcore.tree import parquet
from treepo_mcore.tree.tree import EOS, PROMPT, Tree
from treepo_mcore.weights.layout import Piece
from treepo_mcore.weights.plan import Layouts, make_plan, make_rounds
from treepo_mcore.weights.transfer import STAGING_BYTES, round_limit

RESULTS = Path(__file__).parent / "results" / "scale.json"
PROMPTS, PROMPT_TOKENS = 100_000, 200
TREES, DP = 850, 16
ENGINES, CLIENTS, SECONDS = 1000, 16, 5.0
POLL_SECONDS = 0.005  # of an idle collector
HIDDEN, HEAD, KEYS, FFN, VOCAB = 16384, 128, 1024, 53248, 128256  # of Llama-3.1-405B
PLAN_BEFORE = 41.5  # measured once, at a9e0bf6


def prompts(count: int, folder: Path) -> dict[str, Any]:
    """A file of prompts of about 200 tokens, prepared, opened again, and read whole."""
    words = [
        f"{a}{b}" for a in ("ba", "ke", "lo", "mi", "nu", "ra", "se", "ti") for b in ("n", "r", "st", "l", "m", "x")
    ]
    draw = random.Random(0)
    file = folder / "prompts.jsonl"
    with file.open("w") as lines:
        for number in range(count):
            text = " ".join(draw.choices(words, k=PROMPT_TOKENS))
            lines.write(json.dumps({"prompt": text, "answer": str(number)}) + "\n")
    tokenizer = load_tokenizer(write_tokenizer(folder / "tokenizer", words))
    config = DataConfig(train=file, max_prompt_tokens=4 * PROMPT_TOKENS, cache_dir=folder / "cache")
    begin = time.process_time()
    load_prompts(file, config, tokenizer)
    prepare = time.process_time() - begin
    before = private_bytes()
    begin = time.perf_counter()
    found = load_prompts(file, config, tokenizer)
    opened = time.perf_counter() - begin
    tokens = sum(len(prompt.tokens) for prompt in found) / len(found)
    held = private_bytes() - before
    (made,) = (folder / "cache").glob("*.arrow")
    some = min(count, 10_000)
    begin, memory = time.process_time(), private_bytes()
    kept = in_lists(file, some, tokenizer)
    alone = time.process_time() - begin
    return {
        "prompts": count,
        "tokens": round(tokens, 1),
        "microseconds": round(prepare / count * 1e6, 1),
        "node_bytes": round(made.stat().st_size / count),
        "process_bytes": round(held / count),
        "seconds_to_open_again": round(opened, 2),
        "before": {
            "microseconds_of_every_process": round(alone / len(kept) * 1e6, 1),
            "process_bytes": round((private_bytes() - memory) / len(kept)),
        },
    }


def in_lists(file: Path, count: int, tokenizer: Any) -> list[Prompt]:
    """Every process reads, encodes one by one and keeps lists."""
    kept = []
    with file.open() as lines:
        for number, line in zip(range(count), lines, strict=False):
            row = json.loads(line)
            tokens = tokenizer.encode(row["prompt"])
            kept.append(Prompt(f"prompts-{number}", tokens, row["prompt"], row["answer"], {}, f"{number:016x}"))
    return kept


def write_tokenizer(folder: Path, words: list[str]) -> Path:
    """A byte-level BPE that knows every word."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [" ".join(words)] * 3, trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(folder)
    return folder


def trees() -> dict[str, Any]:
    """Trees of 40,000 tokens: bytes that a rank gets, and processor time of writing one."""
    tree = large_tree()
    outline, whole = len(pickle.dumps(tree.outline())), len(pickle.dumps(tree))
    bare = len(pickle.dumps(_with_leaves(tree, tree), protocol=5))
    share = -(-TREES // DP)
    with tempfile.TemporaryDirectory() as folder:
        many = [tree] * parquet.ROWS
        columns = best(lambda: parquet.write(Path(folder) / "trees.parquet", many)) / len(many)
        lines = best(lambda: json.dumps(tree.to_json(), ensure_ascii=False))
        size = (Path(folder) / "trees.parquet").stat().st_size // len(many)
    return {
        "tokens": tree.unique_tokens,
        "exchange": {
            "trees": TREES,
            "dp": DP,
            "rank_bytes": TREES * outline + share * bare,
            "outline_bytes": outline,
            "before": {"rank_bytes": TREES * whole},
        },
        "writer": {
            "milliseconds": round(columns * 1e3, 2),
            "bytes": size,
            "before": {"milliseconds": round(lines * 1e3, 2), "bytes": len(json.dumps(tree.to_json()))},
        },
    }


def large_tree() -> Tree:
    """Sixteen answers of nine segments below a prompt of 200 tokens, with their texts."""
    draw = random.Random(0)
    tree = Tree("p", range(200), {"prompt": "word " * 200, "answer": "7", "number": 1})
    live = [PROMPT]
    for depth in range(1, 10):
        live = [tree.add_node(node, depth) for node in live for _ in range(2 if len(live) < 16 else 1)]
        for node in live:
            tree.nodes[node].tokens.extend(draw.randrange(150_000) for _ in range(375))
            tree.nodes[node].logprobs.extend(-draw.random() for _ in range(375))
    for node in live:
        leaf = tree.leaves[tree.add_leaf(node, EOS)]
        leaf.text, leaf.reward, leaf.score, leaf.correct = "word " * 2500, 1.0, 1.0, True
    return tree


def queue() -> dict[str, Any]:
    """A thousand idle engines on one TCPStore, each looking every five milliseconds, and what the store can serve."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    clients = [Counting(dist.TCPStore("127.0.0.1", server.port)) for _ in range(CLIENTS)]
    capacity = asked_in(clients, lambda client, _: client.add("idle", 0))
    queues: list[list[SharedQueue]] = [[] for _ in clients]
    for engine in range(ENGINES):
        queues[engine % CLIENTS].append(SharedQueue(clients[engine % CLIENTS], engine, ENGINES, Wanted(1, 1, 1)))
    assert queues[0][0].draw() == 0  # the only prompt; the others wait for its end
    first = {id(client): own for client, own in zip(clients, queues, strict=True)}

    def idle(client: Counting, begin: float) -> None:
        for one in first[id(client)][1:]:
            one.draw(), one.closed(), one.held_back()
        time.sleep(max(0.0, begin + POLL_SECONDS - time.perf_counter()))

    return {
        "engines": ENGINES,
        "requests_per_second": round(asked_in(clients, idle)),
        "served_per_second": round(capacity),
        "at_most": LOOKS_PER_SECOND,
        # draw: three keys; held_back: three; closed: one more.
        "before": {"requests_per_second": round(ENGINES * 7 / POLL_SECONDS)},
    }


def plan() -> dict[str, Any]:
    """The push of a 405B model on 1,024 GPUs, actor tp8 pp16 dp8, engines of sixteen: what each rank plans at first."""
    sources, targets = layouts_of_405b()
    nodes = [rank // 8 for rank in range(len(sources))]
    begin = time.process_time()
    transfers = make_plan(sources, targets, nodes)
    rounds = make_rounds(transfers, round_limit(STAGING_BYTES, len(sources)), 2)
    own = sum(0 in (transfer.source, transfer.target) for transfer in transfers)
    return {
        "transfers": len(transfers),
        "rounds": len(rounds),
        "seconds": round(time.process_time() - begin, 1),
        "kept_by_a_rank": own,
        "before": {"seconds": PLAN_BEFORE, "kept_by_a_rank": len(transfers)},
    }


def layouts_of_405b() -> tuple[Layouts, Layouts]:
    """What every rank of the actor has and of the engines wants; replicas share their lists."""
    tp, stages, engine, world = 8, 16, 16, 1024
    ends = [0, *range(7, 120, 8), 126]  # of the stages
    held = {
        (rank, stage): [piece for layer in range(*ends[stage : stage + 2]) for piece in layer_of_405b(layer, tp, rank)]
        + [rows(name, VOCAB, tp, rank) for name, at in (("embed", 0), ("head", stages - 1)) if stage == at]
        for rank in range(tp)
        for stage in range(stages)
    }
    wanted = [
        [piece for layer in range(ends[-1]) for piece in layer_of_405b(layer, engine, rank)]
        + [rows(name, VOCAB, engine, rank) for name in ("embed", "head")]
        for rank in range(engine)
    ]
    width = world // stages
    return [held[rank % tp, rank // width] for rank in range(world)], [wanted[rank % engine] for rank in range(world)]


def layer_of_405b(layer: int, tp: int, rank: int) -> list[Piece]:
    """One rank's shards of a layer."""
    name = f"model.layers.{layer}."
    keys = max(KEYS // tp, HEAD)  # two ranks share a head where there are sixteen
    first = rank * KEYS // tp // HEAD * HEAD
    return [
        *(rows(name + part, size, tp, rank) for part, size in (("q", HIDDEN), ("gate", FFN), ("up", FFN))),
        *(Piece(name + part, (first, 0), (keys, HIDDEN), name + part, (0, 0)) for part in ("k", "v")),
        *(
            Piece(name + part, (0, rank * size // tp), (HIDDEN, size // tp), name + part, (0, 0))
            for part, size in (("o", HIDDEN), ("down", FFN))
        ),
        *(Piece(name + part, (0,), (HIDDEN,), name + part, (0,)) for part in ("norm", "post_norm")),
    ]


def rows(name: str, size: int, tp: int, rank: int) -> Piece:
    """A rank's rows of a matrix of so many."""
    return Piece(name, (rank * size // tp, 0), (size // tp, HIDDEN), name, (0, 0))


class Counting:
    """A store that counts what it is asked."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.asked = store, 0

    def __getattr__(self, name: str) -> Any:
        self.asked += 1
        return getattr(self.store, name)


def asked_in(clients: list[Counting], work: Callable[[Counting, float], object]) -> float:
    """Requests a second of all clients, each in a thread of its own."""
    for client in clients:
        client.asked = 0
    end = time.perf_counter() + SECONDS
    barrier = threading.Barrier(len(clients))

    def run(client: Counting) -> None:
        barrier.wait()
        while (now := time.perf_counter()) < end:
            work(client, now)

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(run, clients))
    return sum(client.asked for client in clients) / SECONDS


def private_bytes() -> int:
    """Of this process alone; pages that it maps from a file are not counted."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Anonymous in /proc/self/smaps_rollup")


def best(work: Callable[[], object], times: int = 5) -> float:
    """Processor seconds of this thread."""
    found = []
    for _ in range(times):
        begin = time.thread_time()
        work()
        found.append(time.thread_time() - begin)
    return min(found)


def table(found: dict[str, Any]) -> str:
    """For people."""
    of, exchange, writer = found["prompts"], found["trees"]["exchange"], found["trees"]["writer"]
    asked = found["queue"]
    rows = [
        ("a prompt: us of one core, once a node", of["microseconds"], of["before"]["microseconds_of_every_process"]),
        ("a prompt: bytes of every process", of["process_bytes"], of["before"]["process_bytes"]),
        ("a prompt: bytes of a node's page cache", of["node_bytes"], "-"),
        (f"{TREES} trees, dp {DP}: MB a rank", exchange["rank_bytes"] / 1e6, exchange["before"]["rank_bytes"] / 1e6),
        ("writing a tree: ms of the thread", writer["milliseconds"], writer["before"]["milliseconds"]),
        (f"{ENGINES} idle engines: requests/s", asked["requests_per_second"], asked["before"]["requests_per_second"]),
        ("  of those that the store serves", asked["served_per_second"], "-"),
        ("push of 405B on 1,024: s to plan", found["plan"]["seconds"], found["plan"]["before"]["seconds"]),
        ("  transfers that a rank keeps", found["plan"]["kept_by_a_rank"], found["plan"]["before"]["kept_by_a_rank"]),
    ]
    lines = [f"{name:42}{_cell(now):>12}{_cell(before):>12}" for name, now, before in rows]
    return "\n".join([f"{'':42}{'now':>12}{'before':>12}", *lines])


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "machine": machine(),
            "prompts": prompts(PROMPTS // 100 if arguments.quick else PROMPTS, Path(folder)),
            "trees": trees(),
            "queue": queue(),
            "plan": plan(),
        }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
