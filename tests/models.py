"""Tiny Hugging Face directories with randomised norms and biases, and what `transformers` says about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 330  # neither Megatron's 128 x tp nor vLLM's 64 divides it: rows are padded
EOS_IDS = (1, 2)
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": list(EOS_IDS),
    "bos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
SHARED = {"shared_expert_intermediate_size": 96, "norm_topk_prob": False}
MIXTURES = {"qwen3_moe": EXPERTS, "qwen2_moe": EXPERTS | SHARED}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def make_model(directory: Path, family: str, seed: int = 0, tokenizer: bool = True, **overrides: Any) -> Path:
    """Write a float32 model; `overrides` go into its configuration. Returns the directory."""
    config = CONFIGS[family](**SIZES | MIXTURES.get(family, {}) | overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model)
    # Sampling settings of the generation config are not the trainer's; EOS ids in it are.
    model.generation_config.eos_token_id = list(EOS_IDS)
    model.save_pretrained(directory)
    if tokenizer:
        make_tokenizer(directory)
    return directory


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Norms and biases that show when they are swapped; weights whose greedy answers wander.

    Larger ones sharpen attention until float32 itself, `transformers` included, is off by 1e-4.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith(".bias"):
            parameter.copy_(0.3 * noise)
        elif "embed_tokens" in name:
            parameter.copy_(0.1 * noise)
        else:
            gain = 1.0 if any(part in name for part in ("q_proj", "k_proj", "lm_head")) else 2.0
            parameter.copy_(gain * noise / parameter.shape[-1] ** 0.5)  # of experts, one behind the other, too


def make_tokenizer(directory: Path, template: str | None = TEMPLATE) -> None:
    """Words ``w4 w5 ...`` with the ids in their names; 1 and 2 end an answer."""
    special = ["<unk>", "</s>", "<end>", "<pad>"]
    words = special + [f"w{i}" for i in range(len(special), VOCAB)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(special)
    inner.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_prompts(file: Path, count: int, tokens: int = 6, seed: int = 0) -> Path:
    """Prompts of random words with a number as the answer."""
    draw = torch.Generator().manual_seed(seed)
    with file.open("w") as lines:
        for index in range(count):
            words = torch.randint(4, VOCAB, (tokens,), generator=draw).tolist()
            row = {"prompt": " ".join(f"w{w}" for w in words), "answer": str(index)}
            lines.write(json.dumps(row) + "\n")
    return file


class Reference:
    """The same directory in `transformers`, float32."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        self.model.eval()

    @torch.no_grad()
    def log_probs(self, tokens: Sequence[int], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Of every token after the first given those before it, and the entropy at each of these places."""
        logits = self.model(torch.tensor([tokens])).logits[0, :-1].float() / temperature
        logp = logits.log_softmax(-1)
        chosen = logp.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        return chosen, -(logp.exp() * logp).sum(-1)

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], tokens: int, eos_ids: Sequence[int] = ()) -> list[int]:
        """The most likely answer, EOS included."""
        context = list(prompt)
        for _ in range(tokens):
            context.append(int(self.model(torch.tensor([context])).logits[0, -1].argmax()))
            if context[-1] in eos_ids:
                break
        return context[len(prompt) :]
