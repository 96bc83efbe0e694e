"""HF -> Megatron -> HF is byte for byte, also when the layout changes in between; a run's checkpoint is one too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import launch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer
from trees import random_tree

from treepo_mcore.tree.files import write_trees

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
MODELS = {
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "qwen2 experts": ("qwen2_moe", {}),
}


@pytest.mark.parametrize("case", MODELS)
def test_round_trip(case, model_directory, tmp_path):
    family, overrides = MODELS[case]
    ep = ["--ep", "2"] if family == "qwen2_moe" else []
    source = model_directory(family, **overrides)
    there = ["to-megatron", str(source), str(tmp_path / "megatron"), "--tp", "2", *ep]
    back = ["to-hf", str(tmp_path / "megatron"), str(source), str(tmp_path / "hf"), "--pp", "2"]
    launch("convert:run", 2, {"commands": [there, back]}, limit=600)
    same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(source / "model.safetensors"))
    assert AutoConfig.from_pretrained(tmp_path / "hf").vocab_size == AutoConfig.from_pretrained(source).vocab_size
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == len(AutoTokenizer.from_pretrained(source))


def same(after, before):
    """Byte for byte; the dtype is that of the model's config.json, float32."""
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == torch.float32
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_training_checkpoint(model_directory, tmp_path):
    """With its optimizer, of two ranks, in another layout."""
    write_trees(tmp_path / "trees.jsonl", [random_tree(seed) for seed in range(4)])
    source = model_directory("qwen2")
    run = tmp_path / "checkpoints"
    arguments = {
        "directory": str(source),
        "settings": {"tp": 2, "optimizer": {"lr": 1e-2}},
        "trees": str(tmp_path / "trees.jsonl"),
        "out": str(run),
        "command": ["to-hf", str(run / "iter_0000001"), str(source), str(tmp_path / "hf"), "--pp", "2"],
    }
    launch("convert:train_and_run", 2, arguments, limit=600)
    after = load_file(tmp_path / "hf" / "model.safetensors")
    same(after, load_file(run / "weights.safetensors"))
    name = "model.layers.2.mlp.up_proj.weight"
    assert not torch.equal(after[name], load_file(source / "model.safetensors")[name])


def refused(*command):
    """The one line that the tool ends with."""
    done = subprocess.run([sys.executable, "-W", "ignore", TOOL, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_wrong_arguments_are_one_line(model_directory, tmp_path):
    source, new = model_directory("qwen2"), tmp_path / "new"
    there = f"error: {tmp_path}: found something there, expected a path that does not exist yet"
    assert refused("to-megatron", source, tmp_path) == there
    assert refused("to-hf", source, source, tmp_path) == there
    no_checkpoint = f"error: {source}: found no metadata.json, expected a Megatron checkpoint (iter_*)"
    assert refused("to-hf", source, source, new) == no_checkpoint
    assert refused("to-megatron", tmp_path / "none", new) == f"error: {tmp_path / 'none'}/config.json: missing"
    half = tmp_path / "half"
    half.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float16"}
    (half / "config.json").write_text(json.dumps(config))
    wrong = f"error: {half}/config.json: dtype is float16, expected bfloat16 or float32; or say --dtype"
    assert refused("to-megatron", half, new) == wrong
    assert not new.exists()
