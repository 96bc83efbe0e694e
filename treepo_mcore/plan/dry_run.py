"""`train --dry-run`: everything that can go wrong before the first GPU is booked."""

from __future__ import annotations

import math
import time

from treepo_mcore.checks import Context, Moment, walk
from treepo_mcore.config import Config
from treepo_mcore.plan.hardware import GPUS, NETWORKS
from treepo_mcore.plan.paper import PaperJob, planned_machine, put_on_paper
from treepo_mcore.plan.reshard import describe, reshard_report
from treepo_mcore.weights.layout import hf_shapes


def dry_run(config: Config, nodes: int, gpus_per_node: int) -> list[str]:
    """Check files, configuration, process groups and weight plan of a job of `nodes` x `gpus_per_node` processes.

    Weights, tokenizer and prompts are checked where they are; a directory with nothing but config.json will do, and
    prompts may lie elsewhere. Returns lines for people. Raises `ConfigError`.
    """
    begin = time.perf_counter()
    checked = Context(config, partial=True, world=nodes * gpus_per_node, machine=planned_machine())
    walk(checked, Moment.FILES, Moment.LIBRARIES, Moment.WORLD)
    arch, directory = checked.arch, checked.directory
    job = put_on_paper(config, arch, directory, nodes, gpus_per_node)
    where, *push = describe(reshard_report(job, GPUS["h100"], NETWORKS["ib400"], config.rollout.push_staging_mb << 20))
    size = sum(math.prod(shape) for shape in hf_shapes(arch).values())
    return [
        f"model: {directory.name}, {size / 1e9:.2f} billion parameters; {_which(checked.here)}",
        f"layout: {where}",
        f"process groups: {_groups(job)}",
        f"push: {push[0]}",
        *push[-3:],
        f"dry run passed in {time.perf_counter() - begin:.0f} s",
    ]


def _which(here: dict[str, bool]) -> str:
    """Which files were there to be checked."""
    checked, missing = ([name for name, found in here.items() if found is wanted] for wanted in (True, False))
    return "; ".join(
        f"{what}: {', '.join(names)}" for what, names in (("checked", checked), ("not here", missing)) if names
    )


def _groups(job: PaperJob) -> str:
    mine = sum(0 in group and len(group) > 1 for group in job.groups)
    return f"{len(job.groups):,}, created in the same order by every rank; rank 0 talks in {mine}"
