"""Log-probs and entropies equal `transformers` in every layout, for every family, on whole trees."""

from __future__ import annotations

import pytest
import torch
from harness import launch
from models import LLAMA3, YARN, Reference
from trees import path_of, random_tree

from treepo_mcore.tree.files import write_trees

TEMPERATURE = 0.7
TOLERANCE = 3e-5  # nats; the issue asks for 1e-4
MODELS = {
    "qwen2 with biases": ("qwen2", {}),
    "qwen2 tied, yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 64}),
    "phi3": ("phi3", {}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "qwen3 tied, one kv head": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}
LAYOUTS = {
    1: {"one process": {}, "dense attention": {"attention": "dense"}, "flat": {"packing": "flat"}},
    2: {
        "tp2": {"tp": 2},
        "tp2 sp": {"tp": 2, "sequence_parallel": True},
        "pp2": {"pp": 2},
        "pp2 uneven": {"pp": 2, "first_stage_layers": 1},
        "pp2 uneven last": {"pp": 2, "last_stage_layers": 1},
        "pp2 vpp2": {"pp": 2, "vpp": 2},
        "dp2": {},
    },
    4: {
        "tp2 pp2": {"tp": 2, "pp": 2},
        "tp2 pp2 sp vpp2": {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True},
        "tp2 dp2": {"tp": 2},
        "tp4": {"tp": 4},
    },
}
MIXTURES = {"qwen3 experts": ("qwen3_moe", {}), "qwen2 experts, one shared": ("qwen2_moe", {})}
OF_MIXTURES = {1: {"one process": {}}}  # test_layouts.py compares log-probs of other layouts with this one's
CASES = [(MODELS, LAYOUTS, count) for count in LAYOUTS] + [(MIXTURES, OF_MIXTURES, count) for count in OF_MIXTURES]


def some_trees():
    """Short ones, and one whose paths pass the original context length of 64 and end near 256."""
    long = random_tree(100, leaves=4, segment=100, prompt=60)
    assert max(len(path_of(long, i)) for i in range(len(long.leaves))) > 128
    return [random_tree(seed) for seed in range(5)] + [long]


@pytest.fixture(scope="module")
def directories(model_directory):
    return {name: model_directory(family, **overrides) for name, (family, overrides) in (MODELS | MIXTURES).items()}


@pytest.fixture(scope="module")
def expected(directories):
    """Model -> edge -> (log-prob, entropy) from running each leaf by itself."""
    return {name: reference_table(Reference(path)) for name, path in directories.items()}


def reference_table(reference):
    table = {}
    for index, tree in enumerate(some_trees()):
        first = len(tree.nodes[0].tokens)
        for leaf in range(len(tree.leaves)):
            logp, entropy = reference.log_probs(path_of(tree, leaf), TEMPERATURE)
            for node in tree.path(tree.leaves[leaf].node)[1:]:
                begin = tree.nodes[node].start
                assert begin >= first
                for offset in range(len(tree.nodes[node].tokens)):
                    table[index, node, offset] = (logp[begin + offset - 1].item(), entropy[begin + offset - 1].item())
    return table


@pytest.mark.parametrize(("models", "layouts", "processes"), CASES)
def test_equal_transformers(models, layouts, processes, directories, expected, tmp_path):
    write_trees(tmp_path / "trees.jsonl", some_trees())
    arguments = {
        "models": {name: str(directories[name]) for name in models},
        "layouts": layouts[processes],
        "trees": str(tmp_path / "trees.jsonl"),
        "temperature": TEMPERATURE,
        "out": str(tmp_path),
    }
    launch("log_probs:run", processes, arguments)
    errors = {}
    for rank in range(processes):
        tables = torch.load(tmp_path / f"rank_{rank}.pt")
        assert set(tables) == {(layout, name) for layout in layouts[processes] for name in models}
        for (layout, name), table in tables.items():
            errors[layout, name, rank] = difference(table, expected[name])
    print("largest error, nats:", max(errors.values()))
    assert not {case: error for case, error in errors.items() if not error < TOLERANCE}


def difference(table, expected):
    assert table.keys() == expected.keys()
    return (torch.tensor([table[k] for k in expected]) - torch.tensor(list(expected.values()))).abs().max().item()
