"""On every rank of four: what ranks tell each other, one thing after the other in one job."""

from __future__ import annotations

import os
import pickle
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from trees import random_tree

from treepo_mcore.rollout.collection import Collection
from treepo_mcore.rollout.exchange import Exchange
from treepo_mcore.system.placement import colocated, init_process_group, limit_waits
from treepo_mcore.tree.tree import Tree

ENGINE_RANKS = 2


def everything(prompts: int, seconds: float, cache: str, directory: str) -> dict[str, Any]:
    """What the functions below return."""
    hubs = {"shared": hub(f"{cache}/one", False), "own": hub(f"{cache}/each", True)}
    found = {"deliver": deliver(prompts), "hub": hubs, "refusals": refusals("policy"), "replicas": replicas(directory)}
    return found | {"waited": wait(seconds)}


def sampled(number: int, replayed: int = 0) -> Tree:
    """Of a prompt; with rewards only where an engine's first rank looks."""
    tree = random_tree(100 * replayed + number, leaves=6)
    tree.meta = {"number": number, "prompt": "text"} | ({"replayed": replayed} if replayed else {})
    for index, leaf in enumerate(tree.leaves):
        leaf.reward, leaf.text = float(index % 2), "an answer"
    return tree


def deliver(prompts: int) -> dict[str, Any]:
    """Even numbers are of engine 0, odd ones of engine 1; data-parallel ranks alternate over the ranks of the job."""
    init_process_group()
    placement = colocated(dist.get_rank(), dist.get_world_size(), ENGINE_RANKS)
    leaders = dist.new_group(list(placement.leaders), backend="gloo")
    groups = [dist.new_group(list(ranks), backend="gloo") for ranks in placement.engines]
    exchange = Exchange(placement, leaders, groups[placement.engine])
    mine = Collection(trees=[sampled(number) for number in range(placement.engine, prompts, len(placement.engines))])
    if placement.engine == 1:
        mine.restarts = [sampled(1, replayed=1)]
    if not placement.leads_engine:  # it has no rewards: nothing of it may be used
        mine = Collection(trees=[random_tree(0)], drawn=[99])
        mine.trees[0].meta = {"number": 0}
    total, bring = exchange.meet(mine)
    total.trees[0].leaves[0].reward = 7.0  # as a control experiment changes them, on all ranks
    everyone = [*total.trees, *total.restarts]
    shares = [everyone[:3], everyone[3:]]
    got = bring(shares, placement.rank % 2)
    expected = [sampled(int(tree.meta["number"]), tree.replayed) for tree in shares[placement.rank % 2]]
    for tree in expected:
        for leaf in tree.leaves:
            leaf.text = None
        if tree.meta["number"] == 0:
            tree.leaves[0].reward = 7.0
        del tree.meta["prompt"]
    return {
        "numbers": [int(tree.meta["number"]) for tree in total.trees],
        "drawn": total.drawn,
        "same": [one.to_json() == other.to_json() for one, other in zip(got, expected, strict=True)],
        "outlines": len(pickle.dumps(everyone)),
        "none": len(bring([[], everyone], 0)),
    }


def wait(seconds: float) -> float:
    """How long the first rank waits for another one that does not come, in a group that was made before."""
    group = dist.new_group(list(range(dist.get_world_size())), backend="gloo", timeout=timedelta(seconds=1000))
    limit_waits(seconds)
    begin = time.perf_counter()
    if dist.get_rank() == 0:
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError:
            seconds = time.perf_counter() - begin
    else:
        time.sleep(2 * seconds)
    limit_waits(1000)
    return seconds


def hub(cache: str, own_disks: bool) -> list[str]:
    """What the processes of a job of two nodes ask the hub for; the hub is a folder that appears when it is asked."""
    import huggingface_hub
    from models import make_model

    from treepo_mcore.checks import _from_the_hub
    from treepo_mcore.config import parse_config

    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(rank % 2)
    place, asked = Path(cache) / (str(rank // 2) if own_disks else "shared"), []

    def snapshot_download(name: str, local_files_only: bool, **_: Any) -> str:
        if not local_files_only:
            asked.append(f"rank {rank}: {name}")
            if not place.exists():
                make_model(place, "qwen2", tokenizer=False)
        elif not place.exists():
            raise FileNotFoundError
        return str(place)

    huggingface_hub.snapshot_download = snapshot_download
    config = parse_config({"model": {"path": "org/model"}, "data": {"train": "t.jsonl"}})
    assert _from_the_hub(config, weights=False) == place
    return asked


def replicas(directory: str) -> dict[str, Any]:
    """Who reads the model's files, and what of them is on this rank."""
    from log_probs import make_actor

    from treepo_mcore.actor import actor as module

    read, load_pieces = [], module.load_pieces
    module.load_pieces = lambda *given: (read.append(given[0]), load_pieces(*given))
    actor = make_actor(Path(directory), {"dtype": "float32"})
    return {"read": len(read), "sums": {name: float(tensor.double().sum()) for name, tensor in actor.tensors.items()}}


def refusals(out: str) -> list[str]:
    """What each rank says to prompts that another node has otherwise, and to a folder that only rank 1 cannot write."""
    from treepo_mcore.checks import _same_prompts
    from treepo_mcore.config import ConfigError
    from treepo_mcore.weights import export

    init_process_group()
    rank, said = dist.get_rank(), []

    def fails(probe: Path) -> None:
        raise PermissionError(13, "Permission denied")

    for work in (
        lambda: _same_prompts(SimpleNamespace(digests={"a.jsonl": "same", "b.jsonl": f"hash{rank}"})),
        lambda: export._agree(Path(out), lambda: fails(Path(out)) if rank == 1 else None),
    ):
        try:
            work()
        except ConfigError as error:
            said.append(str(error))
    return said
