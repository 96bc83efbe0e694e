"""A whole step on one GPU: pushes against copy bandwidth, sleep, wake and offload, steps of a 1.5B model by phase.

    python benchmarks/gpu/whole.py [--only push] [--minutes 6.5]

`push`: eight tensor-parallel shards of Llama-70B-shaped layers, all on this GPU, into one engine's parameters: local
copies of interleaved pieces, no network; bf16, and quantised to 128 x 128 blocks of FP8 on the way. The floor is one
contiguous copy of the weights' bytes in bf16 on the same device. `steps`: a run of `treepo-mcore train` with random
weights; times and memory are those of its metrics.jsonl, medians behind the first step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from common import main, run_to_the_end, write_model

from treepo_mcore.system.environment import prepare_environment

prepare_environment()

SHARDS, LAYERS, REPEATS = 8, 4, 10
STEPS, PROMPTS = 4, 16
TREE: dict[str, Any] = {"width": 16, "segment_tokens": 128, "max_depth": 8}
CELLS = {
    "push, bf16": ("push", "none"),
    "push, fp8": ("push", "fp8"),
    "steps, bf16": ("steps", "none"),
    "steps, fp8 current": ("steps", "current"),
}


def measure(cell: tuple[str, str]) -> dict[str, Any]:
    """One cell."""
    kind, fp8 = cell
    with tempfile.TemporaryDirectory() as folder:
        if kind == "steps":
            return steps(Path(folder), fp8)
        return push(architecture(write_model(Path(folder), "70b-layers", layers=LAYERS)), SHARDS, "cuda", fp8 == "fp8")


def architecture(directory: Path) -> Any:
    """Of a written configuration."""
    from treepo_mcore.model.architecture import read_architecture

    return read_architecture(directory)


def push(arch: Any, shards: int, device: str, fp8: bool) -> dict[str, Any]:
    """Seconds and bytes/s of a push, with and without checksums, and of the floor. Bytes are the weights' in bf16."""
    from treepo_mcore.engine.vllm.layout import vllm_pieces
    from treepo_mcore.system.placement import init_process_group
    from treepo_mcore.weights.plan import make_plan
    from treepo_mcore.weights.transfer import Push

    init_process_group()
    pieces, sources = shards_on(arch, shards, device)
    targets = engine_parameters(arch, device, fp8)
    run = Push(make_plan([pieces], [list(vllm_pieces(arch, 1, 0))]), sources, targets).run
    size = 2 * sum(piece.numel for piece in pieces)
    acts = {"push": lambda: run(False), "push_checked": run, "floor": contiguous_copy(size, device)}
    times = in_turns(acts, device)
    return times | {
        "gigabytes": size / 1e9,
        "push_gb_per_second": size / times["push"] / 1e9,
        "floor_gb_per_second": size / times["floor"] / 1e9,
        "push_over_floor": times["floor"] / times["push"],
    }


def engine_parameters(arch: Any, device: str, fp8: bool) -> dict[str, Any]:
    """vLLM's, of an engine of one rank: bf16, or linear weights in E4M3 with the scales of their blocks."""
    import torch

    from treepo_mcore.engine.vllm.layout import fp8_shapes, vllm_shapes
    from treepo_mcore.weights.fp8 import SCALE, scale_shape

    shapes = vllm_shapes(arch, 1)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()}
    for name, shape in fp8_shapes(arch, 1).items() if fp8 else ():
        tensors[name] = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        tensors[name + SCALE] = torch.empty(scale_shape(shape), device=device)
    return tensors


def shards_on(arch: Any, shards: int, device: str) -> tuple[list[Any], dict[str, Any]]:
    """Megatron's tensors of all tensor-parallel ranks, named by rank, and their pieces."""
    import torch

    from treepo_mcore.actor.layout import parameter_pieces
    from treepo_mcore.actor.parallel import Place
    from treepo_mcore.weights.layout import Piece

    pieces: list[Piece] = []
    tensors = {}
    for rank in range(shards):
        for name, shape in megatron_shapes(arch, shards).items():
            local = f"{rank}.{name}"
            tensors[local] = torch.randn(shape, dtype=torch.bfloat16, device=device)
            pieces += parameter_pieces(arch, name, local, shape, 0, Place(rank))
    # Norms are on all ranks; one of them sends.
    return [p for p in pieces if "norm" not in p.tensor or p.local.startswith("0.")], tensors


def megatron_shapes(arch: Any, tp: int) -> dict[str, tuple[int, ...]]:
    """Parameters of one tensor-parallel rank, by Megatron's names."""
    from treepo_mcore.actor.model import padded_vocab

    rows = (arch.heads + 2 * arch.kv_heads) * arch.head_dim // tp
    vocab = (padded_vocab(arch.vocab, tp) // tp, arch.hidden)
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": vocab}
    for layer in range(arch.layers):
        p = f"decoder.layers.{layer}."
        shapes |= {
            p + "self_attention.linear_qkv.layer_norm_weight": (arch.hidden,),
            p + "self_attention.linear_qkv.weight": (rows, arch.hidden),
            p + "self_attention.linear_proj.weight": (arch.hidden, arch.heads * arch.head_dim // tp),
            p + "mlp.linear_fc1.layer_norm_weight": (arch.hidden,),
            p + "mlp.linear_fc1.weight": (2 * arch.ffn // tp, arch.hidden),
            p + "mlp.linear_fc2.weight": (arch.hidden, arch.ffn // tp),
        }
    return shapes | {"decoder.final_layernorm.weight": (arch.hidden,), "output_layer.weight": vocab}


def contiguous_copy(size: int, device: str) -> Callable[[], Any]:
    """The most that a copy on the device can do."""
    import torch

    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def in_turns(acts: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Median seconds of each; the first round warms up."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in acts}
    for repeat in range(REPEATS + 1):
        for name, act in acts.items():
            begin = time.perf_counter()
            act()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def steps(folder: Path, fp8: str, model: str = "1.5b", **sizes: Any) -> dict[str, Any]:
    """A run of the trainer, in a process of its own. sizes: changes of the model."""
    config = run_configuration(folder, fp8, model, **sizes)
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    here = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command = [*torchrun, "-m", "treepo_mcore", "train", str(folder / "config.yaml")]
    with suppress(subprocess.CalledProcessError):
        run_to_the_end(command, None, environment)
    if not (folder / "run" / "summary.json").is_file():  # a run's last words; its teardown is not measured
        raise RuntimeError("the run did not come to its end")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return by_phase([json.loads(line) for line in lines])


def run_configuration(folder: Path, fp8: str, model: str, **sizes: Any) -> dict[str, Any]:
    """Of a short run, and its files: a random model, a tokenizer of words, prompts."""
    directory = write_model(folder / "model", model, eos_token_id=[1], **sizes)
    write_weights(directory)
    write_tokenizer(directory)
    prompts = [
        json.dumps({"prompt": " ".join(f"w{4 + (i * 7 + j) % 200}" for j in range(256)), "answer": str(i)})
        for i in range(64)
    ]
    (folder / "train.jsonl").write_text("\n".join(prompts) + "\n")
    tree = TREE | {"stopping": {"boxed": "none", "repetition_count": 0}}
    return {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(directory)},
        "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": 512},
        "filter": {"enabled": False},
        "reward": {"function": "whole:even_length", "wrong": 0.0},
        "rollout": {"tree": tree, "engine": {"gpu_memory_utilization": 0.5}},
        "actor": {"fp8": fp8, "micro_batch_tokens": 8192, "optimizer": {"lr": 1e-6}},
        "trainer": {
            "steps": STEPS,
            "prompts_per_step": PROMPTS,
            "prompts_per_update": PROMPTS // 2,
            "eval_before": False,
            "eval_after": False,
            "export": False,
            "save_trees_every": 0,
        },
    }


def write_weights(directory: Path) -> None:
    """Small random ones, bf16, in one file."""
    import torch
    from safetensors.torch import save_file

    from treepo_mcore.weights.layout import hf_shapes

    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in hf_shapes(architecture(directory)).items():
        ones = torch.ones(shape, dtype=torch.bfloat16)
        tensors[name] = ones if "norm" in name else ones.normal_(0.0, 0.02, generator=draw)
    save_file(tensors, directory / "model.safetensors")


def write_tokenizer(directory: Path) -> None:
    """Words w4, w5, ... with the ids in their names."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "</s>", "<end>", "<pad>"] + [f"w{i}" for i in range(4, 256)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def even_length(response: str, answer: str, prompt: str, row: dict[str, Any]) -> float:
    """A reward that about half of all answers get."""
    return float(len(response) % 2 == 0)


def by_phase(steps_: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps behind the first of everything timed, of memory, pushes, tokens and the mismatch."""
    wanted = ("time/", "memory/", "push/seconds", "rollout/tokens_per_second", "mismatch/", "actor/grad_norm")
    names = [name for name in steps_[-1] if name.startswith(wanted)]
    later = steps_[1:] or steps_
    return {name: statistics.median(step[name] for step in later) for name in names}


if __name__ == "__main__":
    main(__file__, "whole", __doc__.splitlines()[0], CELLS, measure)
