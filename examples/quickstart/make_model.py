"""Make the quickstart's model: a small Qwen3-shaped network that knows nothing yet.

    python examples/quickstart/make_model.py --tokenizer DIR --out DIR

warmup.yaml then teaches it until it half knows its task.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

from treepo_mcore.data.tokenizer import load_tokenizer

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 4, 128, 512, 4, 2, 32


def make_model(tokenizer: Path, out: Path, seed: int) -> None:
    """A randomly initialised Hugging Face directory around the tokenizer."""
    rows = load_tokenizer(tokenizer).vocab_size
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    set_seed(seed)
    shutil.copytree(tokenizer, out, dirs_exist_ok=True)
    Qwen3ForCausalLM(config).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_model(arguments.tokenizer, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
