"""What precision does to training: reward, gradients and log-probs on the quickstart's task, side by side.

    python benchmarks/precision.py [--steps 20] [--fresh] [--out FILE]

The file is written after every run; where it was cut off, the same command goes on.

The same program on a CPU and on a GPU, with every precision that the machine has; the first is the reference. *Runs*:
the quickstart on one process, the same seed and the same warm model, `--steps` steps; rewards and the distance of
engine and trainer are those of its metrics.jsonl. *Gradients*: of the first mini-batch of the reference's first step
(its saved trees), from the same warm model, before clipping: cosine with the reference's gradient for every parameter,
and the distance of the trainer's log-probs from the reference trainer's on these trees. No time is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treepo_mcore.system.environment import has_gpu, prepare_environment

prepare_environment()

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
RUNS = Path("runs/precision")

ACTORS = {
    "float32": ["actor.dtype=float32"],
    "bf16": ["actor.dtype=bfloat16"],
    "FP8 current": ["actor.dtype=bfloat16", "actor.fp8=current"],
    "FP8 blockwise": ["actor.dtype=bfloat16", "actor.fp8=blockwise"],
}
ENGINES = {
    "float32": ["rollout.dtype=float32"],
    "bf16": ["rollout.dtype=bfloat16"],
    "FP8": ["rollout.dtype=bfloat16", "rollout.engine.quantization=fp8_per_block"],
}
# Trainer and engine; the reference first.
ON_CPU = [("float32", "float32"), ("bf16", "bf16"), ("bf16", "FP8")]
ON_GPU = [
    ("bf16", "bf16"),
    ("bf16", "FP8"),
    ("FP8 current", "bf16"),
    ("FP8 blockwise", "bf16"),
    ("FP8 blockwise", "FP8"),
]


def train(trainer: str, engine: str, steps: int) -> dict[str, Any]:
    """One run of the quickstart."""
    directory = run_directory(trainer, engine)
    settings = [f"run.dir={directory}", "run.resume=false", "trainer.export=false", f"trainer.steps={steps}"]
    # As much as a CPU's engine has: what is free on a GPU would be millions of blocks of this small model.
    settings += [f"rollout.engine.kv_cache_memory_bytes={1 << 30}"]
    settings += [f"trainer.save_trees_every={steps}", *ACTORS[trainer], *ENGINES[engine]]
    command = [sys.executable, QUICKSTART / "run.py", "--nproc", "1", *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((directory / "summary.json").read_text())
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    accuracy = {name: summary[name] for name in ("accuracy_before", "accuracy_after")}
    return accuracy | describe([line for line in lines if "reward/mean" in line])


def run_directory(trainer: str, engine: str) -> Path:
    """Where a run's files are."""
    return RUNS / f"{trainer}_{engine}".replace(" ", "_").lower()


def describe(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Rewards of every step; engine against trainer in the first step and over all, nats a logical token.

    kl: of trainer to engine, k3 on the engine's samples.
    """
    mean, highest, kl = (
        [row[f"mismatch/{name}"] for row in rows] for name in ("logprob_abs_mean", "logprob_abs_max", "kl")
    )
    return {
        "reward": [row["reward/mean"] for row in rows],
        "first_step": {"mean": mean[0], "max": highest[0], "kl": kl[0]},
        "all_steps": {"mean": statistics.fmean(mean), "max": max(highest), "kl": statistics.fmean(kl)},
    }


def measure_gradients(trainer: str, trees: Path, out: Path, overrides: Sequence[str] = ()) -> None:
    """Write a trainer's gradients (float32, by parameter) and log-probs (float32 [edges]) on saved trees.

    overrides: of the quickstart's configuration.
    """
    import torch

    from treepo_mcore.actor.actor import Actor
    from treepo_mcore.actor.model import unwrap
    from treepo_mcore.actor.parallel import build_grid
    from treepo_mcore.config import load_config
    from treepo_mcore.learn.advantage import advantages
    from treepo_mcore.learn.loss import PolicyObjective
    from treepo_mcore.learn.step import mini_batches
    from treepo_mcore.model.architecture import read_architecture
    from treepo_mcore.model.files import resolve_model
    from treepo_mcore.model.shards import token_work
    from treepo_mcore.system.placement import init_process_group
    from treepo_mcore.tree.files import read_trees
    from treepo_mcore.tree.stats import informative

    config = load_config(QUICKSTART / "config.yaml", [*ACTORS[trainer], "actor.optimizer.clip_grad=1e9", *overrides])
    init_process_group()
    directory = resolve_model(config.model)
    grid = build_grid(config.actor, seed=0)
    arch = read_architecture(directory)
    actor = Actor(config.actor, arch, directory, grid, temperature=config.rollout.temperature, total_steps=1)
    kept = [tree for tree in read_trees(trees) if informative(tree)]
    worth = advantages(kept, config.advantage, config.actor.loss.aggregation)
    batch = mini_batches(kept, worth, config, grid, token_work(arch))[0]
    old = [output[0] for output in actor.log_probs(batch.sequences)]
    actor.update(batch.sequences, old, PolicyObjective(actor.config), normaliser=batch.normaliser)
    parameters = [named for chunk in actor.chunks for named in unwrap(chunk).named_parameters()]
    gradients = {name: parameter.main_grad.float().cpu() for name, parameter in parameters}
    torch.save({"gradients": gradients, "log_probs": torch.cat(old).cpu()}, out)


def gradients_of(trainer: str, trees: Path) -> dict[str, Any]:
    """The same in a process of its own."""
    import torch

    out = RUNS / "gradients.pt"
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--gradients",
        trainer,
        "--trees",
        str(trees),
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True)
    found: dict[str, Any] = torch.load(out)
    out.unlink()
    return found


def compare(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Two results of `measure_gradients`: cosines, the ratio of the gradients' norms, distance of log-probs in nats."""
    import torch

    mine, theirs = found["gradients"], reference["gradients"]
    assert mine.keys() == theirs.keys()
    cosines = {name: cosine(mine[name], theirs[name]) for name in mine}
    whole, other = (torch.cat([part[name].flatten() for name in mine]).double() for part in (mine, theirs))
    gap = (found["log_probs"] - reference["log_probs"]).abs()
    worst = min(cosines, key=lambda name: cosines[name])
    return {
        "cosine": cosine(whole, other),
        "cosine_median": statistics.median(cosines.values()),
        "cosine_least": cosines[worst],
        "least_of": worst,
        "norm_ratio": float(whole.norm() / other.norm()),
        "logprob_abs_mean": float(gap.mean()),
        "logprob_abs_max": float(gap.max()),
        "cosines": cosines,
    }


def cosine(a: Any, b: Any) -> float:
    """Of two tensors of one shape, as vectors; zero where one of them is zero."""
    a, b = a.double().flatten(), b.double().flatten()
    product = float(a.norm() * b.norm())
    return float(a @ b) / product if product else 0.0


def table(runs: dict[str, Any], gradients: dict[str, Any]) -> str:
    """What the JSON says, in short."""
    lines = [
        f"{'trainer, engine':<24} {'reward first':>12} {'last five':>9}  engine - trainer, all steps: mean, max, KL"
    ]
    for name, row in runs.items():
        reward, gap = row["reward"], row["all_steps"]
        lines.append(
            f"{name:<24} {reward[0]:>12.3f} {statistics.fmean(reward[-5:]):>9.3f}  "
            f"{gap['mean']:.2e} {gap['max']:.2e} {gap['kl']:.2e}"
        )
    lines.append(f"{'trainer':<24} cosine of gradients: whole, median, least; norm ratio; log-probs: mean, max")
    for name, row in gradients.items():
        lines.append(
            f"{name:<24} {row['cosine']:.6f} {row['cosine_median']:.6f} {row['cosine_least']:.6f} ({row['least_of']}); "
            f"{row['norm_ratio']:.4f}; {row['logprob_abs_mean']:.2e} {row['logprob_abs_max']:.2e}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the precisions one after the other, then their gradients."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    place = ROOT / "benchmarks" / "results" / f"precision_{'gpu' if has_gpu() else 'cpu'}.json"
    parser.add_argument("--fresh", action="store_true", help="forget what is in the file")
    parser.add_argument("--out", type=Path, default=place)
    parser.add_argument("--gradients", choices=ACTORS, help=argparse.SUPPRESS)
    parser.add_argument("--trees", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gradients:
        measure_gradients(options.gradients, options.trees, options.out)
        return
    pairs = ON_GPU if has_gpu() else ON_CPU
    trees = run_directory(*pairs[0]) / "trees" / "step_000000.jsonl"
    result = begin(options.out, options.steps, pairs[0][0], options.fresh)
    runs, gradients = result["runs"], result["gradients"]

    def keep() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    for number, (trainer, engine) in enumerate(pairs):
        name = f"{trainer}, {engine}"
        if name in runs and (number or trees.is_file()):  # gradients are of the first run's trees
            continue
        runs[name] = train(trainer, engine, options.steps)
        keep()
        print(f"ran: {trainer} trainer, {engine} engine", flush=True)
    others = dict.fromkeys(trainer for trainer, _ in pairs if trainer != pairs[0][0] and trainer not in gradients)
    reference = gradients_of(pairs[0][0], trees) if others else {}
    for name in others:
        gradients[name] = compare(gradients_of(name, trees), reference)
        keep()
    print(table(runs, gradients))


def begin(file: Path, steps: int, reference: str, fresh: bool) -> dict[str, Any]:
    """What the file holds, if it was measured with the same versions and steps; else nothing yet."""
    from treepo_mcore.system.versions import versions

    result: dict[str, Any] = {"versions": versions(), "steps": steps, "reference": reference}
    before = json.loads(file.read_text()) if file.is_file() and not fresh else {}
    same = all(before.get(name) == value for name, value in result.items())
    return result | {name: before[name] if same else {} for name in ("runs", "gradients")}


if __name__ == "__main__":
    main()
