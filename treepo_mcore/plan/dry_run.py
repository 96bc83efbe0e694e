"""`train --dry-run`: everything that can go wrong before the first GPU is booked."""

from __future__ import annotations

import math
import time
from pathlib import Path

from treepo_mcore.config import Config
from treepo_mcore.data.prompts import check_token_ids, load_prompts
from treepo_mcore.data.tokenizer import load_tokenizer
from treepo_mcore.grow.pruning import make_pruner
from treepo_mcore.model.architecture import Architecture, read_architecture, resolve_model
from treepo_mcore.observe.trackers import check_trackers
from treepo_mcore.plan.hardware import GPUS, NETWORKS
from treepo_mcore.plan.paper import PaperJob, put_on_paper
from treepo_mcore.plan.reshard import describe, reshard_report
from treepo_mcore.rewards.pool import check_function
from treepo_mcore.weights.hf import check_weights
from treepo_mcore.weights.layout import hf_shapes


def dry_run(config: Config, nodes: int, gpus_per_node: int) -> list[str]:
    """Check files, configuration, process groups and weight plan of a job of `nodes` x `gpus_per_node` processes.

    Weights, tokenizer and prompts are checked where they are; a directory with nothing but config.json will do, and
    prompts may lie elsewhere. Returns lines for people. Raises `ConfigError`.
    """
    begin = time.perf_counter()
    directory = resolve_model(config.model, weights=False)
    arch = read_architecture(directory)
    check_function(config.reward)
    make_pruner(config.rollout.tree.pruning)
    check_trackers(config.run.trackers)
    files = _check_files(config, arch, directory)
    job = put_on_paper(config, arch, directory, nodes, gpus_per_node)
    where, *push = describe(reshard_report(job, GPUS["h100"], NETWORKS["ib400"], config.rollout.push_staging_mb << 20))
    size = sum(math.prod(shape) for shape in hf_shapes(arch).values())
    return [
        f"model: {directory.name}, {size / 1e9:.2f} billion parameters; {files}",
        f"layout: {where}",
        f"process groups: {_groups(job)}",
        f"push: {push[0]}",
        *push[-3:],
        f"dry run passed in {time.perf_counter() - begin:.0f} s",
    ]


def _check_files(config: Config, arch: Architecture, directory: Path) -> str:
    """Which files were there to be checked."""
    there = {"weights": any(directory.glob("*.safetensors")), "tokenizer": any(directory.glob("tokenizer*"))}
    if there["weights"]:
        check_weights(directory, arch)
    if there["tokenizer"]:
        tokenizer = load_tokenizer(directory)
        for file in filter(None, (config.data.train, config.data.eval)):
            there[str(file)] = file.is_file()
            if file.is_file():
                check_token_ids(load_prompts(file, config.data, tokenizer), arch.vocab)
    checked, missing = ([name for name, found in there.items() if found is wanted] for wanted in (True, False))
    return "; ".join(
        f"{what}: {', '.join(names)}" for what, names in (("checked", checked), ("not here", missing)) if names
    )


def _groups(job: PaperJob) -> str:
    mine = sum(0 in group and len(group) > 1 for group in job.groups)
    return f"{len(job.groups):,}, created in the same order by every rank; rank 0 talks in {mine}"
