"""What config.json says about a mixture of experts."""

from __future__ import annotations

from typing import Any

from treepo_mcore.config import ConfigError
from treepo_mcore.model.files import truth, whole
from treepo_mcore.model.sizes import Experts


def read_experts(where: str, raw: dict[str, Any], layers: int) -> Experts:
    """Of the Qwen families. where: the file. Raises `ConfigError`."""
    count = whole(where, raw, "num_experts", whole(where, raw, "num_local_experts", 0))  # transformers 5 writes this
    if not count:
        raise ConfigError(f"{where}: expected num_experts to be a positive number, found {raw.get('num_experts')!r}")
    topk = whole(where, raw, "num_experts_per_tok")
    if topk > count:
        raise ConfigError(f"{where}: expected num_experts_per_tok to be at most {count}, found {topk}")
    step, dense = whole(where, raw, "decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigError(f"{where}: expected mlp_only_layers to be a list of layers, found {dense!r:.80}")
    sparse = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    if not any(sparse):
        raise ConfigError(f"{where}: decoder_sparse_step and mlp_only_layers leave no layer with experts")
    return Experts(
        count=count,
        topk=topk,
        ffn=whole(where, raw, "moe_intermediate_size"),
        normalised=truth(where, raw, "norm_topk_prob"),
        sparse=sparse,
        shared=whole(where, raw, "shared_expert_intermediate_size", 0),
    )
