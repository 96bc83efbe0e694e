"""Between Hugging Face directories and Megatron distributed checkpoints, whatever the layout that wrote them.

    python tools/convert_checkpoint.py to-hf runs/treepo/checkpoints/iter_0000100 MODEL OUT
    torchrun --nproc-per-node 8 tools/convert_checkpoint.py to-megatron MODEL OUT --tp 4 --pp 2

MODEL is a Hugging Face directory with the configuration and the tokenizer; `to-megatron` takes the weights from it
too. OUT must not be there yet. Each process holds its own shard, so a model that one host cannot hold is converted on
several; `to-hf` needs on rank 0 two full tensors more, and host memory for a file of 5 GiB. A training checkpoint's
optimizer is left out. What is wrong with the arguments ends it with one line and status 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from treepo_mcore.config import ConfigError
from treepo_mcore.system.environment import prepare_environment

DTYPES = ["bfloat16", "float32"]


def main() -> None:
    """Parse arguments and convert."""
    prepare_environment()
    options = _arguments()
    _check_paths(options)
    from treepo_mcore.actor.checkpoint import load_weights, save_weights
    from treepo_mcore.actor.cpu import megatron_device
    from treepo_mcore.actor.layout import megatron_layout, megatron_tensors
    from treepo_mcore.actor.model import build_model, megatron_configs
    from treepo_mcore.actor.parallel import build_grid
    from treepo_mcore.actor.saved import check_saved
    from treepo_mcore.config import ActorConfig
    from treepo_mcore.model.architecture import read_architecture
    from treepo_mcore.system.placement import init_process_group
    from treepo_mcore.weights.export import export_directory
    from treepo_mcore.weights.hf import check_weights, load_pieces

    arch = read_architecture(options.model)
    if options.direction == "to-hf":
        check_saved(options.checkpoint, arch)
    layout = {"tp": options.tp, "sequence_parallel": options.tp > 1, "pp": options.pp, "ep": options.ep}
    actor = ActorConfig(**layout, dtype=options.dtype or _dtype_of(options.model))
    init_process_group()
    grid = build_grid(actor, 0)
    configs = megatron_configs(actor, arch)
    with megatron_device():
        chunks = build_model(configs, arch)
        pieces, tensors = megatron_layout(chunks, arch, grid.place), megatron_tensors(chunks)
        if options.direction == "to-megatron":
            check_weights(options.model, arch)
            load_pieces(options.model, pieces, tensors)
            save_weights(options.out, chunks)
        else:
            load_weights(options.checkpoint, chunks)
            dtype = configs.transformer.params_dtype
            export_directory(options.model, options.out, arch, pieces, tensors, dtype)
    if grid.rank == 0:
        print(f"wrote {options.out}")


def _check_paths(options: argparse.Namespace) -> None:
    """Before anything is loaded."""
    if options.out.exists():
        raise ConfigError(f"{options.out}: found something there, expected a path that does not exist yet")
    if options.direction == "to-hf" and not (options.checkpoint / "metadata.json").is_file():
        raise ConfigError(f"{options.checkpoint}: found no metadata.json, expected a Megatron checkpoint (iter_*)")


def _dtype_of(model: Path) -> str:
    """What config.json says of the weights; read after `read_architecture`."""
    config = json.loads((model / "config.json").read_text())
    found = config.get("dtype", config.get("torch_dtype"))
    if found not in DTYPES:
        raise ConfigError(f"{model}/config.json: dtype is {found}, expected {' or '.join(DTYPES)}; or say --dtype")
    return str(found)


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
        one.add_argument("--ep", type=int, default=1, help="ranks that share the experts while converting")
        one.add_argument("--dtype", choices=DTYPES, help="of what is written; by default that in MODEL's config.json")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
