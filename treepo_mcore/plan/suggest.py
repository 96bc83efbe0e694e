"""Search layouts: every sensible one is planned, the fastest that fit win, and their neighbours say why they lose."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from treepo_mcore.config import Config, ConfigError, apply_override, parse_config
from treepo_mcore.engine.costs import EngineMemory
from treepo_mcore.model.sizes import Sizes
from treepo_mcore.plan.decode import rollout_time
from treepo_mcore.plan.hardware import Cluster
from treepo_mcore.plan.memory import plan_memory
from treepo_mcore.plan.plan import Plan, errors_of, plan_run
from treepo_mcore.plan.seconds import log_prob_time, offload_seconds, push_time, update_time, wake_seconds
from treepo_mcore.plan.workload import Assumptions, Workload, make_workload

SEGMENT = 512
MICRO_BATCH = "actor.micro_batch_tokens"
FILL_KEY = "gpu_memory_utilization"
FILL = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)


@dataclass(frozen=True)
class Layout:
    """The choices of a search."""

    tp: int
    cp: int
    pp: int
    vpp: int | None
    ep: int
    rollout_tp: int
    recompute: str
    micro_batch_tokens: int

    def overrides(self, sizes: Sizes) -> dict[str, Any]:
        """As keys of the configuration."""
        first, last = uneven(sizes.layers, self.pp)
        return {
            "actor.tp": self.tp,
            "actor.cp": self.cp,
            "actor.pp": self.pp,
            "actor.vpp": self.vpp,
            "actor.ep": self.ep,
            "actor.first_stage_layers": first,
            "actor.last_stage_layers": last,
            "actor.sequence_parallel": self.tp > 1,
            "actor.recompute": self.recompute,
            "actor.micro_batch_tokens": self.micro_batch_tokens,
            "rollout.tp": self.rollout_tp,
        }


@dataclass(frozen=True)
class Verdict:
    """A layout and what the planner says of it. Seconds are infinite where it does not fit."""

    layout: Layout
    config: Config
    seconds: dict[str, float]
    misfit: str | None = None

    @property
    def total(self) -> float:
        """Of a step."""
        return math.inf if self.misfit else sum(self.seconds.values())


@dataclass(frozen=True)
class Suggestions:
    """Best first."""

    sizes: Sizes
    best: list[Verdict]
    plans: list[Plan]
    given: dict[str, str]  # overrides that the search started from: model, lengths, the user's
    neighbours: list[tuple[str, Verdict]]  # what is changed in the best one
    tried: int


def starting_point(model: str, prompt_tokens: int, response_tokens: int, overrides: list[str]) -> dict[str, str]:
    """Key -> value of what a search starts from: lengths four times their means, and what the user says.

    Raises `ConfigError` for an override that is not key=value.
    """
    assumed = {
        "model.path": model,
        "data.max_prompt_tokens": str(4 * prompt_tokens),
        "rollout.tree.segment_tokens": str(SEGMENT),
        "rollout.tree.max_depth": str(max(1, math.ceil(4 * response_tokens / SEGMENT))),
    }
    for override in overrides:
        apply_override({}, override)  # refuses what is not key=value
    return assumed | {key: value for key, _, value in (override.partition("=") for override in overrides)}


def base_config(given: dict[str, str]) -> Config:
    """The defaults with `starting_point`; micro-batches hold the longest path where nothing else is said."""
    raw: dict[str, Any] = {"data": {"train": "data.jsonl"}}
    for key, value in given.items():
        apply_override(raw, f"{key}={value}")
    if MICRO_BATCH in given:
        return parse_config(raw, "plan suggest")
    apply_override(raw, f"{MICRO_BATCH}={sys.maxsize}")  # the length of a path is known when the rest has been read
    config = parse_config(raw, "plan suggest")
    return with_overrides(config, {MICRO_BATCH: _longest_path(config)})


def _longest_path(config: Config) -> int:
    return config.data.max_prompt_tokens + config.rollout.tree.response_tokens


def suggest_layouts(
    given: dict[str, str], sizes: Sizes, cluster: Cluster, assumed: Assumptions, best: int
) -> Suggestions:
    """Try every layout of the search space that has what `given` (a `starting_point`) says.

    Raises `ConfigError` when none has a meaning on this cluster.
    """
    config = base_config(given)
    search = _Search(config, sizes, cluster, assumed)
    verdicts = [search.judge(layout) for layout in layouts(config, sizes, cluster, given)]
    if not verdicts:
        raise ConfigError(
            f"no layout of {sizes.layers} layers and {sizes.heads} heads that is searched fills {cluster.world} GPUs "
            "and agrees with the overrides"
        )
    fitting = sorted((v for v in verdicts if not v.misfit), key=lambda v: v.total)
    shown = _distinct(fitting)[:best]
    plans = [plan_run(v.config, sizes, cluster, assumed) for v in shown]
    around = list(_neighbours(shown[0].layout, verdicts)) if shown else []
    return Suggestions(sizes, shown, plans, given, around, len(verdicts))


def layouts(config: Config, sizes: Sizes, cluster: Cluster, given: dict[str, str]) -> Iterator[Layout]:
    """Those of the search space that have the values that `given` names."""
    for layout in _layouts(config, sizes, cluster, MICRO_BATCH in given):
        chosen = layout.overrides(sizes)
        if all(chosen[key] == _value(config, key) for key in chosen.keys() & given.keys()):
            yield layout


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _layouts(config: Config, sizes: Sizes, cluster: Cluster, one_batch: bool) -> Iterator[Layout]:
    """Tensor and context parallelism within a node, pipelines that come out even, micro-batches that hold a path, whole
    experts."""
    least = config.actor.micro_batch_tokens
    batches = [least] if one_batch else [least, 2 * least]
    engines = [n for n in (1, 2, 4, 8, 16) if cluster.world % n == 0 and _engine_splits(config, sizes, n)]
    for tp, cp in product((1, 2, 4, 8), (1, 2, 4)):
        if cluster.crosses(tp * cp) or sizes.split_problem(tp):
            continue
        for pp in (1, 2, 4, 8, 16, 32):
            if cluster.world % (tp * cp * pp) or pp > sizes.layers or not _splits(sizes.layers, pp):
                continue
            rest = product(
                _interleavings(sizes.layers, pp),
                _expert_ranks(sizes, cluster.world // pp),
                engines,
                ("none", "full"),
                batches,
            )
            for vpp, ep, rollout_tp, recompute, tokens in rest:
                yield Layout(tp, cp, pp, vpp, ep, rollout_tp, recompute, tokens)


def _engine_splits(config: Config, sizes: Sizes, tp: int) -> bool:
    try:
        sizes.check_engine_split(tp, tp > 1 and bool(config.rollout.engine.get("enable_expert_parallel")))
    except ConfigError:
        return False
    return True


def _expert_ranks(sizes: Sizes, ranks: int) -> list[int]:
    """Numbers of a stage's ranks that may share the experts."""
    if sizes.experts is None:
        return [1]
    return [ep for ep in (1, 2, 4, 8, 16, 32, 64) if ranks % ep == 0 and sizes.experts.count % ep == 0]


def uneven(layers: int, pp: int) -> tuple[int | None, int | None]:
    """Layers of the first and of the last stage where the others then come out even; None twice when all do."""
    if layers % pp == 0:
        return None, None
    each = math.ceil(layers / pp)
    missing = each * pp - layers
    return each - missing // 2, each - (missing - missing // 2)


def _splits(layers: int, pp: int) -> bool:
    first, last = uneven(layers, pp)
    return (first is None or first > 0) and (last is None or last > 0)


def _interleavings(layers: int, pp: int) -> list[int | None]:
    if pp == 1 or layers % pp:
        return [None]
    return [None, *(n for n in (2, 4) if (layers // pp) % n == 0 and layers // pp > n)]


class _Search:
    """Judges layouts; what only depends on the engine is played once for each."""

    def __init__(self, config: Config, sizes: Sizes, cluster: Cluster, assumed: Assumptions) -> None:
        self.config, self.sizes, self.cluster = config, sizes, cluster
        self.work: Workload = make_workload(config, assumed)
        self.rollouts: dict[tuple[int, int], float] = {}

    def judge(self, layout: Layout) -> Verdict:
        """With the engine filling what the actor leaves."""
        config = with_overrides(self.config, layout.overrides(self.sizes))
        sizes, cluster = self.sizes, self.cluster
        if not config.rollout.engine.keys() & {FILL_KEY, "kv_cache_memory_bytes"}:
            config = _filled(config, FILL[-1])
            memory = plan_memory(config, sizes, cluster, config.actor.rank_tokens)
            engine = memory.engine
            others = memory.total("rollout") - engine.weights - engine.working - engine.cache
            room = 1 - others / memory.available
            config = _filled(config, max((fill for fill in FILL if fill <= room), default=FILL[-1]))
        memory = plan_memory(config, sizes, cluster, config.actor.rank_tokens)
        engine = memory.engine
        if errors := errors_of(config, sizes, cluster, self.work, memory):
            return Verdict(layout, config, {}, errors[0])
        seconds = {
            "push": push_time(config, sizes, cluster, engine).seconds,
            "rollout": self._rollout(config, engine),
            "sleep, wake": wake_seconds(engine, cluster) + offload_seconds(config, sizes, cluster),
            "log-probs": log_prob_time(config, sizes, cluster, self.work),
            "update": update_time(config, sizes, cluster, self.work).seconds,
        }
        return Verdict(layout, config, seconds)

    def _rollout(self, config: Config, engine: EngineMemory) -> float:
        key = (config.rollout.tp, engine.cache_tokens)
        if key not in self.rollouts:
            self.rollouts[key] = rollout_time(config, self.sizes, self.cluster, engine, self.work).seconds
        return self.rollouts[key]


def with_overrides(config: Config, overrides: dict[str, Any]) -> Config:
    """A copy with values of `actor.*` and `rollout.*`."""
    parts: dict[str, dict[str, Any]] = {"actor": {}, "rollout": {}}
    for key, value in overrides.items():
        section, name = key.split(".")
        parts[section][name] = value
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=values) for section, values in parts.items()}
    )


def _filled(config: Config, utilisation: float) -> Config:
    engine = config.rollout.engine | {FILL_KEY: utilisation}
    return with_overrides(config, {"rollout.engine": engine})


def _distinct(verdicts: list[Verdict]) -> list[Verdict]:
    """The fastest of those that differ in more than recomputing, interleaving and micro-batches."""
    seen = set()
    result = []
    for verdict in verdicts:
        key = (verdict.layout.tp, verdict.layout.cp, verdict.layout.pp, verdict.layout.ep, verdict.layout.rollout_tp)
        if key not in seen:
            seen.add(key)
            result.append(verdict)
    return result


def _neighbours(best: Layout, verdicts: list[Verdict]) -> Iterator[tuple[str, Verdict]]:
    """Layouts that differ from the best in one choice, by one step."""
    table = {verdict.layout: verdict for verdict in verdicts}
    for name in ("tp", "cp", "pp", "vpp", "ep", "rollout_tp", "recompute", "micro_batch_tokens"):
        here = getattr(best, name)
        values = sorted({getattr(layout, name) for layout in table}, key=lambda v: (v is not None, v or 0))
        at = values.index(here)
        for value in values[max(0, at - 1) : at + 2]:
            other = table.get(replace(best, **{name: value}))
            if value != here and other is not None:
                yield f"{name} {value or 'none'} instead of {here or 'none'}", other


def reason(verdict: Verdict, best: Verdict) -> str:
    """Why a neighbour loses, or that it does not."""
    if verdict.misfit:
        return f"does not fit: {verdict.misfit}"
    slower = verdict.total / best.total - 1
    phase = max(best.seconds, key=lambda name: abs(verdict.seconds[name] - best.seconds[name]))
    return (
        f"{slower:+.0%}: {phase} {best.seconds[phase]:.1f} -> {verdict.seconds[phase]:.1f} s"
        if abs(slower) >= 0.005
        else "no slower"
    )


def print_suggestions(found: Suggestions, console: Console) -> None:
    """The best layouts and the neighbours of the first."""
    console.print(f"{found.tried} layouts tried", highlight=False)
    if not found.best:
        console.print(
            "[bold red]none fits[/]: more GPUs, larger ones, FP8 weights in the engine, or more in memory.offload"
        )
        return
    table = Table(title="Best layouts")
    phases = list(found.best[0].seconds)
    for name in ("actor", "rollout.tp", "fill", "recompute", "micro-batch", "step s", *phases):
        table.add_column(name, justify="right")
    for verdict, plan in zip(found.best, found.plans, strict=True):
        layout = verdict.layout
        context = f" cp{layout.cp}" if layout.cp > 1 else ""
        interleaved = f" vpp{layout.vpp}" if layout.vpp else ""
        experts = f" ep{layout.ep}" if found.sizes.experts else ""
        table.add_row(
            f"tp{layout.tp}{context} pp{layout.pp}{interleaved} dp{plan.data_parallel}{experts}",
            str(layout.rollout_tp),
            f"{plan.memory.engine.bytes / plan.memory.available:.2f}",
            layout.recompute,
            str(layout.micro_batch_tokens),
            f"{verdict.total:.1f}",
            *(f"{verdict.seconds[phase]:.1f}" for phase in phases),
        )
    console.print(table)
    best = found.best[0]
    console.print("Neighbours of the first:", highlight=False)
    for change, verdict in found.neighbours:
        console.print(f"  {change}: {reason(verdict, best)}", highlight=False)
    for warning in found.plans[0].warnings:
        console.print(f"  {warning.level} for the first: {warning.message}", highlight=False)
    line = shlex.join(as_overrides(best, found))
    console.print(f"As overrides: {line}", highlight=False, markup=False, soft_wrap=True)


def as_overrides(verdict: Verdict, found: Suggestions) -> list[str]:
    """`key=value` for the command line: what the search started from, and what it chose."""
    values = found.given | {k: v for k, v in verdict.layout.overrides(found.sizes).items() if v is not None}
    values["actor.sequence_parallel"] = str(values["actor.sequence_parallel"]).lower()
    if FILL_KEY in verdict.config.rollout.engine:
        values[f"rollout.engine.{FILL_KEY}"] = verdict.config.rollout.engine[FILL_KEY]
    return [f"{key}={value}" for key, value in values.items()]


def suggestions_json(found: Suggestions) -> dict[str, Any]:
    """The object of `plan suggest --json`."""
    return {
        "tried": found.tried,
        "best": [
            {
                "overrides": as_overrides(verdict, found),
                "seconds": verdict.seconds | {"total": verdict.total},
                "warnings": [warning.message for warning in plan.warnings],
            }
            for verdict, plan in zip(found.best, found.plans, strict=True)
        ],
        "neighbours": [{"change": c, "reason": reason(v, found.best[0])} for c, v in found.neighbours],
    }
