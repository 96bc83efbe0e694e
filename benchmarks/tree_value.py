"""What a tree is worth: effective independent leaves per physical token, for one model and many tree shapes.

    python benchmarks/tree_value.py --model .cache/quickstart/model --data .cache/quickstart/data/eval.jsonl

n_eff = Var(reward of one independent leaf) / Var(mass-weighted mean reward of a tree), both within a prompt and summed
over prompts: so many independent answers estimate a prompt's accuracy as well as the tree does. The variance of the
tree's mean is over repeated trees. 1 / sum(m^2) stands beside it: it is n_eff for leaves that do not depend on each
other at all. A restart looks at how paths ended, so a mean over leaves behind fallbacks is biased: beside it stand
n_eff and accuracy without their mass, and that accuracy has to be the same in all settings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 80  # response tokens, all settings alike
SETTINGS: dict[str, dict[str, Any]] = {
    "flat": {"branching": {"factor": 1, "first": 8}},
    "first 4, b 2 (early)": {"branching": {"factor": 2, "first": 4}},
    "first 2..4, b 2": {"branching": {"factor": 2, "first": [2, 4]}},
    "first 2, b 2": {"branching": {"factor": 2, "first": 2}},
    "first 1, b 2 (late)": {"branching": {"factor": 2, "first": 1}},
    "first 1, b 8 (late, at once)": {"branching": {"factor": 8, "first": 1}},
    "first 2, b 4": {"branching": {"factor": 4, "first": 2}},
    "first 2, b 2, L 8": {"branching": {"factor": 2, "first": 2}, "segment_tokens": 8},
    "first 4, b 2, L 8": {"branching": {"factor": 2, "first": 4}, "segment_tokens": 8},
    "first 2, b 2, L 32": {"branching": {"factor": 2, "first": 2}, "segment_tokens": 32},
}


def configuration(model: Path, data: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """The trainer's own configuration of a setting."""
    segment = setting.get("segment_tokens", 16)
    tree = {"width": 8, "segment_tokens": segment, "max_depth": -(-LONGEST // segment), "max_response_tokens": LONGEST}
    return {
        "model": {"path": str(model)},
        "data": {"train": str(data), "max_prompt_tokens": 64},
        "filter": {"enabled": False},
        "reward": {"correct": 1.0, "wrong": 0.0},
        "rollout": {"dtype": "float32", "tree": tree | setting, "engine": {"max_num_seqs": 128}},
    }


class Lab:
    """One engine with the model's weights, used for all settings."""

    def __init__(self, model: Path, data: Path) -> None:
        from treepo_mcore.config import parse_config
        from treepo_mcore.data.prepared import load_prompts
        from treepo_mcore.data.tokenizer import load_tokenizer
        from treepo_mcore.engine.vllm.engine import VllmEngine
        from treepo_mcore.model.architecture import read_architecture
        from treepo_mcore.rewards.pool import RewardPool
        from treepo_mcore.system.placement import init_process_group

        self.model, self.data = model, data
        self.mean = LONGEST / 2  # response tokens, by which planned forks go; set it to what was measured
        config = parse_config(configuration(model, data, {}))
        self.tokenizer = load_tokenizer(model)
        self.prompts = load_prompts(data, config.data, self.tokenizer)
        self.rewards = RewardPool(config.reward)
        init_process_group()
        self.engine = VllmEngine(config, read_architecture(model), model, self.tokenizer.eos_ids)
        self.engine.sleep()
        self.engine.wake(_weights(model))

    def trees(self, prompts: list[Any], repeats: int, setting: dict[str, Any], seed: int) -> list[list[Any]]:
        """`repeats` trees of each prompt."""
        import torch.distributed as dist

        from treepo_mcore.config import parse_config
        from treepo_mcore.grow.schedule import resolve_forks
        from treepo_mcore.rollout.collector import Collector
        from treepo_mcore.rollout.queue import SharedQueue, Wanted

        config = parse_config(configuration(self.model, self.data, setting) | {"run": {"seed": seed}})
        many = [prompt for prompt in prompts for _ in range(repeats)]
        queue = SharedQueue(dist.HashStore(), 0, 1, Wanted(*[len(many)] * 3))
        planned = config.rollout.tree.branching.schedule
        forks = resolve_forks(planned, config.rollout.tree, self.mean) if planned else None
        collector = Collector(config, self.engine, self.tokenizer, self.rewards, None)
        found = collector.collect(many, queue, 0, 0.0, forks=forks)
        assert len(found.trees) == len(many)
        return [found.trees[i : i + repeats] for i in range(0, len(many), repeats)]

    def undecided(self, count: int) -> list[Any]:
        """Prompts that are answered right between 20 % and 80 % of the time, judged by 32 independent answers."""
        some = self.prompts[: 12 * count]
        groups = self.trees(some, 4, SETTINGS["flat"], seed=1)
        rates = [np.mean([leaf.reward for tree in group for leaf in tree.leaves]) for group in groups]
        return [prompt for prompt, rate in zip(some, rates, strict=True) if 0.2 <= rate <= 0.8][:count]


def value(groups: list[list[Any]], variance: float, rng: np.random.Generator) -> dict[str, Any]:
    """One row. `variance`: of an independent leaf's reward, mean over prompts."""
    means = np.array([[_mean_reward(tree, True) for tree in group] for group in groups])
    unbiased = np.array([[_mean_reward(tree, False) for tree in group] for group in groups])
    trees = [tree for group in groups for tree in group]
    repeats = means.shape[1]
    n_eff = variance / _spread(means)
    boot = [variance / _spread(means[:, rng.integers(0, repeats, repeats)]) for _ in range(200)]
    physical = float(np.mean([tree.unique_tokens for tree in trees]))
    return {
        "n_eff": float(n_eff),
        "n_eff_error": float(np.std(boot)),
        "n_eff_without_fallback": float(variance / _spread(unbiased)),
        "effective_leaves": float(np.mean([1 / (tree.masses() ** 2).sum() for tree in trees])),
        "physical_tokens": physical,
        "n_eff_per_1000_physical": 1000 * float(n_eff) / physical,
        "sharing": float(np.sum([tree.logical_tokens for tree in trees]) / np.sum([t.unique_tokens for t in trees])),
        "two_levels": float(np.mean([_two_levels(tree) for tree in trees])),
        "fallback_share": float(np.mean([leaf.from_fallback for tree in trees for leaf in tree.leaves])),
        "accuracy": float(means.mean()),
        "accuracy_without_fallback": float(unbiased.mean()),
        "accuracy_without_fallback_error": float(np.sqrt(_spread(unbiased) / means.size)),
        "trees": len(trees),
    }


def _spread(means: np.ndarray) -> float:
    """Variance of a tree's mean within a prompt, mean over prompts."""
    return float(means.var(axis=1, ddof=1).mean())


def _mean_reward(tree: Any, fallback: bool) -> float:
    return float(tree.masses(fallback) @ [leaf.reward for leaf in tree.leaves])


def _two_levels(tree: Any) -> bool:
    """Whether some sub-group lies strictly inside another one below the prompt."""
    counts = tree.leaf_counts()
    inner = [n for n in range(1, len(tree.nodes)) if counts[n] >= 2]
    return any(
        2 <= counts[node] < counts[above] for node in inner for above in tree.path(node)[1:-1] if counts[above] >= 2
    )


def _weights(model: Path) -> Any:
    from safetensors import safe_open

    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, tensors.get_tensor(name)


def frontier(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """n_eff without restarts per 1000 physical tokens against sharing, as an SVG."""
    xs = [row["sharing"] for row in rows.values()]
    ys = [1000 * row["n_eff_without_fallback"] / row["physical_tokens"] for row in rows.values()]
    right, top = max(xs) * 1.1, max(ys) * 1.15
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 420" font-family="Helvetica" font-size="12">',
        '<rect width="720" height="420" fill="#fff"/><path d="M60 20V370H700" stroke="#555" fill="none"/>',
        '<text x="300" y="408">logical / physical tokens</text>',
        '<text x="16" y="330" transform="rotate(-90 16 330)">n_eff without restarts per 1000 physical tokens</text>',
    ]
    taken: list[tuple[float, float]] = []
    for name, x, y in zip(rows, xs, ys, strict=True):
        left, height = 60 + 600 * (x - 0.9) / (right - 0.9), 370 - 340 * y / top
        parts.append(
            f'<circle cx="{left:.0f}" cy="{height:.0f}" r="4" fill="#1d4b8f"/>'
            f'<text x="{left + 7:.0f}" y="{height - 5 + _free(taken, left, height):.0f}">{name}</text>'
        )
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def _free(taken: list[tuple[float, float]], left: float, height: float) -> float:
    """How far a label has to go down so that it does not cover another one."""
    down = 0.0
    while any(abs(left - x) < 115 and abs(height + down - y) < 13 for x, y in taken):
        down += 13
    taken.append((left, height + down))
    return down


def main() -> None:
    """All settings on one engine."""
    from treepo_mcore.system.environment import prepare_environment
    from treepo_mcore.system.versions import versions

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--trees", type=int, default=200, help="of each prompt, in every setting")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tree_value.json"))
    options = parser.parse_args()
    prepare_environment()
    lab = Lab(options.model, options.data)
    prompts = lab.undecided(options.prompts)
    rng = np.random.default_rng(0)
    rows: dict[str, dict[str, Any]] = {}
    variance = 0.0
    titles = {"": 30, "n_eff": 8, "+-": 6, "1/Sm2": 7, "tokens": 8, "per 1k": 8, "sharing": 9, "2 lev": 7}
    titles |= {"fallback": 10, "accuracy": 10, "without: n_eff": 15, "accuracy ": 10, "+- ": 7}
    print(f"{len(prompts)} prompts\n" + "".join(f"{title:>{width}}" for title, width in titles.items()))
    for seed, (name, setting) in enumerate(SETTINGS.items(), start=2):
        groups = lab.trees(prompts, options.trees, setting, seed)
        if name == "flat":
            rates = np.array([np.mean([leaf.reward for tree in group for leaf in tree.leaves]) for group in groups])
            variance = float((rates * (1 - rates)).mean())
        row = rows[name] = value(groups, variance, rng)
        print(
            f"{name:30}{row['n_eff']:8.2f}{row['n_eff_error']:6.2f}{row['effective_leaves']:7.2f}"
            f"{row['physical_tokens']:8.0f}{row['n_eff_per_1000_physical']:8.2f}{row['sharing']:9.2f}"
            f"{row['two_levels']:7.2f}{row['fallback_share']:10.2f}{row['accuracy']:10.3f}"
            f"{row['n_eff_without_fallback']:15.2f}{row['accuracy_without_fallback']:10.3f}"
            f"{row['accuracy_without_fallback_error']:7.3f}",
            flush=True,
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"prompts": len(prompts), "trees": options.trees, "versions": versions(), "settings": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    frontier(rows, options.out.with_suffix(".svg"))
    lab.rewards.close()


if __name__ == "__main__":
    main()
