"""Make the quickstart's model: a small Qwen3-shaped network, taught under supervision until it half knows its task.

    torchrun --nproc-per-node 2 examples/quickstart/warmup.py --data DIR --tokenizer DIR --out DIR

It trains through the same Megatron actor that reinforcement learning uses, looks at the held-out problems every few
steps, and stops once `--until` of them are solved by greedy decoding.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from array import array
from pathlib import Path

from treepo_mcore.system.environment import prepare_environment

prepare_environment()

import numpy as np  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed  # noqa: E402

from treepo_mcore.config import Config, parse_config  # noqa: E402
from treepo_mcore.data.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from treepo_mcore.learn.advantage import LeafAdvantage  # noqa: E402
from treepo_mcore.learn.loss import SupervisedObjective  # noqa: E402
from treepo_mcore.learn.packing import pack_trees  # noqa: E402
from treepo_mcore.observe.logs import set_up_logging  # noqa: E402
from treepo_mcore.system.placement import init_process_group  # noqa: E402
from treepo_mcore.trainer import Trainer  # noqa: E402
from treepo_mcore.tree.tree import EOS, PROMPT, Tree  # noqa: E402
from treepo_mcore.weights.hf import export_directory, gather_tensors  # noqa: E402

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


def settings(model: Path, data: Path, run: Path, arguments: argparse.Namespace) -> Config:
    """The trainer's configuration for supervised steps and for looking at the held-out problems."""
    return parse_config(
        {
            "run": {"dir": str(run), "seed": arguments.seed},
            "model": {"path": str(model)},
            "data": {"train": str(data / "train.jsonl"), "eval": str(data / "eval.jsonl")}
            | {"max_prompt_tokens": arguments.prompt_tokens},
            "rollout": {"dtype": "float32", "tree": {"segment_tokens": arguments.response_tokens, "max_depth": 1}},
            "actor": {
                "dtype": "float32",
                "micro_batch_tokens": 4096,
                "optimizer": {
                    "lr": arguments.lr,
                    "warmup_steps": 20,
                    "lr_decay": "cosine",
                    "min_lr": arguments.lr / 10,
                    "weight_decay": 0.01,
                    "betas": [0.9, 0.98],
                },
            },
            "trainer": {"steps": arguments.steps},
        },
        where="warm-up",
    )


def example(row: dict[str, str], tokenizer: Tokenizer, name: str) -> Tree:
    """A problem and its solution as a tree of one leaf."""
    tree = Tree(name, tokenizer.encode(row["prompt"], start=True))
    tokens = [*tokenizer.encode(row["solution"]), tokenizer.eos_ids[0]]
    node = tree.nodes[tree.add_node(PROMPT, 1)]
    node.tokens.extend(tokens)
    node.logprobs = array("f", [0.0] * len(tokens))
    tree.add_leaf(1, EOS)
    return tree


def warm_up(trainer: Trainer, rows: list[dict[str, str]], arguments: argparse.Namespace) -> float:
    """Supervised steps until enough held-out problems are solved; returns their share."""
    grid, begin, accuracy = trainer.policy.grid, time.perf_counter(), 0.0
    trees = [example(row, trainer.checked.tokenizer, str(i)) for i, row in enumerate(rows)]
    order = random.Random(arguments.seed)
    worth = LeafAdvantage(np.ones(1), np.ones(1))
    for step in range(arguments.steps):
        batch = order.sample(trees, arguments.batch)[grid.dp_rank :: grid.dp]
        packed = pack_trees(batch, [worth] * len(batch), trainer.config.actor.micro_batch_tokens)
        with trainer.policy.phases.train():
            trainer.policy.actor.set_step(step)
            metrics = trainer.policy.actor.update(packed, None, SupervisedObjective())
            trainer.policy.actor.finish_updates()
        if (step + 1) % arguments.look_every and step + 1 < arguments.steps:
            continue
        accuracy = trainer.policy.evaluate(trainer.checked.held_out)["eval/accuracy"]
        if grid.rank == 0:
            taken = f"loss {metrics['loss']:.3f}  {time.perf_counter() - begin:.0f}s"
            print(f"warm-up step {step + 1}  held-out accuracy {accuracy:.3f}  {taken}", flush=True)
        if accuracy >= arguments.until:
            break
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200, help="at most")
    parser.add_argument("--batch", type=int, default=64, help="problems in a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--until", type=float, default=0.3, help="held-out accuracy at which to stop")
    parser.add_argument("--prompt-tokens", type=int, default=96, help="longest prompt")
    parser.add_argument("--response-tokens", type=int, default=80, help="longest answer")
    parser.add_argument("--look-every", type=int, default=100, help="steps between looks at the held-out problems")
    arguments = parser.parse_args()
    set_up_logging("info")
    init_process_group()
    start = arguments.out.with_name(arguments.out.name + ".start")
    if dist.get_rank() == 0:
        make_model(arguments.tokenizer, start, arguments.seed)
    dist.barrier()
    trainer = Trainer(settings(start, arguments.data, arguments.out, arguments))
    rows = [json.loads(line) for line in (arguments.data / "sft.jsonl").read_text().splitlines()]
    warm_up(trainer, rows, arguments)
    actor = trainer.policy.actor
    named = gather_tensors(trainer.checked.arch, actor.pieces, actor.tensors, actor.dtype, to=0)
    export_directory(start, arguments.out, named)
    trainer.close()


if __name__ == "__main__":
    main()
