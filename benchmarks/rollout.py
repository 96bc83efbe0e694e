"""Trees against flat sampling and against the released design: one engine, one law of answer lengths.

    python benchmarks/rollout.py [--quick | --full] [--fresh] [--out FILE]
    python benchmarks/rollout.py --profile '{"prompt": 1024, "prompts": 24}'

The model is random with all logits nearly equal, so a token ends an answer with probability (EOS ids) / (vocabulary)
whatever came before: every sampler draws from the same memoryless law, cut at depth x segment, through the same stop
as in a real run. Counts (steps, tokens, requests) come from vLLM's scheduler and do not depend on the machine; seconds
do. The step-time models say what the traces cost where a step takes a + c x live requests milliseconds.

`--profile` runs flat sampling and ours on one cell, the paper's setting with the keys given, under torch's profiler and
writes where the operators' time goes to benchmarks/results/rollout_profile.txt; and flat sampling with the answers of
all prompts mixed, which tells what the order of a batch costs (a processor's cache holds the keys of few prompts).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

VOCABULARY = 512
PROFILE = Path("benchmarks/results/rollout_profile.txt")
PAPER = {"width": 16, "factor": 2, "depth": 8, "segment": 32, "prompt": 64, "tp": 1, "ends": 5, "prompts": 48}
STEP_MODELS = {
    "small GPU batch": (10.0, 0.02),
    "large model": (30.0, 0.05),
    "this kind of CPU": (2.5, 0.11),
}  # a, c: ms
METHODS = {
    "flat, all queued": {},
    "depth-synchronous, waves of 8": {"wave": 8},
    "depth-synchronous, one wave": {"wave": 10**6},
    "ours, stop and fork": {"expansion": "stop_and_fork"},
    "ours, streaming": {"expansion": "fork_behind"},
    "ours, deterministic": {"expansion": "fork_behind", "deterministic": True},
}
PROFILED = {
    "flat, all queued": METHODS["flat, all queued"],
    "flat, prompts mixed": {"mixed": True},
    "ours, streaming": METHODS["ours, streaming"],
}


def cells(mode: str) -> list[dict[str, Any]]:
    """One factor at a time around the paper's setting, scaled down; `full`: the whole grid."""
    if mode == "quick":
        return [PAPER | {"prompts": 24}]
    if mode == "full":
        axes = {"width": (8, 16, 32), "factor": (2, 4), "depth": (4, 8, 14), "prompt": (64, 1024), "tp": (1, 2)}
        return [PAPER | dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    changes: list[dict[str, Any]] = [
        {},
        *({"width": value} for value in (8, 32)),
        *({"factor": value} for value in (4, 8)),
        {"first": [2, 8]},
        *({"depth": value} for value in (4, 14)),
        {"ends": 10},
        {"prompt": 1024},
        {"tp": 2},
        {"tp": 2, "prompt": 1024},
    ]
    return [PAPER | change for change in changes]


# Inside a process of the engine.


def run_cell(cell: dict[str, Any], repeats: int, out: Path) -> None:
    """All methods, interleaved `repeats` times, on one engine."""
    import torch.distributed as dist

    setup = prepare(cell)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for repeat, (name, options) in itertools.product(range(repeats), METHODS.items()):
        rows[name].append(measure(*setup, options, repeat))
    if dist.get_rank() == 0:
        out.write_text(json.dumps({name: merge(runs) for name, runs in rows.items()}))


def profile_cell(cell: dict[str, Any], out: Path) -> None:
    """Each of `PROFILED` once and warm, with the operators' own time."""
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    setup = prepare(cell)
    parts = []
    for name, options in PROFILED.items():
        measure(*setup, options, 0)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            row = measure(*setup, options, 0)
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=50)
        counts = f"{row['physical_tokens']} physical tokens in {row['engine_steps']} steps, mean leaf"
        parts.append(f"{name}: {counts} {row['mean_leaf_tokens']:.1f} tokens\n{table}")
    if dist.get_rank() == 0:
        out.write_text("\n".join(parts))


def prepare(cell: dict[str, Any]) -> tuple[Any, ...]:
    """The first arguments of `measure`: engine, prompts, configuration, the engine's ranks, its traces."""
    import torch.distributed as dist
    from samplers import watch

    from treepo_mcore.config import parse_config
    from treepo_mcore.data.prepared import Prompt
    from treepo_mcore.engine.vllm.engine import VllmEngine
    from treepo_mcore.model.architecture import read_architecture
    from treepo_mcore.system.placement import init_process_group

    with tempfile.TemporaryDirectory() as folder:
        directory = make_model(Path(folder))
        config = parse_config(configuration(cell, directory))
        init_process_group()
        engine = VllmEngine(config, read_architecture(directory), directory, tuple(range(cell["ends"])))
    group = dist.new_group(backend="gloo") if cell["tp"] > 1 else None
    draw = random.Random(0)
    prompts = [
        Prompt(str(i), [draw.randrange(cell["ends"], VOCABULARY) for _ in range(cell["prompt"])], "", "")
        for i in range(cell["prompts"])
    ]
    return engine, prompts, config, group, watch(engine)


def measure(
    engine: Any, prompts: Any, config: Any, group: Any, traces: list[Any], options: dict[str, Any], seed: int
) -> dict[str, Any]:
    """One method once."""
    import torch
    from samplers import Trace, depth_synchronous, flat, ours

    engine.llm.reset_prefix_cache()
    torch.manual_seed(seed)  # unseeded requests draw from it; the same on all ranks
    run = config.run.model_copy(update={"seed": seed, "deterministic": options.get("deterministic", False)})
    config = config.model_copy(update={"run": run})
    traces.append(Trace(engine.block_tokens))
    wall, cpu = time.perf_counter(), time.process_time()
    if "wave" in options:
        leaves = depth_synchronous(engine, prompts, config, options["wave"], random.Random(seed))
    elif "expansion" in options:
        leaves = ours(engine, prompts, config, options["expansion"], group)
    else:
        leaves = flat(engine, prompts, config, random.Random(seed) if "mixed" in options else None)
    return describe(leaves, traces[-1], prompts, time.perf_counter() - wall, time.process_time() - cpu)


def describe(leaves: Any, trace: Any, prompts: Any, wall: float, cpu: float) -> dict[str, Any]:
    """What the table shows."""
    count, steps = len(leaves.lengths), len(trace.live)
    block = trace.block_tokens
    # A prompt's first request finds nothing; all others share its whole blocks at least.
    shared = trace.aligned_tokens - sum((len(p.tokens) - 1) // block * block for p in prompts)
    row = {
        "leaves": count,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "leaves_per_second": count / wall,
        "leaves_per_cpu_second": count / cpu,
        "engine_steps": steps,
        "occupancy": sum(trace.live) / steps,
        "physical_tokens": leaves.decoded,
        "physical_tokens_per_leaf": leaves.decoded / count,
        "mean_leaf_tokens": sum(leaves.lengths) / count,
        "effective_leaves": statistics.mean(leaves.effective),
        "requests": trace.requests,
        "fallback_requests": leaves.fallbacks,
        "prefix_hit_tokens": trace.hit_tokens,
        "prefilled_tokens": trace.context_tokens - trace.hit_tokens,
        "recomputed_tokens": trace.context_tokens - trace.hit_tokens - sum(len(p.tokens) for p in prompts),
        "sibling_hit_share": trace.hit_tokens / shared if shared else None,
        "preemptions": trace.preemptions,
    }
    for name, (constant, per_request) in STEP_MODELS.items():
        seconds = (constant * steps + per_request * sum(trace.live)) / 1e3
        row[f"leaves_per_second, {name}"] = count / seconds
    return row


def merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and the spread of the seconds."""
    row = {key: statistics.median(r[key] for r in runs) if runs[0][key] is not None else None for key in runs[0]}
    row["wall_seconds_all"] = [round(r["wall_seconds"], 2) for r in runs]
    row["cpu_seconds_all"] = [round(r["cpu_seconds"], 2) for r in runs]
    return row


def make_model(directory: Path) -> Path:
    """A configuration; the engine makes up its weights, small enough for equal logits."""
    sizes = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(sizes))
    return directory


def configuration(cell: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The trainer's own configuration of a cell."""
    return {
        "model": {"path": str(directory)},
        "data": {"train": "none", "max_prompt_tokens": cell["prompt"]},
        "filter": {"enabled": False},
        "rollout": {
            "tp": cell["tp"],
            "dtype": "float32",
            "tree": {
                "width": cell["width"],
                "segment_tokens": cell["segment"],
                "max_depth": cell["depth"],
                "branching": {"factor": cell["factor"], "first": cell.get("first")},
                "stopping": {"boxed": "none"},
            },
            "engine": {"max_num_seqs": 128},
        },
    }


# The driver.


def main() -> None:
    """Each cell in a process (or `tp` processes) of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the paper's setting only, 3 minutes")
    parser.add_argument("--full", action="store_true", help="the whole grid, hours")
    parser.add_argument("--repeats", type=int, default=3, help="of the paper's setting; the other cells run once")
    parser.add_argument("--fresh", action="store_true", help="forget what is in FILE; without it, only what it lacks")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rollout.json"))
    parser.add_argument("--profile", type=json.loads, metavar="KEYS", help="a cell's keys as JSON, see above")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        from treepo_mcore.system.environment import prepare_environment

        prepare_environment()
        cell = json.loads(options.cell)
        if options.profile is None:
            run_cell(cell, options.repeats, options.out)
        else:
            profile_cell(cell, options.out)
        return
    if options.profile is not None:
        cell, where = PAPER | options.profile, machine()
        tables = launch(cell, "--profile", "{}")
        text = f"{json.dumps(cell)}\n{json.dumps(where)}\n\n{tables}\n"
        PROFILE.write_text(text)
        print(text)
        return
    mode = "quick" if options.quick else "full" if options.full else "default"
    results: dict[str, Any] = {"step_models_ms": STEP_MODELS, "cells": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.is_file() and not options.fresh:
        results["cells"] = json.loads(options.out.read_text())["cells"]
    known = [entry["cell"] for entry in results["cells"]]
    for cell in cells(mode):
        if cell in known:
            continue
        where = machine()
        repeats = options.repeats if cell == PAPER or mode == "quick" else 1
        rows = json.loads(launch(cell, "--repeats", str(repeats)))
        # With each cell, because a later call may add to the file on another machine or under another load.
        where |= {"load_after": os.getloadavg()[0], "repeats": repeats}
        results["cells"].append({"cell": cell, "machine": where, "methods": rows})
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print_table(cell, rows)


def launch(cell: dict[str, Any], *options: str) -> str:
    """Run one cell under torchrun; what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cell['tp']}"]
        subprocess.run([*command, __file__, "--cell", json.dumps(cell), "--out", str(out), *options], check=True)
        return out.read_text()


def print_table(cell: dict[str, Any], rows: dict[str, Any]) -> None:
    """Counts first."""
    print("\n" + ", ".join(f"{key} {value}" for key, value in cell.items()))
    columns = {
        "steps": "engine_steps",
        "occup.": "occupancy",
        "physical": "physical_tokens",
        "/leaf": "physical_tokens_per_leaf",
        "leaf len": "mean_leaf_tokens",
        "n_eff": "effective_leaves",
        "requests": "requests",
        "prefill": "prefilled_tokens",
        "hit": "prefix_hit_tokens",
        "sib. hit": "sibling_hit_share",
        "leaves/s": "leaves_per_second",
        "/cpu-s": "leaves_per_cpu_second",
    } | {f"model {i}": f"leaves_per_second, {name}" for i, name in enumerate(STEP_MODELS, 1)}
    print(f"{'':30}" + "".join(f"{title:>10}" for title in columns))
    for name, row in rows.items():
        print(f"{name:30}" + "".join(f"{_cell(row[key]):>10}" for key in columns.values()), flush=True)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
