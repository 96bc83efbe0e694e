"""A plan as tables for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from treepo_mcore.model.shards import model_parameters
from treepo_mcore.plan.memory import PHASES
from treepo_mcore.plan.plan import Plan

GIB = 1 << 30


def print_plan(plan: Plan, console: Console) -> None:
    """Layout, memory, time, warnings."""
    console.print(headline(plan), highlight=False)
    console.print(_work_line(plan), highlight=False)
    console.print(memory_table(plan), time_table(plan))
    for warning in plan.warnings:
        style = "bold red" if warning.level == "error" else "yellow"
        console.print(f"[{style}]{warning.level}[/]: {warning.message}", highlight=False)
    if not plan.warnings:
        console.print("fits, and nothing starves", highlight=False)


def headline(plan: Plan) -> str:
    """Model, cluster and layout in two lines."""
    cluster, actor = plan.cluster, plan.config.actor
    details = [
        f"tp{actor.tp}"
        + (f" cp{actor.cp}" if actor.cp > 1 else "")
        + f" pp{actor.pp}"
        + (f" vpp{actor.vpp}" if actor.vpp else "")
        + f" dp{plan.data_parallel}",
        "sequence parallel" if actor.sequence_parallel else "",
        f"recompute {actor.recompute}",
        f"micro-batches of {actor.micro_batch_tokens} tokens",
        f"{plan.engines} engines of {plan.config.rollout.tp}",
        f"offload {', '.join(sorted(plan.config.memory.offloaded(gpu=True))) or 'nothing'}",
    ]
    return (
        f"{plan.config.model.path} ({model_parameters(plan.sizes) / 1e9:.1f} B parameters) on {cluster.nodes} x "
        f"{cluster.gpus_per_node} {cluster.gpu.name}, {cluster.network.name}\n" + ", ".join(filter(None, details))
    )


def _work_line(plan: Plan) -> str:
    work, profile = plan.work, plan.work.profile
    return (
        f"a step: {work.drawn:.0f} prompts of {work.prompt_tokens} tokens drawn, {work.trained:.0f} trained in "
        f"{work.updates} updates; a prompt: {profile.leaves:.0f} leaves, {profile.physical:.0f} physical and "
        f"{profile.logical:.0f} logical tokens"
    )


def memory_table(plan: Plan) -> Table:
    """GiB of the fullest GPU by item and phase, and of a node's host memory."""
    memory = plan.memory
    table = Table(title=f"GiB on the fullest GPU ({memory.available / GIB:.1f} there)")
    table.add_column("")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    items = list(dict.fromkeys(name for phase in PHASES for name in memory.phases[phase]))
    for item in items:
        cells = [_gib(memory.phases[phase].get(item)) for phase in PHASES]
        table.add_row(item, *cells)
    table.add_section()
    totals = [memory.total(phase) for phase in PHASES]
    table.add_row("total", *(f"[red]{_gib(t)}[/]" if t > memory.available else _gib(t) for t in totals))
    if plan.config.actor.pp > 1:
        table.add_row("of pipeline stage", *(str(memory.stages[phase]) for phase in PHASES))
    host = _gib(sum(memory.host.values())) or "0"
    table.caption = (
        f"Longest path that this layout can train: {plan.longest_path} tokens\n"
        f"KV cache of an engine: {memory.engine.cache_tokens} tokens\n"
        f"Host memory of a node: {host} GiB; a checkpoint: {_gib(memory.checkpoint)} GiB"
    )
    return table


def time_table(plan: Plan) -> Table:
    """Seconds of a step by phase, with what makes them."""
    table = Table(title="Seconds of a step")
    table.add_column("")
    table.add_column("s", justify="right")
    table.add_column("of which")
    rollout, update, passes = plan.rollout, plan.update, plan.update.passes
    notes = {
        "push": f"{plan.push.received / GIB:.1f} GiB into a GPU, {plan.push.received_remote / GIB:.1f} of them from "
        f"other nodes; gathered: {plan.push.gather_seconds:.1f} s",
        "rollout": f"{rollout.steps} engine steps, {rollout.mean_batch:.0f} requests at once on average, "
        f"tail {rollout.tail_seconds:.0f} s",
        "update": f"{passes.micro_batches} micro-batches an update, stages wait {passes.bubble:.0%}, gradients "
        f"{update.reduce_seconds:.1f} s, optimizer {update.optimizer_seconds:.1f} s",
    }
    for name, seconds in plan.seconds.items():
        table.add_row(name, f"{seconds:.1f}", notes.get(name, ""))
    table.add_section()
    table.add_row("step", f"{plan.total:.1f}", "")
    return table


def _gib(size: int | None) -> str:
    return "" if not size else f"{size / GIB:.1f}"
