"""Torch's allocator settings that Megatron and vLLM both take."""

from __future__ import annotations

from collections.abc import Mapping

from treepo_mcore.config import ConfigError, RolloutConfig


def check_allocator(environment: Mapping[str, str], rollout: RolloutConfig) -> None:
    """Raise `ConfigError` for allocator settings that Megatron and vLLM do not both take.

    vLLM turns `expandable_segments` off inside its sleeping pool, but only when PYTORCH_CUDA_ALLOC_CONF has them. The
    buffers of its CUDA graphs lie outside of that pool, and its all-reduce shares them in a way that only ordinary
    memory can be shared (cudaIpcGetMemHandle; vLLM issue 42609): the process would exit without a traceback.
    """
    new, old = environment.get("PYTORCH_ALLOC_CONF", ""), environment.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments:True" in new:
        raise ConfigError(
            "PYTORCH_ALLOC_CONF: expandable_segments:True is not seen by vLLM's sleep mode, which must turn it off in "
            "its pool; set it in PYTORCH_CUDA_ALLOC_CONF"
        )
    own_all_reduce = rollout.tp > 1 and not rollout.engine.get("disable_custom_all_reduce")
    if "expandable_segments:True" in old and own_all_reduce:
        raise ConfigError(
            f"PYTORCH_CUDA_ALLOC_CONF: expandable_segments:True with rollout.tp: {rollout.tp}, whose all-reduce cannot "
            "share such memory; leave it out, or set rollout.engine.disable_custom_all_reduce: true (NCCL takes over)"
        )
    if "backend:cudaMallocAsync" in new + old:
        raise ConfigError(
            "PYTORCH_CUDA_ALLOC_CONF: backend:cudaMallocAsync has no memory pools; vLLM's sleep mode needs them"
        )
