"""Rollout on one GPU: flat sampling by vLLM, the released design in lockstep, and ours, on models of real shapes.

    python benchmarks/gpu/rollout.py [--only 1.5b] [--minutes 6.5]

Weights are vLLM's dummy ones: logits nearly equal, so that every token ends an answer at the same rate under every
sampler (benchmarks/rollout.py explains). `flat, async` is vLLM at its best: generate(n=W), asynchronous scheduling,
CUDA graphs. The others share one engine with CUDA graphs, set up as a run sets it up. Tokens are physical: decoded.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from common import MODELS, main, write_model  # noqa: E402

from treepo_mcore.system.environment import prepare_environment  # noqa: E402

prepare_environment()

MEAN = 1024  # tokens of an answer
WIDTH, FACTOR, DEPTH, SEGMENT, PROMPT = 16, 2, 8, 256, 512
PROMPTS = {"1.5b": 32, "7b": 16}
SAMPLERS = ("flat, async", "flat", "depth-synchronous", "ours")
CELLS = {f"{model}: {sampler}": (model, sampler) for model in PROMPTS for sampler in SAMPLERS}


def configuration(model: str, directory: Path) -> dict[str, Any]:
    """The trainer's own."""
    return {
        "model": {"path": str(directory)},
        "data": {"train": "none", "max_prompt_tokens": PROMPT},
        "filter": {"enabled": False},
        "rollout": {
            "tree": {
                "width": WIDTH,
                "segment_tokens": SEGMENT,
                "max_depth": DEPTH,
                "branching": {"factor": FACTOR},
                "stopping": {"boxed": "none", "repetition_count": 0},
            },
            "engine": {"max_num_seqs": 512, "gpu_memory_utilization": 0.85},
        },
    }


def measure(cell: tuple[str, str]) -> dict[str, Any]:
    """One sampler after a warm-up with a quarter of the prompts."""
    from samplers import Trace, watch

    from treepo_mcore.config import parse_config
    from treepo_mcore.data.prepared import Prompt
    from treepo_mcore.engine.vllm.engine import VllmEngine, engine_arguments
    from treepo_mcore.model.architecture import read_architecture
    from treepo_mcore.system.placement import init_process_group

    model, sampler = cell
    if sampler == "flat, async":  # which a trainer's setting for Megatron must not slow down
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    vocabulary = MODELS[model]["vocab_size"]
    ends = tuple(range(vocabulary // MEAN))
    with tempfile.TemporaryDirectory() as folder:
        directory = write_model(Path(folder), model)
        config = parse_config(configuration(model, directory))
        arch = read_architecture(directory)
        init_process_group()
        begin = time.perf_counter()
        if sampler == "flat, async":
            from vllm import LLM

            llm = LLM(**engine_arguments(config, arch, directory) | {"async_scheduling": True})
            engine: Any = SimpleNamespace(llm=llm, eos_ids=list(ends))
            traces: list[Any] = []
        else:
            engine = VllmEngine(config, arch, directory, ends)
            traces = watch(engine)
        built = time.perf_counter() - begin
    draw = random.Random(0)
    prompts = [
        Prompt(str(i), [draw.randrange(len(ends), vocabulary) for _ in range(PROMPT)], "", "")
        for i in range(PROMPTS[model])
    ]
    sample(sampler, engine, prompts[: len(prompts) // 4], config)
    engine.llm.reset_prefix_cache()
    if traces:
        traces.append(Trace(engine.block_tokens))
    begin = time.perf_counter()
    leaves = sample(sampler, engine, prompts, config)
    return describe(leaves, time.perf_counter() - begin, traces[-1] if traces else None) | {"build_seconds": built}


def sample(sampler: str, engine: Any, prompts: list[Any], config: Any) -> Any:
    """`samplers.Leaves` of one way of sampling."""
    from samplers import depth_synchronous, flat, ours

    if sampler.startswith("flat"):
        return flat(engine, prompts, config)
    if sampler == "ours":
        return ours(engine, prompts, config, "fork_behind", None)
    return depth_synchronous(engine, prompts, config, len(prompts), random.Random(0))


def describe(leaves: Any, seconds: float, trace: Any) -> dict[str, Any]:
    """Steps are the scheduler's, which asynchronous scheduling does not let us count."""
    count = len(leaves.lengths)
    return {
        "leaves": count,
        "seconds": seconds,
        "leaves_per_second": count / seconds,
        "physical_tokens_per_second": leaves.decoded / seconds,
        "physical_tokens": leaves.decoded,
        "mean_leaf_tokens": sum(leaves.lengths) / count,
        "effective_leaves": sum(leaves.effective) / len(leaves.effective),
        "engine_steps": len(trace.live) if trace else None,
        "occupancy": sum(trace.live) / len(trace.live) if trace else None,
    }


if __name__ == "__main__":
    main(__file__, "rollout", __doc__.splitlines()[0], CELLS, measure)
