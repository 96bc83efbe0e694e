"""HF -> Megatron -> HF is byte for byte, also when the layout changes in between."""

from __future__ import annotations

import pytest
import torch
from harness import launch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

MODELS = {
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3 one kv head": ("qwen3", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("case", MODELS)
def test_round_trip(case, model_directory, tmp_path):
    family, overrides = MODELS[case]
    source = model_directory(family, **overrides)
    there = ["to-megatron", str(source), str(tmp_path / "megatron"), "--tp", "2"]
    back = ["to-hf", str(tmp_path / "megatron"), str(source), str(tmp_path / "hf"), "--pp", "2"]
    launch("convert:run", 2, {"commands": [[*there, "--dtype", "float32"], [*back, "--dtype", "float32"]]}, limit=600)
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert AutoConfig.from_pretrained(tmp_path / "hf").vocab_size == AutoConfig.from_pretrained(source).vocab_size
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hf")) == len(AutoTokenizer.from_pretrained(source))
