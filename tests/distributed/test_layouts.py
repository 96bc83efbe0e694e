"""One optimizer step is the same step in every layout (issue 2, point 9).

All layouts get the same saved trees. Old log-probs are pushed away from the new ones, so that clipping acts: at ratio
one a whitened batch has loss zero in any layout, right or wrong.
"""

from __future__ import annotations

import math

import pytest
import torch
from harness import launch
from models import YARN
from trees import random_tree

from treepo_mcore.tree.files import write_trees

MODELS = {
    "qwen2": ("qwen2", {"rope_parameters": YARN}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
}
# eps near the gradients' size: Adam's sign of a gradient that is nothing but rounding says nothing about a layout.
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-5, "clip_grad": 0.05}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    1: {
        "flat packing": {"packing": "flat"},
        "dense attention": {"attention": "dense"},
        "recompute full": {"recompute": "full"},
        "recompute selective": {"recompute": "selective"},
        "distributed optimizer": {"distributed": True},
    },
    2: {
        "tp2": {"tp": 2},
        "tp2 sp": {"tp": 2, "sequence_parallel": True},
        "tp2 sp recompute full": {"tp": 2, "sequence_parallel": True, "recompute": "full"},
        "pp2": {"pp": 2},
        "pp2 uneven": {"pp": 2, "first_stage_layers": 1},
        "pp2 vpp2": {"pp": 2, "vpp": 2},
        "pp2 distributed optimizer": {"pp": 2, "distributed": True},
        "dp2": {},
        "dp2 flat packing": {"packing": "flat"},
        "dp2 distributed optimizer": {"distributed": True},
        "dp2 overlapped": {"distributed": True, "megatron": OVERLAP},
        "cp2 recompute selective": {"cp": 2, "recompute": "selective"},
        "cp2 dense attention, distributed optimizer": {"cp": 2, "attention": "dense", "distributed": True},
    },
    4: {
        "tp2 pp2 sp vpp2": {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True},
        "tp2 dp2 distributed optimizer": {"tp": 2, "distributed": True},
        "cp4": {"cp": 4},
        "tp2 sp cp2 recompute full": {"tp": 2, "cp": 2, "sequence_parallel": True, "recompute": "full"},
        "pp2 vpp2 cp2": {"pp": 2, "vpp": 2, "cp": 2},
        "pp2 cp2": {"pp": 2, "cp": 2},
        "dp2 cp2 overlapped": {"cp": 2, "distributed": True, "megatron": OVERLAP},
    },
}
MIXTURES = {"qwen3 experts": ("qwen3_moe", {}), "qwen2 experts, one shared": ("qwen2_moe", {})}
TP2 = {"tp": 2, "sequence_parallel": True}
OF_MIXTURES = {
    1: {"flat packing": {"packing": "flat"}, "recompute full": {"recompute": "full"}},
    2: {
        "dp2 ep2 flat packing": {"ep": 2, "packing": "flat"},
        "dp2 ep2 distributed optimizer": {"ep": 2, "distributed": True},
        "tp2 ep2 recompute full": TP2 | {"ep": 2, "recompute": "full"},
        "tp2 etp2": TP2 | {"etp": 2},
        "pp2 distributed optimizer": {"pp": 2, "distributed": True},
    },
    4: {
        "tp2 dp2 ep2 etp2 distributed optimizer": TP2 | {"ep": 2, "etp": 2, "distributed": True},
        "pp2 cp2 ep2": {"pp": 2, "cp": 2, "ep": 2},
        "pp2 vpp2 dp2 ep2 overlapped": {"pp": 2, "vpp": 2, "ep": 2, "distributed": True, "megatron": OVERLAP},
    },
}
CASES = {"dense": (MODELS, LAYOUTS), "experts": (MIXTURES, OF_MIXTURES)}
PER_UPDATE = 5


def settings(layout):
    layout = dict(layout)
    return {"optimizer": OPTIMIZER | {"distributed": layout.pop("distributed", False)}} | layout


def run(processes, layouts, directories, folder):
    trees, out = folder / "trees.jsonl", folder / f"{processes}.pt"
    write_trees(trees, [random_tree(seed, leaves=7) for seed in range(10)])
    arguments = {
        "models": {name: str(path) for name, path in directories.items()},
        "layouts": {name: settings(layout) for name, layout in layouts.items()},
        "trees": str(trees),
        "per_update": PER_UPDATE,
        "out": str(out),
    }
    launch("layouts:run", processes, arguments)
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def directories(model_directory):
    return {name: model_directory(family, **overrides) for name, (family, overrides) in (MODELS | MIXTURES).items()}


@pytest.fixture(scope="module")
def single(directories, tmp_path_factory):
    """Kind of models -> results on one process: the reference and its own variants."""
    return {
        kind: run(1, {"reference": {}} | layouts[1], named(models, directories), tmp_path_factory.mktemp("single"))
        for kind, (models, layouts) in CASES.items()
    }


def named(models, directories):
    return {name: directories[name] for name in models}


@pytest.mark.parametrize("model", MODELS | MIXTURES)
def test_reference_clips_and_moves(single, model):
    """Otherwise the comparisons below would compare nothing."""
    reference = single["dense" if model in MODELS else "experts"]["reference", model]
    first, second = reference["metrics"]
    assert 0.05 < first["clipped"] < 0.95
    assert ("moe/load_max" in first) == (model in MIXTURES)
    assert abs(first["loss"]) > 1e-3
    assert first["grad_norm"] > OPTIMIZER["clip_grad"]
    assert second["tokens"] != first["tokens"]
    for before, after in zip(reference["weights"][0].values(), reference["weights"][1].values(), strict=True):
        assert relative(before, after) > 1e-4


@pytest.mark.parametrize("processes", sorted(LAYOUTS))
@pytest.mark.parametrize("kind", CASES)
def test_equal_one_process(kind, processes, directories, single, tmp_path):
    (models, layouts), alone = CASES[kind], single[kind]
    given = layouts[processes], named(models, directories)
    results = alone if processes == 1 else run(processes, *given, tmp_path)
    # An expert sees few tokens, and the second gradient is of weights that rounding has moved: 1.1e-5 was seen.
    limits = LIMITS | ({"gradient": 2e-5, "gradient norm of a parameter": 2e-5} if kind == "experts" else {})
    wrong, worst = {}, dict.fromkeys(LIMITS, 0.0)
    for layout in layouts[processes]:
        for model in models:
            found = errors(results[layout, model], alone["reference", model])
            if kind == "experts" and "vpp" not in layouts[processes][layout]:  # which pads all to the longest
                same_load(results[layout, model], alone["reference", model])
            worst = {what: max(worst[what], found.get(what, 0.0)) for what in worst}
            wrong |= {(layout, model, w): error for w, error in found.items() if not error < limits[w]}
    print("largest errors:", {what: f"{error:.1e}" for what, error in worst.items()})
    assert not wrong


def same_load(result, reference):
    """Of experts. An empty micro-batch of a rank that has fewer sequences is a token more, flat packing sees shared
    tokens once for each leaf."""
    one, two = reference["metrics"][0], result["metrics"][0]
    assert 1.05 < one["moe/load_max"] < 4  # two of eight, chosen by a random model
    assert 0.5 < one["moe/load_entropy"] < 0.999
    assert two["moe/load_max"] == pytest.approx(one["moe/load_max"], rel=0.3)
    assert two["moe/load_entropy"] == pytest.approx(one["moe/load_entropy"], rel=0.02)


LIMITS = {
    "log-prob": 1e-5,  # nats
    "gradient norm of a parameter": 1e-5,  # relative, as the ones below
    "gradient": 1e-5,
    "total gradient norm": 1e-5,
    "loss": 1e-5,
    "weights": 1e-5,
    "replicas": 1e-6,  # absolute: copies of one weight or gradient on several ranks
}


def errors(result, reference):
    found = {
        "log-prob": max(log_prob_error(table, reference["log_probs"][0]) for table in result["log_probs"]),
        "weights": worst_relative(result["weights"], reference["weights"]),
        "replicas": max(result["gaps"]),
        "total gradient norm": metric_error(result, reference, "grad_norm"),
        "loss": metric_error(result, reference, "loss"),
    }
    for mine, theirs in zip(result["metrics"], reference["metrics"], strict=True):
        assert mine["tokens"] == theirs["tokens"]
    if "gradients" in result:
        found["gradient"] = worst_relative(result["gradients"], reference["gradients"])
        found["gradient norm of a parameter"] = max(
            abs(mine[name].norm() / theirs[name].norm() - 1).item()
            for mine, theirs in zip(result["gradients"], reference["gradients"], strict=True)
            for name in theirs
        )
    return found


def log_prob_error(table, reference):
    """Of the edges of one rank; `test_equal_one_process` looks at all ranks."""
    assert table
    assert table.keys() <= reference.keys()
    mine = torch.tensor(list(table.values()))
    return (mine - torch.tensor([reference[key] for key in table])).abs().max().item()


def metric_error(result, reference, name):
    assert all(math.isfinite(mine[name]) for mine in result["metrics"])
    pairs = zip(result["metrics"], reference["metrics"], strict=True)
    return max(abs(mine[name] / theirs[name] - 1) for mine, theirs in pairs)


def worst_relative(results, references):
    assert all(mine.keys() == theirs.keys() for mine, theirs in zip(results, references, strict=True))
    assert all(tensor.isfinite().all() for mine in results for tensor in mine.values())
    return max(
        relative(mine[name], theirs[name]) for mine, theirs in zip(results, references, strict=True) for name in theirs
    )


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_ranks_with_unequal_shares(directories, tmp_path):
    """None steps on a gradient that is no number; under delayed scaling all have as many micro-batches."""
    write_trees(tmp_path / "trees.jsonl", [random_tree(seed, leaves=4) for seed in range(8)])
    arguments = {"directory": str(directories["qwen2"]), "trees": str(tmp_path / "trees.jsonl")}
    one, two = launch("layouts:shares_of_two_ranks", 2, arguments)
    assert (one["counts"], two["counts"]) == ([1, 2], [2, 2])
    for rank in (one, two):
        assert rank["skipped"] == [1, 1, 0]
        assert not rank["moved"]
        assert rank["moved at last"]
        assert rank["finite"]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        # Megatron gathers overlapped parameters with the first forward pass, which that rank does not make.
        ("qwen2", {"megatron": OVERLAP}),
        # The other rank's tokens go to experts that are on it.
        ("qwen3 experts", {"ep": 2}),
    ],
)
def test_a_rank_without_trees_in_the_first_step(model, settings, directories, tmp_path):
    write_trees(tmp_path / "trees.jsonl", [random_tree(0, leaves=4)])
    arguments = {"directory": str(directories[model]), "trees": str(tmp_path / "trees.jsonl"), "settings": settings}
    assert launch("layouts:idle_rank", 2, arguments, limit=120) == [random_tree(0, leaves=4).logical_tokens] * 2
