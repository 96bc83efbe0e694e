"""What a checkpoint costs a step: seconds that it stops, seconds until it is written, bytes of the ranks, memory.

    python benchmarks/checkpoints.py [--layers 9] [--rollout 30] [--out benchmarks/results/checkpoints.json]

Eight processes (tensor, pipeline and data parallel 2) train layers of 28 million parameters with random weights; nine
layers are 254 million. A step is an update of a short sequence and, for the engine, `--rollout` seconds of sleep; the
optimizer is offloaded in between. Steps that save, as while a run goes on, take turns with steps that do not; the last
two save for any layout, and wait for it, as at the end of a run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from treepo_mcore.system.environment import prepare_environment

prepare_environment()

PROCESSES, TURNS = 8, 3
SIZES = {
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}


def main() -> None:
    """Start the job, print its row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--rollout", type=float, default=30.0, help="seconds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=Path, help="what the processes of the job are started with: its folder")
    options = parser.parse_args()
    if options.rank:
        measure(options.rank, options.layers, options.rollout)
        return
    with tempfile.TemporaryDirectory(dir=".") as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
        more = ["--layers", str(options.layers), "--rollout", str(options.rollout), "--rank", folder]
        subprocess.run([*launcher, __file__, *more], check=True)
        row = json.loads((Path(folder) / "row.json").read_text())
    print(json.dumps(row, indent=1))
    if options.out:
        options.out.write_text(json.dumps(row, indent=1) + "\n")


def measure(folder: Path, layers: int, rollout: float) -> None:
    """On every rank; rank 0 writes the row."""
    import torch.distributed as dist
    from machine import machine

    from treepo_mcore.actor.saver import Keep, Saver

    facts = machine()
    actor, sequences = build(folder, layers)
    saver = Saver(folder / "checkpoints", Keep(9), timeout_seconds=600)
    times: dict[str, list[float]] = {"without": [], "with": [], "stopped": [], "written": [], "at the end": []}
    learn(actor, sequences)  # moments come with the first
    peaks = []
    for turn in range(2 * TURNS):
        saves, begin = turn % 2 == 1, barrier()
        actor.memory.keep({"parameters", "gradients", "optimizer"})
        learn(actor, sequences)
        if saves:
            stopped = time.perf_counter()
            saver.plan(turn, actor, {}, "dp_reshardable")
        actor.memory.keep({"parameters"})
        if saves:
            saver.write(actor.memory)
            times["stopped"].append(time.perf_counter() - stopped)
        time.sleep(rollout)
        saver.wait()
        times["with" if saves else "without"].append(barrier() - begin)
        if saves:
            times["written"].append(saver.metrics()["save/seconds"])
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    for step in (98, 99):
        begin = barrier()
        actor.memory.keep({"parameters", "gradients", "optimizer"})
        saver.plan(step, actor, {}, "fully_reshardable")
        actor.memory.keep({"parameters"})
        saver.write(actor.memory)
        saver.wait()
        times["at the end"].append(barrier() - begin)
    everyone: list[Any] = [None] * PROCESSES
    dist.all_gather_object(everyone, (peaks[0], peaks[-1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    if dist.get_rank() == 0:
        (folder / "row.json").write_text(json.dumps(describe(facts, actor, times, everyone, folder, rollout)))


def describe(
    facts: dict[str, Any],
    actor: Any,
    times: dict[str, list[float]],
    peaks: list[tuple[int, int, int]],
    folder: Path,
    rollout: float,
) -> dict[str, Any]:
    """The row. peaks: of each rank, before the first checkpoint, behind the last of a run that goes on, at the end."""
    going_on = folder / "checkpoints" / f"iter_{2 * TURNS - 1:07d}"
    written = [sum(file.stat().st_size for file in going_on.glob(f"__{rank}_*")) for rank in range(PROCESSES)]
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "machine": facts,
        "processes": PROCESSES,
        "layers": actor.arch.layers,
        "rollout_seconds": rollout,
        "seconds": times,
        "step_ratio": round(median["with"] / median["without"], 3),
        "rank_bytes": written,
        "memory_ratio": round(max(after / before for before, after, _ in peaks), 3),
        "memory_ratio_at_the_end": round(max(end / before for before, _, end in peaks), 3),
    }


def build(folder: Path, layers: int) -> tuple[Any, list[Any]]:
    """An actor with random weights, and this rank's sequences."""
    from training import Case, generate

    from treepo_mcore.actor import actor as module
    from treepo_mcore.actor.parallel import build_grid
    from treepo_mcore.config import ActorConfig, AdvantageConfig
    from treepo_mcore.learn.advantage import advantages
    from treepo_mcore.learn.packing import pack_trees
    from treepo_mcore.model.architecture import read_architecture
    from treepo_mcore.system.placement import init_process_group

    init_process_group()
    sizes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(sizes | SIZES | {"num_hidden_layers": layers}))
    barrier()
    module.load_pieces = fill  # type: ignore[assignment]  # there is no checkpoint of this shape
    config = ActorConfig.model_validate({"dtype": "float32", "tp": 2, "pp": 2, "optimizer": {"lr": 1e-6}})
    arch = read_architecture(folder)
    actor = module.Actor(config, arch, folder, build_grid(config, seed=0), temperature=1.0, total_steps=1)
    trees = [generate(Case(factor=2, prompt=16, answer=16, segment=8, width=4), 0)]
    return actor, pack_trees(trees, advantages(trees, AdvantageConfig()), 512)


def fill(directory: Path, pieces: Any, tensors: dict[str, Any]) -> None:
    """Random weights of the size that training has; ones in norms."""
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02)


def learn(actor: Any, sequences: list[Any]) -> None:
    """An update."""
    from treepo_mcore.learn.loss import PolicyObjective

    actor.set_step(0)
    actor.update(sequences, [sequence.behaviour_logprob for sequence in sequences], PolicyObjective(actor.config))
    actor.finish_updates()


def barrier() -> float:
    """When all are here."""
    import torch.distributed as dist

    dist.barrier()
    return time.perf_counter()


if __name__ == "__main__":
    main()
