"""Make the quickstart's model: a small Qwen3-shaped network that knows nothing yet.

    python examples/quickstart/make_model.py --tokenizer DIR --out DIR [--experts 8]

With experts it is a Qwen3 mixture: two of them, of half the MLP's width, compute each token. warmup.yaml then teaches
it until it half knows its task.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig, set_seed

from treepo_mcore.data.tokenizer import load_tokenizer

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}


def make_model(tokenizer: Path, out: Path, seed: int, experts: int = 0) -> None:
    """A randomly initialised Hugging Face directory around the tokenizer. experts: 0 for an MLP."""
    sizes = SIZES | {"vocab_size": load_tokenizer(tokenizer).vocab_size}
    config = Qwen3MoeConfig(**sizes, **MIXTURE, num_experts=experts) if experts else Qwen3Config(**sizes)
    set_seed(seed)
    shutil.copytree(tokenizer, out, dirs_exist_ok=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", type=int, default=0, help="of each layer, in the place of its MLP")
    arguments = parser.parse_args()
    make_model(arguments.tokenizer, arguments.out, arguments.seed, arguments.experts)


if __name__ == "__main__":
    main()
