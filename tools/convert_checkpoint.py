"""Between Hugging Face directories and Megatron distributed checkpoints, whatever the layout that wrote them.

    python tools/convert_checkpoint.py to-hf runs/treepo/checkpoints/iter_0000100 MODEL OUT
    torchrun --nproc-per-node 8 tools/convert_checkpoint.py to-megatron MODEL OUT --tp 4 --pp 2

MODEL is a Hugging Face directory with the configuration and the tokenizer; `to-megatron` takes the weights from it
too. Each process holds its own shard and one more tensor, so a model that one host cannot hold is converted on
several. A training checkpoint's optimizer is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from treepo_mcore.environment import prepare_environment


def main() -> None:
    """Parse arguments and convert."""
    prepare_environment()
    options = _arguments()
    from treepo_mcore.actor.cpu import megatron_device
    from treepo_mcore.actor.model import build_model, megatron_configs
    from treepo_mcore.actor.parallel import build_grid, init_process_group
    from treepo_mcore.architecture import read_architecture
    from treepo_mcore.checkpoint import load_weights, save_weights
    from treepo_mcore.config import ActorConfig
    from treepo_mcore.weights.hf import export_directory, gather_tensors, load_pieces
    from treepo_mcore.weights.megatron import megatron_layout, megatron_tensors

    arch = read_architecture(options.model)
    actor = ActorConfig(tp=options.tp, pp=options.pp, dtype=options.dtype)
    init_process_group()
    grid = build_grid(actor, 1, 0)
    configs = megatron_configs(actor, arch)
    with megatron_device():
        chunks = build_model(configs, arch)
        pieces, tensors = megatron_layout(chunks, arch, grid.tp_rank), megatron_tensors(chunks)
        if options.direction == "to-megatron":
            load_pieces(options.model, arch, pieces, tensors)
            save_weights(options.out, chunks)
        else:
            load_weights(options.checkpoint, chunks)
            dtype = configs.transformer.params_dtype
            export_directory(options.model, options.out, gather_tensors(arch, pieces, tensors, dtype))
    if grid.rank == 0:
        print(f"wrote {options.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    directions = parser.add_subparsers(dest="direction", required=True)
    to_hf = directions.add_parser("to-hf", help="Megatron checkpoint -> Hugging Face directory")
    to_hf.add_argument("checkpoint", type=Path, help="an iter_* directory")
    to_megatron = directions.add_parser("to-megatron", help="Hugging Face directory -> Megatron checkpoint")
    for one in (to_hf, to_megatron):
        one.add_argument("model", type=Path, help="Hugging Face directory")
        one.add_argument("out", type=Path)
        one.add_argument("--tp", type=int, default=1, help="tensor-parallel size while converting")
        one.add_argument("--pp", type=int, default=1, help="pipeline-parallel size while converting")
        one.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
