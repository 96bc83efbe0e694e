"""Training on one GPU: TFLOP/s of Llama-70B-shaped layers in bf16 and FP8, trees against flattened leaves.

    python benchmarks/gpu/training.py [--only blockwise] [--minutes 6.5]

As many layers as fit, random weights, a vocabulary of 2048. FLOPs are those of the model: twice the weights a token
for a pass, three times that for an update, and attention over what each token sees; recomputation is not counted.
Every layer is in the precision of the cell, also the first and the last, which a run leaves in bf16.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from common import benchmark, main, write_model

from treepo_mcore.system.environment import prepare_environment

prepare_environment()

TREES, WIDTH, MEAN, BUDGET, REPEATS = 4, 16, 1024, 16384, 3
FILLED = 0.93  # of the memory: the planner knows no fragments
CELLS = {f"{fp8}, prompt {prompt}": (fp8, prompt) for prompt in (512, 2048) for fp8 in ("none", "current", "blockwise")}


def measure(cell: tuple[str, int]) -> dict[str, Any]:
    """Both passes on trees and on flattened leaves, in turns."""
    import torch

    from treepo_mcore.model.architecture import read_architecture

    fp8, prompt = cell
    with tempfile.TemporaryDirectory() as folder:
        arch = read_architecture(write_model(Path(folder), "70b-layers", layers=1))
        layers = how_many_layers(arch, torch.cuda.mem_get_info()[1], torch.cuda.get_device_capability())
        actor = build(fp8, write_model(Path(folder), "70b-layers", layers=layers))
    packed = pack(prompt)
    return {"layers": layers} | describe(packed, in_turns(actor, packed), actor.arch)


def build(fp8: str, directory: Path) -> Any:
    """An actor with random weights."""
    from treepo_mcore.actor import actor as module
    from treepo_mcore.actor.parallel import build_grid
    from treepo_mcore.config import parse_config
    from treepo_mcore.model.architecture import read_architecture
    from treepo_mcore.system.placement import init_process_group

    module.load_pieces = fill  # there is no checkpoint of this shape
    config = parse_config(configuration(fp8, directory)).actor
    init_process_group()
    grid = build_grid(config, seed=0)
    arch = read_architecture(directory)
    assert arch.vocab >= benchmark("cpu_training").VOCAB, "the trees have tokens that the model has not"
    return module.Actor(config, arch, directory, grid, temperature=1.0, total_steps=1)


def pack(prompt: int) -> dict[str, list[Any]]:
    """The same leaves as trees and one by one, from the real sampler (benchmarks/training.py)."""
    from treepo_mcore.config import AdvantageConfig
    from treepo_mcore.learn.advantage import advantages
    from treepo_mcore.learn.packing import pack_flat, pack_trees

    maker = benchmark("cpu_training")
    case = maker.Case(factor=2, prompt=prompt, answer=MEAN, segment=MEAN // 4, width=WIDTH)
    trees = [maker.generate(case, seed) for seed in range(TREES)]
    worth = advantages(trees, AdvantageConfig())
    return {"tree": pack_trees(trees, worth, BUDGET), "flat": pack_flat(trees, worth, BUDGET)}


def configuration(fp8: str, directory: Path) -> dict[str, Any]:
    """A run's, but with no layer left out of FP8."""
    megatron = {} if fp8 == "none" else {"first_last_layers_bf16": False}
    actor = {"fp8": fp8, "micro_batch_tokens": BUDGET, "megatron": megatron}
    return {"model": {"path": str(directory)}, "data": {"train": "none"}, "actor": actor}


def fill(directory: Path, pieces: Any, tensors: dict[str, Any]) -> None:
    """Random weights of the size that training has; ones in norms."""
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02)


def how_many_layers(arch: Any, memory: int, capability: tuple[int, int]) -> int:
    """That fit in an update by the planner's numbers, in every cell alike: FP8 has copies of weights on top.

    memory: bytes of the GPU.
    """
    from treepo_mcore.actor.costs import CONTEXT_BYTES, actor_state, update_working
    from treepo_mcore.config import ActorConfig
    from treepo_mcore.model.shards import Stage

    actor = ActorConfig.model_validate(configuration("blockwise", Path())["actor"])

    deep = dataclasses.replace(arch, layers=80)

    def needed(layers: int) -> int:
        stage = Stage(tuple(range(layers)), True, True)
        work = update_working(actor, deep, stage, 0, BUDGET, capability)
        return sum(actor_state(actor, deep, stage, 1).values()) + sum(work.values()) + CONTEXT_BYTES

    return max(layers for layers in range(1, 81) if layers == 1 or needed(layers) <= FILLED * memory)


def layer_parameters(arch: Any) -> int:
    """Weights of the linear layers of one layer."""
    attention = arch.hidden * arch.head_dim * (2 * arch.heads + 2 * arch.kv_heads)
    return int(attention + 3 * arch.hidden * arch.ffn)


def in_turns(actor: Any, packed: dict[str, list[Any]]) -> dict[str, list[float]]:
    """Seconds of every pass; the first round compiles and is left out."""
    times: dict[str, list[float]] = {}
    for repeat in range(REPEATS + 1):
        for packing, sequences in packed.items():
            for what, act in passes(actor, sequences).items():
                seconds = timed(act)
                if repeat:
                    times.setdefault(f"{what}_{packing}", []).append(seconds)
    return times


def passes(actor: Any, sequences: list[Any]) -> dict[str, Callable[[], Any]]:
    """What is measured."""
    from treepo_mcore.learn.loss import PolicyObjective

    old = [sequence.behaviour_logprob for sequence in sequences]
    return {
        "logprob": lambda: actor.log_probs(sequences),
        "update": lambda: actor.update(sequences, old, PolicyObjective(actor.config)),
    }


def timed(act: Callable[[], Any]) -> float:
    """Seconds until the device is done."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = time.perf_counter()
    act()
    wait()
    return time.perf_counter() - begin


def describe(packed: dict[str, list[Any]], times: dict[str, list[float]], arch: Any) -> dict[str, Any]:
    """TFLOP/s, speed of trees over flat, and the spread."""
    median = {name: statistics.median(values) for name, values in times.items()}
    row: dict[str, Any] = {}
    for packing, sequences in packed.items():
        work = flops(sequences, arch) / 1e12
        row[f"logprob_tflops_{packing}"] = work / median[f"logprob_{packing}"]
        row[f"update_tflops_{packing}"] = 3 * work / median[f"update_{packing}"]
        row[f"tokens_{packing}"] = sum(len(s.tokens) for s in sequences)
    row["tokens_flat_over_tree"] = row["tokens_flat"] / row["tokens_tree"]
    for what in ("logprob", "update"):
        row[f"speedup_{what}"] = median[f"{what}_flat"] / median[f"{what}_tree"]
    spread = {name: {"median": median[name], "min": min(v), "max": max(v)} for name, v in times.items()}
    return row | {"seconds": spread}


def flops(sequences: Sequence[Any], arch: Any) -> float:
    """Of one forward pass without embedding and output layer, padding not counted."""
    tokens = sum(len(s.tokens) for s in sequences)
    seen = sum(int((s.positions + 1).sum()) for s in sequences)  # keys that the tokens see
    linear = 2.0 * layer_parameters(arch) * tokens
    attention = 4.0 * arch.heads * arch.head_dim * seen
    return arch.layers * (linear + attention)


if __name__ == "__main__":
    main(__file__, "training", __doc__.splitlines()[0], CELLS, measure)
