"""What an engine costs on one GPU, and vLLM's defaults that it depends on. Neither torch nor vLLM is imported."""

from __future__ import annotations

from dataclasses import dataclass

from treepo_mcore.config import Config, RolloutConfig
from treepo_mcore.model.sizes import Sizes

UTILISATION = 0.6  # of GPU memory for the engine, where rollout.engine.gpu_memory_utilization does not say
BLOCK_FP8 = "fp8_per_block"  # vLLM's word for 128 x 128 blocks, quantised from bf16 weights: the one that pushes know
GRAPH_BYTES = 1 << 30  # assumed: CUDA graphs, outside gpu_memory_utilization


@dataclass(frozen=True)
class EngineMemory:
    """One GPU of an engine."""

    weights: int
    working: int  # activations of the largest batch and the sampler's logits
    cache: int
    cache_tokens: int  # that the whole engine holds
    token_bytes: int  # of the cache, one token on one GPU
    requests: int  # that may run at once
    utilisation: float

    @property
    def bytes(self) -> int:
        """On the GPU while it generates, CUDA graphs apart."""
        return self.weights + self.working + self.cache


def engine_in_fp8(config: Config) -> bool:
    """Whether the engine's linear layers have FP8 weights."""
    return config.rollout.engine.get("quantization") == BLOCK_FP8


def engine_mlp(rollout: RolloutConfig, sizes: Sizes) -> int:
    """Elements a token that the widest layer's MLP, or its experts, hold at a time on one GPU."""
    tp, experts = rollout.tp, sizes.experts
    dense = 0 if sizes.all_sparse else 3 * sizes.ffn // tp
    if experts is None:
        return dense
    width = experts.ffn if rollout.expert_parallel else experts.ffn // tp
    return max(dense, experts.topk * (max(2 * width, sizes.hidden) + width))


def cache_bytes(sizes: Sizes, tp: int, dtype: str, size: int) -> int:
    """Of one token on one GPU of an engine."""
    element = 1 if dtype.startswith("fp8") else size
    return 2 * sizes.layers * max(1, sizes.kv_heads // tp) * sizes.head_dim * element
