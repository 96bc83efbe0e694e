"""What a decoded token is worth to the gradient: signal over noise, for samplers and estimators, on a fixed model.

    python benchmarks/gradient_snr.py [--quick] [--json] [--out benchmarks/results/gradient_snr.json]

The quickstart's warm model answers the same prompts many times in every arm. Each tree gives one gradient of the policy
loss, before clipping and Adam, through the trainer's own estimators, packing and Megatron actor. A batch is one tree of
each prompt; its signal is the mean gradient's projection on a reference direction (of thousands of independent answers,
by `rloo`), its noise the trace of the covariance between repeats of the same prompts. An arm's value is signal squared
over noise and over what a batch costs: decoded tokens, seconds of rollout, seconds of update. `gain_over_flat` is that
by decoded token over the first arm's, with a 90 % interval from resampling prompts. cos is between mean gradient and
reference. Prompts whose leaves agree are left out of the update, as the trainer does, and stay in the costs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tree_value

NONE = {"candidates": "none"}
FIRST, HALF = [[0, 4], [0.25, 8]], [[0, 4], [0.45, 8]]
SHAPES: dict[str, dict[str, Any]] = {
    "flat": {"branching": {"factor": 1, "first": 8}},
    "default": {"branching": {"factor": 2, "first": [2, 4]}},
    "default, no fallback": {"branching": {"factor": 2, "first": [2, 4]}, "fallback": NONE},
    "fork at 0.25": {"branching": {"schedule": FIRST}, "fallback": NONE},
    "fork at 0.45": {"branching": {"schedule": HALF}, "fallback": NONE},
}
# Arm -> shape, advantage, loss.
ARMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "flat, token mean": ("flat", {"estimator": "rloo"}, "token_mean"),
    "flat, sequence mean": ("flat", {"estimator": "rloo"}, "sequence_mean"),
    "default, treepo": ("default", {"estimator": "treepo"}, "token_mean"),
    "default, grpo": ("default", {"estimator": "grpo"}, "token_mean"),
    "default, subtree": ("default, no fallback", {"estimator": "subtree"}, "token_mean"),
    "default, brownian": ("default, no fallback", {"estimator": "brownian"}, "token_mean"),
    "fork at 0.25, treepo": ("fork at 0.25", {"estimator": "treepo"}, "token_mean"),
    "fork at 0.25, subtree": ("fork at 0.25", {"estimator": "subtree"}, "token_mean"),
    "fork at 0.25, subtree kin": ("fork at 0.25", {"estimator": "subtree", "baseline": "kin"}, "token_mean"),
    "fork at 0.25, subtree blup": ("fork at 0.25", {"estimator": "subtree", "baseline": "blup"}, "token_mean"),
    "fork at 0.25, brownian": ("fork at 0.25", {"estimator": "brownian"}, "token_mean"),
    "fork at 0.45, treepo": ("fork at 0.45", {"estimator": "treepo"}, "token_mean"),
    "fork at 0.45, subtree": ("fork at 0.45", {"estimator": "subtree"}, "token_mean"),
    "fork at 0.45, subtree kin": ("fork at 0.45", {"estimator": "subtree", "baseline": "kin"}, "token_mean"),
    "fork at 0.45, subtree blup": ("fork at 0.45", {"estimator": "subtree", "baseline": "blup"}, "token_mean"),
    "fork at 0.45, brownian": ("fork at 0.45", {"estimator": "brownian"}, "token_mean"),
    "auto, subtree": ("auto", {"estimator": "subtree"}, "token_mean"),
    "auto, subtree blup": ("auto", {"estimator": "subtree", "baseline": "blup"}, "token_mean"),
}
PLANNED = ("fork at 0.25", "fork at 0.45", "auto")
RESAMPLES = 2000


class Gradients:
    """The trainer's gradient of trees, of a model that stays as it is."""

    def __init__(self, model: Path) -> None:
        from treepo_mcore.actor.actor import Actor
        from treepo_mcore.actor.parallel import build_grid
        from treepo_mcore.config import ActorConfig
        from treepo_mcore.learn.loss import PolicyObjective
        from treepo_mcore.model.architecture import read_architecture

        still = {"lr": 1e-30, "weight_decay": 0.0, "clip_grad": 1e30}
        self.config = ActorConfig.model_validate({"dtype": "float32", "optimizer": still})
        grid = build_grid(self.config, 0)
        arch = read_architecture(model)
        self.actor = Actor(self.config, arch, model, grid, temperature=1.0, total_steps=1)
        self.objective = PolicyObjective(self.config)
        self.parameters = [p for chunk in self.actor.chunks for p in chunk.parameters() if p.requires_grad]

    def of(self, trees: list[Any], worth: list[Any]) -> Any:
        """Of the sum of the trees' losses, as one float32 vector."""
        import torch

        from treepo_mcore.learn.packing import pack_trees

        sequences = pack_trees(trees, worth, self.config.micro_batch_tokens)
        old = [sequence.behaviour_logprob for sequence in sequences]
        self.actor.update(sequences, old, self.objective, normaliser=1.0)
        return torch.cat([parameter.main_grad.flatten() for parameter in self.parameters])


def advantage_lists(groups: list[list[Any]], advantage: dict[str, Any], loss: str) -> list[list[Any]]:
    """Of the informative trees of all prompts and repeats as one batch, as the trainer whitens; None for the others."""
    from treepo_mcore.config import AdvantageConfig
    from treepo_mcore.learn.advantage import advantages
    from treepo_mcore.tree.stats import informative

    kept = [tree for group in groups for tree in group if informative(tree)]
    found = dict(zip(map(id, kept), advantages(kept, AdvantageConfig.model_validate(advantage), loss), strict=True))
    return [[found.get(id(tree)) for tree in group] for group in groups]


def measure(gradients: Gradients, groups: list[list[Any]], worth: list[list[Any]], reference: Any) -> dict[str, Any]:
    """By prompt: the mean projection on the reference and the trace of the covariance of one tree's gradient."""
    total, projections, spreads, traces = None, [], [], []
    for group, values in zip(groups, worth, strict=True):
        summed, squares, along = None, 0.0, []
        for tree, value in zip(group, values, strict=True):
            if value is None:
                along.append(0.0)
                continue
            gradient = gradients.of([tree], [value])
            summed = gradient.clone() if summed is None else summed + gradient
            squares += float(gradient.double().square().sum())
            along.append(float(gradient.double() @ reference))
        count = len(group)
        of_mean = 0.0 if summed is None else float(summed.double().square().sum()) / count
        projections.append(float(np.mean(along)))
        spreads.append(float(np.var(along, ddof=1)) / count)
        traces.append((squares - of_mean) / (count - 1))
        if summed is not None:
            total = summed / count if total is None else total + summed / count
    begin = time.perf_counter()
    first = [(g[0], w[0]) for g, w in zip(groups, worth, strict=True) if w[0] is not None]
    gradients.of([tree for tree, _ in first], [value for _, value in first])
    seconds = time.perf_counter() - begin
    cos = float(total.double() @ reference / total.double().norm())
    return {"projections": projections, "spreads": spreads, "traces": traces, "cos": cos, "update_seconds": seconds}


def snr(projections: np.ndarray, spreads: np.ndarray, traces: np.ndarray) -> np.ndarray:
    """Of a batch of one tree a prompt. float64[..., prompts]; spreads: the variances of the measured projections, which
    the square of their sum has too much."""
    return (projections.sum(-1) ** 2 - spreads.sum(-1)) / traces.sum(-1)


def gains(arms: dict[str, Any], cost: str, seed: int = 0) -> dict[str, dict[str, float]]:
    """Of each arm over the first one, by what a batch costs."""
    rng = np.random.default_rng(seed)
    count = len(next(iter(arms.values()))["projections"])
    draws = rng.integers(0, count, (RESAMPLES, count))
    values = {}
    for name, arm in arms.items():
        columns = [np.array(arm[key]) for key in ("projections", "spreads", "traces")]
        values[name] = snr(*columns) / arm[cost], snr(*(column[draws] for column in columns)) / arm[cost]
    base = next(iter(values.values()))
    return {
        name: {
            "value": float(one / base[0]),
            "low": float(np.quantile(many / base[1], 0.05)),
            "high": float(np.quantile(many / base[1], 0.95)),
        }
        for name, (one, many) in values.items()
    }


def run(model: Path, data: Path, prompts: int, repeats: int, reference_trees: int) -> dict[str, Any]:
    """All arms."""
    lab = tree_value.Lab(model, data)
    gradients = Gradients(model)
    chosen = lab.prompts[:prompts]
    flat = lab.trees(chosen, reference_trees // prompts, SHAPES["flat"], seed=9)
    worth = advantage_lists(flat, {"estimator": "rloo"}, "token_mean")
    pairs = [(t, w) for g, v in zip(flat, worth, strict=True) for t, w in zip(g, v, strict=True) if w is not None]
    reference = gradients.of([t for t, _ in pairs], [w for _, w in pairs]).double()
    reference /= reference.norm()
    from treepo_mcore.tree.curve import CurveSums, mean_length

    lab.mean = float(np.mean([mean_length(tree) for group in flat for tree in group]))
    sampled, costs = {}, {}
    planned = None
    for seed, name in enumerate([*SHAPES, "auto"], 100):
        if name == "auto":  # by the curve of the trees so far
            planned = plan_from([tree for groups in sampled.values() for group in groups for tree in group])
        shape = SHAPES.get(name) or {"branching": {"schedule": planned["forks"]}, "fallback": NONE}
        begin = time.perf_counter()
        sampled[name] = lab.trees(chosen, repeats, shape, seed=seed)
        tokens = sum(tree.unique_tokens for group in sampled[name] for tree in group)
        costs[name] = {
            "rollout_seconds": (time.perf_counter() - begin) / repeats,
            "decoded_tokens": tokens / repeats,
            "leaves": sum(len(tree.leaves) for group in sampled[name] for tree in group) / repeats,
        }
    arms = {}
    for name, (shape, advantage, loss) in ARMS.items():
        worth = advantage_lists(sampled[shape], advantage, loss)
        arms[name] = measure(gradients, sampled[shape], worth, reference) | costs[shape]
        print(f"{name}: cos {arms[name]['cos']:.2f}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "prompts": prompts,
        "repeats": repeats,
        "mean_length": round(lab.mean, 1),
        "reference_leaves": 8 * len([tree for group in flat for tree in group]),
        "planned": planned,
        "gain_over_flat": gains(arms, "decoded_tokens"),
        "gain_over_flat_by_rollout_second": gains(arms, "rollout_seconds"),
        "gain_over_flat_by_update_second": gains(arms, "update_seconds"),
        "arms": {
            name: {key: round(value, 4) for key, value in arm.items() if isinstance(value, float)}
            for name, arm in arms.items()
        },
    }
    for shape in ("default", *PLANNED):
        points = CurveSums.of([tree for group in sampled[shape] for tree in group]).points()
        result.setdefault("curve", {})[shape] = [vars(point) for point in points]
    lab.rewards.close()
    return result


def plan_from(trees: list[Any]) -> dict[str, Any]:
    """What `schedule: auto` would do after these trees, and what it expects of the other planned shapes."""
    from treepo_mcore.grow.forks import best_plan, expected_gain
    from treepo_mcore.tree.curve import CurveSums, rising
    from treepo_mcore.tree.profile import STEPS, ProfileSums

    decided = rising(CurveSums.of(trees).points(), [step / STEPS for step in range(1, STEPS + 1)])
    profile = ProfileSums.of(trees).profile()
    plan = best_plan(decided, 8, profile)
    expected = {"auto": plan.gain} | {
        name: expected_gain(decided, SHAPES[name]["branching"]["schedule"], profile) for name in PLANNED[:-1]
    }
    rounded = {name: round(float(gain), 3) for name, gain in expected.items()}
    return {"forks": [list(fork) for fork in plan.forks], "decided": decided, "expected_gain": rounded}


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'arm':28}{'cos':>6}{'tokens':>9}{'gain a token':>22}{'a rollout s':>13}{'an update s':>13}"]
    for name, arm in result["arms"].items():
        gain = result["gain_over_flat"][name]
        others = [result[f"gain_over_flat_by_{what}_second"][name]["value"] for what in ("rollout", "update")]
        lines.append(
            f"{name:28}{arm['cos']:6.2f}{arm['decoded_tokens']:9.0f}"
            f"{gain['value']:9.2f} ({gain['low']:.2f}..{gain['high']:.2f}){others[0]:11.2f}{others[1]:13.2f}"
        )
    planned = result["planned"]
    lines.append(f"auto plans {planned['forks']}; expected a token: {planned['expected_gain']}")
    return "\n".join(lines)


def main() -> None:
    from treepo_mcore.system.environment import prepare_environment

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(".cache/quickstart/model"))
    parser.add_argument("--data", type=Path, default=Path(".cache/quickstart/data/train.jsonl"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=24, help="trees of each prompt in each arm")
    parser.add_argument("--reference-trees", type=int, default=1024, help="of 8 independent answers")
    parser.add_argument("--quick", action="store_true", help="16 prompts, 6 repeats, a reference of 256 trees")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    parser.add_argument("--out", type=Path, help="also write the object there, with machine and versions")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.repeats, options.reference_trees = 16, 6, 256
    prepare_environment()
    result = run(options.model, options.data, options.prompts, options.repeats, options.reference_trees)
    if options.out:
        from machine import machine

        options.out.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(json.dumps(result) if options.json else table(result), flush=True)


if __name__ == "__main__":
    main()
